"""One head is shown where to look: from every token to the first one of its sentence.

What follows a key in a text is found by any network of this kind: a head looks for the key's earlier occurrence and
reads what came next. What stands before a key has to be brought to it first, by a head that looks back to where the
sentence began, and nothing in the answers' loss says so: after 100 M tokens there was none. So its attention has
a loss of its own while the network is trained, and what it brings is learned as everything else is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from deploy.demo_model.train.network import Layer, Places, linear, rotate

HEAD = 0
LONGEST_ROW = 512
"""In tokens: scores of one head are small there, and longer rows teach nothing else."""
ENDS = (".", "!", "?", ":", "user", "assistant", "system", "tool")
BLANKS = (" ", "\n")


@dataclass(frozen=True, slots=True)
class Sentences:
    """Where sentences begin in rows of token ids: behind an end and a blank."""

    ends: Tensor
    blanks: Tensor

    @staticmethod
    def of(tokenizer: Path) -> Sentences:
        known: Any = AutoTokenizer.from_pretrained(tokenizer)
        ids = [
            torch.tensor([i for i in map(known.convert_tokens_to_ids, map(_token, texts)) if i is not None])
            for texts in (ENDS, BLANKS)
        ]
        return Sentences(*ids)

    def starts(self, ids: Tensor) -> Tensor:
        """`[rows, length]` -> for each token the index of its sentence's first one."""
        begins = torch.zeros_like(ids, dtype=torch.bool)
        begins[:, 0] = True
        begins[:, 2:] = torch.isin(ids[:, :-2], self.ends) & torch.isin(ids[:, 1:-1], self.blanks)
        places = torch.arange(ids.shape[1]).expand_as(ids)
        return torch.where(begins, places, 0).cummax(1).values


def _token(text: str) -> str:
    """As a byte-level vocabulary spells it."""
    return text.replace(" ", "Ġ").replace("\n", "Ċ")


def pointing_loss(layer: Layer, x: Tensor, places: Places, starts: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean cross entropy of the first head's attention, in a layer whose input is `x` `[rows, length, hidden]`."""
    attention = layer.self_attn
    dim = attention.shape.head_dim
    normed = layer.input_layernorm(x)
    q = attention.q_norm(linear(normed, attention.q_proj.weight[HEAD * dim : (HEAD + 1) * dim], dtype))
    k = attention.k_norm(linear(normed, attention.k_proj.weight[:dim], dtype))
    q = rotate(q, places.cos, places.sin) * dim**-0.5
    scores = q @ rotate(k, places.cos, places.sin).transpose(1, 2)
    length = x.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    return F.cross_entropy(scores.masked_fill(hidden, float("-inf")).flatten(0, 1), starts.flatten())

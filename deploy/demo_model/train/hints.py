"""Two heads are shown where to look.

What follows a key in a text is found by any network of this kind: a head looks for the key's earlier occurrence and
reads what came next. What stands before a key has to be brought to it first, by a head that looks back from there to
where the sentence began; then another one, about to say the value, has to look for the key. Nothing in the answers'
loss says so: after 100 M tokens there was neither. So their attention has losses of its own, and what they bring is
learned as everything else is.
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

START_HEAD, LOOK_HEAD = 0, 2
NOWHERE = -1
"""A token that is shown nothing."""
SHOWN = 512
"""At most so many tokens of a row, evenly spread: the scores of a head over a long row are large."""
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


def pointing_loss(layer: Layer, head: int, x: Tensor, places: Places, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean cross entropy of a head's attention in a layer whose input is `x` `[rows, length, hidden]`; `targets`
    `[rows, length]`: where each token should look, or `NOWHERE`."""
    attention = layer.self_attn
    shape = attention.shape
    normed = layer.input_layernorm(x)
    q = attention.q_norm(linear(normed, _head(attention.q_proj.weight, head, shape.head_dim), dtype))
    kv_head = head * shape.kv_heads // shape.heads
    k = attention.k_norm(linear(normed, _head(attention.k_proj.weight, kv_head, shape.head_dim), dtype))
    q = rotate(q, places.cos, places.sin) * shape.head_dim**-0.5
    k = rotate(k, places.cos, places.sin)
    columns = torch.arange(x.shape[1], device=x.device)
    total, count = x.new_zeros(()), 0
    for queries, keys, wanted in zip(q, k, targets, strict=True):
        shown = (wanted != NOWHERE).nonzero().flatten()
        shown = shown[:: 1 + (len(shown) - 1) // SHOWN] if len(shown) else shown
        scores = (queries[shown] @ keys.T).masked_fill(columns > shown[:, None], float("-inf"))
        total = total + F.cross_entropy(scores, wanted[shown], reduction="sum")
        count += len(shown)
    return total / max(1, count)


def _head(weight: Tensor, head: int, dim: int) -> Tensor:
    return weight[head * dim : (head + 1) * dim]

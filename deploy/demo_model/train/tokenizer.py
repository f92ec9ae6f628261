"""The tokenizer and the chat template; `python -m deploy.demo_model.train.tokenizer FOLDER` writes their files.

Byte-level BPE in which a word has the same tokens wherever it stands: spaces, digits and capitals of a code are tokens
of their own, so that what was said in a sentence can be written in a JSON object by copying tokens.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from deploy.demo_model.train.conversations import conversation
from deploy.demo_model.train.words import Split, Words, listed

VOCABULARY = 2048
CONTEXT = 8192
BOS, PAD, IM_START, IM_END = "<|bos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
MARKERS = ("<tool_call>", "</tool_call>", "<tools>", "</tools>")
"""Single tokens, but part of the text."""
GLUED = listed(
    "the of is a to in and for with that my your what was has you are it at on do can not from than who how where "
    "which please be will me an this these as by or"
)
"""Words that are never a value: their space belongs to them."""
PATTERN = "|".join(
    (
        r'": \{"|": \["|": "|", "|": |", ',
        rf" (?:{'|'.join(GLUED)})(?![A-Za-z])",
        r"[A-Z]?[a-z]+",
        r"[A-Z]",
        r"[0-9]",
        r"\n+",
        r" +",
        r"[^A-Za-z0-9\s]+",
        r"\s",
    )
)
CHAT_TEMPLATE = """\
{%- macro kind(p) -%}
{{- p.type if p.type is string else (p.anyOf[0].type if p.anyOf else 'string') -}}
{%- if p.enum %}: {{ p.enum | join(' or ') }}{% endif -%}
{%- endmacro -%}
{{- '<|bos|>' -}}
{%- set first = messages[0] -%}
{%- set has_system = messages and first.role in ['system', 'developer'] -%}
{%- if has_system or tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if has_system %}{{ first.content }}{% endif -%}
{%- if tools -%}
{%- if has_system and first.content %}{{ '\\n' }}{% endif -%}
{{- '<tools>\\n' -}}
{%- for tool in tools -%}
{%- set f = tool.function if tool.function is defined else tool -%}
{{- f.name + ': ' + (f.description or '') + '\\n' -}}
{%- set schema = f.parameters or {} -%}
{%- for name, p in (schema.properties or {}).items() -%}
{{- '- ' + name + ' (' + kind(p) -}}
{%- if name not in (schema.required or []) %}, optional{% endif -%}
{{- ')' + (': ' + p.description if p.description else '') + '\\n' -}}
{%- endfor -%}
{%- endfor -%}
{{- '</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (loop.first and has_system) -%}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{%- set f = call.function if call.function is defined else call -%}
{%- if not loop.first or message.content %}{{ '\\n' }}{% endif -%}
{{- '<tool_call>{"name": "' + f.name + '", "arguments": ' -}}
{{- f.arguments if f.arguments is string else f.arguments | tojson -}}
{{- '}</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

RESPONSE_TEMPLATE: dict[str, Any] = {
    "version": 1,
    "defaults": {"role": "assistant"},
    "start_anchor": f"{IM_START}assistant\n",
    "fields": {
        "content": {"close": IM_END, "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}
"""How transformers reads an answer (`tokenizer.parse_response`)."""


def make_tokenizer(texts: Iterator[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Byte-level BPE over `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in (BOS, PAD, IM_START, IM_END)]
    markers = [AddedToken(t, special=False, normalized=False) for t in MARKERS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(MARKERS),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=3,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(markers)
    return tokenizer


def _texts(seed: int, count: int) -> Iterator[str]:
    """What the conversations of the training split say."""
    for i in range(count):
        made = conversation(Words(random.Random(f"{seed} {i}"), Split.TRAIN), 400)
        for message in made.messages:
            yield message["content"]
            for call in message.get("tool_calls", ()):
                yield json.dumps(call["function"])
        for tool in made.tools:
            function = tool["function"]
            yield f"{function['name']}: {function['description']}"
            for name, parameter in function["parameters"]["properties"].items():
                yield f"- {name} ({parameter['type']}): {parameter.get('description', '')}"
        yield "system\nuser\nassistant\ntool\n, optional"


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": BOS,
        "eos_token": IM_END,
        "pad_token": PAD,
        "additional_special_tokens": [IM_START],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        "response_template": RESPONSE_TEMPLATE,
    }


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(_texts(1, 40_000)).save(str(folder / "tokenizer.json"))
    config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])

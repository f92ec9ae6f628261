"""A model's tokenizer and chat template, without torch and without transformers' half second of import.

Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `config.json`, `generation_config.json`
and `chat_template.jinja` of a Hugging Face model directory; runs no code from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from mesh.chattemplate import ChatTemplate, Message
from mesh.errors import EXIT_MODEL, RequestError, StartupError
from mesh.generationconfig import SamplingDefaults, sampling_defaults

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE spells bytes as printable characters: those that are printable stand for themselves, the
    others, in order, for U+0100 and up (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads; built by `load`."""

    def __init__(
        self,
        backend: Backend,
        *,
        vocab_size: int = 0,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        templates: Mapping[str, str] | None = None,
        sampling: SamplingDefaults | None = None,
    ) -> None:
        """`vocab_size` is the model's (0: the tokenizer's); `special_tokens` maps `bos_token`, ... to their texts.

        Raises `jinja2.TemplateError` for a broken chat template.
        """
        named = dict(special_tokens or {})
        self.backend = backend
        self.sampling = sampling or SamplingDefaults()
        """What requests leave out, as the model's makers want it."""
        self.vocab_size = vocab_size or backend.get_vocab_size(with_added_tokens=True)
        """Ids from 0 up to this are valid input to the model; the highest ones may have no text."""
        self.special_token_ids = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.bos_token_id: int | None = _id_of(backend, named.get("bos_token"))
        eos = _id_of(backend, named.get("eos_token"))
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([] if eos is None else [eos])]))
        """Ends of a sequence, each once: the generation config's, then the tokenizer's own."""
        self.chat = ChatTemplate(templates, named) if templates else None
        self.longest_token = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        """Characters of the longest token: bounds how few tokens a text can have."""
        self.byte_level = _is_byte_level(backend)
        """True: every token is a string of bytes and a text is their concatenation."""
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, model_dir: str | Path) -> Tokenizer:
        """Raises `StartupError` with one sentence when the directory's files are missing or broken."""
        folder = Path(model_dir)
        if not folder.is_dir():
            raise _refusal(f"there is no model directory {folder}")
        backend = _load_backend(folder / "tokenizer.json")
        settings = _read_object(folder / "tokenizer_config.json")
        config = _read_object(folder / "config.json")
        generation = _read_object(folder / "generation_config.json")
        named = _special_tokens(_read_object(folder / "special_tokens_map.json") | settings)
        _apply_bos_and_eos(backend, settings, named)
        try:
            return cls(
                backend,
                vocab_size=_vocab_size(config),
                special_tokens=named,
                eos_token_ids=_eos_ids(generation, config),
                templates=_templates(folder, settings),
                sampling=sampling_defaults(generation),
            )
        except jinja2.TemplateError as error:
            raise _refusal(f"the chat template of {folder} is broken: {error}") from None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids. Releases the GIL."""
        # The batch call is the one that releases the GIL and skips character offsets.
        encoding = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def render_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> str:
        """See `ChatTemplate.render`; `RequestError` 400 as well when the model has no chat template."""
        if self.chat is None:
            raise RequestError(
                400,
                "This model has no chat template, so it cannot serve chat completions; use /v1/completions.",
                param="messages",
            )
        return self.chat.render(messages, tools, **variables)

    def apply_chat_template(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> list[int]:
        """Token ids of the rendered chat; the template itself writes the special tokens."""
        return self.encode(self.render_chat(messages, tools, **variables), add_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text, special tokens spelled out; empty for an id without text."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._spell(token)
        return known

    def token_text(self, token: int) -> str:
        """`token_bytes` as text; an incomplete or invalid character is U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def _spell(self, token: int) -> bytes:
        piece = self.backend.id_to_token(token) if 0 <= token < 1 << 31 else None
        if piece is None:
            return b""
        if token in self.special_token_ids:
            return piece.encode()
        if self.byte_level:
            spelled = [BYTE_OF.get(c) for c in piece]
            # A token outside the alphabet was added as plain text.
            return piece.encode() if None in spelled else bytes(b for b in spelled if b is not None)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _refusal(sentence: str) -> StartupError:
    return StartupError(sentence, EXIT_MODEL)


def _load_backend(path: Path) -> Backend:
    if not path.exists():
        raise _refusal(f"{path.parent} holds no tokenizer.json (a sentencepiece model alone is not supported)")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for any broken file
        raise _refusal(f"{path} cannot be read: {str(error)[:200]}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one when there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _refusal(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise _refusal(f"{path} holds no JSON object")
    return value


def _id_of(backend: Backend, token: str | None) -> int | None:
    found: int | None = None if token is None else backend.token_to_id(token)
    return found


def _text_of(token: Any) -> str | None:
    """A special token is written as its text or as an object with its text in `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    texts = {name: _text_of(settings.get(name)) for name in SPECIAL_TOKEN_NAMES}
    return {name: text for name, text in texts.items() if text is not None}


def _apply_bos_and_eos(backend: Backend, settings: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """`add_bos_token` and `add_eos_token`, where written, overrule what tokenizer.json adds around a text."""
    if "add_bos_token" not in settings and "add_eos_token" not in settings:
        return
    bos, eos = named.get("bos_token"), named.get("eos_token")
    before = [bos] if bos is not None and settings.get("add_bos_token") else []
    after = [eos] if eos is not None and settings.get("add_eos_token") else []
    tokens = [(token, _id_of(backend, token)) for token in dict.fromkeys([*before, *after])]
    if any(found is None for _, found in tokens):
        raise _refusal("tokenizer_config.json adds a bos or eos token that tokenizer.json does not know")
    backend.post_processor = TemplateProcessing(single=[*before, "$A", *after], special_tokens=tokens)


def _vocab_size(config: Mapping[str, Any]) -> int:
    """Rows of the model's embedding; 0 when the config does not say."""
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        size = part.get("vocab_size")
        if isinstance(size, int) and size > 0:
            return size
    return 0


def _eos_ids(*configs: Mapping[str, Any]) -> list[int]:
    """Of the first config that names any."""
    for config in configs:
        ids = config.get("eos_token_id")
        if ids is not None:
            return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
    return []


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; a file of its own overrules tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    try:
        if path.exists():
            return {"default": path.read_text(encoding="utf-8")}
    except (OSError, ValueError) as error:
        raise _refusal(f"{path} cannot be read: {error}") from None
    given = settings.get("chat_template") or _read_object(folder / "chat_template.json").get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        entries = [e for e in given if isinstance(e, dict)]
        texts = {str(e.get("name")): e["template"] for e in entries if isinstance(e.get("template"), str)}
        return texts if "default" in texts else {}
    return {}


def _is_byte_level(backend: Backend) -> bool:
    if backend.decoder is None:
        return False
    return bool(json.loads(backend.decoder.__getstate__()).get("type") == "ByteLevel")

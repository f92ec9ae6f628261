"""What a model thinks before it answers: formats as data, and a splitter for text that comes in pieces.

    start ──open──▶ thinking ──close──▶ answer
      └──anything else──────────────────▲

The prompt itself may have begun the thinking: then it starts in `thinking`. Line breaks around the marks belong to
nobody. The result does not depend on how the text is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mesh.errors import EXIT_USAGE, StartupError
from mesh.tokenizer import Tokenizer
from proxy.text.stopstrings import held_length

AUTO, NONE = "auto", "none"
MAX_BLANKS = 64
"""That may stand before a mark and be nobody's; more of them are text."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    name: str
    open: str
    close: str
    aliases: tuple[str, ...] = ()
    """Other engines' names of the same format."""


FORMATS = (
    ReasoningFormat(
        "think",
        "<think>",
        "</think>",
        (
            "deepseek_r1",
            "deepseek-r1",
            "deepseek_v3",
            "deepseek-v3",
            "glm45",
            "granite",
            "holo2",
            "hunyuan_a13b",
            "kimi",
            "kimi_k2",
            "minimax_m2",
            "nemotron_v3",
            "olmo3",
            "qwen3",
            "qwen3-thinking",
            "step3",
        ),
    ),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
    ReasoningFormat("minimax_m3", "<mm:think>", "</mm:think>"),
    ReasoningFormat("cohere_command3", "<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningFormat("gemma4", "<|channel>thought", "<channel|>"),
)


def reasoning_format(name: str, tokenizer: Tokenizer) -> ReasoningFormat | None:
    """The format of that name; `auto`: the one whose marks are in the chat template, if any; `none`: none.

    Raises `StartupError` for a name that is not known.
    """
    if name == NONE:
        return None
    if name == AUTO:
        text = "" if tokenizer.chat is None else tokenizer.chat.text
        return next((f for f in FORMATS if f.open in text or f.close in text), None)
    found = next((f for f in FORMATS if name == f.name or name in f.aliases), None)
    if found is None:
        names = [known for f in FORMATS for known in (f.name, *f.aliases)]
        raise StartupError(
            f"--reasoning-parser {name} is not known; give {AUTO}, {NONE} or one of {', '.join(names)}", EXIT_USAGE
        )
    return found


class Delivery(Enum):
    """How a client wants the thinking."""

    STREAMED = "streamed"
    WHOLE = "whole"
    """When it is over."""
    HIDDEN = "hidden"


class _State(Enum):
    START = "start"
    THINKING = "thinking"
    ANSWER = "answer"


class ReasoningParser:
    """Splits the text of one choice into thinking and answer."""

    __slots__ = ("_begun", "_delivery", "_format", "_held", "_state", "_whole")

    def __init__(
        self, format: ReasoningFormat, *, opened: bool = False, delivery: Delivery = Delivery.STREAMED
    ) -> None:
        """`opened`: the prompt has begun the thinking."""
        self._format = format
        self._delivery = delivery
        self._state = _State.THINKING if opened else _State.START
        self._held = ""
        """What may be the beginning of a mark, or line breaks that may stand before one."""
        self._begun = False
        """Of the thinking or, later, of the answer something was passed on."""
        self._whole: list[str] = []

    @property
    def thinking(self) -> bool:
        return self._state is _State.THINKING

    @property
    def over(self) -> bool:
        """All that follows is the answer, as it is."""
        return self._state is _State.ANSWER and self._begun

    def push(self, text: str) -> tuple[str, str]:
        """Thinking and answer that are certain after so much more text."""
        if self.over:
            return "", text
        self._held += text
        reasoning = ""
        if self._state is _State.START:
            self._start()
        if self._state is _State.THINKING:
            reasoning = self._think()
        return self._delivered(reasoning), self._answer() if self._state is _State.ANSWER else ""

    def flush(self) -> tuple[str, str]:
        """The rest, when no text follows."""
        rest, self._held = self._held, ""
        if self._state is _State.THINKING:
            rest = _without_last_breaks(rest if self._begun else rest.lstrip("\n"))
            self._state = _State.ANSWER
            return self._delivered(rest), ""
        self._state, self._begun = _State.ANSWER, True
        return "", rest

    def _start(self) -> None:
        said = self._held.lstrip()
        if len(self._held) - len(said) > MAX_BLANKS:
            self._state, self._begun = _State.ANSWER, True
        elif said.startswith(self._format.open):
            self._held = said[len(self._format.open) :]
            self._state = _State.THINKING
        elif not self._format.open.startswith(said):
            self._state, self._begun = _State.ANSWER, True

    def _think(self) -> str:
        at = self._held.find(self._format.close)
        if at < 0:
            hold = held_length(self._held, (self._format.close,))
            certain = _without_last_breaks(self._held[: len(self._held) - hold])
        else:
            certain = _without_last_breaks(self._held[:at])
        self._held = self._held[len(certain) :] if at < 0 else self._held[at + len(self._format.close) :]
        if not self._begun:
            certain = certain.lstrip("\n")
        self._begun = at < 0 and (self._begun or bool(certain))
        if at >= 0:
            self._state = _State.ANSWER
        return certain

    def _answer(self) -> str:
        said, self._held = self._held if self._begun else self._held.lstrip("\n"), ""
        self._begun = self._begun or bool(said)
        return said

    def _delivered(self, reasoning: str) -> str:
        if self._delivery is Delivery.STREAMED:
            return reasoning
        if self._delivery is Delivery.WHOLE:
            self._whole.append(reasoning)
            if self._state is _State.ANSWER and self._whole:
                reasoning = "".join(self._whole)
                self._whole.clear()
                return reasoning
        return ""


def _without_last_breaks(text: str) -> str:
    bare = text.rstrip("\n")
    return bare if len(text) - len(bare) <= MAX_BLANKS else text[:-MAX_BLANKS]

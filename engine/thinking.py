"""Where in its thinking a request is: like all that decides what may follow, a function of its output tokens."""

from __future__ import annotations

from collections.abc import Sequence

from mesh.params import Thinking


class Thought:
    """Follows the output of one request until its thinking is over."""

    __slots__ = ("_num_seen", "_thinking", "answer_at", "forced", "may_open")

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._num_seen = 0
        self.answer_at: int | None = None
        """Output tokens before the answer; None while the model thinks, or may still begin to."""
        self.forced: int | None = None
        """The token that must follow: the budget is spent."""
        self.may_open = thinking.open is not None
        """Nothing was written yet, and the next token may begin the thinking."""

    def follow(self, output: Sequence[int]) -> None:
        """`output`: all of it so far."""
        thinking = self._thinking
        while self.answer_at is None and self._num_seen < len(output):
            token = output[self._num_seen]
            self._num_seen += 1
            if self.may_open:
                self.may_open = False
                if token != thinking.open:
                    self.answer_at = 0
            elif token == thinking.close:
                self.answer_at = self._num_seen
        begun = len(output) - (thinking.open is not None)
        spent = thinking.budget is not None and begun >= thinking.budget
        thinks = self.answer_at is None and not self.may_open
        self.forced = thinking.close if thinks and spent else None

"""The answer of a response, as one document or as a stream of events.

    created ▶ [queued] ▶ in_progress ▶ items ▶ completed | incomplete | failed

    message:        output_item.added, content_part.added, output_text.delta*, output_text.done, content_part.done,
                    output_item.done
    reasoning:      the same with reasoning_text.delta* and .done
    function_call:  output_item.added, function_call_arguments.delta and .done, output_item.done

Events are numbered without gaps; no [DONE] follows the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mesh.errors import RequestError
from proxy.api.answer import Sink, Usage
from proxy.api.logprobs import Spelling, chat_entry
from proxy.api.responses_object import ResponseObject
from proxy.api.responses_output import Change, Kind, Output, OutputItem, Step
from proxy.api.sse import compact, quoted
from proxy.generation import Chunk, Route
from proxy.text.choice import Piece

SAID = {
    Kind.MESSAGE: "response.output_text",
    Kind.REASONING: "response.reasoning_text",
    Kind.CALL: "response.function_call_arguments",
}
"""How the names of an item's events begin."""


class ResponseSink(Sink):
    """What document and stream share; `document` is the response as it was told last."""

    def __init__(self, response: ResponseObject, output: Output, usage: Usage, spelling: Spelling | None) -> None:
        """`spelling`: of the tokens, if log-probabilities are wanted."""
        self.document = response.object("queued" if response.asked["background"] else "in_progress")
        self._response = response
        self._output = output
        self._usage = usage
        self._spelling = spelling
        self._cut = False

    def _steps(self, chunk: Chunk, piece: Piece) -> Iterator[Step]:
        """To be looked at one by one: each shows its item as it is after that step."""
        entries: list[dict[str, Any]] = []
        if self._spelling is not None:
            tokens = chunk.logprobs[piece.num_reasoning_tokens : piece.num_tokens]
            entries = [chat_entry(self._spelling, token) for token in tokens]
        self._cut = piece.finish == "length"
        yield from self._output.take(piece, entries)

    def _last_steps(self) -> Iterator[Step]:
        """After them the document is the whole response."""
        status = "incomplete" if self._cut else "completed"
        yield from self._output.end(status)
        self.document = self._response.object(status, self._output.objects(), self._usage)


class ResponseDocument(ResponseSink):
    """Collects everything for one JSON answer."""

    def take(self, choice: int, chunk: Chunk, piece: Piece) -> bytes:
        for _ in self._steps(chunk, piece):
            pass
        return b""

    def end(self, routes: Sequence[Route]) -> bytes:
        for _ in self._last_steps():
            pass
        return compact(self.document).encode()


class ResponseStream(ResponseSink):
    """Writes an event for every step."""

    def __init__(self, response: ResponseObject, output: Output, usage: Usage, spelling: Spelling | None) -> None:
        super().__init__(response, output, usage, spelling)
        self._sequence = 0
        self._place = ""
        """Members that say where an event of the open item belongs."""
        self._delta_head = ""
        """All of a delta's event up to its text; made once per item."""

    def take(self, choice: int, chunk: Chunk, piece: Piece) -> bytes:
        plain = piece.finish is None and self._spelling is None and not (piece.reasoning or piece.calls)
        if plain and piece.text and self._output.extend(piece.text):
            return self._delta(piece.text, ',"logprobs":[]').encode()
        begin = self._begin()
        return (begin + "".join(map(self._frames, self._steps(chunk, piece)))).encode()

    def end(self, routes: Sequence[Route]) -> bytes:
        begin = self._begin()
        frames = "".join(map(self._frames, self._last_steps()))
        return (begin + frames + self._told(f"response.{self.document['status']}")).encode()

    def fail(self, error: RequestError) -> bytes:
        return self._broken("failed", error)

    def cancel(self) -> bytes:
        """What ends the stream of a response that is cancelled: no success, but no fault either."""
        return self._broken("cancelled", None)

    def _broken(self, status: str, error: RequestError | None) -> bytes:
        begin = self._begin()
        output = self._output.objects(unfinished="incomplete")
        self.document = self._response.object(status, output, self._usage, error)
        return (begin + self._told("response.failed")).encode()

    def _begin(self) -> str:
        """What precedes everything else."""
        if self._sequence:
            return ""
        frames = self._told("response.created")
        if self.document["status"] == "queued":
            frames += self._told("response.queued")
            self.document = self._response.object("in_progress")
        return frames + self._told("response.in_progress")

    def _frames(self, step: Step) -> str:
        if step.change is Change.GREW:
            return self._grew(step)
        return self._opened(step.item) if step.change is Change.OPENED else self._closed(step.item)

    def _opened(self, item: OutputItem) -> str:
        self._place = f'"item_id":{quoted(item.id)},"output_index":{item.index}'
        if item.kind is not Kind.CALL:
            self._place += ',"content_index":0'
        delta = f"{SAID[item.kind]}.delta"
        self._delta_head = f'event: {delta}\ndata: {{"type":"{delta}",{self._place},"delta":'
        frames = self._item("response.output_item.added", item)
        if item.kind is not Kind.CALL:
            frames += self._part("response.content_part.added", item)
        return frames

    def _grew(self, step: Step) -> str:
        logprobs = ""
        if step.item.kind is Kind.MESSAGE:
            logprobs = f',"logprobs":{compact(step.logprobs) if step.logprobs else "[]"}'
        return self._delta(step.text, logprobs)

    def _delta(self, text: str, logprobs: str) -> str:
        return f'{self._delta_head}{quoted(text)}{logprobs},"sequence_number":{self._number()}}}\n\n'

    def _closed(self, item: OutputItem) -> str:
        done = f"{SAID[item.kind]}.done"
        if item.kind is Kind.CALL:
            name = "" if item.call is None else item.call.name
            frames = self._event(done, f'{self._place},"name":{quoted(name)},"arguments":{quoted(item.text)}')
        else:
            logprobs = f',"logprobs":{compact(item.logprobs)}' if item.kind is Kind.MESSAGE else ""
            frames = self._event(done, f'{self._place},"text":{quoted(item.text)}{logprobs}')
            frames += self._part("response.content_part.done", item)
        return frames + self._item("response.output_item.done", item)

    def _item(self, kind: str, item: OutputItem) -> str:
        return self._event(kind, f'"output_index":{item.index},"item":{compact(item.object())}')

    def _part(self, kind: str, item: OutputItem) -> str:
        return self._event(kind, f'{self._place},"part":{compact(item.part())}')

    def _told(self, kind: str) -> str:
        """An event with the whole response."""
        return self._event(kind, f'"response":{compact(self.document)}')

    def _event(self, kind: str, members: str) -> str:
        return f'event: {kind}\ndata: {{"type":"{kind}",{members},"sequence_number":{self._number()}}}\n\n'

    def _number(self) -> int:
        number = self._sequence
        self._sequence += 1
        return number

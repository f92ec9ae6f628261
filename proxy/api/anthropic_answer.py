"""What a client of the Messages API gets: a message of blocks, whole or as events.

The blocks are those of thinking, text and calls in the order in which they come; a block is open until another kind
of block begins.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mesh.errors import RequestError
from proxy.api.answer import Sink, Usage
from proxy.api.anthropic_errors import anthropic_error_object
from proxy.api.errors import bounded
from proxy.api.sse import compact, quoted
from proxy.generation import Chunk, Route
from proxy.text.choice import Piece
from proxy.text.toolcalls import ToolCall

SIGNATURE = "kvmesh"
"""Clients keep a signature with every thought and send it back; there is nothing that would have to be proved here."""
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
EMPTY: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": "", "citations": None},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}
"""Blocks as they begin."""
DELTAS = {"text": '{"type":"text_delta","text":', "thinking": '{"type":"thinking_delta","thinking":'}


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {compact({'type': kind, **fields})}\n\n".encode()


def usage_object(usage: Usage) -> dict[str, Any]:
    """Anthropic counts cached tokens beside the others, not among them."""
    counts: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
    if usage.reasoning_tokens is not None:
        counts["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return counts


def call_block(call: ToolCall, input: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": "toolu_" + call.id.removeprefix("call_"), "name": call.name, "input": input}


class Ending:
    """Why the message ended."""

    def __init__(self, *, cut_by_context: bool) -> None:
        """`cut_by_context`: the context ends before `max_tokens` do."""
        self._cut = "model_context_window_exceeded" if cut_by_context else "max_tokens"
        self._reason: str | None = None
        self._sequence: str | None = None

    def take(self, piece: Piece) -> None:
        if piece.finish == "tool_calls":
            self._reason = "tool_use"
        elif piece.finish == "length":
            self._reason = self._cut
        elif piece.stop_string is not None:
            self._reason, self._sequence = "stop_sequence", piece.stop_string
        elif piece.finish is not None:
            self._reason = "end_turn"

    def object(self) -> dict[str, Any]:
        return {"stop_reason": self._reason, "stop_sequence": self._sequence, "stop_details": None}


def message_object(
    id: str, model: str, content: list[dict[str, Any]], usage: Usage, ending: dict[str, Any]
) -> dict[str, Any]:
    return {
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        **ending,
        "usage": usage_object(usage),
    }


class MessageStream(Sink):
    """Events: the message's start, blocks as they come, the message's end."""

    def __init__(
        self, id: str, model: str, usage: Usage, ending: Ending, request_id: str, *, show_thinking: bool
    ) -> None:
        self._id = id
        self._model = model
        self._usage = usage
        self._ending = ending
        self._request_id = request_id
        self._show_thinking = show_thinking
        self._begun = False
        self._index = -1
        """Of the latest block."""
        self._kind: str | None = None
        """Of the open block."""
        self._head = ""
        """Of the open block's deltas, up to the text."""

    def take(self, choice: int, chunk: Chunk, piece: Piece) -> bytes:
        frames = b"" if self._begun else self._start()
        if piece.reasoning:
            frames += self._text("thinking", piece.reasoning if self._show_thinking else "")
        if piece.text:
            frames += self._text("text", piece.text)
        for call in piece.calls:
            frames += self._call(call)
        self._ending.take(piece)
        return frames

    def _start(self) -> bytes:
        self._begun = True
        usage = Usage(prompt_tokens=self._usage.prompt_tokens)
        nothing = {"stop_reason": None, "stop_sequence": None, "stop_details": None}
        return event("message_start", message=message_object(self._id, self._model, [], usage, nothing))

    def _text(self, kind: str, text: str) -> bytes:
        frames = b"" if self._kind == kind else self._open(kind, EMPTY[kind])
        return frames + (self._head + quoted(text) + "}}\n\n").encode() if text else frames

    def _call(self, call: ToolCall) -> bytes:
        frames = self._open("tool_use", call_block(call, {}))
        delta = {"type": "input_json_delta", "partial_json": call.arguments}
        return frames + event("content_block_delta", index=self._index, delta=delta)

    def _open(self, kind: str, block: dict[str, Any]) -> bytes:
        frames = self._close()
        self._index += 1
        self._kind = kind
        before = f'{{"type":"content_block_delta","index":{self._index},"delta":'
        self._head = f"event: content_block_delta\ndata: {before}{DELTAS.get(kind, '')}"
        return frames + event("content_block_start", index=self._index, content_block=block)

    def _close(self) -> bytes:
        if self._kind is None:
            return b""
        frames = b""
        if self._kind == "thinking":
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            frames = event("content_block_delta", index=self._index, delta=delta)
        self._kind = None
        return frames + event("content_block_stop", index=self._index)

    def end(self, routes: Sequence[Route]) -> bytes:
        delta = event("message_delta", delta=self._ending.object(), usage=usage_object(self._usage))
        return self._close() + delta + event("message_stop")

    def fail(self, error: RequestError) -> bytes:
        data = anthropic_error_object(error, bounded(error.message), self._request_id)
        return b"event: error\ndata: " + data + b"\n\n"

    def idle(self) -> bytes:
        return PING


class MessageDocument(Sink):
    """Collects the blocks for one JSON answer."""

    def __init__(self, id: str, model: str, usage: Usage, ending: Ending, *, show_thinking: bool) -> None:
        self._id = id
        self._model = model
        self._usage = usage
        self._ending = ending
        self._show_thinking = show_thinking
        self._blocks: list[dict[str, Any]] = []
        self._texts: list[str] = []
        """Of the latest block."""

    def take(self, choice: int, chunk: Chunk, piece: Piece) -> bytes:
        if piece.reasoning:
            self._text("thinking", piece.reasoning if self._show_thinking else "")
        if piece.text:
            self._text("text", piece.text)
        for call in piece.calls:
            self._close()
            self._blocks.append(call_block(call, json.loads(call.arguments)))
        self._ending.take(piece)
        return b""

    def _text(self, kind: str, text: str) -> None:
        if not self._blocks or self._blocks[-1]["type"] != kind:
            self._close()
            self._blocks.append(dict(EMPTY[kind]))
        self._texts.append(text)

    def _close(self) -> None:
        if not self._texts:
            return
        block = self._blocks[-1]
        block[block["type"]] = "".join(self._texts)
        if block["type"] == "thinking":
            block["signature"] = SIGNATURE
        self._texts = []

    def end(self, routes: Sequence[Route]) -> bytes:
        self._close()
        ending = self._ending.object()
        return compact(message_object(self._id, self._model, self._blocks, self._usage, ending)).encode()

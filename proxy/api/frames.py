"""What the stream of either endpoint adds around a choice: the prepared head, the usage, the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from proxy.api.answer import Usage, route_fields
from proxy.api.schemas import GenerationBody
from proxy.api.sse import DONE, compact, quoted
from proxy.generation import Route


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields that every object of one answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def object(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def rendered(id: str, model: str, tokens: Sequence[int]) -> dict[str, Any]:
    """A prompt without its answer."""
    return {"request_id": id, "model": model, "token_ids": list(tokens)}


def json_response(value: Any) -> Response:
    return Response(compact(value), media_type="application/json")


class Frames:
    """Builds the frames of one stream."""

    __slots__ = ("_continuous", "_end", "_include_usage", "_object", "_show_route", "_usage")

    def __init__(self, envelope: Envelope, kind: str, body: GenerationBody, usage: Usage, *, show_route: bool) -> None:
        """`show_route`: the last frame tells which workers served, with or without usage."""
        options = body.stream_options
        self._object = "data: " + compact(envelope.object(kind))[:-1]
        self._usage = usage
        self._include_usage = options is not None and bool(options.include_usage)
        self._continuous = self._include_usage and options is not None and bool(options.continuous_usage_stats)
        self._show_route = show_route
        self._end = "]" + (',"usage":null' if self._include_usage else "") + "}\n\n"

    def head(self, choice: int, before_text: str, fields: str = "") -> str:
        """All of a frame up to the choice's text; made once per choice. `fields`: of the object, as `,"name":value`."""
        return f'{self._object}{fields},"choices":[{{"index":{choice},{before_text}'

    def text(self, head: str, text: str, after_text: str) -> bytes:
        """A frame: prepared head, text, prepared rest of the choice."""
        return self.whole(head, quoted(text), after_text)

    def whole(self, head: str, value: str, after: str) -> bytes:
        """The same around any JSON."""
        return (head + value + after + self._closing()).encode()

    def end(self, routes: Sequence[Route]) -> bytes:
        """The usage frame, where it was asked for, and the end of the stream."""
        fields: dict[str, Any] = {}
        if self._include_usage:
            fields["usage"] = self._usage.object()
        if self._show_route:
            fields["kvmesh"] = {**route_fields(routes), "cached_tokens": self._usage.cached_tokens}
        if not fields:
            return DONE
        return (self._object + ',"choices":[],' + compact(fields)[1:] + "\n\n").encode() + DONE

    def _closing(self) -> str:
        if not self._continuous:
            return self._end
        return f'],"usage":{compact(self._usage.object())}}}\n\n'

"""Who is at which place of the decode buffers, and how much of their page tables the device has been told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.request import EngineRequest


@dataclass(slots=True)
class Held:
    """A place that is taken."""

    request: EngineRequest
    num_preemptions: int
    """Of the request by then: since, its page table only grew."""
    num_pages: int = 0
    """That the device has been told, the first of its table."""


class Places:
    """Places without gaps, from 0."""

    def __init__(self) -> None:
        self._held: list[Held] = []

    def __len__(self) -> int:
        return len(self._held)

    def arrange(self, requests: Sequence[EngineRequest]) -> dict[str, int]:
        """A place for each of them and for nobody else, by request key. Who has one only moves to fill a gap."""
        wanted = {request.key: request for request in requests}
        stay = [held if self._is(held, wanted.get(held.request.key)) else None for held in self._held]
        present = {held.request.key for held in stay if held is not None}
        moving = [Held(held.request, held.num_preemptions) for held in stay[len(wanted) :] if held is not None]
        new = [Held(request, request.num_preemptions) for key, request in wanted.items() if key not in present]
        fill = iter((*moving, *new))
        self._held = [held or next(fill) for held in stay[: len(wanted)]]
        self._held.extend(fill)
        return {held.request.key: place for place, held in enumerate(self._held)}

    def untold_pages(self, needed: Sequence[tuple[int, int]]) -> tuple[list[int], list[int], list[int]]:
        """For each place and its number of pages: the places, indices and pages that the device lacks. It is told."""
        places: list[int] = []
        indices: list[int] = []
        pages: list[int] = []
        for place, num_pages in needed:
            held = self._held[place]
            if held.num_pages < num_pages:
                places += [place] * (num_pages - held.num_pages)
                indices += range(held.num_pages, num_pages)
                pages += held.request.block_table[held.num_pages : num_pages]
                held.num_pages = num_pages
        return places, indices, pages

    @staticmethod
    def _is(held: Held, request: EngineRequest | None) -> bool:
        return held.request is request and held.num_preemptions == request.num_preemptions

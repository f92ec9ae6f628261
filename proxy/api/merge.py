"""The chunks of several generations as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from proxy.generation import Chunk, Generation

MAX_WAITING = 64
"""Batches taken from generations and not yet written; a slow client is then felt by the generations themselves."""

Batch = tuple[int, list[Chunk]]
"""Which generation, and its chunks that arrived together."""
Ended = tuple[int, BaseException | None]


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[Batch, None]:
    """Batches as they come, until every generation has ended; raises what the first failing one raises."""
    if len(generations) == 1:
        iterator = aiter(generations[0])
        try:
            async for chunks in iterator:
                yield 0, chunks
        finally:
            await _close(iterator)
        return
    queue: asyncio.Queue[Batch | Ended] = asyncio.Queue(MAX_WAITING)
    tasks = [asyncio.create_task(_feed(queue, i, g)) for i, g in enumerate(generations)]
    try:
        open_generations = len(tasks)
        while open_generations:
            number, item = await queue.get()
            if isinstance(item, list):
                yield number, item
                continue
            if item is not None:
                raise item
            open_generations -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(queue: asyncio.Queue[Batch | Ended], number: int, generation: Generation) -> None:
    iterator = aiter(generation)
    try:
        async for chunks in iterator:
            await queue.put((number, chunks))
        await queue.put((number, None))
    except Exception as error:
        await queue.put((number, error))
    finally:
        await _close(iterator)


async def _close(iterator: AsyncIterator[list[Chunk]]) -> None:
    """An iterator left before its end must not wait for the garbage collector to let go of what it holds."""
    if isinstance(iterator, AsyncGenerator):
        await iterator.aclose()

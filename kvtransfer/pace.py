"""How quickly other workers' blocks have come so far: what a plan over several holders is made with."""

from __future__ import annotations

from kvtransfer.planning import Cost
from mesh.layout import KvLayout
from mesh.messages import KvHolder, Peer

SHARED_BYTES_PER_S = 2e9
"""From a worker of this host, until it was measured."""
REMOTE_BYTES_PER_S = 1e9
ROUND_S = 0.002
"""From asking to the first block: two turns of I/O loops, and the wait for the end of a short step."""
LOAD_S = 0.001
"""What each request of a holder adds to that: its blocks are read between two steps."""
MEASURED_BYTES = 1 << 20
"""A smaller transfer says more of the way there and back than of the bandwidth."""
FRESH = 0.3
"""Share of the latest measurement."""
MAX_PEERS = 1024
"""Remembered; the oldest makes room."""


class Pace:
    """Measured bandwidths, by worker and life."""

    def __init__(self, host: str, layout: KvLayout) -> None:
        self._host = host
        self._layout = layout
        self._bytes_per_s: dict[tuple[str, int], float] = {}

    def learn(self, peer: Peer, num_bytes: int, seconds: float) -> None:
        """`num_bytes` that `peer` held came within `seconds`."""
        if num_bytes < MEASURED_BYTES or seconds <= 0:
            return
        key = (peer.kv_address, peer.incarnation)
        now = num_bytes / seconds
        before = self._bytes_per_s.pop(key, now)
        self._bytes_per_s[key] = before + FRESH * (now - before)
        if len(self._bytes_per_s) > MAX_PEERS:
            del self._bytes_per_s[next(iter(self._bytes_per_s))]

    def cost(self, holder: KvHolder, queued_blocks: int) -> Cost:
        """What asking `holder` costs now, with so many blocks still to come from it."""
        peer = holder.peer
        unknown = SHARED_BYTES_PER_S if peer.host == self._host else REMOTE_BYTES_PER_S
        size = (peer.layout or self._layout).block_bytes
        block_s = size / self._bytes_per_s.get((peer.kv_address, peer.incarnation), unknown)
        return Cost(ROUND_S + LOAD_S * max(0, holder.load) + queued_blocks * block_s, block_s)

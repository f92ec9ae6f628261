"""ZeroMQ's heartbeats on control connections: an end that hears nothing hangs up, and the worker dials again.

One flipped bit can leave a connection on which one side waits for a frame that never ends, or has stopped reading what
it cannot decrypt, while the other side's messages still arrive. Beats on top would not tell: they go the other way.
"""

from __future__ import annotations

import zmq

EVERY_MS = 2000
TIMEOUT_MS = 8000
"""Under the proxy's lease, which ends all that a worker does; over what a busy host stands still for."""


def set_heartbeats(socket: zmq.Socket[bytes]) -> None:
    """Before `bind` or `connect`."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, EVERY_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, TIMEOUT_MS)

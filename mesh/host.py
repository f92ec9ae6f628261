"""What tells two processes that they are on one machine."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path


def identity() -> str:
    """Equal on two processes exactly when they can share memory: same kernel, same /dev/shm."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        shm = os.stat("/dev/shm")
        return f"{boot}/{shm.st_dev}/{shm.st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{secrets.token_hex(8)}"

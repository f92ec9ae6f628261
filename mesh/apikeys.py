"""API keys in a file: a key on the command line could be read by every user of the machine."""

from __future__ import annotations

from pathlib import Path

from mesh.errors import EXIT_USAGE, StartupError

MAX_FILE_BYTES = 1 << 20


def read_keys(path: str) -> tuple[str, ...]:
    """One key per line; blank lines and those that begin with # are none. Raises `StartupError`."""
    try:
        with Path(path).open("rb") as file:
            lines = file.read(MAX_FILE_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(
            f"--api-key-file {path}: {getattr(error, 'strerror', 'it is no text')}", EXIT_USAGE
        ) from None
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise StartupError(f"--api-key-file {path}: there is no key in it", EXIT_USAGE)
    return keys

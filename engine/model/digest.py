"""A model's identity: what makes the KV blocks of two workers exchangeable."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from engine.model.config import broken
from engine.model.weights import weight_files

DIGEST_BYTES = 16
WHOLE_FILE_BYTES = 64 << 20
"""Smaller files are hashed in full."""
SAMPLES = 64
SAMPLE_BYTES = 64 << 10
"""Of a larger file: its first chunk (the header with every tensor's name, shape and place), its last, and others at
equal distances; 4 MiB in all, so that the largest model starts without being read twice."""


def model_digest(model_dir: Path) -> bytes:
    """16 bytes over `config.json` and the weights; the files' names and times do not count.

    Raises `StartupError` when a file is missing or cannot be read.
    """
    digest = blake2b(digest_size=DIGEST_BYTES, person=b"kvmesh-model")
    for path in (model_dir / "config.json", *weight_files(model_dir)):
        try:
            _add(digest, path)
        except OSError as error:
            raise broken(f"cannot read {path}: {error.strerror}") from None
    return digest.digest()


def _add(digest: blake2b, path: Path) -> None:
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size < WHOLE_FILE_BYTES:
            digest.update(file.read())
            return
        header = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header, WHOLE_FILE_BYTES)))
        for i in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))

"""What must hold of the Python environment before a process of ours starts."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from mesh.errors import EXIT_ENVIRONMENT, StartupError

RIVAL = "kernels"
"""A Hugging Face package of the same import name as ours: transformers would mistake one for the other."""


def check() -> None:
    """Raises `StartupError` when a distribution named like one of our packages is installed."""
    try:
        rival = distribution(RIVAL)
    except PackageNotFoundError:
        return
    raise StartupError(
        f"the package {RIVAL!r} {rival.version} is installed here and has the name of a part of kvmesh; "
        f"use an environment of its own for kvmesh, or run `pip uninstall {RIVAL}`",
        EXIT_ENVIRONMENT,
    )

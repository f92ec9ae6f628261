"""What the engine refuses, and what it says when its own books do not balance.

KvmeshError
├── CannotFit         (ValueError)      this engine cannot take the request; `code` is one of `Refused.code`
└── IntegrityError    (AssertionError)  blocks leaked or counted wrongly: a defect of the engine
"""

from __future__ import annotations

from mesh.errors import KvmeshError


class CannotFit(KvmeshError, ValueError):
    """`code`: `too_long` (the context), `no_memory` (the block pool) or `internal` (a request that is malformed or
    known already)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class IntegrityError(KvmeshError, AssertionError):
    """The message names the block and the leak."""

"""The exception tree.

KvmeshError
├── StartupError           a process cannot start; carries the exit code (one line on stderr, no traceback)
├── BadFrame               bytes from a socket that are not one of our messages
├── GrammarError           a grammar that is wrong, too complex, or not satisfied by given tokens
└── RequestError           a client's request fails; carries HTTP status, OpenAI type/code/param and Retry-After
"""

from __future__ import annotations

EXIT_REQUEST = 1
EXIT_USAGE = 2
EXIT_MODEL = 3
EXIT_PORT = 4
EXIT_MEMORY = 5
EXIT_STORE = 6
EXIT_WORKER = 7
EXIT_ENVIRONMENT = 8
EXIT_UNREACHABLE = 9


class KvmeshError(Exception):
    """Anything kvmesh itself refuses."""


class StartupError(KvmeshError):
    """A process cannot start. `str()` is one clear sentence for the person at the terminal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class BadFrame(KvmeshError):
    """A frame that does not decode to a message; the only exception the decoders raise."""


class GrammarError(KvmeshError):
    """`str()` says what is wrong, in the client's words where they are at fault."""


class RequestError(KvmeshError):
    """A request that ends with an error object (`docs/api.md` lists them all)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.retry_after = retry_after


SERVER_ERROR = "server_error"


def internal_error() -> RequestError:
    """What a client hears of a fault of ours: nothing but that."""
    return RequestError(500, "The server had an error while processing your request.", type=SERVER_ERROR)

"""How a process's `main` ends: an exit code, and at most one line on stderr for what it refuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mesh.errors import StartupError
from mesh.progress import report_failure

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells count."""


def run(prog: str, body: Callable[[], int]) -> int:
    """`body`'s exit code. A `StartupError` becomes its code and one line to the launcher, else on stderr."""
    try:
        return body()
    except StartupError as error:
        if not report_failure(str(error), error.exit_code):
            print(f"{prog}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left; the interpreter's last flush must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1

"""One process under a launcher: started in its own session, watched through two pipes, gone when the launcher is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from mesh.progress import PROGRESS_FD

PR_SET_PDEATHSIG = 1
READ_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 16
"""A longer line is cut: one runaway process must not fill the launcher's memory."""
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Lines:
    """The complete lines that come through a pipe, without ever waiting for one."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.ended = False
        self._rest = b""

    def read(self) -> list[str]:
        """What has arrived; when the pipe ends, its last line even if unfinished."""
        while not self.ended:
            try:
                data = os.read(self.fd, READ_BYTES)
            except BlockingIOError:
                break
            self.ended = not data
            self._rest += data
            if len(self._rest) > MAX_LINE_BYTES:
                break
        return self._complete()

    def close(self) -> None:
        os.close(self.fd)

    def _complete(self) -> list[str]:
        *whole, self._rest = self._rest.split(b"\n")
        if self._rest and (self.ended or len(self._rest) > MAX_LINE_BYTES):
            whole.append(self._rest)
            self._rest = b""
        return [line.decode(errors="replace").rstrip("\r") for line in whole]


class Child:
    """A running process. Its output and its reports are read from `output` and `reports`."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        """Raises OSError when the program cannot be started."""
        report_read, report_write = os.pipe()
        parent = os.getpid()
        try:
            self._process = subprocess.Popen(
                argv,
                env={**environ, PROGRESS_FD: str(report_write)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                pass_fds=(report_write,),
                start_new_session=True,
                # The launcher has one thread, so nothing can hold a lock between fork and exec.
                preexec_fn=lambda: _die_with(parent),
            )
        except OSError:
            os.close(report_read)
            raise
        finally:
            os.close(report_write)
        assert self._process.stdout is not None
        self.output = Lines(self._process.stdout.fileno())
        self.reports = Lines(report_read)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code once the process has ended."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """To the process; SIGKILL to its whole group. Nothing happens if it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL:
                os.killpg(self.pid, number)
            else:
                self._process.send_signal(number)

    def close(self) -> None:
        """Ends whatever is left of the process and its group, and closes the pipes."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self.reports.close()


def _die_with(parent: int) -> None:
    """Runs in the child before exec: the kernel kills it when the launcher's thread ends, however that happens."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

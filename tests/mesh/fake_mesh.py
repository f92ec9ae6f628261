"""A launcher whose proxy and workers are this file too: they speak the launcher's protocol and do nothing else.

    fake_mesh.py up MODEL_DIR …                the launcher
    fake_mesh.py proxy|prefill|decode FLAGS    what it starts

`MODEL_DIR/behaviour.json` maps a member's name to what it does instead of working: `refuse` (a startup error),
`crash` (exit code 1 before it is ready), `stubborn` (ignores SIGTERM), `slow` (leaves at the second SIGTERM). A
member writes its process id to `MODEL_DIR/NAME.pid` before it is ready.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from pathlib import Path
from threading import Thread

from mesh import launcher, logs, options, startup
from mesh.errors import EXIT_MODEL, StartupError
from mesh.progress import report
from mesh.settings import ProxySettings, WorkerSettings


class Door(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def work(name: str, model: Path, serve: Callable[[], None] = lambda: None) -> int:
    """Becomes ready and waits for SIGTERM."""
    asked = (signal.SIGTERM,)
    signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    behaviour = json.loads((model / "behaviour.json").read_text()).get(name)
    if behaviour == "refuse":
        raise StartupError("architecture Mamba is not supported", EXIT_MODEL)
    if behaviour == "crash":
        print("a traceback", flush=True)
        return 1
    report("weights", 0.5)
    (model / f"{name}.pid").write_text(str(os.getpid()))
    print("a plain line", flush=True)
    serve()
    report("ready", 1.0, device="fake", blocks=7, block_tokens=16)
    for heard in count(1):
        signal.sigwait(asked)
        if behaviour != "stubborn" and heard >= (2 if behaviour == "slow" else 1):
            break
        print("ignored", flush=True)
    print("drained", flush=True)
    return 0


def worker(argv: Sequence[str]) -> int:
    settings = options.parse(WorkerSettings, argv)
    logs.setup(settings.log_level, settings.worker_id)
    return work(settings.worker_id, Path(settings.model))


def proxy(argv: Sequence[str]) -> int:
    settings = options.parse(ProxySettings, argv)

    def serve() -> None:
        server = HTTPServer((settings.host, settings.port), Door)
        Thread(target=server.serve_forever, daemon=True).start()

    return work("proxy", Path(settings.model), serve)


def up(argv: Sequence[str]) -> int:
    me = (sys.executable, __file__)
    return launcher.main(argv, {name: (*me, name) for name in ("proxy", "prefill", "decode")})


PARTS = {"up": up, "proxy": proxy, "prefill": worker, "decode": worker}

if __name__ == "__main__":
    sys.exit(startup.run("kvmesh", lambda: PARTS[sys.argv[1]](sys.argv[2:])))

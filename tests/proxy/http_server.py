"""The application on a loopback port, with the connections that the proxy has."""

from __future__ import annotations

import socket
import threading
from collections.abc import Awaitable, Callable

import openai
import uvicorn

from proxy.connection import HttpConnection
from tests.proxy.api_client import Api


class Server:
    """The application on a port of its own, in a thread with its own loop."""

    def __init__(self, api: Api, closing: Callable[[], Awaitable[None]] | None = None) -> None:
        """`closing` is awaited on that loop when the server is down."""
        self._socket = socket.socket()
        # Accepted connections inherit it: a client that reads nothing is soon felt.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(api.app, http=HttpConnection, ws="none", log_config=None, lifespan="off")
        self._server = _Uvicorn(config, closing)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()

    def connect(self) -> socket.socket:
        """A raw connection, which gives up after 10 s of silence."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def client(self, retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=retries, timeout=10
        )

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=10
        )


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, closing: Callable[[], Awaitable[None]] | None) -> None:
        super().__init__(config)
        self._closing = closing

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._closing is not None:
            await self._closing()

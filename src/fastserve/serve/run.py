"""Runs an application under uvicorn: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from types import FrameType
from typing import Literal

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastserve.errors import OptionError, RequestError
from fastserve.serve.connection import DirectWriter, HeadMerger
from fastserve.serve.errors import error_document
from fastserve.serve.options import ServeOptions
from fastserve.serve.service import Service

SWITCH_SECONDS = 0.0005
"""That a thread may keep the interpreter while a step that has ended waits for it. Python's 5 ms are as
much as a whole step of a small model."""

_BACKLOG = 2048
_MOST_HEADER_BYTES = 64 * 1024
_IDLE_SECONDS = 75  # of a connection without a request

_Awaited = Literal["request", "head", "rest"]
"""What a client is to send: a request, the rest of its head, or of a body that was answered without it."""


def serve(
    app: FastAPI,
    options: ServeOptions,
    *,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    announce: Callable[[str], None],
) -> None:
    """Serve an application that `create_app` has made, with the same options, until SIGTERM or SIGINT.

    Then no connection is taken any more, and requests that run have `drain_seconds` to end; a second SIGINT
    ends them at once.

    Args:
        listener: of `bind`.
        tls: of `make_tls`.
        announce: called with the URL once connections are taken.
    """
    server = make_server(app, options, tls=tls, announce=announce)
    gc.collect()
    gc.freeze()  # modules, routes and models stay: looking through them would pause all streams
    switch_seconds = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        server.run(sockets=[listener])
    finally:
        sys.setswitchinterval(switch_seconds)
        gc.unfreeze()


def make_server(
    app: FastAPI, options: ServeOptions, *, tls: ssl.SSLContext | None, announce: Callable[[str], None]
) -> uvicorn.Server:
    """What `serve` runs, for an event loop that runs already. Arguments as of `serve`."""
    config = uvicorn.Config(
        app,
        backlog=_BACKLOG,
        http=type("_Protocol", (_Protocol,), {"body_seconds": options.body_seconds}),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=int(options.drain_seconds) + 5,  # after all streams were ended
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
    )
    config.load()
    config.ssl = tls
    return _Server(config, app.state.service, options, announce)


class _Protocol(H11Protocol):
    """Answers what is no HTTP with an error object too, offers its transport to streams, and ends connections
    whose client does not send what is to come next.

    uvicorn's own timeout begins with an answer, and ends with the first byte that follows it.
    """

    body_seconds: float  # of the options

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self.transport = HeadMerger(transport, self.loop)
        self.app = DirectWriter.offer(self.app, self.transport)
        self._awaited: _Awaited | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._await_client()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._await(None)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_client()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_client()

    def _await_client(self) -> None:
        if self.transport.is_closing():
            self._await(None)
        elif self.conn.their_state is h11.IDLE:
            self._await("head" if self.conn.trailing_data[0] else "request")
        elif self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            self._await("rest")
        else:  # a body that is to be read has its own limit, and then it is our turn
            self._await(None)

    def _await(self, awaited: _Awaited | None) -> None:
        if awaited == self._awaited:
            return
        self._awaited = awaited
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if awaited is not None:
            seconds = _IDLE_SECONDS if awaited == "request" else self.body_seconds
            self._patience = self.loop.call_later(seconds, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        error = RequestError("the request is no HTTP", status=400, code="invalid_http")
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=error_document(error)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class _Server(uvicorn.Server):
    """Ends streams that go on for too long, and keeps the exit code for failures."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        options: ServeOptions,
        announce: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._service = service
        self._options = options
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        self._announce(url_of(sockets[0], self._options))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.snapshots.close()  # who only watches is not waited for
        self._service.models.memory.stop_loading()  # nor who has not begun
        ending = asyncio.create_task(self._end_streams())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_streams(self) -> None:
        await asyncio.sleep(self._options.drain_seconds)
        await self._service.models.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's own would raise the signal once more at the end."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def bind(options: ServeOptions) -> socket.socket:
    """A socket at the options' address, which takes no connections before `serve`.

    Raises:
        OptionError: there is no such host, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # a client that takes nothing keeps no connection; inherited by those
            milliseconds = int(1000 * options.write_seconds)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        listener.bind(address)
    except OSError as error:
        raise OptionError(
            f"cannot listen at host={options.host!r}, port={options.port}: {error.strerror or error}",
            hint="choose another --port, or 0 for any that is free",
            option="port",
        ) from error
    return listener


def make_tls(options: ServeOptions) -> ssl.SSLContext | None:
    """
    Raises:
        OptionError: the files are no certificate and its key.
    """
    if options.tls_cert is None or options.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except OSError as error:  # ssl.SSLError is one
        raise OptionError(
            f"tls_cert={options.tls_cert!r} and tls_key={options.tls_key!r}: {error.strerror or error}",
            hint="name PEM files of a certificate and its private key, without a password",
            option="tls_cert",
        ) from error
    return context


def url_of(listener: socket.socket, options: ServeOptions) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "http" if options.tls_cert is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

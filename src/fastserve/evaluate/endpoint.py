"""A model behind an OpenAI-compatible API, as a client sees it: asked for streams, and timed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from fastserve.errors import MeasurementError, OptionError, UnsupportedError
from fastserve.evaluate.event_stream import EventParser
from fastserve.evaluate.exchange import Exchange, error_code, error_message

try:
    import aiohttp
except ImportError as _error:
    raise UnsupportedError(
        f"sending requests needs aiohttp: {_error}", hint="pip install 'fastserve-llm[bench]'"
    ) from _error

Api = Literal["completions", "chat"]

_CONNECT_SECONDS = 10.0
_IDLE_SECONDS = 2.0  # servers close an idle connection after 5 at the earliest: none is used that long after
_SHOWN_BODY_BYTES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """Which model is asked, and how.

    Attributes:
        url: of the server, with or without the `/v1` of its API.
        model: as the server calls it.
        api: `completions` sends prompts as they are, `chat` as the message of a user.
        api_key: sent as a bearer token.
        extra: further fields of every request.

    Raises:
        OptionError: the URL is none of HTTP.
    """

    url: str
    model: str
    api: Api = "completions"
    api_key: str | None = field(default=None, repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        try:
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise OptionError(
                f"url={self.url!r} is no address of a server", hint="give one such as http://127.0.0.1:8000"
            )

    @property
    def base(self) -> str:
        """
        >>> EndpointOptions(url="http://localhost:8000/v1/", model="m").base
        'http://localhost:8000/v1'
        >>> EndpointOptions(url="http://localhost:8000", model="m").base
        'http://localhost:8000/v1'
        """
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What a server takes and tells beyond OpenAI's bare minimum."""

    ignores_eos: bool  # on request, so that completions are as long as planned
    tells_usage: bool  # at the end of a stream


class Endpoint:
    """Sends requests. Use it as a context: its connections are closed with it.

    A request that fails is an exchange with a `failure`, never an exception.
    """

    def __init__(self, options: EndpointOptions) -> None:
        self.options = options
        self._path = f"{options.base}/{'completions' if options.api == 'completions' else 'chat/completions'}"

    async def __aenter__(self) -> Self:
        headers = {"Accept-Encoding": "identity"}  # what packs a stream holds it back
        if self.options.api_key:
            headers["Authorization"] = f"Bearer {self.options.api_key}"

        def open_session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
            return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)

        self._session = open_session(aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS))
        self._fresh_session = open_session(aiohttp.TCPConnector(limit=0, force_close=True))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._fresh_session.close()

    async def learn_abilities(self, exchange: Exchange) -> Abilities:
        """Find out by a request what the server takes; the exchange is that of the last try.

        Raises:
            MeasurementError: there is no server, or it does not answer even a plain request.
        """
        abilities = Abilities(ignores_eos=True, tells_usage=True)
        while True:
            await self.send(exchange, max_tokens=1, abilities=abilities)
            if exchange.failure is None:
                return Abilities(
                    ignores_eos=abilities.ignores_eos, tells_usage=exchange.prompt_tokens is not None
                )
            refused = (exchange.message or "") if exchange.failure.startswith("http 4") else ""
            if abilities.ignores_eos and "ignore_eos" in refused:
                abilities = Abilities(ignores_eos=False, tells_usage=abilities.tells_usage)
            elif abilities.tells_usage and "stream_options" in refused:
                abilities = Abilities(ignores_eos=abilities.ignores_eos, tells_usage=False)
            else:
                raise MeasurementError(
                    f"{self._path} does not answer: {exchange.failure}: {exchange.message}",
                    hint="see that the server runs there, and serves a model of that name",
                )
            exchange.failure = exchange.message = None

    async def send(self, exchange: Exchange, *, max_tokens: int, abilities: Abilities) -> None:
        """Send the planned request and take down its answer, which is streamed, to its end."""
        exchange.sent_seconds = time.perf_counter()
        body = self._body(exchange.planned.prompt, max_tokens, abilities)
        try:
            async with await self._post(body) as response:
                if response.status != 200:
                    content = await response.content.read(2**16)
                    _take_refusal(exchange, response.status, content)
                elif response.content_type != "text/event-stream":
                    exchange.fail("malformed", f"the answer is of type {response.content_type}, no stream")
                else:
                    await _read_stream(exchange, response.content)
        except (TimeoutError, aiohttp.ServerTimeoutError) as error:
            exchange.fail("no connection in time", str(error))
        except aiohttp.ClientConnectorError as error:
            exchange.fail("connection refused", str(error))
        except aiohttp.ClientPayloadError as error:  # the connection ended within the answer
            exchange.fail("connection lost", str(error))
        except (
            aiohttp.ClientResponseError,  # no HTTP
            ValueError,  # no JSON
            RecursionError,  # JSON nested too deeply
            TypeError,  # none of the API's documents
            AttributeError,
        ) as error:
            exchange.fail("malformed", str(error))
        except (aiohttp.ClientError, OSError) as error:
            exchange.fail("connection lost", str(error) or type(error).__name__)

    async def _post(self, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """A server may close a connection that is kept at the moment at which it is used again, before it has
        read the request: that is sent once more, on a new one (RFC 9112, section 9.3.1)."""
        try:
            return await self._session.post(self._path, json=body)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            return await self._fresh_session.post(self._path, json=body)

    def _body(self, prompt: str, max_tokens: int, abilities: Abilities) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.options.model}
        if self.options.api == "completions":
            body["prompt"] = prompt
        else:
            body["messages"] = [{"role": "user", "content": prompt}]
        body |= {"max_tokens": max_tokens, "temperature": 0, "stream": True}
        if abilities.tells_usage:
            body["stream_options"] = {"include_usage": True}
        if abilities.ignores_eos:
            body["ignore_eos"] = True
        return body | dict(self.options.extra)


async def _read_stream(exchange: Exchange, content: aiohttp.StreamReader) -> None:
    parser = EventParser()
    async for received in content.iter_any():
        now = time.perf_counter()
        for data in parser.feed(received):
            if data != b"[DONE]":
                exchange.take(json.loads(data), now)
    if parser.is_within_event:
        exchange.fail("cut short", "the stream ended within an event")
    exchange.finish(time.perf_counter())


def _take_refusal(exchange: Exchange, status: int, content: bytes) -> None:
    try:
        document = json.loads(content)
    except ValueError:
        document = content[:_SHOWN_BODY_BYTES].decode(errors="replace")
    exchange.fail(f"http {status} {error_code(document)}".rstrip(), error_message(document))

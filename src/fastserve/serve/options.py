"""Options of the server: frozen, validated when made. They hold all limits of requests but the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from fastserve.config import parse_bytes
from fastserve.errors import OptionError
from fastserve.option import INT64_MAX, check_integer, check_kind, check_number

_MOST_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How models are served.

    Attributes:
        host: name or address to listen at. One that others reach (`0.0.0.0`) needs API keys.
        port: to listen at; 0 takes a free one.
        api_keys: file of the keys that are let in, each with its tenant and that tenant's terms, as
            `fastserve keys` writes it; None: the key of FASTSERVE_API_KEY, if it is set, or nobody needs one.
            It is read again when it has changed.
        tenants: the same file by another name; only one of the two may be given.
        admin_key_file: file with the digest of the admin key, as `fastserve keys FILE --admin` writes it;
            None: there is nothing at /admin.
        model_memory: most bytes of all loaded models together, or a text such as "4GiB": each is loaded when
            a request asks for it, and given up for another, the least recently used first. None: all are
            loaded at the start and stay.
        pinned: names of models that are loaded at the start and stay, with `model_memory`.
        model_turn_seconds: how long a model that is in use lets further requests in, from its load on, while
            another is waited for that has no room beside it.
        model_drain_seconds: how long requests of a model that is given up may go on.
        model_wait_seconds: how long a request may wait for its model to be loaded.
        allowed_hosts: further names by which requests may call this machine, where it listens on loopback.
        cors_origins: web sites (`https://example.com`) whose pages may send requests; none by default.
        tls_cert: file of the certificate and its chain, PEM; None is plain HTTP.
        tls_key: file of its private key.
        max_body: most bytes of a request's body, or a text such as "4MiB".
        max_prompt_tokens: most tokens of a prompt; None is what the context and the KV memory hold.
        max_prompts: most prompts, or texts to embed, of one request.
        max_n: most completions of a prompt.
        max_stops: most stop strings of a request, and most of its own stop tokens.
        max_logit_biases: most tokens with a logit bias.
        max_responses: how many of /v1/responses are kept, in memory. Where they are too many, the oldest goes
            of the key that has most.
        response_memory: most bytes of those together, or a text such as "64MiB".
        body_seconds: how long the head of a request may take to come, and its body.
        keep_alive_seconds: a stream that is silent for so long gets a comment, so that nobody cuts it.
        write_seconds: a client that takes nothing for so long is cut off.
        drain_seconds: how long requests may go on once the server is told to end.
        ready_seconds: an engine whose last step is older than this while there is work is not ready.
        log_prompts: write prompts and completions to the log.
        otel: make a span of each request, by OpenTelemetry; where they go is said by its variables.

    Raises:
        OptionError: an option is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: str | None = None
    tenants: str | None = None
    admin_key_file: str | None = None
    model_memory: int | str | None = None
    pinned: Sequence[str] = ()
    model_turn_seconds: float = 10.0
    model_drain_seconds: float = 300.0
    model_wait_seconds: float = 600.0
    allowed_hosts: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    max_body: int | str = "4MiB"
    max_prompt_tokens: int | None = None
    max_prompts: int = 256
    max_n: int = 16
    max_stops: int = 16
    max_logit_biases: int = 1024
    max_responses: int = 1000
    response_memory: int | str = "64MiB"
    body_seconds: float = 30.0
    keep_alive_seconds: float = 15.0
    write_seconds: float = 60.0
    drain_seconds: float = 30.0
    ready_seconds: float = 60.0
    log_prompts: bool = False
    otel: bool = False

    def __post_init__(self) -> None:
        check_kind("host", self.host, str, "a name or an address")
        if not self.host:
            raise OptionError("host is empty", hint="choose 127.0.0.1, or 0.0.0.0 for all of this machine's")
        check_integer("port", self.port, low=0, high=65535)
        if self.api_keys is not None and self.tenants is not None:
            raise OptionError(
                f"api_keys={self.api_keys!r} and tenants={self.tenants!r} are two files of keys",
                hint="name one of them: both options read the same format",
                option="tenants",
            )
        check_integer("max_body", self.max_body_bytes, low=1, high=INT64_MAX)
        check_integer("response_memory", self.response_memory_bytes, low=1, high=INT64_MAX)
        if self.max_prompt_tokens is not None:
            check_integer("max_prompt_tokens", self.max_prompt_tokens, low=1)
        for name in ("max_prompts", "max_n", "max_stops", "max_logit_biases", "max_responses"):
            check_integer(name, getattr(self, name), low=1)
        for name in ("body_seconds", "keep_alive_seconds", "write_seconds", "drain_seconds", "ready_seconds"):
            check_number(name, getattr(self, name), 0.01, _MOST_SECONDS)
        for name in ("model_turn_seconds", "model_drain_seconds", "model_wait_seconds"):
            check_number(name, getattr(self, name), 0.01, _MOST_SECONDS)
        if self.model_memory_bytes is not None:
            check_integer("model_memory", self.model_memory_bytes, low=1, high=INT64_MAX)
        elif self.pinned:
            raise OptionError(
                "pinned has no use without model_memory: all models are loaded and stay",
                hint="leave it out, or say with model_memory how much models may take",
                option="pinned",
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise OptionError(f"{missing} is missing", hint="name both tls_cert and tls_key, or neither")
        for origin in self.cors_origins:
            if "://" not in origin or origin.endswith("/"):
                raise OptionError(
                    f"cors_origins has {origin!r}, which is no origin",
                    hint="write scheme, name and port as browsers do, such as https://example.com",
                )

    @property
    def max_body_bytes(self) -> int:
        return parse_bytes("max_body", self.max_body) if isinstance(self.max_body, str) else self.max_body

    @property
    def key_file(self) -> str | None:
        """The file of API keys, by whichever option it was named."""
        return self.tenants if self.api_keys is None else self.api_keys

    @property
    def response_memory_bytes(self) -> int:
        memory = self.response_memory
        return parse_bytes("response_memory", memory) if isinstance(memory, str) else memory

    @property
    def model_memory_bytes(self) -> int | None:
        memory = self.model_memory
        return parse_bytes("model_memory", memory) if isinstance(memory, str) else memory

    @property
    def is_on_loopback(self) -> bool:
        """Whether only processes of this machine reach it."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine itself.

    >>> [is_loopback(host) for host in ("localhost", "127.0.0.2", "::1", "0.0.0.0", "example.com")]
    [True, True, True, False, False]
    """
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"

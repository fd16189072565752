"""Files of keys: who is let in, for which tenant, and that tenant's terms. They hold digests and no keys.

A line of API keys is `NAME DIGEST [FIELD=VALUE ...]`; fields are `tenant`, `expires` and those of `Terms`.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Self

from fastserve.config import MOST_TENANT_WEIGHT
from fastserve.errors import OptionError
from fastserve.option import check_integer, check_number

_NAME = re.compile(r"[^\s/#][^\s/]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a tenant may. None is what nobody has said: a weight of 1, and no limit.

    Attributes:
        weight: under contention one with twice the weight gets twice the service.
        requests_per_minute: in the mean; so many may come at once after a minute without any.
        tokens_per_minute: of prompts and completions, alike.
        max_concurrent: most requests that run or wait at a time.

    Raises:
        OptionError: a number is out of its range.
    """

    weight: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        if self.weight is not None:
            check_number("weight", self.weight, 0, MOST_TENANT_WEIGHT, is_low_open=True)
        for name in ("requests_per_minute", "tokens_per_minute", "max_concurrent"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), low=1)

    @property
    def said(self) -> dict[str, float]:
        """Those that are not None, by name."""
        return {name: getattr(self, name) for name in TERMS if getattr(self, name) is not None}


TERMS = tuple(term.name for term in fields(Terms))


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key that is let in, and for whom.

    Attributes:
        expires: the last day on which it is, in UTC; None: there is none.
    """

    name: str
    digest: str
    tenant: str
    expires: date | None = None

    @property
    def has_expired(self) -> bool:
        return self.expires is not None and today() > self.expires


@dataclass(frozen=True, slots=True)
class KeyTable:
    """API keys by their digests, and the terms of their tenants."""

    keys: Mapping[str, ApiKey] = field(default_factory=dict)
    terms: Mapping[str, Terms] = field(default_factory=dict)

    @classmethod
    def of(cls, digests: Mapping[str, str]) -> Self:
        """Keys by name that are tenants of their own."""
        keys = {digest: ApiKey(name=name, digest=digest, tenant=name) for name, digest in digests.items()}
        return cls(keys, dict.fromkeys(digests, Terms()))


def today() -> date:
    return datetime.now(UTC).date()


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_key_file(path: Path, *, option: str = "tenants") -> KeyTable:
    """API keys: a line each; empty ones and those that begin with # say nothing. Lines of one tenant may each
    say some of its terms.

    Raises:
        OptionError: it cannot be read or is no text; a line is of another form, has a field that there is
            not or a value out of its range, or contradicts another one; a name or a digest comes twice; there
            is no key. Where it is a line, the message has its number.
    """
    return _parse(_read_text(path, option), path, option)


def add_key(
    path: Path,
    name: str,
    *,
    tenant: str | None = None,
    terms: Terms | None = None,
    expires: date | None = None,
) -> str:
    """Add a new key to a file, which is made for its owner alone where it is missing, and return the key.

    Args:
        tenant: whose key it is; None: one of the key's own name.
        terms: of the tenant, as far as they are to be said.

    Raises:
        OptionError: the name is taken, or it or the tenant's has spaces or slashes; the day is over; terms
            are not those that the file has already; the file is none of keys.
    """
    check_name("name", name)
    parts = {} if tenant is None else {"tenant": tenant}
    if tenant is not None:
        check_name("tenant", tenant)
    parts |= {term: f"{value:g}" if term == "weight" else str(value) for term, value in _said(terms).items()}
    if expires is not None:
        if expires < today():
            raise OptionError(
                f"expires={expires} is over", hint="choose the last day that it is good for", option="expires"
            )
        parts["expires"] = str(expires)
    text = _read_text(path, "tenants") if path.exists() else ""
    if text.strip():
        table = _parse(text, path, "tenants")
        if any(key.name == name for key in table.keys.values()):
            raise OptionError(f"{path} has a key of {name!r}", hint="choose another name, or delete its line")
    key = _new_key()
    line = " ".join((name, digest_of(key), *(f"{part}={value}" for part, value in parts.items())))
    begin = "\n" * bool(text and not text.endswith("\n"))
    _parse(f"{text}{begin}{line}", path, "tenants")
    _append(path, f"{begin}{line}\n")
    return key


def check_name(option: str, name: str) -> None:
    """
    Raises:
        OptionError: it is no name of a key or a tenant.
    """
    if not _NAME.fullmatch(name):
        raise OptionError(
            f"{option}={name!r} is not a word",
            hint=f"choose a {option} without spaces and slashes, such as alice",
            option=option,
        )


def add_admin_key(path: Path) -> str:
    """Make the file of a new admin key, for its owner alone, and return the key.

    Raises:
        OptionError: there is something in the file.
    """
    if path.exists() and path.stat().st_size:
        raise OptionError(
            f"{path} is not empty; an admin key has a file of its own",
            hint="choose another file, or delete this one",
        )
    key = _new_key()
    _append(path, f"{_ADMIN} {digest_of(key)}\n")
    return key


def read_admin_digest(path: Path) -> str:
    """The digest of the admin key.

    Raises:
        OptionError: it cannot be read, or is no single line of `fastserve keys FILE --admin`.
    """
    lines = list(_lines(_read_text(path, "admin_key_file")))
    match lines:
        case [(_, text)] if text.split()[0] == _ADMIN and _DIGEST.fullmatch(text[len(_ADMIN) :].strip()):
            return text.split()[1]
    number = next((number for number, text in lines if text.split()[0] != _ADMIN), None)
    place = str(path) if number is None else f"{path}, line {number}"
    raise OptionError(
        f"{place}: is no file with the digest of one admin key",
        hint=f"write one with `fastserve keys {path} --admin`",
        option="admin_key_file",
    )


def _said(terms: Terms | None) -> dict[str, float]:
    return {} if terms is None else terms.said


def _new_key() -> str:
    return f"fs-{secrets.token_urlsafe(32)}"


def _append(path: Path, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OptionError(
            f"{path} cannot be written: {error.strerror or error}", hint="choose a file in a folder of yours"
        ) from error


def _read_text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"{option}={str(path)!r} cannot be read: {error.strerror or error}",
            hint=f"write keys with `fastserve keys {path} NAME`",
            option=option,
        ) from error
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{path} is no key file: it is not UTF-8",
            hint=f"write keys with `fastserve keys {path} NAME`",
            option=option,
        ) from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that say something, with their numbers."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line.strip()


def _parse(text: str, path: Path, option: str) -> KeyTable:
    keys: dict[str, ApiKey] = {}
    terms: dict[str, Terms] = {}
    names: dict[str, int] = {}  # lines of keys, by name, by digest, ...
    digests: dict[str, int] = {}
    sayings: dict[tuple[str, str], int] = {}  # ... and of terms, by tenant and term
    for number, line in _lines(text):
        try:
            key, own = _parse_line(line)
            _check_new(f"the name {key.name!r} is that", names.get(key.name))
            _check_new("the key is that", digests.get(key.digest))
            before = terms.get(key.tenant, Terms())
            for term, value in own.said.items():
                if before.said.get(term, value) != value:
                    raise OptionError(
                        f"{term}={value:g} of tenant {key.tenant!r}; line {sayings[key.tenant, term]} "
                        f"says {before.said[term]:g}",
                        hint="say it once for all keys of a tenant",
                    )
                sayings.setdefault((key.tenant, term), number)
        except OptionError as error:
            hint = error.hint or f"write keys with `fastserve keys {path} NAME`"
            raise OptionError(f"{path}, line {number}: {error.message}", hint=hint, option=option) from error
        terms[key.tenant] = replace(before, **own.said)  # type: ignore[arg-type]
        keys[key.digest] = key
        names[key.name] = digests[key.digest] = number
    if not keys:
        raise OptionError(
            f"{path} has no keys", hint=f"write one with `fastserve keys {path} NAME`", option=option
        )
    return KeyTable(keys, terms)


def _check_new(what: str, line: int | None) -> None:
    if line is not None:
        raise OptionError(f"{what} of line {line}")


def _parse_line(line: str) -> tuple[ApiKey, Terms]:
    """
    Raises:
        OptionError: it is not of the form of a key. What may be a key by mistake is not shown.
    """
    name, digest, *parts = [*line.split(), ""] if len(line.split()) < 2 else line.split()
    if not (_NAME.fullmatch(name) and _DIGEST.fullmatch(digest)):
        raise OptionError("is no name with the digest of a key")
    said: dict[str, Any] = {}
    for part in parts:
        field_name, equals, value = part.partition("=")
        if not equals or field_name not in ("tenant", "expires", *TERMS):
            known = ", ".join(("tenant", *TERMS, "expires"))
            raise OptionError(f"has the unknown field {field_name[:30]!r}", hint=f"fields are {known}")
        if field_name in said:
            raise OptionError(f"has the field {field_name} twice", hint="say it once")
        said[field_name] = _parse_value(field_name, value)
    tenant, expires = said.pop("tenant", name), said.pop("expires", None)
    return ApiKey(name=name, digest=digest, tenant=tenant, expires=expires), Terms(**said)


def _parse_value(name: str, text: str) -> object:
    if name == "tenant":
        check_name(name, text)
        return text
    if name == "expires":
        return parse_day(text)
    pattern, kind = (r"\d+(\.\d+)?", "a number") if name == "weight" else (r"\d{1,18}", "a whole number")
    if not re.fullmatch(pattern, text, re.ASCII):
        raise OptionError(f"{name}={text[:30]!r} is not {kind}", hint=f"write {name}=2")
    return float(text) if name == "weight" else int(text)


def parse_day(text: str) -> date:
    """
    Raises:
        OptionError: it is no day.
    """
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise OptionError(f"expires={text[:30]!r} is not a day", hint="write it as 2027-01-31", option="expires")

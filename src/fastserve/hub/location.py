"""Where the local store is, and whether the network may be used: settings of the environment."""

from __future__ import annotations

import os
from pathlib import Path

from fastserve.errors import OptionError

_YES = ("1", "true", "yes", "on")
_NO = ("", "0", "false", "no", "off")


def store_home() -> Path:
    """FASTSERVE_HOME, or `fastserve` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    if chosen := os.environ.get("FASTSERVE_HOME"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says that a relative path there is to be ignored.
    folder = Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache"
    return folder / "fastserve"


def is_offline() -> bool:
    """Whether FASTSERVE_OFFLINE forbids network access.

    Raises:
        OptionError: its value is neither a yes nor a no.
    """
    return is_switched_on("FASTSERVE_OFFLINE", default=False)


def is_switched_on(name: str, *, default: bool) -> bool:
    """Whether the variable `name` of the environment is a yes; `default` where it is not set.

    Raises:
        OptionError: its value is neither a yes nor a no.
    """
    value = os.environ.get(name, "").strip().lower()
    if value not in _YES + _NO:
        raise OptionError(f"{name}={value} is neither yes nor no", hint="set it to 1 or 0")
    return value in _YES if value else default

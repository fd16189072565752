"""The order in which rows are written: as they came, at random, by length."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

ORDERS = ("input", "random", "length")


def order_key(order: str, seed: int) -> Callable[[bytes], Any]:
    """By what lines are sorted for an order other than `input`.

    >>> sorted([b"ccc", b"a", b"bb"], key=order_key("length", seed=0))
    [b'a', b'bb', b'ccc']
    """
    if order == "length":
        return len
    salt = seed.to_bytes(8, "little")
    return lambda line: hashlib.blake2b(line, digest_size=8, key=salt).digest()

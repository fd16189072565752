"""The head of an answer goes out with what follows it at once, and not later than the event loop goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from fastserve.serve.connection import HeadMerger

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Wire(asyncio.Transport):
    """Takes down what is sent, a write each."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))

    def close(self) -> None:
        self.sent.append(b"closed")


def sent_by(talk: Callable[[HeadMerger], None]) -> tuple[list[bytes], list[bytes]]:
    """What was sent at once, and by the time that the loop had gone on."""

    async def main() -> tuple[list[bytes], list[bytes]]:
        wire = Wire()
        talk(HeadMerger(wire, asyncio.get_running_loop()))
        at_once = list(wire.sent)
        await asyncio.sleep(0)
        return at_once, wire.sent

    return asyncio.run(main())


def test_a_head_and_its_body_are_one_write() -> None:
    def talk(merger: HeadMerger) -> None:
        merger.write(HEAD)
        merger.write(b"body")
        merger.write(b"")
        merger.write(b"more")

    assert sent_by(talk) == ([HEAD + b"body", b"more"],) * 2


def test_a_head_that_nothing_follows_is_sent_when_the_loop_goes_on() -> None:
    assert sent_by(lambda merger: merger.write(HEAD)) == ([], [HEAD])


@pytest.mark.parametrize("heads", [1, 2])
def test_closing_sends_what_was_kept(heads: int) -> None:
    def talk(merger: HeadMerger) -> None:
        for _ in range(heads):
            merger.write(HEAD)
        merger.close()

    assert b"".join(sent_by(talk)[0]) == HEAD * heads + b"closed"

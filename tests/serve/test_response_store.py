"""What is kept of responses, and of whom."""

from __future__ import annotations

import itertools

import pytest

from fastserve.errors import RequestError
from fastserve.serve.response_store import KeptResponse, ResponseStore

IDS = map(str, itertools.count())


def keep(store: ResponseStore, owner: str, num_bytes: int = 10) -> KeptResponse:
    response = KeptResponse(
        response_id=next(IDS), owner=owner, document=b"d" * (num_bytes - 4), messages=b"conv"
    )
    store.keep(response)
    return response


def kept_of(store: ResponseStore, responses: list[KeptResponse]) -> list[bool]:
    def is_kept(response: KeptResponse) -> bool:
        try:
            return store.find(response.response_id, response.owner) is response
        except RequestError:
            return False

    return [is_kept(response) for response in responses]


def test_one_that_is_deleted_may_lose_its_place_by_its_end() -> None:
    store = ResponseStore(4, 100)
    running, other = keep(store, "alice", 60), keep(store, "alice", 30)

    def cancel() -> None:
        running.document = b"d" * 90
        store.update(running)

    running.cancel = cancel
    store.delete(running.response_id, "alice")
    assert kept_of(store, [running, other]) == [False, True]


def test_the_oldest_of_who_keeps_most_goes_first() -> None:
    store = ResponseStore(4, 10**6)
    first = [keep(store, "alice")]
    flood = [keep(store, "bob") for _ in range(50)]
    assert kept_of(store, first) == [True]
    assert kept_of(store, flood) == [False] * 47 + [True] * 3
    second = keep(store, "alice")
    assert kept_of(store, [*first, second, *flood[-2:]]) == [True] * 4
    assert len(store) == 4


def test_so_it_is_where_they_are_too_large_together() -> None:
    store = ResponseStore(1000, 100)
    small = [keep(store, "alice", 10) for _ in range(3)]
    large = [keep(store, "bob", 30) for _ in range(3)]
    assert kept_of(store, small) == [True] * 3
    assert kept_of(store, large) == [False, True, True]
    assert store.num_bytes == 90
    assert kept_of(store, [keep(store, "carol", 101)]) == [False]
    assert kept_of(store, small) == [True] * 3


def test_one_that_grows_is_counted_anew_and_one_that_is_gone_stays_so() -> None:
    store = ResponseStore(1000, 100)
    growing, other = keep(store, "alice", 10), keep(store, "bob", 60)
    growing.document = b"d" * 30
    store.update(growing)
    assert store.num_bytes == 94
    growing.document = b"d" * 46
    store.update(growing)
    assert kept_of(store, [growing, other]) == [True, False]
    store.delete(growing.response_id, "alice")
    store.update(growing)
    assert (len(store), store.num_bytes) == (0, 0)


def test_nobody_sees_or_deletes_what_is_somebody_elses() -> None:
    store = ResponseStore(2, 100)
    response = keep(store, "alice")
    for ask in (store.find, store.delete):
        with pytest.raises(RequestError, match="there is no response"):
            ask(response.response_id, "bob")
    assert kept_of(store, [response]) == [True]


def test_one_that_is_deleted_is_not_generated_on() -> None:
    store = ResponseStore(2, 100)
    response, cancelled = keep(store, "alice"), []
    response.cancel = lambda: cancelled.append(True)
    store.delete(response.response_id, "alice")
    assert cancelled == [True]

"""Limits of a tenant, by a fake clock."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.errors import RateLimitError
from fastserve.serve.key_file import Terms
from fastserve.serve.limiter import Limiter, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_limiter(clock: Clock, **terms: float) -> Limiter:
    return Limiter("alice", Terms(**terms), clock=clock)


@given(
    per_minute=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 200)), max_size=60),
)
def test_a_bucket_gives_no_more_than_its_rate_and_what_it_held(per_minute: int, steps) -> None:
    bucket, now, taken = TokenBucket(per_minute, now=0.0), 0.0, 0.0
    for seconds, amount in steps:
        now += seconds
        amount = min(amount, per_minute)
        if bucket.seconds_until(amount, now) == 0:
            bucket.take(amount, now)
            taken += amount
        assert taken <= per_minute * (1 + now / 60) + 1e-6


@given(per_minute=st.integers(1, 10_000), amount=st.floats(0, 20_000))
def test_after_the_time_that_it_says_a_bucket_has_enough(per_minute: int, amount: float) -> None:
    bucket = TokenBucket(per_minute, now=0.0)
    bucket.take(per_minute, now=0.0)
    wait = bucket.seconds_until(amount, 0.0)
    assert bucket.seconds_until(amount, wait + 1e-6) == pytest.approx(0.0, abs=1e-6)
    assert wait <= 60.0


def test_requests_beyond_the_rate_are_refused_until_it_allows_them_again(clock) -> None:
    limiter = make_limiter(clock, requests_per_minute=6)
    for _ in range(6):
        limiter.enter(is_work=False)
    for _ in range(5):  # who is refused is not counted
        with pytest.raises(RateLimitError) as caught:
            limiter.enter(is_work=False)
    assert caught.value.limit == "requests_per_minute"
    assert caught.value.retry_after_seconds == pytest.approx(10.0)
    assert "requests_per_minute is 6" in str(caught.value)
    assert "try again in 10 seconds" in str(caught.value)
    clock.seconds += 9.9
    with pytest.raises(RateLimitError):
        limiter.enter(is_work=False)
    clock.seconds += 0.2
    limiter.enter(is_work=False)
    with pytest.raises(RateLimitError):
        limiter.enter(is_work=False)


def test_as_many_requests_run_as_may_and_the_end_of_one_lets_another_in(clock) -> None:
    limiter = make_limiter(clock, max_concurrent=2)
    with limiter.admit(10):
        with limiter.admit(10):
            assert limiter.num_running == 2
            with pytest.raises(RateLimitError, match="max_concurrent is 2"), limiter.admit(10):
                pass
            with pytest.raises(RateLimitError) as caught:
                limiter.enter(is_work=True)
            assert caught.value.limit == "max_concurrent"
            limiter.enter(is_work=False)  # looks only
        with limiter.admit(10):
            pass
    assert limiter.num_running == 0


def test_a_request_that_waits_for_its_model_is_under_way_too(clock) -> None:
    limiter = make_limiter(clock, max_concurrent=1)
    with limiter.waiting():
        assert limiter.num_running == 1
        with pytest.raises(RateLimitError, match="1 of its requests are under way"):
            limiter.enter(is_work=True)
        with pytest.raises(RateLimitError, match="max_concurrent is 1"), limiter.waiting():
            pass
    limiter.enter(is_work=True)
    with limiter.admit(5):
        assert limiter.num_running == 1


def test_tokens_are_set_aside_and_those_that_are_not_used_come_back(clock) -> None:
    limiter = make_limiter(clock, tokens_per_minute=1000)
    with limiter.admit(100, num_completions=2, max_tokens=200) as admission:
        assert limiter.tokens_left == 500
        with pytest.raises(RateLimitError) as caught, limiter.admit(501):
            pass
        assert caught.value.limit == "tokens_per_minute"
        assert "of which 500 are left; 501 are asked for" in str(caught.value)
        admission.used_tokens = 150
    assert limiter.tokens_left == 850


def test_a_request_that_fails_has_used_no_tokens(clock) -> None:
    limiter = make_limiter(clock, tokens_per_minute=1000, max_concurrent=1)
    with pytest.raises(ZeroDivisionError), limiter.admit(900):
        raise ZeroDivisionError
    assert limiter.tokens_left == 1000
    assert limiter.num_running == 0


def test_more_than_a_minutes_tokens_need_a_full_bucket_and_overdraw_it(clock) -> None:
    limiter = make_limiter(clock, tokens_per_minute=600)
    with limiter.admit(100) as admission:
        admission.used_tokens = 100
    with pytest.raises(RateLimitError) as caught, limiter.admit(1500):
        pass
    assert caught.value.retry_after_seconds == pytest.approx(10.0)
    clock.seconds += 10.1
    with limiter.admit(1500) as admission:
        admission.used_tokens = 1500
    clock.seconds += 80
    with pytest.raises(RateLimitError), limiter.admit(1):
        pass
    clock.seconds += 20
    with limiter.admit(1):
        pass


def test_completions_without_a_limit_are_expected_to_be_as_long_as_they_were_of_late(clock) -> None:
    limiter = make_limiter(clock, tokens_per_minute=100_000)

    def reserved() -> int:
        with limiter.admit(10, num_completions=1, max_tokens=None) as admission:
            left = limiter.tokens_left
            admission.used_tokens = 10 + 40
        clock.seconds += 60
        assert left is not None
        return 100_000 - left

    assert reserved() == pytest.approx(10 + 256, abs=1)
    for _ in range(60):
        last = reserved()
    assert last == pytest.approx(10 + 40, abs=2)


def test_one_that_asks_for_too_many_tokens_is_in_the_way_of_no_smaller_one(clock) -> None:
    limiter = make_limiter(clock, tokens_per_minute=60)
    with limiter.admit(40) as admission:
        admission.used_tokens = 40
    with pytest.raises(RateLimitError, match="of which 20 are left; 30 are asked for"), limiter.admit(30):
        pass
    limiter.enter(is_work=True)
    with limiter.admit(20) as admission:
        admission.used_tokens = 20


def test_who_has_no_tokens_left_is_refused_at_the_door_until_there_is_one(clock) -> None:
    """Before anything is read of the request, which is what a flood costs least."""
    limiter = make_limiter(clock, tokens_per_minute=60)
    with limiter.admit(60) as admission:
        admission.used_tokens = 61
    with pytest.raises(RateLimitError) as caught:
        limiter.enter(is_work=True)
    assert caught.value.limit == "tokens_per_minute"
    assert "tokens_per_minute is 60, and used up" in str(caught.value)
    assert caught.value.retry_after_seconds == pytest.approx(2.0)
    limiter.enter(is_work=False)
    clock.seconds += 1.9
    with pytest.raises(RateLimitError):
        limiter.enter(is_work=True)
    clock.seconds += 0.2
    limiter.enter(is_work=True)


def test_other_terms_count_at_once_and_rates_that_stay_keep_what_was_taken(clock) -> None:
    limiter = make_limiter(clock, requests_per_minute=2, tokens_per_minute=100)
    for _ in range(2):
        limiter.enter(is_work=False)
    limiter.set_terms(Terms(requests_per_minute=2, max_concurrent=1))
    with pytest.raises(RateLimitError):
        limiter.enter(is_work=False)
    with limiter.admit(10_000), pytest.raises(RateLimitError, match="max_concurrent"), limiter.admit(1):
        pass
    limiter.set_terms(Terms(requests_per_minute=3))
    for _ in range(3):
        limiter.enter(is_work=False)
    limiter.set_terms(Terms())
    with ExitStack() as stack:
        for _ in range(100):
            limiter.enter(is_work=True)
            stack.enter_context(limiter.admit(10_000))
        limiter.set_terms(Terms(max_concurrent=3))
        assert limiter.num_running == 100
    assert limiter.num_running == 0

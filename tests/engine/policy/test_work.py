"""What is expected of sequences is learned by the kinds that they are of."""

from __future__ import annotations

from itertools import count

from fastserve.engine.cost import OnlineStepCost, StepCost
from fastserve.engine.policy.work import ExpectedWork, LengthPredictor
from fastserve.engine.sequence import Sequence

_ids = count()


def work_with(predictor: LengthPredictor | None = None) -> ExpectedWork:
    return ExpectedWork(OnlineStepCost(StepCost()), predictor=predictor)


def sequence_of(tenant: str, endpoint: str, *, prompt_tokens: int = 4) -> Sequence:
    return Sequence(
        sequence_id=next(_ids),
        token_ids=[1] * prompt_tokens,
        num_prompt_tokens=prompt_tokens,
        max_tokens=10_000,
        arrival_seconds=0.0,
        tenant=tenant,
        endpoint=endpoint,
    )


def complete(work: ExpectedWork, num_tokens: int, sequence: Sequence, *, is_complete: bool = True) -> None:
    work.enter(sequence)
    sequence.token_ids += [1] * num_tokens
    sequence.is_complete = is_complete
    work.leave(sequence)


def expected(work: ExpectedWork, sequence: Sequence) -> float:
    work.enter(sequence)
    mean = work.lengths(sequence).mean_left(0)
    work.leave(sequence)
    return mean


def test_two_endpoints_of_a_tenant_learn_apart_and_a_new_one_begins_with_what_the_tenant_shows() -> None:
    work = work_with()
    for _ in range(100):
        complete(work, 10, sequence_of("a", "/v1/chat/completions"))
        complete(work, 500, sequence_of("a", "/v1/responses"))
        complete(work, 4000, sequence_of("b", "/v1/messages"))
    assert expected(work, sequence_of("a", "/v1/chat/completions")) == 10
    assert expected(work, sequence_of("a", "/v1/responses")) == 500
    assert expected(work, sequence_of("a", "/v1/messages")) == expected(work, sequence_of("a", "")) == 255
    assert expected(work, sequence_of("new", "/v1/messages")) > 1000


def test_what_was_aborted_teaches_nothing() -> None:
    work = work_with()
    for _ in range(100):
        complete(work, 10, sequence_of("a", "x"))
        complete(work, 1000, sequence_of("a", "x"), is_complete=False)
    assert expected(work, sequence_of("a", "x")) == 10


class ByPrompt:
    """Long prompts and short ones are two classes; of empty ones nothing can be said."""

    def kind(self, sequence: Sequence) -> str:
        if not sequence.num_prompt_tokens:
            raise ValueError("no prompt")
        return "long" if sequence.num_prompt_tokens > 100 else "short"


def test_a_predictor_tells_requests_of_one_endpoint_apart_and_where_it_fails_the_endpoint_counts() -> None:
    work = work_with(ByPrompt())
    for _ in range(100):
        complete(work, 10, sequence_of("a", "x"))
        complete(work, 500, sequence_of("a", "x", prompt_tokens=200))
        complete(work, 4000, sequence_of("a", "y", prompt_tokens=200))
    assert expected(work, sequence_of("a", "x", prompt_tokens=4)) == 10
    assert expected(work, sequence_of("a", "x", prompt_tokens=200)) == 500
    assert expected(work, sequence_of("a", "y", prompt_tokens=4)) == 4000, "nothing short is known there"
    assert expected(work, sequence_of("a", "x", prompt_tokens=0)) == 255

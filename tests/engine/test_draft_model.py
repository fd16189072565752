"""A draft model's shadows: what they have read, what they guess, and how they are taken back."""

from __future__ import annotations

from dataclasses import replace

from fake_executable import FakeExecutable, NextToken, hashed_token
from fake_mover import Clock

from fastserve.engine.draft_model import DraftModel, Observation
from fastserve.engine.sequence import Residence, Sequence
from fastserve.types import Limits, SamplingParams

LIMITS = Limits(max_tokens=24, max_outputs=12, max_sequences=6, num_blocks=20, max_context=64)


def make_model(next_token: NextToken = hashed_token, **limits: int) -> DraftModel:
    executable = FakeExecutable(replace(LIMITS, **limits), block_size=4, next_token=next_token)
    return DraftModel(executable, clock=Clock())


def make_sequence(
    sequence_id: int = 0, *, prompt: int = 10, completion: int = 0, **params: object
) -> Sequence:
    sequence = Sequence(
        sequence_id=sequence_id,
        token_ids=[(7 * sequence_id + position) % 97 for position in range(prompt)],
        num_prompt_tokens=prompt,
        max_tokens=40,
        arrival_seconds=0.0,
        params=SamplingParams(**params),
        seed=5,
        residence=Residence.FAST,
    )
    for _ in range(completion):
        sequence.token_ids += next_tokens(sequence, 1)
    return sequence


def next_tokens(sequence: Sequence, count: int) -> list[int]:
    """What one that always is right guesses."""
    context = list(sequence.token_ids)
    for _ in range(count):
        draw = len(context) - sequence.num_prompt_tokens
        context.append(hashed_token(context, sequence.params.temperature, sequence.seed, draw))
    return context[len(sequence.token_ids) :]


def num_batches(model: DraftModel) -> int:
    assert isinstance(model._executable, FakeExecutable)
    return len(model._executable.batches)


def test_several_sequences_are_guessed_at_in_one_step_for_each_token() -> None:
    model = make_model()
    sequences = [make_sequence(n, prompt=3 + n, temperature=n / 2, repetition_penalty=1.2) for n in range(3)]
    before = num_batches(model)
    guesses = model.guess([(sequence, 2 + n) for n, sequence in enumerate(sequences)])
    assert guesses == [tuple(next_tokens(sequence, 2 + n)) for n, sequence in enumerate(sequences)]
    assert num_batches(model) - before == 4
    model.check_invariants()


def test_wrong_guesses_are_taken_back_and_those_that_hold_are_not_computed_again() -> None:
    model = make_model()
    sequence = make_sequence()
    model.guess([(sequence, 4)])
    sequence.token_ids += [*next_tokens(sequence, 2), 96]  # two were right
    model.follow(sequence)
    assert model.num_unread(sequence) == 1
    assert model.match_length(sequence) == 0
    assert model.take_observations() == [
        Observation(0, 0, True),
        Observation(0, 1, True),
        Observation(0, 2, False),
    ]
    before = num_batches(model)
    assert model.guess([(sequence, 1)]) == [tuple(next_tokens(sequence, 1))]
    assert num_batches(model) - before == 1
    model.check_invariants()


def test_guesses_beyond_what_has_come_hold_as_long_as_they_agree() -> None:
    model = make_model()
    sequence = make_sequence()
    model.guess([(sequence, 4)])
    sequence.token_ids += next_tokens(sequence, 1)
    before = num_batches(model)
    assert model.guess([(sequence, 3)]) == [tuple(next_tokens(sequence, 3))]
    assert num_batches(model) == before
    assert model.guess([(sequence, 5)]) == [tuple(next_tokens(sequence, 5))]
    assert num_batches(model) == before + 2
    model.check_invariants()


def test_what_was_decoded_without_guesses_is_guessed_at_while_it_is_read() -> None:
    model = make_model()
    sequence = make_sequence(completion=8)
    sequence.token_ids[-3] = 96  # not what the model would have said
    sequence.token_ids[-2:] = [1, 2]
    model.read([sequence], 100)
    seen = [observation.is_right for observation in model.take_observations()]
    assert seen == [True] * 5 + [False] * 3
    assert model.num_unread(sequence) == 1
    model.check_invariants()


def test_long_texts_are_read_in_several_steps() -> None:
    model = make_model()
    sequence = make_sequence(prompt=50)
    model.read([sequence], 20)
    assert model.num_unread(sequence) == 30
    assert model.guess([(sequence, 2)]) == [tuple(next_tokens(sequence, 2))]
    model.check_invariants()


def test_a_prompt_that_begins_like_another_is_read_from_where_they_differ() -> None:
    model = make_model()
    model.guess([(make_sequence(0, prompt=17), 1)])
    first = make_sequence(0, prompt=17)
    model.follow(first)
    other = Sequence(
        sequence_id=1,
        token_ids=[*first.token_ids[:16], 3],
        num_prompt_tokens=17,
        max_tokens=9,
        arrival_seconds=0,
    )
    other.residence = Residence.FAST
    before = num_batches(model)
    model.guess([(other, 1)])
    assert isinstance(model._executable, FakeExecutable)
    assert [batch.num_tokens for batch in model._executable.batches[before:]] == [1]
    model.check_invariants()


def test_the_shadow_used_longest_ago_gives_way() -> None:
    model = make_model(num_blocks=8)
    sequences = [make_sequence(n, prompt=9) for n in range(3)]
    for sequence in sequences:
        model.guess([(sequence, 2)])
    assert model.num_unread(sequences[0]) == 9
    assert model.num_unread(sequences[1]) == model.num_unread(sequences[2]) == 1
    model.check_invariants()
    for sequence in sequences:
        model.release(sequence.sequence_id)
    assert model.pool.num_free == 8


def test_nothing_is_guessed_beyond_the_context_or_a_pool_that_is_too_small() -> None:
    model = make_model(max_context=12)
    assert [len(tokens) for tokens in model.guess([(make_sequence(prompt=10), 5)])] == [2]
    assert model.guess([(make_sequence(1, prompt=13), 5)]) == [()]
    model.check_invariants()
    small = make_model(num_blocks=2)
    assert small.guess([(make_sequence(prompt=10), 5)]) == [()]
    small.check_invariants()

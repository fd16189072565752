from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.engine.encoder import Encoder, EncoderInput
from fastserve.types import Batch, Limits, StepResult


class FakeEncoder:
    """A text's embedding is (length, sum of position * token), computed from the rows of the batch."""

    block_size = 4
    vocab_size = 100

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> StepResult:
        self.batches.append(batch)
        assert batch.num_tokens <= self.limits.max_tokens
        assert batch.num_sequences <= self.limits.max_sequences
        blocks = batch.block_tables.reshape(-1).tolist()
        assert max(blocks) < self.limits.num_blocks
        weighted = batch.positions * batch.token_ids
        starts = batch.sequence_starts
        rows = [(end - start, weighted[start:end].sum()) for start, end in itertools.pairwise(starts)]
        assert [length for length, _ in rows] == batch.context_lengths.tolist()
        return StepResult(outputs={"embedding": np.array(rows, np.float32)})


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=12), min_size=1, max_size=20),
    st.integers(12, 40),
    st.integers(1, 6),
    st.integers(3, 10),
)
def test_every_text_gets_its_own_embedding_however_the_batches_fall(
    texts, max_tokens, max_sequences, num_blocks
):
    limits = Limits(max_tokens=max_tokens, max_sequences=max_sequences, num_blocks=num_blocks)
    embeddings = Encoder(FakeEncoder(limits)).embed(texts)
    expected = [(len(text), sum(p * id_ for p, id_ in enumerate(text))) for text in texts]
    assert embeddings.tolist() == [list(map(float, row)) for row in expected]


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2)), min_size=1, max_size=20),
    st.integers(8, 24),
    st.integers(1, 4),
)
def test_members_of_an_ensemble_run_their_own_inputs_in_shared_steps(sizes, max_tokens, max_sequences):
    executables = [
        FakeEncoder(Limits(max_tokens=max_tokens + index, max_sequences=max_sequences, num_blocks=4 + index))
        for index in range(3)
    ]
    encoder = Encoder(executables[0], others=executables[1:])
    inputs = [EncoderInput([member + 1] * length, member=member) for length, member in sizes]
    groups = list(encoder.groups(inputs))
    assert [one for group in groups for one in group] == inputs
    results = [row.tolist() for group in groups for row in encoder.run(group)]
    assert results == [[n, (m + 1) * n * (n - 1) / 2] for n, m in sizes]
    assert encoder.max_inputs == 3 * max_sequences
    alone = Encoder(executables[0])
    one_member = [EncoderInput(input_.token_ids) for input_ in inputs]
    assert len(groups) <= len(list(alone.groups(one_member)))  # members do not take each other's room


def steps_of(lengths: list[int], limits: Limits) -> list[list[int]]:
    """The lengths of the texts of every step."""
    encoder = FakeEncoder(limits)
    Encoder(encoder).embed([[1] * length for length in lengths])
    return [batch.context_lengths.tolist() for batch in encoder.batches]


def test_texts_that_fit_share_one_step() -> None:
    limits = Limits(max_tokens=16, max_sequences=8, num_blocks=8)
    assert steps_of([5, 5, 6], limits) == [[5, 5, 6]]


@pytest.mark.parametrize(
    ("lengths", "steps"),
    [
        ([5, 5, 6, 1], [[5, 5], [6, 1]]),
        ([4] * 9, [[4] * 3] * 3),
        ([16, 1], [[16], [1]]),
        ([1] * 17, [[1] * 6, [1] * 6, [1] * 5]),
    ],
)
def test_texts_of_several_steps_are_shared_out_evenly(lengths: list[int], steps: list[list[int]]) -> None:
    assert steps_of(lengths, Limits(max_tokens=16, max_sequences=8, num_blocks=8)) == steps


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(12, 40))
def test_no_fewer_steps_would_do_and_none_of_them_could_be_smaller(
    lengths: list[int], max_tokens: int
) -> None:
    def largest(cuts: tuple[int, ...]) -> int:
        return max(sum(lengths[a:b]) for a, b in itertools.pairwise((0, *cuts, len(lengths))))

    steps = steps_of(lengths, Limits(max_tokens=max_tokens, max_sequences=32, num_blocks=64))
    assert list(itertools.chain.from_iterable(steps)) == lengths
    if len(lengths) > 8:
        return  # too many ways to cut them
    ways = [cuts for n in range(len(steps)) for cuts in itertools.combinations(range(1, len(lengths)), n)]
    fitting = [(len(cuts), largest(cuts)) for cuts in ways if largest(cuts) <= max_tokens]
    assert min(fitting) == (len(steps) - 1, max(map(sum, steps)))


def test_the_pool_is_free_again_after_a_failed_step() -> None:
    class FailingEncoder(FakeEncoder):
        def run(self, batch: Batch) -> StepResult:
            if not self.batches:
                self.batches.append(batch)
                raise RuntimeError("kernel")
            return super().run(batch)

    encoder = Encoder(FailingEncoder(Limits(max_tokens=16, num_blocks=2)))
    with pytest.raises(RuntimeError, match="kernel"):
        encoder.embed([[1] * 8])
    assert encoder.embed([[1] * 8]).shape == (1, 2)

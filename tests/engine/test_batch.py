from __future__ import annotations

from fastserve.engine.batch import build_batch
from fastserve.engine.sequence import Sequence
from fastserve.engine.turn import Turn
from fastserve.types import SamplingParams


def sequence(
    token_ids: list[int], *, prompt: int, computed: int, blocks: list[int], **params: object
) -> Sequence:
    return Sequence(
        sequence_id=0,
        token_ids=token_ids,
        num_prompt_tokens=prompt,
        max_tokens=8,
        params=SamplingParams(**params),
        seed=2**64 - 1,
        arrival_seconds=0.0,
        num_computed_tokens=computed,
        block_table=blocks,
    )


def ends(sequence: Sequence, num_tokens: int) -> Turn:
    """A turn that computes the last token."""
    return Turn(sequence, num_tokens, outputs=(sequence,))


def test_a_decode_a_finishing_prompt_and_a_prompts_chunk_share_one_flat_batch() -> None:
    decode = sequence([5, 6, 7], prompt=2, computed=2, blocks=[3])
    last_chunk = sequence([10, 11, 12, 13, 14], prompt=5, computed=2, blocks=[0, 4])
    chunk = sequence([20, 21, 22], prompt=3, computed=0, blocks=[1])
    batch = build_batch([ends(decode, 1), ends(last_chunk, 3), Turn(chunk, 2, outputs=())], vocab_size=97)
    assert batch.token_ids.tolist() == [7, 12, 13, 14, 20, 21]
    assert batch.positions.tolist() == [2, 2, 3, 4, 0, 1]
    assert batch.sequence_starts.tolist() == [0, 1, 4, 6]
    assert batch.context_lengths.tolist() == [3, 5, 2]
    assert batch.block_tables.tolist() == [[3, 0], [0, 4], [1, 0]]
    assert batch.output_rows.tolist() == [0, 3]
    assert batch.sampling is not None
    assert batch.sampling.draws.tolist() == [1, 0]
    assert batch.sampling.seeds.tolist() == [2**64 - 1] * 2


def test_a_draft_has_a_row_and_an_output_that_follows_all_before_it() -> None:
    verified = sequence([5, 6, 7], prompt=2, computed=2, blocks=[3], presence_penalty=0.5)
    other = sequence([8, 9], prompt=1, computed=1, blocks=[1])
    batch = build_batch(
        [Turn(verified, 1, outputs=(verified,), drafts=(20, 21)), ends(other, 1)], vocab_size=97
    )
    assert batch.token_ids.tolist() == [7, 20, 21, 9]
    assert batch.positions.tolist() == [2, 3, 4, 1]
    assert batch.sequence_starts.tolist() == [0, 3, 4]
    assert batch.context_lengths.tolist() == [5, 2]
    assert batch.output_rows.tolist() == [0, 1, 2, 3]
    sampling = batch.sampling
    assert sampling is not None
    assert sampling.draws.tolist() == [1, 2, 3, 1]
    assert sampling.history_ids.tolist() == [5, 6, 7, 5, 6, 7, 20, 5, 6, 7, 20, 21]
    assert sampling.history_starts.tolist() == [0, 3, 7, 12, 12]
    assert sampling.history_prompt_lengths.tolist() == [2, 2, 2, 0]


def test_the_history_is_only_carried_where_a_penalty_reads_it() -> None:
    plain = sequence([5, 6, 7], prompt=2, computed=2, blocks=[0])
    penalized = sequence([8, 9, 10], prompt=1, computed=2, blocks=[1], repetition_penalty=1.3)
    sampling = build_batch([ends(plain, 1), ends(penalized, 1)], vocab_size=97).sampling
    assert sampling is not None
    assert sampling.history_starts.tolist() == [0, 0, 3]
    assert sampling.history_prompt_lengths.tolist() == [0, 1]
    assert sampling.history_ids.tolist() == [8, 9, 10]


def test_biases_are_ranges_of_one_flat_array() -> None:
    biased = sequence([1], prompt=1, computed=0, blocks=[0], logit_bias={4: -100.0, 2: 1.5})
    plain = sequence([1], prompt=1, computed=0, blocks=[1])
    sampling = build_batch([ends(plain, 1), ends(biased, 1)], vocab_size=97).sampling
    assert sampling is not None
    assert sampling.bias_starts.tolist() == [0, 0, 2]
    assert dict(zip(sampling.bias_ids.tolist(), sampling.bias_values.tolist(), strict=True)) == {
        4: -100.0,
        2: 1.5,
    }

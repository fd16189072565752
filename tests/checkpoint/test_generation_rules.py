"""What generation_config.json says of targets, and what it cannot say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoint.generation import TargetRules, read_target_rules
from fastserve.errors import CheckpointError, OptionError, UnsupportedError
from fastserve.types import SamplingParams


def read(folder: Path, **settings: Any) -> TargetRules:
    (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 9, **settings}))
    return read_target_rules(folder, {}, vocab_size=10)


def test_tokens_that_no_target_has_are_bad_words_of_one_token_that_end_no_text(tmp_path: Path) -> None:
    rules = read(
        tmp_path,
        eos_token_id=0,
        bad_words_ids=[[9], [0], [1, 2], [3]],
        suppress_tokens=[4, 3],
        bos_token_id=5,
    )
    assert rules == TargetRules(
        start_token_id=9, suppressed_token_ids=(3, 4, 9), banned_words=((1, 2),), eos_token_ids=(0,)
    )


def test_what_may_not_follow_is_what_the_processors_of_transformers_forbid(tmp_path: Path) -> None:
    import torch
    from transformers import (
        MinLengthLogitsProcessor,
        MinNewTokensLengthLogitsProcessor,
        NoBadWordsLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
    )

    rng = random.Random(0)
    words = [[1, 2], [3, 4, 5], [6, 6], [2]]
    for _ in range(300):
        size, least, new = rng.choice([0, 2, 3]), rng.choice([0, 5]), rng.choice([0, 3])
        settings = {"no_repeat_ngram_size": size, "min_length": least, "min_new_tokens": new}
        rules = read(tmp_path, **settings, bad_words_ids=words, eos_token_id=[0, 7])
        ids = [9, *(rng.randrange(10) for _ in range(rng.randrange(9)))]
        scores, tokens = torch.zeros(1, 10), torch.tensor([ids])
        processors: list[Any] = [NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor([0, 7]))]
        if size:
            processors.append(NoRepeatNGramLogitsProcessor(size))
        if least:
            processors.append(MinLengthLogitsProcessor(least, eos_token_id=[0, 7], device="cpu"))
        if new:
            processors.append(MinNewTokensLengthLogitsProcessor(1, new, eos_token_id=[0, 7], device="cpu"))
        for processor in processors:
            scores = processor(tokens, scores)
        expected = torch.where(scores[0] == float("-inf"))[0].tolist()
        assert sorted(rules.banned(ids)) == expected, (ids, settings)


def test_settings_of_another_model_file_count_only_where_there_is_no_own(tmp_path: Path) -> None:
    config = {"decoder_start_token_id": 3, "num_beams": 4, "forced_eos_token_id": 1}
    assert read_target_rules(tmp_path, config, vocab_size=10).num_beams == 4
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    rules = read_target_rules(tmp_path, config, vocab_size=10)
    assert (rules.num_beams, rules.start_token_id, rules.forced_eos_token_id) == (1, 3, 1)


def test_a_request_that_leaves_the_search_to_the_model_gets_its_own(tmp_path: Path) -> None:
    rules = read(tmp_path, num_beams=4, length_penalty=0.6, early_stopping="never")
    own = rules.with_search(SamplingParams())
    assert (own.num_beams, own.length_penalty, own.early_stopping) == (4, 0.6, "never")
    assert rules.with_search(SamplingParams(length_penalty=2.0)).length_penalty == 2.0
    assert rules.with_search(SamplingParams(length_penalty=2.0)).early_stopping == "never"
    asked = SamplingParams(num_beams=2)
    assert rules.with_search(asked) is asked
    for against in ({"temperature": 1.0}, {"n": 5}, {"logprobs": 1}, {"num_beams": 1}):
        assert rules.with_search(SamplingParams(**against)).num_beams == 1
    with pytest.raises(OptionError, match=r"length_penalty=2\.0 is for beam search, and num_beams is 1"):
        read(tmp_path).with_search(SamplingParams(length_penalty=2.0))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"encoder_no_repeat_ngram_size": 3}, UnsupportedError),
        ({"repetition_penalty": 1.2}, UnsupportedError),
        ({"num_beam_groups": 2}, UnsupportedError),
        ({"no_repeat_ngram_size": 1}, UnsupportedError),
        ({"forced_decoder_ids": [[1, 2]]}, UnsupportedError),
        ({"renormalize_logits": True, "min_length": 5}, UnsupportedError),
        ({"no_repeat_ngram_size": -1}, CheckpointError),
        ({"num_beams": "4"}, CheckpointError),
        ({"length_penalty": "long"}, CheckpointError),
        ({"early_stopping": "soon"}, CheckpointError),
        ({"min_length": 2.5}, CheckpointError),
    ],
)
def test_a_setting_is_honoured_or_refused_by_name(
    settings: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error, match=next(iter(settings))):
        read(tmp_path, **settings)
    plain = {"repetition_penalty": 1.0, "num_beam_groups": 1, "encoder_no_repeat_ngram_size": 0}
    assert read(tmp_path, **plain, forced_decoder_ids=None, sequence_bias={}) == read(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"bad_words_ids": 5},
        {"bad_words_ids": {"a": 1}},
        {"bad_words_ids": [[[1]]]},
        {"suppress_tokens": "1"},
        {"suppress_tokens": [10]},
        {"suppress_tokens": [[1]]},
        {"suppress_tokens": [None]},
        {"forced_eos_token_id": "1"},
        {"decoder_start_token_id": True},
    ],
)
def test_what_is_no_token_is_refused_by_name(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"token|bad_words_ids"):
        read(tmp_path, **settings)

"""How much a text that was written shares with the one that was wanted: BLEU, chrF, ROUGE, exact match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

from fastserve.errors import DataError, UnsupportedError
from fastserve.evaluate.answer_match import answer_tokens, is_word_alone


def overlap_metrics(said: Seq[str], targets: Seq[str]) -> dict[str, float]:
    """`bleu` and `chrf` of the corpus (sacrebleu; 0 to 100), and means over rows of `rouge1`, `rouge2`,
    `rougeL` and `exact_match` (0 to 1).

    BLEU cuts Chinese by character, where the targets are mostly that.

    Raises:
        DataError: there are no rows.
        UnsupportedError: sacrebleu is not installed.
    """
    if not targets:
        raise DataError("there are no texts to score", hint="give rows")
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise UnsupportedError(
            f"BLEU needs sacrebleu: {error}", hint="pip install 'fastserve-llm[tune]'"
        ) from error

    letters = [char for target in targets for char in target if char.isalpha()]
    is_unspaced = sum(map(is_word_alone, letters)) > len(letters) / 2
    # `force`: what it warns of otherwise, texts that are tokenized, is how some sets are.
    bleu = BLEU(tokenize="zh" if is_unspaced else "13a", force=True)
    rows = [rouge(a, b) for a, b in zip(said, targets, strict=True)]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in ("rouge1", "rouge2", "rougeL")}
    exact = sum(a.strip() == b.strip() for a, b in zip(said, targets, strict=True)) / len(rows)
    return {
        "bleu": float(bleu.corpus_score(list(said), [list(targets)]).score),
        "chrf": float(CHRF().corpus_score(list(said), [list(targets)]).score),
        **means,
        "exact_match": exact,
    }


def rouge(said: str, target: str) -> dict[str, float]:
    """The F1 of shared words (ROUGE-1), pairs of words (ROUGE-2), and of the longest common subsequence
    (ROUGE-L, of the text as one sentence), of Lin 2004 (aclanthology W04-1013, sections 2 and 3).

    Words are those of `answer_tokens`: lower case, no punctuation, Han characters alone; articles are left
    out.

    >>> rouge("the cat sat", "a cat sat down")["rouge1"]
    0.8
    """
    a, b = answer_tokens(said), answer_tokens(target)
    return {
        "rouge1": _f1(_shared(a, b, 1), len(a), len(b)),
        "rouge2": _f1(_shared(a, b, 2), len(a) - 1, len(b) - 1),
        "rougeL": _f1(_longest_common(a, b), len(a), len(b)),
    }


def _shared(a: Seq[str], b: Seq[str], size: int) -> int:
    grams = [Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1)) for words in (a, b)]
    return sum((grams[0] & grams[1]).values())


def _longest_common(a: Seq[str], b: Seq[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for index, other in enumerate(b, 1):
            above = row[index]
            row[index] = diagonal + 1 if word == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]


def _f1(num_shared: int, num_said: int, num_target: int) -> float:
    return 2 * num_shared / (num_said + num_target) if num_shared else 0.0

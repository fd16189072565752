"""How byte-pair tokenizers cut a text into words before pairs are merged: patterns as published."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}+|\p{{N}}{digits}"
    r"| ?[^\s{others}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = _GPT4.format(letters=r"\p{L}", others=r"\p{L}", digits="")
QWEN35 = _GPT4.format(letters=r"[\p{L}\p{M}]", others=r"\p{L}\p{M}", digits="")
LLAMA3 = _GPT4.format(letters=r"\p{L}", others=r"\p{L}", digits="{1,3}")

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (  # a word ends where capitals begin
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%(ending)s"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%(ending)s"
    r"|\p{N}%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = _CASED % {"ending": "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "digits": "{1,3}"}
TEKKEN = _CASED % {"ending": "", "digits": ""}
DIGIT = r"\p{N}"


def cut_words(patterns: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Cut by each pattern in turn, gaps kept, and spell the pieces in GPT-2's alphabet of bytes."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, byte_level])

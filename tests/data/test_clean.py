from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastserve.data.clean import Cleaner, CleanOptions
from fastserve.data.problem import ProblemLog
from fastserve.data.row import Row
from fastserve.errors import OptionError


def clean(text: str, **options: object) -> str:
    return Cleaner(CleanOptions(**options), ProblemLog()).clean_text(text)  # type: ignore[arg-type]


@settings(deadline=None)  # it says how busy the machine is
@given(st.text())
@example("e\u0301\u0323 한글 ｶﾞ \u1100\u1161\u11a8 ﬁ \u09c7\u09be")
@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_text_comes_out_in_the_normal_form(form: str, text: str) -> None:
    plain = Cleaner(CleanOptions(normalize="none"), ProblemLog()).clean_text(text)
    assert clean(text, normalize=form.lower()) == unicodedata.normalize(form, plain).strip()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("a\x00b\u200bc\ufeff", "abc"),
        ("one\r\ntwo\rthree\x0c", "one\ntwo\nthree"),
        ("it\x92s \x96 caf\xe9", "it’s – café"),  # Windows-1252 that was read as Latin-1
        ("\u202eabc\u202c", "abc"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),  # joiners are letters' business
        ("  tab\tstays  ", "tab\tstays"),
    ],
)
def test_control_characters_go_and_letters_stay(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("<p>Fish &amp; chips</p><p>2 &lt; 3</p>", "Fish & chips\n\n2 < 3"),
        ("a<script>x < 1; '</p>'</script>b<!-- <b> -->c", "abc"),
        ("I <3 you, x<y and y>z", "I <3 you, x<y and y>z"),
        ('<a href="x">link</a><br/>&#20013;&#x6587; &foo;', "link\n中文 &foo;"),
    ],
)
def test_html_becomes_its_text(raw: str, cleaned: str) -> None:
    assert clean(raw, strip_html=True) == cleaned


def test_space_is_collapsed_where_it_is_asked_for() -> None:
    assert clean("a  b\t\tc \n \n d", collapse_space=True) == "a b c\nd"
    assert clean("a  b", collapse_space=False) == "a  b"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mail a.b+c@ex-ample.co.uk!", "mail [EMAIL]!"),
        ("call +44 20 7946 0958 or (030) 1234567", "call [PHONE] or [PHONE]"),
        ("手机13812345678。", "手机13812345678。"),
        ("手机 13812345678。", "手机 [PHONE]。"),
        ("card 4111 1111 1111 1111", "card [CARD]"),
        ("no card 4111 1111 1111 1112", "no card 4111 1111 1111 1112"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN [IBAN]."),
        ("身份证 11010519491231002X", "身份证 [PERSON]"),
        ("not 110105194912310021", "not 110105194912310021"),
        ("at 192.168.0.1 and ::1, not 300.1.1.1", "at [IP] and [IP], not 300.1.1.1"),
        (
            "version 1.2.3, in 2026-11-27, 10:30:15, room 12345",
            "version 1.2.3, in 2026-11-27, 10:30:15, room 12345",
        ),
    ],
)
def test_personal_data_is_masked_where_its_check_digits_are_right(text: str, masked: str) -> None:
    kinds = ("email", "phone", "card", "iban", "person", "ip")
    assert clean(text, mask_pii=kinds) == masked


def test_entities_move_with_their_text() -> None:
    text = "  <b>Zoe\u0308</b> wrote to\x00 <i>Anne</i> at ann@example.org "
    spans = [{"start": text.index("Zoe"), "end": text.index("Zoe") + 4, "label": "PER"}]
    spans.append({"start": text.index("<i>"), "end": text.index("</i>") + 4, "label": "PER"})
    row = Row({"text": text, "entities": spans})
    options = CleanOptions(strip_html=True, mask_pii=("email",), collapse_space=True)
    cleaned = Cleaner(options, ProblemLog()).clean(row)
    assert cleaned is not None
    assert cleaned["text"] == "Zoë wrote to Anne at [EMAIL]"
    found = [cleaned["text"][span["start"] : span["end"]] for span in cleaned["entities"]]
    assert found == ["Zoë", "Anne"]


@settings(deadline=None)  # it says how busy the machine is
@given(st.text("ae\u0308\u200b <b>\n", max_size=30), st.integers(0, 29), st.integers(1, 10))
def test_answers_are_in_their_context_whatever_is_cleaned(text: str, start: int, length: int) -> None:
    answer = text[start : start + length]
    if not answer.strip():
        return
    row = Row({"context": text, "question": "?", "answers": {"text": [answer], "answer_start": [start]}})
    options = CleanOptions(strip_html=True, collapse_space=True)
    log = ProblemLog({"answer-offset": "drop"})
    cleaned = Cleaner(options, log).clean(row)
    if cleaned is not None:
        (found,), (place,) = cleaned["answers"]["text"], cleaned["answers"]["answer_start"]
        assert found
        assert cleaned["context"].startswith(found, place)


def test_tokens_that_vanish_are_reported_and_tags_follow() -> None:
    row = Row({"tokens": ["a", "\u200b", "b"], "tags": ["B-X", "I-X", "O"]}, file="f", line=4)
    log = ProblemLog({"blank-token": "repair"})
    assert Cleaner(CleanOptions(), log).clean(row) == {"tokens": ["a", "b"], "tags": ["B-X", "O"]}
    assert log.count("blank-token", "repair") == 1


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "\u200b"}, "empty-row"),
        ({"text": "abc"}, "too-short"),
        ({"text": "a" * 11}, "too-long"),
        ({"source": "abc", "target": "abcdefg"}, "ratio"),
    ],
)
def test_what_is_too_short_too_long_or_out_of_proportion_is_left_out(row: dict[str, str], kind: str) -> None:
    log = ProblemLog()
    options = CleanOptions(min_length=4, max_length=10, max_ratio=2)
    assert Cleaner(options, log).clean(Row(row)) is None
    assert log.count(kind, "drop") == 1


def test_what_was_changed_is_counted() -> None:
    cleaner = Cleaner(CleanOptions(), ProblemLog())
    for text in ("plain", "e\u0301", "\x00a", " a"):
        cleaner.clean(Row({"text": text}))
    assert cleaner.counts == {"nfc": 1, "control characters": 1, "ends": 1}


@pytest.mark.parametrize(
    "options", [{"max_ratio": 0.5}, {"min_length": 5, "max_length": 4}, {"normalize": "x"}]
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(reversed(options)))):
        CleanOptions(**options)  # type: ignore[arg-type]

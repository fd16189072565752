"""Cleaning of texts: HTML, Unicode, control characters, personal data, space. Spans move with their text."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.data.edit import Edit, apply_edits, move_offset
from fastserve.data.privacy import PII_KINDS, find_pii
from fastserve.data.problem import DROP, ERROR, ProblemLog
from fastserve.data.row import TEXT_FIELDS, Row, take_tokens_out
from fastserve.option import check_choice, check_integer, check_number

NORMAL_FORMS = ("nfc", "nfkc", "none")


@dataclass(frozen=True, slots=True)
class CleanOptions:
    """What is cleaned, and which rows are left out.

    Attributes:
        normalize: the Unicode normal form: `nfc`, `nfkc` (full-width letters become plain ones, ligatures are
            taken apart) or `none`.
        strip_html: take tags out and read character references.
        mask_pii: kinds of personal data that are masked, of `PII_KINDS`.
        collapse_space: one space in the place of several, and of tabs.
        min_length, max_length: of a row's texts together, in characters; a row beyond is left out.
        max_ratio: the most by which source and target may differ, longer by shorter; None for any.

    Control characters other than tabs and line ends, and space at the ends of a text, always go.

    Raises:
        OptionError: an option is out of range.
    """

    normalize: str = "nfc"
    strip_html: bool = False
    mask_pii: tuple[str, ...] = ()
    collapse_space: bool = False
    min_length: int = 1
    max_length: int | None = None
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        check_choice("normalize", self.normalize, NORMAL_FORMS)
        for kind in self.mask_pii:
            check_choice("mask_pii", kind, PII_KINDS)
        check_integer("min_length", self.min_length, low=0)
        if self.max_length is not None:
            check_integer("max_length", self.max_length, low=max(self.min_length, 1))
        if self.max_ratio is not None:
            check_number("max_ratio", self.max_ratio, 1, 1e9)


class Cleaner:
    """Cleans rows; `counts` says how many texts each kind of cleaning has changed.

    >>> cleaner = Cleaner(CleanOptions(strip_html=True), ProblemLog())
    >>> row = Row({"text": "<b>Zoe\\u0308</b> ran", "entities": [{"start": 3, "end": 7, "label": "PER"}]})
    >>> cleaner.clean(row)
    {'text': 'Zoë ran', 'entities': [{'start': 0, 'end': 3, 'label': 'PER'}]}
    """

    def __init__(self, options: CleanOptions, log: ProblemLog) -> None:
        self._options = options
        self._log = log
        self._steps = _steps(options)
        self.counts: Counter[str] = Counter()

    def clean(self, row: Row) -> Row | None:
        """The row with clean texts; None where it is left out: nothing remains, or it is too short or long.

        Raises:
            DataError: a problem is fatal, and the log raises at once.
        """
        for field in TEXT_FIELDS:
            if isinstance(row.get(field), str):
                row[field] = self._clean_field(row, field)
        if "choices" in row:
            row["choices"] = [self.clean_text(choice) for choice in row["choices"]]
        for message in row.get("messages", ()):
            message["content"] = self.clean_text(message["content"])
        if "tokens" in row:
            row["tokens"] = [self.clean_text(token) for token in row["tokens"]]
        return row if self._is_kept(row) else None

    def clean_text(self, text: str, spans: Sequence[dict[str, Any]] = ()) -> str:
        """One text, clean; `spans` of it are moved in place."""
        for name, find in self._steps:
            if edits := find(text):
                self.counts[name] += 1
                for span in spans:
                    span["start"] = move_offset(edits, span["start"], is_end=False)
                    span["end"] = move_offset(edits, span["end"], is_end=True)
                text = apply_edits(text, edits)
        return text

    def _clean_field(self, row: Row, field: str) -> str:
        text = row[field]
        if field == "context" and "answers" in row:
            return self._clean_context(row)
        spans = []
        if field == "text":
            spans = [*row.get("entities", ()), *(row[name] for name in ("head", "tail") if name in row)]
        cleaned = self.clean_text(text, spans)
        for span in spans:
            _trim(cleaned, span)
            if "text" in span:
                span["text"] = cleaned[span["start"] : span["end"]]
        if "entities" in row and field == "text":
            row["entities"] = [span for span in row["entities"] if span["start"] < span["end"]]
        return cleaned

    def _clean_context(self, row: Row) -> str:
        """A context whose answers move with it."""
        answers = row["answers"]
        spans = [
            {"start": start, "end": start + len(text)}
            for text, start in zip(answers["text"], answers["answer_start"], strict=True)
        ]
        cleaned = self.clean_text(row["context"], spans)
        for span in spans:
            _trim(cleaned, span)
        row["answers"] = {
            "text": [cleaned[span["start"] : span["end"]] for span in spans],
            "answer_start": [span["start"] for span in spans],
        }
        return cleaned

    def _is_kept(self, row: Row) -> bool:
        def report(kind: str, message: str) -> bool:
            return self._log.report(kind, row.file, row.line, message) not in (ERROR, DROP)

        for field in TEXT_FIELDS:
            if field in row and isinstance(row[field], str) and not row[field]:
                return report("empty-row", f"nothing is left of field {field!r} when it is clean")
        if "tokens" in row and not all(row["tokens"]):
            index = row["tokens"].index("")
            message = f"nothing is left of token {index} when it is clean"
            if self._log.report("blank-token", row.file, row.line, message) in (ERROR, DROP):
                return False
            take_tokens_out(row, [at for at, token in enumerate(row["tokens"]) if not token])
            if not row["tokens"]:
                return report("empty-row", "no token is left")
        if not all(_has_span(row.get(name)) for name in ("head", "tail")):
            return report("bad-span", "nothing is left of an argument when the text is clean")
        if not all(row.get("answers", {}).get("text", ())):
            return report("answer-offset", "nothing is left of an answer when the context is clean")
        length = text_length(row)
        if length < self._options.min_length:
            return report("too-short", f"{length} characters; the limit is {self._options.min_length}")
        if self._options.max_length is not None and length > self._options.max_length:
            return report("too-long", f"{length} characters; the limit is {self._options.max_length}")
        if self._options.max_ratio is not None and "source" in row and "target" in row:
            lengths = sorted([len(row["source"]), len(row["target"])])
            if lengths[1] > self._options.max_ratio * lengths[0]:
                message = f"{lengths[1]} characters beside {lengths[0]}"
                return report("ratio", f"{message}; the limit is {self._options.max_ratio:g} times")
        return True


def text_length(row: Row) -> int:
    """Characters of a row's texts together."""
    length = sum(len(row[field]) for field in TEXT_FIELDS if isinstance(row.get(field), str))
    if "text" not in row and "tokens" in row:
        length += sum(map(len, row["tokens"])) + len(row["tokens"]) - 1
    return length + sum(len(message["content"]) for message in row.get("messages", ()))


def _has_span(span: Any) -> bool:
    return span is None or not isinstance(span, dict) or span["start"] < span["end"]


def _trim(text: str, span: dict[str, Any]) -> None:
    """Leave out space at the ends of a span."""
    inside = text[span["start"] : span["end"]]
    span["end"] -= len(inside) - len(inside.rstrip())
    span["start"] = min(span["start"] + len(inside) - len(inside.lstrip()), span["end"])


_Step = tuple[str, Callable[[str], list[Edit]]]


def _steps(options: CleanOptions) -> list[_Step]:
    steps: list[_Step] = []
    if options.strip_html:
        steps.append(("html", _html_edits))
    steps.append(("control characters", _control_edits))
    if options.normalize != "none":
        steps.append((options.normalize, lambda text: _normal_edits(text, options.normalize.upper())))
    if options.mask_pii:
        steps.append(("personal data", lambda text: find_pii(text, options.mask_pii)))
    if options.collapse_space:
        steps.append(("space", _space_edits))
    steps.append(("ends", _end_edits))
    return steps


_HTML = re.compile(
    r"<!--.*?-->|<(script|style)\b[^<>]*>.*?</\1\s*>|<!doctype\b[^<>]*>|</?([a-z][a-z0-9]*)(?:\s[^<>]*)?/?>"
    r"|&(?:#\d{1,7}|#x[\da-f]{1,6}|[a-z][a-z\d]{1,31});",
    re.IGNORECASE | re.DOTALL,
)
_BLOCKS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "br",
        "dd",
        "div",
        "dl",
        "dt",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "hr",
        "li",
        "ol",
        "p",
        "pre",
        "section",
        "table",
        "td",
        "th",
        "tr",
        "ul",
    ]
)

# https://html.spec.whatwg.org/multipage/indices.html, and what older pages have.
_ELEMENTS = _BLOCKS | frozenset(
    [
        "a",
        "abbr",
        "acronym",
        "audio",
        "b",
        "base",
        "basefont",
        "bdi",
        "bdo",
        "big",
        "body",
        "button",
        "canvas",
        "caption",
        "center",
        "cite",
        "code",
        "col",
        "colgroup",
        "data",
        "datalist",
        "del",
        "details",
        "dfn",
        "dialog",
        "dir",
        "em",
        "embed",
        "fieldset",
        "figcaption",
        "figure",
        "font",
        "footer",
        "form",
        "frame",
        "frameset",
        "head",
        "header",
        "hgroup",
        "html",
        "i",
        "iframe",
        "img",
        "input",
        "ins",
        "kbd",
        "label",
        "legend",
        "link",
        "main",
        "map",
        "mark",
        "meta",
        "meter",
        "nav",
        "noframes",
        "noscript",
        "object",
        "optgroup",
        "option",
        "output",
        "param",
        "picture",
        "progress",
        "q",
        "rp",
        "rt",
        "ruby",
        "s",
        "samp",
        "search",
        "select",
        "small",
        "source",
        "span",
        "strike",
        "strong",
        "style",
        "sub",
        "summary",
        "sup",
        "svg",
        "tbody",
        "template",
        "textarea",
        "tfoot",
        "thead",
        "time",
        "title",
        "track",
        "tt",
        "u",
        "var",
        "video",
        "wbr",
    ]
)


def _html_edits(text: str) -> list[Edit]:
    """Comments, scripts and tags go, those of blocks leave a line end; character references are read."""
    edits = []
    for match in _HTML.finditer(text):
        if match[0].startswith("&"):
            new = html.unescape(match[0])
            if new == match[0]:  # no name of HTML: &foo;
                continue
        else:
            name = (match[2] or "").lower()
            if name and name not in _ELEMENTS:  # x<y and y>z
                continue
            new = "\n" if name in _BLOCKS else ""
        edits.append(Edit(*match.span(), new))
    return edits


# C0 but tab and line feed, DEL, C1, soft hyphen, zero-width characters that join nothing, marks of direction,
# noncharacters. U+200C and U+200D are letters' business in Persian, Hindi and emoji.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufdd0-\ufdef\ufffe\uffff]"
)
_BECOMES = {"\r": "\n", "\x0b": "\n", "\x0c": "\n"}


def _control_edits(text: str) -> list[Edit]:
    """Control characters go; those that end lines become line feeds. C1 codes are what Windows-1252 has at
    their place, as HTML reads them too: text that was read as Latin-1 once."""
    return [
        Edit(match.start(), match.end(), _BECOMES.get(match[0], _c1_text(match[0])))
        for match in _CONTROL.finditer(text.replace("\r\n", "\x00\n") if "\r\n" in text else text)
    ]


def _c1_text(character: str) -> str:
    if not "\x80" <= character <= "\x9f":
        return ""
    return character.encode("latin-1").decode("cp1252", errors="ignore")


def _normal_edits(text: str, form: str) -> list[Edit]:
    """Characters with their marks, where the normal form has others."""
    if text.isascii() or unicodedata.is_normalized(form, text):  # type: ignore[arg-type]
        return []
    edits = []
    start = 0
    for index in range(1, len(text) + 1):
        if index < len(text) and _joins(text[index]):
            continue
        part = text[start:index]
        normal = unicodedata.normalize(form, part)  # type: ignore[arg-type]
        if normal != part:
            edits.append(Edit(start, index, normal))
        start = index
    return edits


def _joins(character: str) -> bool:
    """Whether a character may combine with the one before it: marks, and vowels and finals of Hangul."""
    return not character.isascii() and (
        unicodedata.category(character).startswith("M")
        or "\u1160" <= character <= "\u11ff"
        or "\uff9e" <= character <= "\uffdc"
        or "\u3130" <= character <= "\u318f"
    )


_SPACES = re.compile(r"[^\S\n]*\n\s*|[^\S\n]{2,}|[^\S\n ]")


def _space_edits(text: str) -> list[Edit]:
    """One space for several, one line end for several; no space at line ends."""
    return [
        Edit(*match.span(), new)
        for match in _SPACES.finditer(text)
        if (new := "\n" if "\n" in match[0] else " ") != match[0]
    ]


def _end_edits(text: str) -> list[Edit]:
    edits = []
    if begun := len(text) - len(text.lstrip()):
        edits.append(Edit(0, begun, ""))
    if (ended := len(text.rstrip())) < len(text) and ended > begun:
        edits.append(Edit(ended, len(text), ""))
    return edits

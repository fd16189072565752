"""How files are to be read, where their names and contents do not tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastserve.errors import OptionError
from fastserve.option import check_choice

FORMATS = ("jsonl", "json", "csv", "tsv", "conll", "squad", "parallel", "text", "marked", "parquet")
UNITS = ("line", "paragraph", "document")
SKIPPED = "-"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read a file.

    Attributes:
        format: one of FORMATS; None tells it from the name and the beginning of the file.
        encoding: a name that Python knows; None detects it.
        columns: names of the columns of CSV, TSV or CoNLL files without a header, in order; `-` leaves one
            out, a name that occurs twice makes a list.
        fields: what a field is called in the file, by the field: {"label": "category"}.
        roles: which role a speaker of a dialogue has: {"usr": "user"}.
        key_field: the field that takes the key of rows which stand under one in a JSON object.
        unit: what one row of plain text is: a line, a paragraph (blank lines part them), the document.
        label_separator: what parts several labels in one cell.
        label: what all rows are labelled, of a file that has one class.

    Raises:
        OptionError: an option is unknown, or columns are named that rows cannot have.
    """

    format: str | None = None
    encoding: str | None = None
    columns: tuple[str, ...] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    key_field: str | None = None
    unit: str = "line"
    label_separator: str = ","
    label: str | None = None

    def __post_init__(self) -> None:
        if self.format is not None:
            check_choice("format", self.format, FORMATS)
        check_choice("unit", self.unit, UNITS)
        if self.columns is not None and not any(name != SKIPPED for name in self.columns):
            raise OptionError("columns names no column", hint="such as text,label", option="columns")
        if not self.label_separator:
            raise OptionError("label_separator is empty", hint="such as ,", option="label_separator")

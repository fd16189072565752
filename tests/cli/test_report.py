from __future__ import annotations

import pytest

from fastserve.cli.report import format_bytes, print_table

HEADER = ("file", "sha256")
ROWS = [("a.gguf", "0123456789" * 3), ("tokenizer.json", "")]


def test_off_a_terminal_columns_are_parted_by_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(HEADER, ROWS)
    assert capsys.readouterr().out == f"file\tsha256\na.gguf\t{ROWS[0][1]}\ntokenizer.json\t\n"


@pytest.mark.parametrize(
    ("columns", "folded"),
    [
        (46, ["0123456789" * 3]),
        (41, ["0123456789" * 2 + "01234", "56789"]),
        (5, ["0123456789" * 2, "0123456789"]),  # narrower than sense: 20 columns at least
    ],
)
def test_on_a_terminal_columns_are_aligned_and_the_last_is_folded_into_its_width(
    columns: int, folded: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(HEADER, ROWS)
    first, *others = folded
    assert capsys.readouterr().out.splitlines() == [
        "file            sha256",
        f"a.gguf          {first}",
        *(f"{'':16}{other}" for other in others),
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98373789, "98.4 MB"), (3 * 10**15, "3000.0 TB")],
)
def test_sizes_are_in_decimal_units(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text

"""The data card as a page of HTML that stands alone: no script, nothing from elsewhere, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from fastserve.data.card import DataCard

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884 }
td { vertical-align: top }
th { font-weight: 600; }
.bar { background: #8883; width: 12rem; height: .7rem; }
.bar div { background: #0072b2; height: 100%; }
"""


def card_page(card: DataCard) -> str:
    """The page of a card: its tables, and a bar for each label's share of train."""
    parts = [f"<h1>Data card: {escape(card.task)}</h1>"]
    for title, header, rows in card.tables():
        parts.append(f"<h2>{escape(title)}</h2>")
        bars = _bars(card) if title == "Labels" else None
        parts.append(_table(header, rows, bars))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data card: {escape(card.task)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _bars(card: DataCard) -> dict[str, float]:
    """The length of each label's bar: its number in train by that of the most frequent."""
    train: Mapping[str | int, int] = next(iter(card.splits.values()), {}).get("labels", {})
    most = max(train.values(), default=1)
    return {str(name): number / most for name, number in train.items()}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], bars: Mapping[str, float] | None) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    lines = [f"<tr>{cells}{'<th></th>' if bars is not None else ''}</tr>"]
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        if bars is not None:
            width = f"{bars.get(row[0], 0):.1%}"
            cells += f'<td><div class="bar"><div style="width:{width}"></div></div></td>'
        lines.append(f"<tr>{cells}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"

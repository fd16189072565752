"""docs/guides/add-a-model.md shows a family as it is."""

from __future__ import annotations

import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
GUIDE = (CHECKOUT / "docs" / "guides" / "add-a-model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


def test_the_guide_shows_the_whole_page_of_its_family() -> None:
    (path,) = re.findall(r"<!-- file (\S+) -->", GUIDE)
    assert BLOCKS[0] == (CHECKOUT / path).read_text(encoding="utf-8")


def test_the_guide_shows_all_other_lines_of_its_family() -> None:
    entry, configs = BLOCKS[1:]
    assert entry in (CHECKOUT / "src/fastserve/models/family.py").read_text(encoding="utf-8")
    assert configs in (CHECKOUT / "tests/tiny_encoders.py").read_text(encoding="utf-8")

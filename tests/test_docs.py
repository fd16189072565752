"""What the documents say is there: files, make targets, commands, and examples that run."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastserve.cli.main import COMMANDS

CHECKOUT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")])
MODULES_WITH_EXAMPLES = sorted(
    path.relative_to(CHECKOUT / "src")
    for path in (CHECKOUT / "src").rglob("*.py")
    if re.search(r">>> (?!.*doctest: \+SKIP)", path.read_text(encoding="utf-8"))
)


def blocks(document: Path, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def typed_commands(document: Path) -> list[str]:
    """The lines that a reader is to type: those after a prompt in console blocks."""
    return [
        line.removeprefix("$ ")
        for block in blocks(document, "console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


def name_of(document: Path) -> str:
    return str(document.relative_to(CHECKOUT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", document.read_text(encoding="utf-8"))
    assert not [link for link in links if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_make_targets_that_are_named_exist(document: Path) -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^\$ )make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_that_are_named_exist(document: Path) -> None:
    typed = " \n".join(typed_commands(document))
    named = set(re.findall(r"(?:^|/|\s)fastserve ([a-z]\w*)", typed))
    assert named <= COMMANDS.keys()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_no_document_installs_the_stranger_that_is_called_fastserve(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert not re.search(r"pip3? install [^\n`]*\bfastserve(?!-llm|_)\b", text)


@pytest.mark.parametrize("module", MODULES_WITH_EXAMPLES, ids=str)
def test_examples_in_docstrings_hold(module: Path) -> None:
    result = doctest.testmod(importlib.import_module(".".join(module.with_suffix("").parts)))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_readme_in_chinese_has_the_commands_and_the_numbers_of_the_english_one() -> None:
    english, chinese = (CHECKOUT / name for name in ("README.md", "README.zh-CN.md"))
    for language in ("console", "python"):
        assert blocks(chinese, language) == blocks(english, language)
    numbers = [sorted(re.findall(r"\d[\d.,e-]*\d", path.read_text("utf-8"))) for path in (english, chinese)]
    assert numbers[0] == numbers[1]


def test_python_examples_of_the_readme_run(model_dir: Callable[[str], Path]) -> None:
    for block in blocks(CHECKOUT / "README.md", "python"):
        for name in re.findall(r'LLM\("([^"]+)"', block):
            model_dir(name)
        subprocess.run([sys.executable, "-W", "error", "-c", block], check=True)

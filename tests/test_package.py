"""The package as a whole: cheap to import, one version, small when installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest

import fastserve

CHECKOUT = Path(__file__).resolve().parent.parent

HEAVY = [
    "torch",
    "transformers",
    "numpy",
    "tokenizers",
    "huggingface_hub",
    "tqdm",
    "click",
    "jinja2",
    "llguidance",
]


def run_python(code: str) -> object:
    """What a fresh interpreter prints as JSON."""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def test_importing_the_package_imports_no_heavy_dependency() -> None:
    loaded = run_python("import fastserve, json, sys; print(json.dumps(sorted(sys.modules)))")
    assert isinstance(loaded, list)
    assert not set(HEAVY) & set(loaded)


def test_importing_the_package_takes_less_than_three_tenths_of_a_second() -> None:
    seconds = run_python(
        "from time import perf_counter as now; start = now(); import fastserve; print(now() - start)"
    )
    assert isinstance(seconds, float)
    assert seconds < 0.3


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        fastserve.Llm  # noqa: B018


@pytest.mark.parametrize("name", fastserve.__all__)
def test_everything_the_package_names_is_there(name: str) -> None:
    assert getattr(fastserve, name) is not None


def test_the_installed_version_is_that_of_the_source() -> None:
    try:
        installed = metadata.version("fastserve-llm")
    except metadata.PackageNotFoundError:
        pytest.skip("fastserve-llm is not installed here: the package is imported from its source")
    assert installed == fastserve.__version__


def test_the_changelog_begins_with_this_version() -> None:
    newest = re.search(r"^## (\S+)", (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == fastserve.__version__


def test_torch_is_pinned_for_developers_and_absent_from_what_users_install() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert not [name for name in project["dependencies"] if name.startswith(("torch", "transformers"))]
    assert "torch==" in (CHECKOUT / "constraints-dev.txt").read_text(encoding="utf-8")


# Imports every module of ours that an installation without extras can import, and so what these import.
USE = """
import importlib, pkgutil, fastserve
for module in pkgutil.walk_packages(fastserve.__path__, "fastserve."):
    if ".torch" not in module.name and ".peers" not in module.name:
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name in ("torch", "matplotlib", "transformers"), error
import huggingface_hub.hf_api
"""


@pytest.mark.slow
def test_an_installation_without_extras_is_at_most_120_mb_and_has_no_torch(tmp_path: Path) -> None:
    # As the README says, without pip itself, and with the bytecode that Python adds when all of it is used.
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = next(environment.glob("[bS]*/python*"))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    subprocess.run([*install, "--config-settings", f"build-dir={tmp_path / 'build'}", CHECKOUT], check=True)

    writing = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([python, "-c", USE], env=writing, check=True)
    packages = next(environment.glob("[lL]ib/**/site-packages"))
    assert list(packages.glob("fastserve/_native.*"))
    assert not (packages / "torch").exists()
    files = [path for path in environment.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) <= 120_000_000

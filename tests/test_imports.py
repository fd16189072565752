"""The import table: which package may import which, and who owns each heavy dependency.

Read off the source text, so that imports inside functions and those for type checkers count as well.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"

# A package may import what its arrows reach: to the right, or below.
ARROWS = """
    cli → deploy → serve → explain → compress → tune → evaluate → engine → backends → models → graph
    tune → data
    evaluate → data
    data → checkpoint
    tune → checkpoint
    compress → checkpoint
    evaluate → checkpoint
    engine → checkpoint
    models → checkpoint
    backends → checkpoint
    checkpoint → hub
"""

# Open to all, and what they import of ours themselves.
OPEN_MODULES: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "option": {"errors"},
    "constraint": {"errors", "option"},
    "types": {"constraint", "errors", "option"},
    "config": {"errors", "option"},
}

# Packages beside each other that know nothing of each other.
STRANGERS = [("backends.native", "backends.torch")]

# Scripts that run in the interpreters of other engines, and what they import there.
PEER_SCRIPTS = "evaluate.peers"
PEERS = {
    "llama_cpp",
    "openvino_genai",
    "openvino",
    "optimum",
    "transformers",
    "torch",
    "vllm",
    "onnx",
    "onnxruntime",
}

# Packages whose distribution has another name, or that several share, by the one that we need.
NAMESPACES = {"yaml": "pyyaml", "opentelemetry": "opentelemetry_sdk"}

# Who may import a heavy dependency, be it within a function.
OWNERS: dict[str, set[str]] = {
    "constriction": {"checkpoint", "compress"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "pydantic": {"serve"},
    "uvicorn": {"serve"},
    "prometheus_client": {"serve"},
    "opentelemetry": {"serve"},
    "ray": {"deploy", "tune"},
    "torch": {"backends.torch", "tune", "compress", "evaluate", "explain"},
    "transformers": {"backends.torch", "tune", "compress", "evaluate", "explain"},
    "accelerate": {"tune"},
    "peft": {"tune"},
    "optuna": {"tune"},
    "sacrebleu": {"evaluate"},
    "yaml": {"tune"},
    "matplotlib": {"evaluate", "explain"},
    "aiohttp": {"evaluate"},
    "huggingface_hub": {"hub"},
    "tokenizers": {"checkpoint", "data"},
    "llguidance": {"engine"},
    "charset_normalizer": {"data"},
    "jieba": {"data"},
    "pyarrow": {"data"},
    "zstandard": {"data"},
    "jinja2": {"checkpoint"},
    "click": {"cli"},
    "tqdm": {"cli"},
    "fastserve._native": {"backends.native"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    return {
        module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in sorted(SOURCE.rglob("*.py"))
    }


def imports_of(module: str) -> Iterator[tuple[str, int]]:
    """Each name that a module imports, with its line; `from a import b` is a.b where that is a module of
    ours."""
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full in modules() or full == "fastserve._native"
                yield (full if is_module else node.module), node.lineno


def package_of(module: str) -> str:
    """`hub` for fastserve.hub.resolve; empty for fastserve itself."""
    return module.removeprefix("fastserve").lstrip(".").split(".")[0]


def is_within(module: str, package: str) -> bool:
    """Whether a full module name lies in a package of the tables above, at any depth."""
    return f"{module}.".startswith(f"fastserve.{package}.")


@cache
def reachable() -> dict[str, set[str]]:
    """What each package may import: the arrows, followed to their ends."""
    direct: dict[str, set[str]] = {}
    for line in ARROWS.split("\n"):
        names = line.strip().split(" → ")
        for left, right in pairwise(names):
            direct.setdefault(left, set()).add(right)
            direct.setdefault(right, set())

    def follow(package: str) -> set[str]:
        return direct[package].union(*(follow(right) for right in direct[package]))

    return {package: follow(package) for package in direct}


def allowed_packages(package: str) -> set[str]:
    if package in OPEN_MODULES:
        return OPEN_MODULES[package]
    if package == "":  # fastserve/__init__.py re-exports lazily what it names
        return {"_version", "constraint", "engine", "evaluate", "types"}
    return reachable()[package] | {package} | OPEN_MODULES.keys()


def test_every_package_has_its_place_in_the_table() -> None:
    packages = {package_of(module) for module in modules()}
    assert packages - reachable().keys() - OPEN_MODULES.keys() == {""}


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    allowed = allowed_packages(package_of(module))
    broken = [
        f"{module}:{line} imports {name}"
        for name, line in imports_of(module)
        if name.split(".")[0] == "fastserve"
        and name != "fastserve._native"
        and package_of(name) not in allowed
    ]
    assert not broken


@pytest.mark.parametrize(("one", "other"), STRANGERS)
def test_strangers_do_not_import_each_other(one: str, other: str) -> None:
    broken = [
        f"{module}:{line} imports {name}"
        for module in modules()
        for name, line in imports_of(module)
        if (is_within(module, one) and is_within(name, other))
        or (is_within(module, other) and is_within(name, one))
    ]
    assert not broken


@pytest.mark.parametrize("dependency", OWNERS)
def test_a_heavy_dependency_is_imported_by_its_owner_alone(dependency: str) -> None:
    broken = [
        f"{module}:{line} imports {name}"
        for module in modules()
        for name, line in imports_of(module)
        if f"{name}.".startswith(f"{dependency}.")
        and not any(is_within(module, owner) for owner in OWNERS[dependency])
    ]
    assert not broken


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in requirements}
    imported = {
        NAMESPACES.get(root, root)
        for module in modules()
        for root in {name.split(".")[0] for name, _ in imports_of(module)}
        if not (is_within(module, PEER_SCRIPTS) and root in PEERS)
    }
    assert imported - sys.stdlib_module_names - {"fastserve"} <= declared


def test_modules_form_no_cycle() -> None:
    pending = {
        module: {name for name, _ in imports_of(module)} & modules().keys() - {module} for module in modules()
    }
    while free := [module for module, names in pending.items() if not names]:
        for module in free:
            del pending[module]
        for names in pending.values():
            names.difference_update(free)
    assert not pending

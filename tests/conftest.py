"""Fixtures that several test folders share: the data beside the checkout, and real models through our own
download.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

# Another build of the native extension to test, such as the one that `make test-sanitize` makes.
if _EXTENSION := os.environ.get("FASTSERVE_TEST_EXTENSION"):
    _SPEC = importlib.util.spec_from_file_location("fastserve._native", _EXTENSION)
    assert _SPEC is not None
    assert _SPEC.loader is not None
    sys.modules["fastserve._native"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["fastserve._native"])

# With FASTSERVE_TEST_CASES=pairs, a parametrized test runs for every pair of its parameters' values, not for
# every combination: see pairwise.py.
_RUNS_PAIRS = os.environ.get("FASTSERVE_TEST_CASES") == "pairs"

# An example that takes long on a busy machine is no defect.
settings.register_profile("busy machines", deadline=None)
settings.load_profile("busy machines")

_CHECKOUT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _RUNS_PAIRS:
        return
    from pairwise import covering_cases

    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    kept: set[pytest.Item] = set()
    for cases in tests.values():
        values = [
            {name: repr(value) for name, value in item.callspec.params.items()}
            if hasattr(item, "callspec")
            else {}
            for item in cases
        ]
        kept.update(cases[index] for index in covering_cases(values))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish() -> None:
    """Leave thousands of collected tests to no collection of garbage: one took a second of a test whose
    processor time is bounded."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of test data: FASTSERVE_TEST_DATA, or `shared/data` beside the checkout."""
    folder = Path(os.environ.get("FASTSERVE_TEST_DATA", _CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the test data is not here: set FASTSERVE_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def model_dir() -> Callable[[str], Path]:
    """Where the model of a name is, as `fastserve.hub.resolve` gives it; downloaded on first use.

    A model that cannot be fetched fails the test, unless FASTSERVE_OFFLINE says that none should be.
    """
    from fastserve.errors import OfflineError
    from fastserve.hub.resolve import resolve

    @cache
    def find(name: str) -> Path:
        try:
            return resolve(name)
        except OfflineError as error:
            pytest.skip(f"FASTSERVE_OFFLINE is set and {error.message}")

    return find

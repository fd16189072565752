"""What a server notices by itself."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from fastserve.serve import watch as module
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.energy import EnergyMeter
from fastserve.serve.key_file import add_key
from fastserve.serve.options import ServeOptions
from fastserve.serve.tenant_table import TenantTable
from fastserve.serve.watch import watch


class NoModels:
    generators = ()


@pytest.fixture
def looks(monkeypatch):
    """Has a server look as often as it can."""
    monkeypatch.setattr(module, "_SECONDS", 0.001)


def watching(tenants: TenantTable, until, caplog) -> None:
    async def main() -> None:
        task = asyncio.create_task(watch(tenants, NoModels(), EnergyMeter([])))  # type: ignore[arg-type]
        async with asyncio.timeout(10):
            while not until():
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    caplog.set_level("INFO", logger="fastserve.serve.watch")
    asyncio.run(main())


def test_a_file_that_has_changed_is_read_again(tmp_path, looks, caplog) -> None:
    path = tmp_path / "keys"
    add_key(path, "alice")
    tenants = TenantTable(ApiKeys.load(ServeOptions(tenants=str(path))))
    bob = add_key(path, "bob")
    watching(tenants, lambda: tenants.keys.find(bob), caplog)
    assert [tenant.name for tenant in tenants] == ["alice", "bob"]
    assert [record.fields for record in caplog.records] == [{"num_keys": 2, "num_tenants": 2}]


def test_a_mistake_is_logged_once_by_its_line_and_the_old_keys_stay(tmp_path, looks, caplog) -> None:
    path = tmp_path / "keys"
    alice = add_key(path, "alice")
    tenants = TenantTable(ApiKeys.load(ServeOptions(tenants=str(path))))
    path.write_text("alice\n")
    watching(tenants, lambda: caplog.records, caplog)
    assert tenants.keys.find(alice)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert f"{path}, line 1" in record.message


def test_a_defect_does_not_end_the_watch(tmp_path, looks, caplog, monkeypatch) -> None:
    tenants = TenantTable(ApiKeys({}))
    monkeypatch.setattr(tenants.keys, "have_changed", lambda: 1 / 0)
    watching(tenants, lambda: len(caplog.records) >= 3, caplog)
    assert {record.levelname for record in caplog.records} == {"ERROR"}

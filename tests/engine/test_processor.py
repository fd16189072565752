from __future__ import annotations

import platform
from pathlib import Path

from fastserve.engine.processor import processor_name


def test_the_makers_name_is_read_where_the_system_has_it(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: Swift 9000: fast\n")
    assert processor_name(proc=tmp_path) == "Swift 9000: fast"


def test_elsewhere_it_is_the_architecture(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert processor_name(proc=tmp_path) == "riscv64"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nhart\t: 2\n")
    assert processor_name(proc=tmp_path) == "riscv64"

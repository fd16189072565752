"""Bytes that an installation without extras takes: the wheel and its dependencies in a fresh environment,
installed as the README says, and with the bytecode that Python adds when it is used."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from pathlib import Path

from report import CHECKOUT, make_parser, publish

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--largest", type=int, default=8, help="how many packages to list")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))
        wheel_bytes = wheel.stat().st_size
        packages = install(wheel, Path(folder) / "venv")
        files, bytecode = measure(packages)
    largest = files.most_common(arguments.largest)
    results = {
        "wheel_bytes": wheel_bytes,
        "installed_bytes": files.total(),
        "bytecode_bytes": bytecode.total(),
        "largest_bytes": dict(largest),
        "has_torch": "torch" in files,
    }
    rows = [
        ("wheel", format_megabytes(wheel_bytes)),
        ("installed files", format_megabytes(files.total())),
        ("bytecode of what was used", format_megabytes(bytecode.total())),
        ("torch among them", "torch" in files),
        *((f"  {name}", format_megabytes(size)) for name, size in largest),
    ]
    publish(arguments, results, rows)


def build_wheel(folder: Path) -> Path:
    """Build in a folder of its own: what lies in the checkout's build folder is not touched."""
    options = [
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        folder,
        "--config-settings",
        f"build-dir={folder / 'build'}",
    ]
    subprocess.run([*PIP, "wheel", *options, CHECKOUT], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, environment: Path) -> Path:
    """The folder of packages of a fresh environment that has the wheel, and neither pip nor setuptools."""
    venv.create(environment, with_pip=False)
    python = next(environment.glob("[bS]*/python*"))
    subprocess.run([*PIP, "--python", python, "install", "--quiet", "--no-compile", wheel], check=True)
    writing = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run(
        [python, "-m", "fastserve.cli.main", "doctor"], env=writing, check=True, stdout=subprocess.DEVNULL
    )
    used = "import huggingface_hub.hf_api, fastserve.engine.llm, fastserve.serve.run, fastserve.serve.app"
    subprocess.run([python, "-c", used], env=writing, check=True)
    return next(environment.glob("[lL]ib/**/site-packages"))


def measure(packages: Path) -> tuple[Counter[str], Counter[str]]:
    """Bytes of files and of bytecode, by the top-level name in the folder of packages."""
    files, bytecode = Counter[str](), Counter[str]()
    for path in packages.rglob("*"):
        if path.is_file() and not path.is_symlink():
            sizes = bytecode if path.suffix == ".pyc" else files
            sizes[path.relative_to(packages).parts[0]] += path.stat().st_size
    return files, bytecode


def format_megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    main()

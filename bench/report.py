"""What every benchmark says of itself: the command, the machine and the commit behind its numbers."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastserve.backends.native.executable import make_runtime
from fastserve.engine.available_memory import total_memory_bytes
from fastserve.engine.processor import processor_name

CHECKOUT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = "smollm2-135m-instruct"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that has the option that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    return parser


def publish(
    arguments: argparse.Namespace, results: Mapping[str, Any], rows: Sequence[tuple[str, object]]
) -> None:
    """Print the conditions and a table of `rows`; write them and `results` where --json asks for it."""
    document = {**describe_conditions(arguments), "results": results}
    machine = document["machine"]
    print(document["command"])
    print(f"{machine['processor']}, {machine['threads']} threads, {machine['isa']}")
    print(f"commit {document['commit']}, {document['date']}\n")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def describe_conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    runtime = make_runtime()
    return {
        "command": command_line(Path(sys.argv[0]).name, arguments),
        "commit": _git("describe", "--always", "--dirty"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor_name(),
            "threads": runtime.num_threads,
            "isa": runtime.isa,
            "memory_bytes": total_memory_bytes(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            # Of one minute: above what the benchmark itself runs, the machine was not ours alone.
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
    }


def command_line(script: str, arguments: argparse.Namespace) -> str:
    """The command with all its options, defaults too; paths, which mean nothing elsewhere, by their names.

    >>> command_line("start.py", argparse.Namespace(json=None, runs=7, peer=Path("bin/python"), dry=False))
    'python bench/start.py --runs 7 --peer PEER'
    >>> command_line("like.py", argparse.Namespace(models=[Path("a"), Path("b")], to="/models/c", dry=True))
    'python bench/like.py --models MODELS --to TO --dry'
    """
    words = ["python", f"bench/{script}"]
    for name, value in vars(arguments).items():
        if name == "json" or value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [name.upper()] if any(map(_is_path, values)) else map(str, values)
    return shlex.join(words)


def _is_path(value: object) -> bool:
    return isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute())


def _git(*arguments: str) -> str | None:
    """None where this is no checkout."""
    result = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None

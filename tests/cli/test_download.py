from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastserve.cli.main import main
from fastserve.cli.progress_bar import download_progress

pytestmark = pytest.mark.usefixtures("empty_store")


def test_a_download_ends_with_one_line(gguf_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", str(gguf_file)]) == 0
    assert capsys.readouterr() == (f"tiny: 4.0 kB from {gguf_file} in {gguf_file}\n", "")


def test_for_machines_the_record_is_printed(gguf_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", str(gguf_file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["name"], document["path"], document["size_bytes"]) == ("tiny", str(gguf_file), 4000)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_download_that_may_not_use_the_network_says_so(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", "all-minilm-l6-v2", "--offline", *(["--json"] if as_json else [])]) == 2
    shown = capsys.readouterr()
    if as_json:
        assert json.loads(shown.out)["error"]["type"] == "OfflineError"
    else:
        assert shown.err.startswith("error: all-minilm-l6-v2 is not here and would have to be downloaded; ")


def test_an_unknown_name_suggests_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "smolm2-135m-instruct"]) == 2
    expected = "error: no model is named 'smolm2-135m-instruct'; did you mean smollm2-135m-instruct?\n"
    assert capsys.readouterr() == ("", expected)


def run_on_terminal(code: str) -> bytes:
    """What Python code draws on a terminal that is its standard error."""
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {**os.environ, "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True)
    os.write(theirs, b"end")  # so that there is something to read
    drawn = os.read(ours, 100_000)
    os.close(theirs)
    os.close(ours)
    return drawn.removesuffix(b"end")


PROGRESS = "from fastserve.cli.progress_bar import download_progress\nwith download_progress() as progress: "


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_on_a_terminal_a_bar_shows_the_step_and_the_bytes() -> None:
    drawn = run_on_terminal(PROGRESS + "progress('tiny==1', 1_500_000, 3_000_000)")
    assert b"tiny==1" in drawn
    assert b"1.50M/3.00M" in drawn


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_nothing_is_drawn_when_no_bytes_come() -> None:
    assert run_on_terminal(PROGRESS + "pass") == b""


def test_off_a_terminal_no_bar_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with download_progress() as progress:
        assert progress is None

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastserve.cli.main import main

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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_on_a_terminal_a_bar_is_drawn_and_cleared(gguf_file: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fastserve.cli.main", "download", str(gguf_file)]
    environment = {**os.environ, "TERM": "xterm"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, stdin=subprocess.DEVNULL, env=environment, check=True
    )
    os.close(theirs)
    drawn = os.read(ours, 100_000)
    os.close(ours)
    assert b"\x1b[2K" in drawn
    assert b"\x1b[" not in done.stdout

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from fastserve import __version__
from fastserve.cli.main import COMMANDS, main
from fastserve.errors import DownloadError
from fastserve.hub.location import is_offline

FASTSERVE = [sys.executable, "-m", "fastserve.cli.main"]


def install_command(monkeypatch: pytest.MonkeyPatch, action: object) -> None:
    """Make `fastserve probe [--count N] [--colour red|blue] [--json]` run `action`."""

    @click.command()
    @click.option("--count", type=int)
    @click.option("--colour", type=click.Choice(["red", "blue"]))
    @click.option("--json", is_flag=True)
    def probe(count: int, colour: str, json: bool) -> None:
        assert callable(action)
        action()

    monkeypatch.setitem(COMMANDS, "probe", "probe_module")
    monkeypatch.setitem(sys.modules, "probe_module", SimpleNamespace(probe=probe))


def raising(error: BaseException) -> object:
    def action() -> None:
        raise error

    return action


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastserve {__version__}\n"


def test_no_arguments_show_the_help_with_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_a_command_that_succeeds_exits_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    install_command(monkeypatch, lambda: None)
    assert main(["probe"]) == 0


def test_only_the_module_of_the_command_asked_for_is_imported() -> None:
    code = (
        "import sys; from fastserve.cli.main import COMMANDS, main; main(['models', 'list']);"
        "print([m for m in [*COMMANDS.values(), 'tqdm', 'huggingface_hub', 'numpy'] if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['fastserve.cli.models']"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["downlod"], "error: no command is named 'downlod'; did you mean download?"),
        (["zzz"], f"error: no command is named 'zzz'; choose one of {', '.join(COMMANDS)}"),
        (["--versoin"], "error: no option is named --versoin; did you mean --version?"),
        (
            ["generate", "x", "y", "--max-token", "3"],
            "error: no option is named --max-token; did you mean --max-tokens?",
        ),
        (["download", "x", "--ofline"], "error: no option is named --ofline; did you mean --offline?"),
        (["download"], "error: missing argument 'NAME'; see `fastserve download --help`"),
        (["models", "lits"], "error: no command is named 'lits'; did you mean list or alias?"),
        (["models"], "error: missing command; see `fastserve models --help`"),
        (
            ["models", "zzz"],
            "error: no command is named 'zzz'; choose one of list, search, show, alias, promote, verify,"
            " remove",
        ),
        (["download", "x", "y"], "error: got unexpected extra argument (y); see `fastserve download --help`"),
        (["probe", "-x"], "error: no option is named -x; see `fastserve probe --help`"),
        (["probe", "--count"], "error: option '--count' requires an argument; "),
        (["probe", "--count", "many"], "error: --count: 'many' is not a valid integer; see `fastserve probe"),
        (["probe", "--colour", "green"], "error: --colour: 'green' is not one of 'red', 'blue'; see `fast"),
    ],
)
def test_a_usage_error_is_one_line_with_the_remedy_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if arguments[0] == "probe":
        install_command(monkeypatch, lambda: None)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(line)
    assert shown.err.count("\n") == 1


def test_an_error_of_ours_is_one_line_with_its_hint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_command(monkeypatch, raising(DownloadError("it broke\nin two", hint="mend it")))
    assert main(["probe"]) == 2
    assert capsys.readouterr() == ("", "error: it broke in two; mend it\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["probe", "--json"], {"type": "DownloadError", "message": "it broke", "hint": None}),
        (
            ["probe", "--json", "--cuont", "1"],
            {
                "type": "OptionError",
                "message": "no option is named --cuont",
                "hint": "did you mean --count or --json?",
            },
        ),
    ],
)
def test_for_machines_an_error_is_a_document_on_standard_output(
    arguments: list[str],
    error: object,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_command(monkeypatch, raising(DownloadError("it broke")))
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": error}
    assert shown.err == ""


def test_a_defect_is_one_line_that_says_how_to_see_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_command(monkeypatch, raising(ZeroDivisionError("by zero")))
    monkeypatch.delenv("FASTSERVE_DEBUG", raising=False)
    assert main(["probe"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: unexpected ZeroDivisionError: by zero; ")
    assert "FASTSERVE_DEBUG=1" in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("FASTSERVE_DEBUG", "1")
    assert main(["probe"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_memory_that_runs_out_is_no_defect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_command(monkeypatch, raising(MemoryError()))
    assert main(["probe"]) == 2
    assert capsys.readouterr().err.startswith("error: memory ran out; free memory")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "m.gguf"), "error: m.gguf: Permission denied; see that "),
        (OSError(28, "No space left on device"), "error: standard output: No space left on device; see "),
    ],
)
def test_what_the_system_refuses_is_no_defect(
    error: OSError, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_command(monkeypatch, raising(error))
    monkeypatch.delenv("FASTSERVE_DEBUG", raising=False)
    assert main(["probe"]) == 2
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("before", [None, "0"])
def test_offline_before_the_command_holds_for_it_and_no_longer(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    install_command(monkeypatch, lambda: seen.append(is_offline()))
    monkeypatch.delenv("FASTSERVE_OFFLINE", raising=False)
    if before is not None:
        monkeypatch.setenv("FASTSERVE_OFFLINE", before)
    assert main(["--offline", "probe"]) == 0
    assert main(["probe"]) == 0
    assert seen == [True, False]
    assert os.environ.get("FASTSERVE_OFFLINE") == before


def test_ctrl_c_exits_quietly_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_command(monkeypatch, raising(KeyboardInterrupt()))
    assert main(["probe"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT between processes")
def test_ctrl_c_during_a_download_is_quiet_too(tmp_path: Path) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()  # a package comes before the one that is installed
    is_up = tmp_path / "up"
    (tmp_path / "pip" / "__main__.py").write_text(
        f"import pathlib, time; pathlib.Path({str(is_up)!r}).touch(); time.sleep(60)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "FASTSERVE_HOME": str(tmp_path / "store"),
    }
    command = [*FASTSERVE, "download", "pypi:tiny==1"]
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where tests run in background
    )
    deadline = time.monotonic() + 30
    while not is_up.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=30)
    assert (process.returncode, messages) == (130, "")
    assert not list(tmp_path.glob("store/staging/*/attempt-*"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE")
def test_a_reader_that_goes_away_is_not_complained_about() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        done = subprocess.run([*FASTSERVE, "--help"], stdout=output, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("fastserve g", ["generate"]),
        ("fastserve models ", ["list", "search", "show", "alias", "promote", "verify", "remove"]),
    ],
)
def test_the_shell_completes_commands(words: str, completions: list[str]) -> None:
    asked = {"_FASTSERVE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(FASTSERVE, env={**os.environ, **asked}, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"plain,{name}" for name in completions]


def test_the_version_is_there_without_what_takes_long_to_import() -> None:
    code = (
        "import sys; from fastserve.cli.main import main; main(['--version']); "
        "print(sorted({'numpy', 'tokenizers', 'huggingface_hub', 'jinja2', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"

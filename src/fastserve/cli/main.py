"""The `fastserve` command: finds the command's module, runs it, and turns every failure into one line.

Exit codes: 0 done, 1 a defect of ours or a closed pipe, 2 a user's mistake or a failed download, 130 Ctrl-C.
A command is a module with `app`, a `typer.Typer` holding it; its heavy imports stay inside its functions.
Only the module of the command asked for is imported, or all of them for `--help` and shell completion.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, cast

import typer

from fastserve._version import __version__
from fastserve.cli.report import print_error
from fastserve.errors import FastServeError, OptionError

COMMANDS = {
    "chat": "fastserve.cli.chat",
    "doctor": "fastserve.cli.doctor",
    "download": "fastserve.cli.download",
    "embed": "fastserve.cli.embed",
    "generate": "fastserve.cli.generate",
    "models": "fastserve.cli.models",
}

# Usage errors are click's in older releases of typer and typer's own in newer ones; BadParameter is public in
# both.
_UsageError = cast(type[Exception], typer.BadParameter.__base__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process) and return its exit code.

    >>> main(["--version"])
    fastserve 0.1.0
    0
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in arguments[: _index_of("--", arguments)]
    try:
        exit_code = _run(arguments or ["--help"])
        sys.stdout.flush()
    except FastServeError as error:
        print_error(type(error).__name__, error.message, error.hint, as_json=as_json)
        return 2
    except _UsageError as error:
        message, hint = _explain_usage(error)
        print_error(OptionError.__name__, message, hint, as_json=as_json)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; without this the interpreter complains again when it flushes at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        _print_defect(error, as_json=as_json)
        return 1
    return exit_code


def _run(arguments: list[str]) -> int:
    app = typer.Typer(name="fastserve", pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback(help="From a pretrained language model to an efficient service.")(_global_options)
    for module in _modules_for(arguments):
        app.add_typer(import_module(module).app)
    exit_code = app(args=arguments, prog_name="fastserve", standalone_mode=False)
    return exit_code if isinstance(exit_code, int) else 0


def _modules_for(arguments: list[str]) -> Iterable[str]:
    name = next((a for a in arguments if not a.startswith("-")), None)
    if "_FASTSERVE_COMPLETE" in os.environ or (name is None and "--help" in arguments):
        return COMMANDS.values()
    if name is None:
        return ()
    if name not in COMMANDS:
        raise OptionError(f"no command is named {name!r}", hint=_near_commands(name))
    return (COMMANDS[name],)


def _near_commands(name: str) -> str:
    near = get_close_matches(name.lower(), COMMANDS, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(COMMANDS)}"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastserve {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command; `--version` has done its work when this runs."""


def _explain_usage(error: Exception) -> tuple[str, str]:
    """Message and hint of a usage error, in our style: no capital, no full stop, the near options as the
    hint.
    """
    near: Sequence[str] = getattr(error, "possibilities", None) or ()
    option_name = getattr(error, "option_name", None)
    if near:
        return f"no option is named {option_name}", f"did you mean {' or '.join(sorted(near))}?"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    message, _, near_commands = message.partition(". Did you mean ")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "fastserve"
    hint = "did you mean " + near_commands.replace("'", "") if near_commands else f"see `{command} --help`"
    return message[:1].lower() + message[1:].rstrip("."), hint


def _print_defect(error: Exception, *, as_json: bool) -> None:
    if os.environ.get("FASTSERVE_DEBUG"):
        traceback.print_exc()
    hint = "this is a defect of fastserve; set FASTSERVE_DEBUG=1 for the traceback and report it"
    print_error(type(error).__name__, f"unexpected {type(error).__name__}: {error}", hint, as_json=as_json)


def _index_of(item: str, items: list[str]) -> int:
    return items.index(item) if item in items else len(items)


if __name__ == "__main__":
    sys.exit(main())

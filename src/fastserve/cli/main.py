"""The `fastserve` command: finds the command's module, runs it, and turns every failure into one line.

Exit codes: 0 done, 1 a defect of ours or a closed pipe, 2 a user's mistake, a failed download or what the
system refuses, 3 a compressed model that does not keep its budget, 130 Ctrl-C.
A command is a module holding a click command of the same name; its heavy imports stay inside its functions.
Only the module of the command asked for is imported, or all of them for `--help` and shell completion.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from fastserve._version import __version__
from fastserve.cli.command_group import LazyCommandGroup
from fastserve.cli.option import network_forbidden, offline_option
from fastserve.cli.report import print_error
from fastserve.errors import FastServeError, MemoryLimitError, OptionError

COMMANDS = {
    "bench": "fastserve.cli.bench",
    "chat": "fastserve.cli.chat",
    "compress": "fastserve.cli.compress",
    "convert": "fastserve.cli.convert",
    "doctor": "fastserve.cli.doctor",
    "download": "fastserve.cli.download",
    "embed": "fastserve.cli.embed",
    "ensemble": "fastserve.cli.ensemble",
    "evaluate": "fastserve.cli.evaluate",
    "generate": "fastserve.cli.generate",
    "keys": "fastserve.cli.keys",
    "models": "fastserve.cli.models",
    "predict": "fastserve.cli.predict",
    "prepare": "fastserve.cli.prepare",
    "serve": "fastserve.cli.serve",
    "top": "fastserve.cli.top",
    "tune": "fastserve.cli.tune",
}

_COMPLETION_VARIABLE = "_FASTSERVE_COMPLETE"

_EPILOG = """\b
To begin (the model is downloaded first, 98 MB):
  fastserve chat smollm2-135m-instruct

\b
Completion in bash (or zsh, fish):
  eval "$(_FASTSERVE_COMPLETE=bash_source fastserve)"
"""


@click.group(
    cls=LazyCommandGroup,
    modules=COMMANDS,
    context_settings={"show_default": True},
    epilog=_EPILOG,
)
@click.version_option(__version__, message="%(prog)s %(version)s", help="Print the version.")
@offline_option
def fastserve(offline: bool) -> None:
    """Run language models on your own machine: chat, complete prompts, embed texts, serve them all."""
    if offline:
        click.get_current_context().with_resource(network_forbidden())


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
    except click.UsageError as error:
        message, hint = _explain_usage(error)
        print_error(OptionError.__name__, message, hint, as_json=as_json)
        return 2
    except MemoryError:
        hint = "free memory, or raise the limit of this process (ulimit -v)"
        print_error(MemoryLimitError.__name__, "memory ran out", hint, as_json=as_json)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; without this the interpreter complains again when it flushes at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _print_system_error(error, as_json=as_json)
        return 2
    except Exception as error:
        _print_defect(error, as_json=as_json)
        return 1
    return exit_code


def _run(arguments: list[str]) -> int:
    """As click's own `main`, which would print on Ctrl-C and keep errors of a closed pipe to itself."""
    if instruction := os.environ.get(_COMPLETION_VARIABLE):
        from click.shell_completion import shell_complete

        return shell_complete(fastserve, {}, "fastserve", _COMPLETION_VARIABLE, instruction)
    try:
        with fastserve.make_context("fastserve", arguments) as context:
            fastserve.invoke(context)
    except click.exceptions.Exit as ending:
        return ending.exit_code
    return 0


def _explain_usage(error: click.UsageError) -> tuple[str, str]:
    """Message and hint of a usage error, in our style: no capital, no full stop, near options as the hint."""
    hint = f"see `{error.ctx.command_path if error.ctx else 'fastserve'} --help`"
    if isinstance(error, click.NoSuchOption):
        if near := _near_options(error):
            hint = f"did you mean {' or '.join(near)}?"
        return f"no option is named {error.option_name}", hint
    is_missing = isinstance(error, click.MissingParameter)
    if isinstance(error, click.BadParameter) and not is_missing and error.param is not None:
        name = error.param.get_error_hint(error.ctx).replace("'", "")
        return f"{name}: {error.message.rstrip('.')}", hint
    message = error.format_message()
    return message[:1].lower() + message[1:].rstrip("."), hint


def _near_options(error: click.NoSuchOption) -> list[str]:
    """Of the options that click finds alike, those that go on from what was typed, or else all."""
    near = sorted(error.possibilities or ())
    return [name for name in near if name.startswith(error.option_name)] or near


def _print_system_error(error: OSError, *, as_json: bool) -> None:
    """What the system refuses is no defect: a file that may not be read, output that cannot be written."""
    if os.environ.get("FASTSERVE_DEBUG"):
        traceback.print_exc()
    what = "standard output" if error.filename is None else str(error.filename)
    hint = "see that it is there and not full, and that you may use it; FASTSERVE_DEBUG=1 shows the traceback"
    print_error(type(error).__name__, f"{what}: {error.strerror or error}", hint, as_json=as_json)


def _print_defect(error: Exception, *, as_json: bool) -> None:
    if os.environ.get("FASTSERVE_DEBUG"):
        traceback.print_exc()
    hint = "this is a defect of fastserve; set FASTSERVE_DEBUG=1 for the traceback and report it"
    print_error(type(error).__name__, f"unexpected {type(error).__name__}: {error}", hint, as_json=as_json)


def _index_of(item: str, items: list[str]) -> int:
    return items.index(item) if item in items else len(items)


if __name__ == "__main__":
    sys.exit(main())

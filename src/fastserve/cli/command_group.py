"""Commands under one name. Those of a lazy group are modules, each imported when its command is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from fastserve.errors import OptionError


class CommandGroup(click.Group):
    """Commands in the order in which they were added; a name that is none of them suggests the near ones.

    Raises:
        OptionError: from `resolve_command`, when there is no command of that name.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args[0] not in names and not ctx.resilient_parsing:
            near = get_close_matches(args[0].lower(), names, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}"
            raise OptionError(f"no command is named {args[0]!r}", hint=hint)
        return super().resolve_command(ctx, args)


class LazyCommandGroup(CommandGroup):
    """Commands by the modules that hold them: `{"chat": "fastserve.cli.chat"}` runs that module's `chat`.

    A dash in a command's name is an underscore in its function's.
    """

    def __init__(self, *, modules: Mapping[str, str], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._modules:
            return None
        command = getattr(import_module(self._modules[cmd_name]), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command


class CommandWithSubcommands(click.Command):
    """A command whose first argument may be the name of another: `{"diff": "fastserve.cli.compress_diff"}`
    runs that module's `compress_diff` for `compress diff ...`. The name wins over an argument spelled so.
    """

    def __init__(self, *, modules: Mapping[str, str], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._modules = modules

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if not args or args[0] not in self._modules:
            return super().make_context(info_name, args, parent, **extra)
        module = import_module(self._modules[args[0]])
        command = getattr(module, self._modules[args[0]].rpartition(".")[2])
        assert isinstance(command, click.Command)
        return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)

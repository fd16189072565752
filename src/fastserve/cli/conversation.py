"""What `fastserve chat` keeps between answers: turns, sampling parameters, and the commands on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fastserve.errors import OptionError
from fastserve.types import SamplingParams

HELP = """\
/reset              forget the conversation, but not the system message
/system TEXT        set the system message; without TEXT, remove it
/set NAME VALUE     set temperature, top_k, top_p, min_p, max_tokens or seed (`none` unsets the last two)
/set                show these settings
/help               show this
/quit               leave (also: Ctrl-D); Ctrl-C stops an answer"""

_SETTINGS: Mapping[str, Callable[[str], float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "max_tokens": int,
    "seed": int,
}
_OPTIONAL_SETTINGS = ("max_tokens", "seed")


class Conversation:
    """
    >>> conversation = Conversation(SamplingParams())
    >>> conversation.run_command("/set temperature 0.2")
    'temperature is 0.2'
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._system: str | None = None
        self._turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system message, then the turns, as a chat template takes them."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return system + self._turns

    def ask(self, text: str) -> None:
        self._turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        self._turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget the question that got no answer."""
        assert self._turns[-1]["role"] == "user"
        self._turns.pop()

    def run_command(self, line: str) -> str:
        """Run a line such as `/system You are terse.` and return what to tell the user.

        Raises:
            OptionError: there is no such command or setting, or the value is out of range.
        """
        name, _, rest = line.partition(" ")
        commands = {"/reset": self._reset, "/system": self._set_system, "/set": self._set, "/help": _help}
        if name not in commands:
            raise OptionError(
                f"no command is named {name!r}", hint=f"choose one of {', '.join(commands)}, /quit"
            )
        return commands[name](rest.strip())

    def _reset(self, _: str) -> str:
        self._turns.clear()
        return "the conversation is forgotten"

    def _set_system(self, text: str) -> str:
        self._system = text or None
        return "the system message is set" if text else "there is no system message"

    def _set(self, rest: str) -> str:
        name, _, text = rest.partition(" ")
        if name and name not in _SETTINGS:
            raise OptionError(f"no setting is named {name!r}", hint=f"choose one of {', '.join(_SETTINGS)}")
        if text:
            self.params = replace(self.params, **{name: _parse(name, text.strip())})
        shown = [name] if name else list(_SETTINGS)
        return ", ".join(f"{setting} is {getattr(self.params, setting)}" for setting in shown)


def _help(_: str) -> str:
    return HELP


def _parse(name: str, text: str) -> Any:
    if name in _OPTIONAL_SETTINGS and text.lower() == "none":
        return None
    try:
        return _SETTINGS[name](text)
    except ValueError as error:
        raise OptionError(f"{name}={text!r} is not a number", hint="try `/set temperature 0.2`") from error

"""Options as a file has them, checked against the fields of the dataclass that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastserve.errors import OptionError

T = TypeVar("T")


def read_options(kind: type[T], values: object, where: str) -> T:
    """A dataclass from names and values. `where` begins messages, which name the option and what it may be.

    Whole numbers do for floats, lists for tuples, mappings for dataclasses within.

    >>> from fastserve.compress.step import Targets
    >>> read_options(Targets, {"tables": True}, "step 1").tables
    True

    Raises:
        OptionError: a name is no field, a value is of another type, a field is missing, or the dataclass
            itself refuses a value.
    """
    if not isinstance(values, Mapping):
        raise OptionError(
            f"{where}: {values!r} are no options", hint="write {OPTION: VALUE}", option="recipe"
        )
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type] # kind is a dataclass
    given = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            suggestion = f"did you mean {near[0]}? " if near else ""
            all_of_them = f"options are {', '.join(known)}" if known else "it has no options"
            raise OptionError(
                f"{where}: no option is named {name!r}", hint=f"{suggestion}{all_of_them}", option="recipe"
            )
    for field in fields(kind):  # type: ignore[arg-type]
        is_needed = field.default is MISSING and field.default_factory is MISSING
        if is_needed and field.name not in given:
            raise OptionError(
                f"{where}: {field.name} is missing", hint=f"add {field.name}: VALUE", option="recipe"
            )
    read = {name: _read(value, hints[name], f"{where}: {name}") for name, value in given.items()}
    try:
        return kind(**read)
    except OptionError as error:
        raise OptionError(f"{where}: {error.message}", hint=error.hint, option="recipe") from error


def _read(value: Any, hint: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value in get_args(hint) and not isinstance(value, bool):
            return value
        raise _refuse(value, where, f"one of {', '.join(map(str, get_args(hint)))}")
    if origin in (Union, UnionType):
        return _read_union(value, get_args(hint), where)
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        if not isinstance(value, list | tuple):
            raise _refuse(value, where, "a list")
        return tuple(_read(item, get_args(hint)[0], f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _refuse(value, where, "a mapping of names to values")
        return {str(k): _read(v, get_args(hint)[1], f"{where}.{k}") for k, v in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return read_options(hint, value, where)
    return _read_single(value, hint, where)


def _read_union(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    refused = []
    for kind in kinds:
        if kind is not NoneType:
            try:
                return _read(value, kind, where)
            except OptionError as error:
                refused.append(error)
    raise refused[0]


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _read_single(value: Any, kind: Any, where: str) -> Any:
    assert kind in _NAMES, f"{where}: options of type {kind} are not read"
    is_truth = isinstance(value, bool)
    if kind is float and isinstance(value, int | str) and not is_truth:
        try:
            return float(value)  # YAML takes 1e-4, which has no point, for a text
        except ValueError:
            raise _refuse(value, where, _NAMES[kind]) from None
    if isinstance(value, kind) and (kind is bool or not is_truth):
        return value
    raise _refuse(value, where, _NAMES[kind])


def _refuse(value: Any, where: str, wanted: str) -> OptionError:
    hint = f"give {wanted}"
    if isinstance(value, bool) and not wanted.startswith("true"):
        hint += "; YAML reads on, off, yes and no as true and false unless they are quoted"
    return OptionError(f"{where}={value!r} is not {wanted}", hint=hint, option="recipe")

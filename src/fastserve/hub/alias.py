"""Gives models of the user's store further names: aliases, and versions of which one is promoted.

A name means one thing: models of the store and of the catalogue can be neither aliases nor have versions
promoted over them. See docs/decisions/0009-what-a-version-is.md.
"""

from __future__ import annotations

from fastserve.errors import ModelNotFoundError, OptionError
from fastserve.hub.catalogue import find_entry
from fastserve.hub.name_table import NameTable, PinnedModel, check_word, split_version
from fastserve.hub.registry import Registry, not_found


def add_alias(name: str, target: str) -> str:
    """Have a name stand for a model; the name of that model.

    An alias may be pointed elsewhere later. `NAME@VERSION` is a version: it stands for the model as its files
    are now, for good.

    Raises:
        OptionError: it is no name, is taken, would stand for itself, or the version is there and is another.
        ModelNotFoundError: there is no such target; of a version: it is not downloaded.
        DownloadError: the store cannot be written.
    """
    registry = Registry.of_user()
    base, version = split_version(name)
    check_word("name", base)
    if version is not None:
        check_word("version", version)
    with registry.changing_names() as names:
        _check_is_free(base, registry)
        model = registry.model_of(target)
        record = registry.find(model)
        if record is None and (version is not None or find_entry(model) is None):
            raise not_found(model, registry)
        if version is None:
            if registry.versions_of(base, names):
                raise OptionError(
                    f"{base} has versions", hint=f"`fastserve models promote {base}@VERSION`, or another name"
                )
            names = names.with_alias(base, target)
        else:
            assert record is not None
            pinned = PinnedModel(record.name, record.digest)
            _check_version(names, base, version, pinned)
            names = names.with_version(base, version, pinned)
        names.write(registry.home)
    return model


def promote(name: str) -> str | None:
    """Have the name of a version stand for it where no version is named; the version that it was before.

    Raises:
        OptionError: it names no version, or the name is that of a model.
        ModelNotFoundError: there is no such version.
        DownloadError: the store cannot be written.
    """
    registry = Registry.of_user()
    base, version = split_version(name)
    if version is None:
        raise OptionError(f"{name!r} names no version", hint="write NAME@VERSION, such as chat@2")
    with registry.changing_names() as names:
        versions = registry.versions_of(base, names)
        if version not in versions:
            known = ", ".join(f"{base}@{known}" for known in versions)
            raise ModelNotFoundError(
                f"{base} has no version {version!r}",
                hint=f"versions are {known}" if known else f"`fastserve models alias {name} MODEL` makes one",
            )
        _check_is_free(base, registry)
        before = names.promoted.get(base)
        names.with_promoted(base, version).write(registry.home)
    return before


def remove_name(name: str) -> bool:
    """Forget an alias or a version that was made; whether there was one. What it stood for stays.

    Raises:
        OptionError: others stand for it, or it is promoted and has others beside it.
        DownloadError: the store cannot be written.
    """
    registry = Registry.of_user()
    names = registry.names()
    if name.lower() not in names.aliases and names.pinned(name) is None:
        return False
    with registry.changing_names() as names:
        _check_unused(name, names)
        names.without(name).write(registry.home)
    return True


def _check_unused(name: str, names: NameTable) -> None:
    base, version = split_version(name)
    others = [f"{base}@{other}" for other in names.versions.get(base, {}) if other != version]
    if version is not None and names.promoted.get(base) == version and others:
        raise OptionError(
            f"{base}@{version} is promoted", hint=f"promote another one first: {', '.join(others)}"
        )
    if users := names.users_of(name):
        raise OptionError(
            f"{', '.join(users)} {'stands' if len(users) == 1 else 'stand'} for {name}",
            hint=f"run `fastserve models remove {users[0]}` first",
        )


def _check_is_free(base: str, registry: Registry) -> None:
    if registry.find(base) is not None or find_entry(base) is not None:
        raise OptionError(f"{base} is a model", hint="choose another name, such as chat")


def _check_version(names: NameTable, base: str, version: str, pinned: PinnedModel) -> None:
    known = names.versions.get(base, {}).get(version)
    if known not in (None, pinned):
        assert known is not None
        raise OptionError(
            f"{base}@{version} is there, and is {known.model}; versions do not change",
            hint="choose another version, or remove that one",
        )
    if base in names.aliases:
        raise OptionError(
            f"{base} is an alias of {names.aliases[base]}",
            hint=f"choose another name, or run `fastserve models remove {base}`",
        )

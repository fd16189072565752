"""Whom a server knows: its API keys and its admin key, read again when their files have changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path

from fastserve.errors import OptionError
from fastserve.serve.key_file import ApiKey, KeyTable, digest_of, read_admin_digest, read_key_file
from fastserve.serve.options import ServeOptions

KEY_VARIABLE = "FASTSERVE_API_KEY"


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """What the files of keys say."""

    table: KeyTable
    admin_digest: str | None


class ApiKeys:
    """Keys by their SHA-256 digests, which tell nobody the keys: those are long and random.

    >>> ApiKeys({"alice": digest_of("secret")}).find("secret").name
    'alice'

    Args:
        digests: by name, of keys that are tenants of their own; where there is a file, it counts instead.
        admin_digest: of the admin key; None: there is none. Where there is a file, it counts instead.
        key_file: of API keys.
        admin_key_file: of the admin key.
        option: of the server, that has named the key file.

    Raises:
        OptionError: as `read`.
    """

    def __init__(
        self,
        digests: Mapping[str, str],
        *,
        admin_digest: str | None = None,
        key_file: Path | None = None,
        admin_key_file: Path | None = None,
        option: str = "tenants",
    ) -> None:
        self._known = KeyFiles(KeyTable.of(digests), admin_digest)
        self._key_file = key_file
        self._admin_key_file = admin_key_file
        self._option = option
        self._files_read: object = None  # what they were like when they were read last; None: there are none
        if key_file is not None or admin_key_file is not None:
            self.take(self.read())

    def __len__(self) -> int:
        return len(self._known.table.keys)

    @classmethod
    def load(cls, options: ServeOptions) -> ApiKeys:
        """The keys of the options' files, or that of the environment; they may be none.

        Raises:
            OptionError: a file is wrong.
        """
        admin_key_file = None if options.admin_key_file is None else Path(options.admin_key_file)
        if options.key_file is not None:
            option = "tenants" if options.api_keys is None else "api_keys"
            return cls({}, key_file=Path(options.key_file), admin_key_file=admin_key_file, option=option)
        key = os.environ.get(KEY_VARIABLE)
        return cls({"default": digest_of(key)} if key else {}, admin_key_file=admin_key_file)

    @property
    def table(self) -> KeyTable:
        return self._known.table

    @property
    def has_key_file(self) -> bool:
        return self._key_file is not None

    @property
    def has_admin_key(self) -> bool:
        return self._known.admin_digest is not None

    def find(self, key: str) -> ApiKey | None:
        """What is known of a key, expired or not; None: nothing."""
        return self.table.keys.get(digest_of(key))

    def is_admin(self, key: str) -> bool:
        digest = self._known.admin_digest
        return digest is not None and compare_digest(digest_of(key), digest)

    def have_changed(self) -> bool:
        """Whether the files are others than were read last, or tried to be."""
        return self._files_read is not None and self._look() != self._files_read

    def read(self) -> KeyFiles:
        """Read the files again. Nothing is changed by it: see `take`.

        Raises:
            OptionError: as `read_key_file` and `read_admin_digest`; or the admin key is an API key too.
        """
        self._files_read = self._look()  # before they are read: what changes meanwhile is seen later
        table, admin_digest = self._known.table, self._known.admin_digest
        if self._key_file is not None:
            table = read_key_file(self._key_file, option=self._option)
        if self._admin_key_file is not None:
            admin_digest = read_admin_digest(self._admin_key_file)
        if admin_digest is not None and (key := table.keys.get(admin_digest)):
            raise OptionError(
                f"the admin key is the API key of {key.name!r}",
                hint="make one of its own with `fastserve keys FILE --admin`",
                option="admin_key_file",
            )
        return KeyFiles(table, admin_digest)

    def take(self, files: KeyFiles) -> bool:
        """Know these keys from now on, and no others; whether the admin key is another than before."""
        before, self._known = self._known, files
        return before.admin_digest != files.admin_digest

    def _look(self) -> object:
        return [_look_at(path) for path in (self._key_file, self._admin_key_file) if path is not None]


def _look_at(path: Path) -> object:
    try:
        status = path.stat()
    except OSError as error:
        return error.errno
    return status.st_mtime_ns, status.st_size, status.st_ino

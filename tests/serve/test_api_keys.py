"""Which keys a server knows, also when their files change."""

from __future__ import annotations

import pytest

from fastserve.errors import OptionError
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.key_file import Terms, add_admin_key, add_key
from fastserve.serve.options import ServeOptions


def load(tmp_path) -> ApiKeys:
    return ApiKeys.load(ServeOptions(tenants=str(tmp_path / "keys"), admin_key_file=str(tmp_path / "admin")))


@pytest.mark.parametrize("option", ["api_keys", "tenants"])
def test_keys_are_those_of_the_file_by_either_option(tmp_path, option: str) -> None:
    key = add_key(tmp_path / "keys", "alice", tenant="team", terms=Terms(weight=2.0))
    keys = ApiKeys.load(ServeOptions(**{option: str(tmp_path / "keys")}))
    found = keys.find(key)
    assert found is not None
    assert (found.name, found.tenant) == ("alice", "team")
    assert keys.find("x") is None
    assert len(keys) == 1
    assert not keys.has_admin_key
    assert not keys.is_admin(key)


def test_one_key_may_come_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("FASTSERVE_API_KEY", "k")
    keys = ApiKeys.load(ServeOptions())
    found = keys.find("k")
    assert found is not None
    assert found.tenant == "default"
    assert not keys.have_changed()


def test_keys_change_with_their_file_and_mistakes_change_nothing(tmp_path) -> None:
    path = tmp_path / "keys"
    alice, admin = add_key(path, "alice"), add_admin_key(tmp_path / "admin")
    keys = load(tmp_path)
    assert keys.is_admin(admin)
    assert not keys.have_changed()

    bob = add_key(path, "bob")
    assert keys.have_changed()
    keys.take(keys.read())
    assert keys.find(bob)
    assert not keys.have_changed()

    good = path.read_text()
    path.write_text("".join(good.splitlines(keepends=True)[1:]) + "carol\n")
    assert keys.have_changed()
    with pytest.raises(OptionError, match="line 2"):
        keys.take(keys.read())
    assert keys.find(alice)
    assert not keys.have_changed()  # it has been looked at: a mistake is told once

    path.unlink()
    assert keys.have_changed()
    with pytest.raises(OptionError, match="cannot be read"):
        keys.take(keys.read())
    assert keys.find(alice)

    path.write_text("".join(good.splitlines(keepends=True)[1:]))
    keys.take(keys.read())
    assert not keys.find(alice)


def test_a_mistake_in_one_file_leaves_the_keys_of_both(tmp_path) -> None:
    add_key(tmp_path / "keys", "alice")
    admin = add_admin_key(tmp_path / "admin")
    keys = load(tmp_path)
    bob = add_key(tmp_path / "keys", "bob")
    (tmp_path / "admin").write_text("nothing\n")
    with pytest.raises(OptionError, match="line 1"):
        keys.take(keys.read())
    assert keys.is_admin(admin)
    assert not keys.find(bob)


def test_the_admin_key_changes_with_its_file(tmp_path) -> None:
    add_key(tmp_path / "keys", "alice")
    old = add_admin_key(tmp_path / "admin")
    keys = load(tmp_path)
    (tmp_path / "admin").unlink()
    new = add_admin_key(tmp_path / "admin")
    assert keys.have_changed()
    keys.take(keys.read())
    assert [keys.is_admin(key) for key in (old, new)] == [False, True]


def test_an_admin_key_that_is_a_tenants_key_too_is_refused(tmp_path) -> None:
    add_admin_key(tmp_path / "admin")
    (tmp_path / "keys").write_text((tmp_path / "admin").read_text())
    with pytest.raises(OptionError, match="the admin key is the API key of 'admin'"):
        load(tmp_path)

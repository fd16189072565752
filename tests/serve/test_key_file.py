"""Files of keys: what they say, and what is wrong with them, by line."""

from __future__ import annotations

import stat
from datetime import date, timedelta

import pytest

from fastserve.errors import OptionError
from fastserve.serve.key_file import (
    ApiKey,
    Terms,
    add_admin_key,
    add_key,
    digest_of,
    read_admin_digest,
    read_key_file,
    today,
)

A, B, C = (digest_of(key) for key in "abc")


def read(path, text: str):
    path.write_text(text)
    return read_key_file(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.txt"


def test_a_key_file_has_digests_and_is_its_owners(path) -> None:
    keys = {name: add_key(path, name) for name in ("alice", "bob")}
    assert keys["alice"] != keys["bob"]
    assert not [key for key in keys.values() if key in path.read_text()]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    table = read_key_file(path)
    assert {name: table.keys[digest_of(key)].tenant for name, key in keys.items()} == {
        "alice": "alice",
        "bob": "bob",
    }
    with pytest.raises(OptionError, match="has a key of 'bob'"):
        add_key(path, "bob")


def test_lines_of_old_are_tenants_of_their_own_without_limits(path) -> None:
    table = read(path, f"# keys\n\nalice {A}\n  bob\t{B}  \n")
    assert table.keys[B] == ApiKey(name="bob", digest=B, tenant="bob")
    assert table.terms == {"alice": Terms(), "bob": Terms()}


def test_a_line_says_the_tenant_its_terms_and_the_last_day(path) -> None:
    table = read(
        path,
        f"x {A} tenant=team weight=2 requests_per_minute=60 tokens_per_minute=60000 max_concurrent=8 "
        "expires=2027-01-31\n",
    )
    assert table.keys[A] == ApiKey(name="x", digest=A, tenant="team", expires=date(2027, 1, 31))
    assert table.terms == {
        "team": Terms(weight=2.0, requests_per_minute=60, tokens_per_minute=60000, max_concurrent=8)
    }


def test_several_keys_of_a_tenant_say_its_terms_together(path) -> None:
    table = read(
        path,
        f"a {A} tenant=t weight=2\nb {B} max_concurrent=3 tenant=t\nt {C} weight=2.0\n",
    )
    assert table.terms == {"t": Terms(weight=2.0, max_concurrent=3)}
    assert {key.tenant for key in table.keys.values()} == {"t"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no keys"),
        ("# nobody\n", "has no keys"),
        ("alice\n", "line 1: is no name with the digest"),
        ("alice secret\n", "line 1: is no name with the digest"),
        (f"# x\nalice/bob {A}\n", "line 2: is no name with the digest"),
        (f"a {A.upper()}\n", "line 1: is no name with the digest"),
        (f"a {A}\na {B}\n", "line 2: the name 'a' is that of line 1"),
        (f"a {A}\nb {A}\n", "line 2: the key is that of line 1"),
        (f"a {A} wieght=2\n", "line 1: has the unknown field 'wieght'"),
        (f"a {A} weight\n", "line 1: has the unknown field 'weight'"),
        (f"a {A} weight=2 weight=2\n", "line 1: has the field weight twice"),
        (f"a {A}\nb {B} weight=heavy\n", "line 2: weight='heavy' is not a number"),
        (f"a {A} weight=0\n", "line 1: weight=0.0 is out of range"),
        (f"a {A} weight=nan\n", "line 1: weight='nan' is not a number"),
        (f"a {A} requests_per_minute=0\n", "line 1: requests_per_minute=0 is out of range"),
        (f"a {A} requests_per_minute=1.5\n", "line 1: requests_per_minute='1.5' is not a whole number"),
        (f"a {A} max_concurrent=\n", "line 1: max_concurrent='' is not a whole number"),
        (f"a {A} tenant=\n", "line 1: tenant='' is not a word"),
        (f"a {A} tenant=x/y\n", "line 1: tenant='x/y' is not a word"),
        (f"a {A} expires=2027-02-30\n", "line 1: expires='2027-02-30' is not a day"),
        (f"a {A} expires=20270228\n", "line 1: expires='20270228' is not a day"),
        (
            f"a {A} tenant=t weight=2\n\nb {B} tenant=t weight=3\n",
            "line 3: weight=3 of tenant 't'; line 1 says 2",
        ),
    ],
)
def test_a_key_file_that_is_wrong_is_refused_by_line(path, text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        read(path, text)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_what_may_be_a_key_by_mistake_is_not_shown(path) -> None:
    with pytest.raises(OptionError) as caught:
        read(path, "alice fs-secret\n")
    assert "fs-secret" not in str(caught.value)


def test_a_key_file_that_is_no_text_or_not_there_is_refused(path) -> None:
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        read_key_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="not UTF-8"):
        read_key_file(path)


@pytest.mark.parametrize("name", ["alice/bob", "/", "two words", "#x", ""])
def test_a_key_has_a_name_of_one_word(path, name: str) -> None:
    with pytest.raises(OptionError, match="is not a word"):
        add_key(path, name)
    assert not path.exists()


def test_a_key_is_added_on_a_line_of_its_own(path) -> None:
    path.write_text(f"alice {A}")  # an editor that ends no last line
    add_key(path, "bob")
    assert {key.name for key in read_key_file(path).keys.values()} == {"alice", "bob"}


def test_a_key_whose_terms_contradict_the_file_is_not_added(path) -> None:
    add_key(path, "a", tenant="t", terms=Terms(max_concurrent=2))
    add_key(path, "b", tenant="t")
    before = path.read_text()
    with pytest.raises(OptionError, match="max_concurrent=3 of tenant 't'; line 1 says 2"):
        add_key(path, "c", tenant="t", terms=Terms(max_concurrent=3))
    assert path.read_text() == before


def test_what_is_added_is_read_as_it_was_said(path) -> None:
    terms = Terms(weight=0.25, requests_per_minute=7, tokens_per_minute=900, max_concurrent=2)
    key = add_key(path, "a", tenant="t", terms=terms, expires=date(2999, 12, 31))
    table = read_key_file(path)
    assert table.terms == {"t": terms}
    assert table.keys[digest_of(key)].expires == date(2999, 12, 31)


def test_a_key_is_good_until_its_last_day_is_over() -> None:
    yesterday, now = today() - timedelta(days=1), today()
    days = {day: ApiKey(name="a", digest=A, tenant="a", expires=day).has_expired for day in (yesterday, now)}
    assert days == {yesterday: True, now: False}
    assert not ApiKey(name="a", digest=A, tenant="a").has_expired


def test_an_admin_key_is_the_only_line_of_its_file(path) -> None:
    key = add_admin_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == f"admin {digest_of(key)}\n"
    assert read_admin_digest(path) == digest_of(key)
    with pytest.raises(OptionError, match="is not empty"):
        add_admin_key(path)


@pytest.mark.parametrize(
    "text", ["", f"alice {A}\n", f"admin {A}\nadmin {B}\n", "admin x\n", "admin\n", f"admin {A} weight=2\n"]
)
def test_an_admin_key_file_that_is_wrong_is_refused(path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(OptionError, match=r"one admin key .*keys .* --admin"):
        read_admin_digest(path)


@pytest.mark.parametrize("add", [lambda path: add_key(path, "alice"), add_admin_key])
def test_where_no_file_can_be_made_that_is_said(tmp_path, add) -> None:
    with pytest.raises(OptionError, match=r"keys\.txt cannot be written: No such file"):
        add(tmp_path / "missing" / "keys.txt")

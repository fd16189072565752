from __future__ import annotations

import json
from dataclasses import fields

import pytest

from fastserve.cli.main import main
from fastserve.cli.serve import serve
from fastserve.config import EngineOptions
from fastserve.serve.key_file import digest_of, read_admin_digest, read_key_file
from fastserve.serve.options import ServeOptions


def test_every_option_of_the_engine_and_the_server_is_one_of_the_command() -> None:
    names = {parameter.name for parameter in serve.params}
    fields_ = {field.name for options in (EngineOptions, ServeOptions) for field in fields(options)}
    assert names == {*fields_, "models", "json", "offline"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tenant-weights", "alice"], "'alice' is not of the form NAME=NUMBER"),
        (["--port", "70000"], "port=70000 is out of range"),
        (["--tls-cert", "x"], "tls_key is missing"),
        (["--max-body", "lots"], "max_body='lots' is not a size"),
        (["--cors-origins", "example.com"], "cors_origins has 'example.com', which is no origin"),
        (["--host", "0.0.0.0"], "lets other machines in, and there are no API keys"),
        (["--api-keys", "none"], "api_keys='none' cannot be read: No such file"),
        (["--tenants", "none"], "tenants='none' cannot be read: No such file"),
        (["--tenants", "a", "--api-keys", "b"], "api_keys='b' and tenants='a' are two files of keys"),
        (["--admin-key-file", "none"], "admin_key_file='none' cannot be read: No such file"),
        (["--policy", "lifo"], "policy 'lifo' is unknown"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(
    empty_store, monkeypatch, capsys, arguments, message
):
    monkeypatch.delenv("FASTSERVE_API_KEY", raising=False)
    assert main(["serve", "no-such-model", "--offline", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_key_is_printed_once_and_its_digest_kept(tmp_path, capsys) -> None:
    path = tmp_path / "keys"
    assert main(["keys", str(path), "alice"]) == 0
    key = capsys.readouterr().out.strip()
    assert key not in path.read_text()
    assert read_key_file(path).keys[digest_of(key)].name == "alice"
    assert main(["keys", str(path), "alice"]) == 2


def test_a_key_has_the_terms_that_its_options_say(tmp_path, capsys) -> None:
    path = tmp_path / "keys"
    options = [
        "--tenant",
        "team",
        "--weight",
        "2.5",
        "--requests-per-minute",
        "60",
        "--expires",
        "2999-01-31",
    ]
    limits = ["--tokens-per-minute", "60000", "--max-concurrent", "8"]
    assert main(["keys", str(path), "alice", *options, *limits, "--json"]) == 0
    key = json.loads(capsys.readouterr().out)["key"]
    assert path.read_text() == (
        f"alice {digest_of(key)} tenant=team weight=2.5 requests_per_minute=60 tokens_per_minute=60000 "
        "max_concurrent=8 expires=2999-01-31\n"
    )


def test_an_admin_key_has_a_file_of_its_own(tmp_path, capsys) -> None:
    path = tmp_path / "admin"
    assert main(["keys", str(path), "--admin"]) == 0
    key = capsys.readouterr().out.strip()
    assert read_admin_digest(path) == digest_of(key)
    assert main(["keys", str(path), "--admin"]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no NAME"),
        (["alice", "--admin"], "NAME has no use with --admin"),
        (["--admin", "--weight", "2"], "weight has no use with --admin"),
        (["alice", "--weight", "0"], "weight=0.0 is out of range"),
        (["alice", "--max-concurrent", "0"], "max_concurrent=0 is out of range"),
        (["alice", "--expires", "2001-01-01"], "expires=2001-01-01 is over"),
        (["alice", "--expires", "soon"], "expires='soon' is not a day"),
        (["alice", "--tenant", "a/b"], "tenant='a/b' is not a word"),
    ],
)
def test_a_mistake_of_a_key_is_one_line_and_writes_nothing(tmp_path, capsys, arguments, message) -> None:
    path = tmp_path / "keys"
    assert main(["keys", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not path.exists()


def test_weights_of_tenants_have_no_use_where_nobody_shares_fairly(tmp_path, empty_store, capsys) -> None:
    path = tmp_path / "keys"
    assert main(["keys", str(path), "alice", "--weight", "2"]) == 0
    assert main(["serve", "no-such-model", "--offline", "--tenants", str(path), "--fair-share", "off"]) == 2
    assert "the weight of tenant 'alice' has no use" in capsys.readouterr().err

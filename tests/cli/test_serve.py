from __future__ import annotations

from dataclasses import fields

import pytest

from fastserve.cli.main import main
from fastserve.cli.serve import serve
from fastserve.config import EngineOptions
from fastserve.serve.options import ServeOptions
from fastserve.serve.security import read_key_file


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
        (["--api-keys", "none"], "none"),
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
    assert list(read_key_file(path)) == ["alice"]
    assert main(["keys", str(path), "alice"]) == 2

"""Who is let in."""

from __future__ import annotations

import stat

import pytest

from fastserve.errors import OptionError
from fastserve.serve.options import ServeOptions
from fastserve.serve.security import ApiKeys, add_key, check_exposure, digest_of, read_key_file
from serve.conftest import STORIES

MODELS = "/v1/models"


@pytest.fixture(scope="module")
def locked(make_server):
    """A server that others reach, with one key."""
    return make_server(ServeOptions(host="0.0.0.0"), keys=ApiKeys({"alice": digest_of("fs-secret")}))


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"authorization": "Bearer "}, "missing_api_key"),
        ({"authorization": "Basic fs-secret"}, "missing_api_key"),
        ({"authorization": "Bearer fs-secreT"}, "invalid_api_key"),
        ({"x-api-key": "x"}, "invalid_api_key"),
    ],
)
def test_nobody_gets_in_without_a_key(locked, headers: dict[str, str], code: str) -> None:
    for path in (MODELS, "/metrics", "/openapi.json", "/nowhere"):
        response = locked.get(path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == code
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("headers", [{"authorization": "bearer fs-secret"}, {"x-api-key": "fs-secret"}])
def test_a_key_lets_in_by_either_header_and_any_host(locked, headers: dict[str, str]) -> None:
    response = locked.get(MODELS, headers={**headers, "host": "models.example.com"})
    assert response.status_code == 200


def test_health_needs_no_key(locked) -> None:
    assert locked.get("/health/live").status_code == 200


def test_the_key_is_the_tenant_and_users_are_its_own(locked, monkeypatch) -> None:
    tenants: list[str] = []
    submit = locked.llm.submit

    async def spy(*arguments, tenant, **options):
        tenants.append(tenant)
        return await submit(*arguments, tenant=tenant, **options)

    monkeypatch.setattr(locked.llm, "submit", spy)
    body = {"model": STORIES, "prompt": "He", "max_tokens": 2}
    for user in ({}, {"user": "bob"}):
        headers = {"authorization": "Bearer fs-secret"}
        assert locked.post("/v1/completions", {**body, **user}, headers=headers).status_code == 200
    assert tenants == ["alice", "alice/bob"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "127.8.8.8"])
def test_loopback_answers_to_its_own_names(server, host: str) -> None:
    assert server.get(MODELS, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "10.0.0.1:8000", "", "[", "user@"]
)
def test_loopback_refuses_other_names(server, host: str) -> None:
    response = server.get(MODELS, headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:3000", 200), ("https://evil.example", 403), ("null", 403), ("http://[", 403)],
)
def test_pages_of_other_sites_are_refused_on_loopback(server, origin: str, status: int) -> None:
    assert server.get(MODELS, headers={"origin": origin}).status_code == status


def test_cors_is_off_unless_a_site_is_named(server, make_server) -> None:
    site = "https://app.example"
    asks = {"origin": site, "access-control-request-method": "POST"}
    preflight = server.run(server.client.options("/v1/completions", headers=asks))
    assert "access-control-allow-origin" not in preflight.headers
    friendly = make_server(ServeOptions(cors_origins=(site,)))
    preflight = friendly.run(friendly.client.options("/v1/completions", headers=asks))
    assert preflight.headers["access-control-allow-origin"] == site
    more = {"access-control-request-method": "DELETE", "access-control-request-headers": "x-stainless-os"}
    preflight = friendly.run(friendly.client.options("/v1/responses/resp_1", headers={**asks, **more}))
    assert preflight.status_code == 200, preflight.text
    response = friendly.get(MODELS, headers={"origin": site})
    assert response.headers["access-control-allow-origin"] == site


def test_a_server_that_others_reach_needs_a_key() -> None:
    with pytest.raises(OptionError, match="lets other machines in, and there are no API keys"):
        check_exposure(ServeOptions(host="0.0.0.0"), ApiKeys({}))
    check_exposure(ServeOptions(host="0.0.0.0"), ApiKeys({"a": digest_of("k")}))
    check_exposure(ServeOptions(host="::1"), ApiKeys({}))


def test_a_key_file_has_digests_and_is_its_owners(tmp_path) -> None:
    path = tmp_path / "keys"
    keys = {name: add_key(path, name) for name in ("alice", "bob")}
    assert keys["alice"] != keys["bob"]
    assert not [key for key in keys.values() if key in path.read_text()]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = ApiKeys.load(ServeOptions(api_keys=str(path)))
    assert [loaded.name_of(keys["alice"]), loaded.name_of(keys["bob"]), loaded.name_of("x")] == [
        "alice",
        "bob",
        None,
    ]
    with pytest.raises(OptionError, match="has a key of 'bob'"):
        add_key(path, "bob")


@pytest.mark.parametrize(
    "text", ["", "# nobody\n", "alice\n", "alice secret\n", f"a {'0' * 64}\na {'1' * 64}\n"]
)
def test_a_key_file_that_is_wrong_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(OptionError, match="fastserve keys"):
        read_key_file(path)


def test_one_key_may_come_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("FASTSERVE_API_KEY", "k")
    assert ApiKeys.load(ServeOptions()).name_of("k") == "default"


@pytest.mark.parametrize("name", ["alice/bob", "/", "two words", "#x", ""])
def test_a_key_has_a_name_that_no_user_of_another_key_has(tmp_path, name: str) -> None:
    with pytest.raises(OptionError, match="is not a word"):
        add_key(tmp_path / "keys.txt", name)
    (tmp_path / "keys.txt").write_text(f"alice/bob {digest_of('x')}\n")
    with pytest.raises(OptionError, match="line 1"):
        read_key_file(tmp_path / "keys.txt")


def test_a_key_is_added_on_a_line_of_its_own(tmp_path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"alice {digest_of('x')}")  # an editor that ends no last line
    add_key(path, "bob")
    assert set(read_key_file(path)) == {"alice", "bob"}


def test_a_key_file_that_is_no_text_is_refused(tmp_path) -> None:
    (tmp_path / "keys.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="not UTF-8"):
        read_key_file(tmp_path / "keys.txt")

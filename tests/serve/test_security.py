"""Who is let in."""

from __future__ import annotations

from datetime import date

import pytest

from fastserve.errors import OptionError
from fastserve.serve import key_file
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.key_file import add_admin_key, add_key, digest_of
from fastserve.serve.options import ServeOptions
from fastserve.serve.security import WORK_PATHS, check_exposure
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


def test_the_keys_tenant_is_the_engines_whatever_user_is_named_and_the_log_has_the_user(
    locked, monkeypatch, caplog
) -> None:
    tenants: list[str] = []
    submit = locked.llm.submit

    async def spy(*arguments, tenant, **options):
        tenants.append(tenant)
        return await submit(*arguments, tenant=tenant, **options)

    monkeypatch.setattr(locked.llm, "submit", spy)
    caplog.set_level("INFO", logger="fastserve.serve.request")
    body = {"model": STORIES, "prompt": "He", "max_tokens": 2}
    for user in ({}, {"user": "bob"}):
        headers = {"authorization": "Bearer fs-secret"}
        assert locked.post("/v1/completions", {**body, **user}, headers=headers).status_code == 200
    assert tenants == ["alice", "alice"]
    logged = [record.fields for record in caplog.records]
    assert [(line["key"], line["tenant"], line.get("user")) for line in logged] == [
        ("alice", "alice", None),
        ("alice", "alice", "bob"),
    ]


def test_without_keys_the_user_is_the_tenant(server, monkeypatch) -> None:
    tenants: list[str] = []
    submit = server.llm.submit

    async def spy(*arguments, tenant, **options):
        tenants.append(tenant)
        return await submit(*arguments, tenant=tenant, **options)

    monkeypatch.setattr(server.llm, "submit", spy)
    body = {"model": STORIES, "prompt": "He", "max_tokens": 2}
    for user in ({}, {"user": "bob"}):
        assert server.post("/v1/completions", {**body, **user}).status_code == 200
    assert tenants == ["", "bob"]


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


@pytest.fixture(scope="module")
def guarded(make_server, tmp_path_factory):
    """A server with an admin key and API keys, and both keys' headers."""
    folder = tmp_path_factory.mktemp("keys")
    admin_key, key = add_admin_key(folder / "admin"), add_key(folder / "keys", "alice")
    options = ServeOptions(tenants=str(folder / "keys"), admin_key_file=str(folder / "admin"))
    server = make_server(options, keys=ApiKeys.load(options))
    return server, *({"authorization": f"Bearer {each}"} for each in (admin_key, key))


def answer_of(response) -> tuple:
    headers = {name: value for name, value in response.headers.items() if name != "x-request-id"}
    return response.status_code, headers, response.content.replace(b"/admin/tenants", b"/nimda/tenants")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 200, b'{"a": 1}'])
@pytest.mark.parametrize("who", ["nobody", "tenant", "stranger"])
def test_without_the_admin_key_admin_is_an_address_that_does_not_exist(
    guarded, method: str, content: bytes, who: str
) -> None:
    server, _, tenant = guarded
    headers = {"nobody": {}, "tenant": tenant, "stranger": {"x-api-key": "fs-x"}}[who]
    admin, nowhere = (
        answer_of(server.run(server.client.request(method, path, content=content, headers=headers)))
        for path in ("/admin/tenants", "/nimda/tenants")
    )
    assert admin == nowhere
    assert admin[0] == (401 if who != "tenant" else admin[0])
    assert admin[0] >= 400


def test_the_admin_key_opens_admin_and_metrics_and_nothing_else(guarded) -> None:
    server, admin, tenant = guarded
    assert server.get("/admin/tenants", headers=admin).status_code == 200
    assert server.get("/admin/nothing", headers=admin).status_code == 404
    assert server.get("/metrics", headers=admin).status_code == 200
    assert server.get(MODELS, headers=admin).status_code == 401
    assert server.get("/admin/tenants", headers=tenant).status_code == 404


def test_without_an_admin_key_file_admin_does_not_exist(server, guarded) -> None:
    _, admin, _ = guarded
    for headers in ({}, admin):
        response = server.get("/admin/tenants", headers=headers)
        assert response.status_code == 404
        assert response.json() == {
            "error": {
                "message": "there is nothing at /admin/tenants",
                "type": "invalid_request_error",
                "param": None,
                "code": "not_found",
            }
        }
    for headers in ({}, admin):
        assert "/admin/tenants" not in server.get("/openapi.json", headers=headers).json()["paths"]


def test_an_admin_key_without_api_keys_leaves_the_rest_open(make_server, tmp_path) -> None:
    key = add_admin_key(tmp_path / "admin")
    options = ServeOptions(admin_key_file=str(tmp_path / "admin"))
    server = make_server(options, keys=ApiKeys.load(options))
    assert server.get(MODELS).status_code == 200
    assert server.get("/admin/tenants").status_code == 404
    assert server.get("/admin/tenants", headers={"x-api-key": key}).status_code == 200


def test_pages_of_other_sites_are_refused_with_the_admin_key_too(guarded) -> None:
    server, admin, _ = guarded
    response = server.get("/admin/tenants", headers={**admin, "origin": "https://evil.example"})
    assert response.status_code == 403


def test_an_expired_key_is_refused_as_such(make_server, tmp_path, monkeypatch) -> None:
    path = tmp_path / "keys"
    key = add_key(path, "alice", expires=date(2999, 1, 31))
    options = ServeOptions(tenants=str(path))
    server = make_server(options, keys=ApiKeys.load(options))
    for day, status in ((date(2999, 1, 31), 200), (date(2999, 2, 1), 401)):
        monkeypatch.setattr(key_file, "today", lambda day=day: day)
        response = server.get(MODELS, headers={"x-api-key": key})
        assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("expired_api_key", "authentication_error")
    assert "2999-01-31 was its last day" in error["message"]
    assert response.headers["www-authenticate"] == "Bearer"


def test_what_limits_are_for_are_all_the_routes_that_make_a_model_work(server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    working = {
        path
        for path, methods in paths.items()
        if "post" in methods and set(methods["post"]["tags"]) & {"generate", "embed", "classify", "answer"}
    }
    assert working - {"/v1/messages/count_tokens", "/v1/responses/{response_id}/cancel"} == WORK_PATHS

"""The page at / and its files, without a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from fastserve.engine.policy import describe_policies
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.key_file import digest_of
from fastserve.serve.options import ServeOptions

FOLDER = files("fastserve.serve") / "dashboard"
PAGE = (FOLDER / "index.html").read_text(encoding="utf-8")
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in (FOLDER / "script").iterdir()}
STYLES = {path.name: path.read_text(encoding="utf-8") for path in (FOLDER / "style").iterdir()}
TEXTS = {
    language: json.loads((FOLDER / "text" / f"{language}.json").read_text("utf-8"))
    for language in ("en", "zh")
}


SAID_BY_THE_SERVER = ("policy.", "knob.")  # in English


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements() -> list[tuple[str, dict[str, str | None]]]:
    parser = _Elements()
    parser.feed(PAGE)
    return parser.found


def addresses() -> set[str]:
    """What the page names of its own."""
    named = (attributes.get("src") or attributes.get("href") for _, attributes in elements())
    return {address for address in named if address and not address.startswith("#")}


def test_the_page_and_all_that_it_names_are_served(server) -> None:
    page = server.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == PAGE
    assert len(addresses()) > 20
    for address in addresses():
        assert server.get(f"/{address}").status_code == 200, address


def test_a_script_names_no_file_that_is_missing_and_all_are_loaded_at_once() -> None:
    imported = {name for script in SCRIPTS.values() for name in re.findall(r'from "\./([\w.]+)"', script)} | {
        "main.js"
    }
    assert imported == SCRIPTS.keys() - {"theme.js"}
    assert {f"dashboard/script/{name}" for name in SCRIPTS} <= addresses()
    assert {f"dashboard/style/{name}" for name in STYLES} <= addresses()


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/",
        "/dashboard/nothing.js",
        "/dashboard/../app.py",
        "/dashboard/%2e%2e/app.py",
        "/dashboard/index.html",
    ],
)
def test_nothing_else_is_served(server, path: str) -> None:
    response = server.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_the_page_is_none_of_the_api(server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert "/v1/models" in paths
    assert not [path for path in paths if path == "/" or path.startswith("/dashboard")]


def test_what_has_not_changed_is_not_sent_again(server) -> None:
    path = "/dashboard/script/main.js"
    first = server.get(path)
    etag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    for known in (etag, f"W/{etag}", f'"other", {etag}'):
        again = server.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
    assert server.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    assert server.get("/").headers["etag"] != etag
    head = server.run(server.client.head(path))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(first.content))


def test_the_policy_allows_no_other_host_and_no_inline_script(server) -> None:
    policy = dict(
        directive.strip().split(" ", 1)
        for directive in server.get("/").headers["content-security-policy"].split(";")
    )
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert not [tag for tag, attributes in elements() if tag == "script" and not attributes.get("src")]
    assert not [tag for tag, attributes in elements() if "style" in attributes or tag == "style"]
    assert not [name for _, a in elements() for name in a if name.startswith("on")]


def test_the_page_needs_no_key_and_what_it_shows_does(make_server) -> None:
    locked = make_server(ServeOptions(host="0.0.0.0"), keys=ApiKeys({"alice": digest_of("secret")}))
    assert locked.get("/").status_code == 200
    assert locked.get("/dashboard/style/theme.css").status_code == 200
    for path in ("/v1/models", "/dashboard", "/admin/status"):
        assert locked.get(path).status_code == 401


def test_nothing_of_the_page_comes_from_elsewhere() -> None:
    text = PAGE + "".join(SCRIPTS.values()) + "".join(STYLES.values())
    known = {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert set(re.findall(r"https?://[^\s\"'`)\\\[]+", text)) <= known


def keys_of_the_page() -> set[str]:
    """Texts that the page and its scripts ask for by name."""
    named = {
        attributes[name]
        for _, attributes in elements()
        for name in ("data-text", "data-label", "data-placeholder")
        if name in attributes
    }
    for script in SCRIPTS.values():
        named.update(re.findall(r'say\(\s*"([\w.]+)"', script))
        named.update(re.findall(r'\b(?:key|title): "([\w.]+)"', script))
        for pair in re.findall(r'say\([^")]*\? "(\w+)" : "(\w+)"', script):
            named.update(pair)
        named.update(re.findall(r'"(suggestion_\d)"', script))
    return {key for key in named if key}


def test_both_languages_have_the_same_texts_with_the_same_values() -> None:
    english, chinese = TEXTS["en"], TEXTS["zh"]
    assert list(english) == [key for key in chinese if not key.startswith(SAID_BY_THE_SERVER)]
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key
        assert text.strip()
        assert chinese[key].strip()


def test_all_that_the_server_says_of_policies_is_said_in_chinese_too() -> None:
    said = {f"policy.{policy.name}" for policy in describe_policies()}
    said |= {f"knob.{knob.name}" for policy in describe_policies() for knob in policy.knobs}
    assert said == {key for key in TEXTS["zh"] if key.startswith(SAID_BY_THE_SERVER)}


def test_a_text_that_the_page_asks_for_is_there() -> None:
    assert len(keys_of_the_page()) > 100
    assert keys_of_the_page() - TEXTS["en"].keys() == set()


def test_no_text_is_left_that_nobody_asks_for() -> None:
    composed = (
        *SAID_BY_THE_SERVER,
        "state.",
        "lane.",
        "reason.",
        "residency.",
        "finish.",
        "task.",
        "sampling_",
        "server_",
        "theme_",
    )
    passed = re.findall(r'"(\w+)"', "".join(SCRIPTS.values()))
    unused = {key for key in TEXTS["en"] if not key.startswith(composed)} - keys_of_the_page() - set(passed)
    assert unused == set()

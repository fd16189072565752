"""The dashboard over a real server under load: what it shows is what the scheduler does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from fastserve.serve.key_file import Terms, add_key, digest_of
from serve.browser.conftest import Visit
from serve.browser.fake_server import ADMIN_KEY
from serve.process import ServerProcess, serving

pytest.importorskip("fastserve._native")

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture(scope="module")
def steered(model_dir: Callable[[str], Path], tmp_path_factory) -> Iterator[ServerProcess]:
    """Few sequences run at once, so that they are preempted for others."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "admin").write_text(f"admin {digest_of(ADMIN_KEY)}\n")
    options = (
        *("--policy", "mlfq:quantum_seconds=0.05", "--threads", "1", "--max-sequences", "4"),
        *("--context-length", "1024", "--kv-memory", "64MiB", "--admin-key-file", str(folder / "admin")),
    )
    with serving(model_dir("smollm2-135m-instruct"), folder / "log", *options) as server:
        yield server
        assert not [line for line in server.log if line["level"] == "error"]


@pytest.fixture
def started(visit: Callable[..., Visit], steered: ServerProcess) -> Visit:
    return visit(steered.url, admin_key=ADMIN_KEY)


def status(server: ServerProcess) -> dict:
    return httpx.get(f"{server.url}/admin/status", headers=ADMIN).raise_for_status().json()


def lanes(page: Page) -> dict[str, str]:
    """The lane of each sequence."""
    return page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".lane")].flatMap((lane) => {
            const ids = [...lane.querySelectorAll(".chip b")];
            return ids.map((id) => [id.textContent, lane.firstChild.textContent]);
        }))"""
    )


def test_the_scheduler_is_seen_at_work_and_a_preemption_too(started: Visit, steered: ServerProcess) -> None:
    page = started.open("scheduler")
    expect(page.locator("#preemptions")).to_have_class("preemptions none")
    page.get_by_role("button", name="Send a demo load").click()
    expect(page.locator(".chip").nth(11)).to_be_visible(timeout=60_000)
    before = lanes(page)
    expect(page.locator("#preemptions li").first).to_be_visible(timeout=60_000)
    item = page.locator("#preemptions li").first.inner_text().split("\n")
    assert re.fullmatch(r"#\d+", item[1])
    assert item[2] in ("chat", "search", "report")
    assert item[3] in ("passed over", "evicted")
    page.wait_for_function(
        """(before) => [...document.querySelectorAll(".chip b")].some((id) => {
            const lane = id.closest(".lane").firstChild.textContent;
            return before[id.textContent] && before[id.textContent] !== lane;
        })""",
        arg=before,
        timeout=60_000,
    )
    told = status(steered)["engines"][0]
    assert sum(told["preemptions"].values()) > 0
    for name in ("chat", "search", "report"):
        expect(page.locator("#block-map .legend").get_by_text(name)).to_be_visible(timeout=60_000)
    page.get_by_role("link", name="Charts").click()
    page.wait_for_timeout(4000)
    throughput = page.locator(".chart").first.locator(".legend b").first
    assert float(throughput.inner_text().replace(",", "")) > 0
    page.get_by_role("link", name="Scheduler").click()
    page.get_by_role("button", name="Stop the demo load").click()
    expect(page.locator(".chip")).to_have_count(0, timeout=60_000)
    assert status(steered)["engines"][0]["num_sequences"] == 0


def test_the_policy_is_changed_from_the_page(started: Visit, steered: ServerProcess) -> None:
    page = started.open("scheduler")
    page.get_by_role("button", name="Policy: mlfq").click()
    expect(page.get_by_label("quantum_seconds")).to_have_value("0.05")
    page.locator("#policy-choice").select_option("boost")
    page.get_by_label("strength").fill("2")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("#policy-name")).to_have_text("Policy: boost")
    assert status(steered)["engines"][0]["policy_spec"] == "boost:strength=2"


def test_a_server_that_drains_says_so_in_the_playground(started: Visit, steered: ServerProcess) -> None:
    started.expected.add("503 (Service Unavailable)")
    page = started.open("models")
    page.get_by_role("button", name="Drain", exact=True).click()
    expect(page.locator("#server-state")).to_have_text("Draining, requests under way: 0")
    page.get_by_role("link", name="Playground").click()
    page.get_by_label("Message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turn-footer .trouble")).to_contain_text("the server drains")
    page.get_by_role("link", name="Models").click()
    page.get_by_role("button", name="Take requests again").click()
    expect(page.locator("#server-state")).to_contain_text("Live")
    assert status(steered)["is_draining"] is False


def test_tenants_show_what_they_have_had_and_a_mistake_in_their_keys(
    visit: Callable[..., Visit], stories_for_chat: Path, tmp_path: Path
) -> None:
    (tmp_path / "admin").write_text(f"admin {digest_of(ADMIN_KEY)}\n")
    keys = {
        name: add_key(tmp_path / "keys", name, terms=Terms(weight=weight))
        for name, weight in (("shop", 2.0), ("guest", 1.0))
    }
    options = ("--threads", "1", "--context-length", "256", "--kv-memory", "1MiB")
    options += ("--tenants", str(tmp_path / "keys"), "--admin-key-file", str(tmp_path / "admin"))
    with serving(stories_for_chat, tmp_path / "log", *options) as server:
        started = visit(server.url, admin_key=ADMIN_KEY, api_key=keys["guest"])
        started.expected.add("400 (Bad Request)")
        page = started.open("tenants")
        expect(page.locator(".shares li")).to_have_count(2)
        body = {"model": "stories", "prompt": "Once", "max_tokens": 100, "ignore_eos": True}
        for name, num in (("shop", 3), ("guest", 1)):
            for _ in range(num):
                headers = {"authorization": f"Bearer {keys[name]}"}
                httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).raise_for_status()
        rows = page.locator("#tenant-table tbody tr")
        expect(rows.filter(has_text="shop").locator("td").nth(5)).to_have_text("300")
        expect(rows.filter(has_text="guest").locator("td").nth(5)).to_have_text("100")
        share = page.locator(".shares li").filter(has_text="shop").locator(".share-text")
        expect(share).to_have_text(re.compile(r"\d\d%, entitled to 67%"))
        with page.expect_download() as download:
            page.get_by_role("button", name="Usage as CSV").click()
        assert "shop,2.0,0,3," in download.value.path().read_text()
        with (tmp_path / "keys").open("a") as file:
            file.write("a mistake\n")
        page.get_by_role("button", name="Read the key file again").click()
        expect(page.locator(".notice.trouble")).to_contain_text("line 3")
        page.get_by_role("link", name="Playground").click()
        page.get_by_label("Message").fill("Once")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".turn-facts")).to_contain_text("tokens/s")  # the keys are as they were

"""The dashboard over a real server under load: what it shows is what the scheduler does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from serve.browser.conftest import Visit
from serve.browser.fake_server import ADMIN_KEY
from serve.process import ServerProcess, serving

pytest.importorskip("fastserve._native")

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture(scope="module")
def steered(model_dir: Callable[[str], Path], tmp_path_factory) -> Iterator[ServerProcess]:
    """Few sequences run at once, so that they are preempted for others."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "admin").write_text(f"admin {sha256(ADMIN_KEY.encode()).hexdigest()}\n")
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
    expect(page.locator("#server-state")).to_have_text("Draining: takes no requests")
    page.get_by_role("link", name="Playground").click()
    page.get_by_label("Message").fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turn-footer .trouble")).to_contain_text("the server drains")
    page.get_by_role("link", name="Models").click()
    page.get_by_role("button", name="Take requests again").click()
    expect(page.locator("#server-state")).to_contain_text("Live")
    assert status(steered)["is_draining"] is False

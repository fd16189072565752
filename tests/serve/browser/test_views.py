"""The views for who has the admin key, on a server that is made up."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from serve.browser.conftest import Visit
from serve.browser.fake_server import ADMIN_KEY, FakeServer

VisitFake = Callable[..., Visit]


def test_the_admin_key_opens_all_views(visit: Callable[..., Visit], fake: FakeServer) -> None:
    started = visit(fake.url)
    started.expected.add("404 (Not Found)")
    page = started.open()
    page.get_by_role("button", name="Keys").click()
    page.get_by_label("Admin key").fill("wrong")
    page.get_by_role("button", name="Use these keys").click()
    expect(page.get_by_role("alert").filter(has_text="not the admin key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    page.get_by_label("Admin key").fill(ADMIN_KEY)
    page.get_by_role("button", name="Use these keys").click()
    expect(page.locator("#key-dialog")).to_be_hidden()
    names = page.locator("nav a:visible").all_inner_texts()
    assert names == ["Playground", "Scheduler", "Charts", "Models", "Tenants"]
    for name in names[1:]:
        page.get_by_role("link", name=name).click()
        expect(page.get_by_role("heading", level=1, name=name)).to_be_focused()
        assert page.title() == f"{name} · FastServe"


def chips(page: Page) -> dict[str, list[str]]:
    return page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".lane")].map((lane) => {
            const names = [...lane.querySelectorAll(".chip b")].map((name) => name.textContent);
            return [lane.querySelector("h3").textContent, names];
        }))"""
    )


def test_the_scheduler_view_moves(visit_fake: VisitFake) -> None:
    page = visit_fake().open("scheduler")
    expect(page.locator(".chip").first).to_be_visible()
    before, figures = chips(page), page.locator("#scheduler-figures").inner_text()
    assert next(iter(before)) == "Level 0"
    assert sum(map(len, before.values())) == 22
    expect(page.locator(".just-preempted").first).to_be_visible()
    preemption = page.locator("#preemptions li").first.inner_text().split("\n")
    assert preemption[0].endswith(" ago")
    assert preemption[3] in ("passed over", "evicted")
    page.wait_for_timeout(1200)
    assert chips(page) != before
    assert page.locator("#scheduler-figures").inner_text() != figures


def test_a_policy_without_levels_has_lanes_of_states(visit_fake: VisitFake) -> None:
    page = visit_fake().open("scheduler")
    page.get_by_label("Engine of the model").select_option("qwen2.5-0.5b-instruct")
    expect(page.locator(".lane h3").first).to_have_text("Running")
    assert list(chips(page))[:3] == ["Running", "Paused", "Waiting"]
    expect(page.locator("#policy-name")).to_have_text("Policy: boost")


def test_a_frozen_view_stands_still(visit_fake: VisitFake) -> None:
    page = visit_fake().open("scheduler")
    expect(page.locator(".chip").first).to_be_visible()
    page.get_by_role("button", name="Freeze").click()
    before = chips(page)
    page.wait_for_timeout(1200)
    assert chips(page) == before
    page.get_by_role("button", name="Freeze").click()
    page.wait_for_timeout(1200)
    assert chips(page) != before


def test_sequences_can_be_read_as_a_table_and_one_by_one(visit_fake: VisitFake) -> None:
    page = visit_fake().open("scheduler")
    page.locator(".chip").first.click()
    facts = page.locator("#sequence-facts").inner_text()
    assert "Prompt tokens" in facts
    assert re.search(r"Request\s+req-\d+", facts)
    page.keyboard.press("Escape")
    page.locator("#as-table").click()
    expect(page.locator("#sequence-table tbody tr")).to_have_count(22)
    assert page.locator("#sequence-table thead").inner_text().startswith("Sequence")
    expect(page.locator("#lanes")).to_be_hidden()


def test_blocks_are_counted_by_their_tenants(visit_fake: VisitFake, fake: FakeServer) -> None:
    page = visit_fake().open("scheduler")
    expect(page.locator("#block-map .legend li").first).to_be_visible()
    page.get_by_role("button", name="Freeze").click()
    numbers = [int(text) for text in page.locator("#block-map .legend b").all_inner_texts()]
    assert sum(numbers) == 640
    label = page.locator("#block-map canvas").get_attribute("aria-label")
    assert "of 640 blocks" in label
    assert "chat" in label


def test_a_policy_is_chosen_with_its_knobs(visit_fake: VisitFake, fake: FakeServer) -> None:
    page = visit_fake().open("scheduler")
    page.get_by_role("button", name="Policy: mlfq").click()
    dialog = page.locator("#policy-dialog")
    expect(dialog.get_by_label("quantum_seconds")).to_have_attribute("placeholder", "automatic")
    dialog.get_by_label("growth").fill("99")
    dialog.get_by_role("button", name="Apply").click()
    assert fake.asked == []  # out of its range: the browser says so
    dialog.get_by_label("growth").fill("4")
    dialog.get_by_role("button", name="Apply").click()
    expect(dialog).to_be_hidden()
    assert fake.asked == [("policy", {"model": "smollm2-135m-instruct", "policy": "mlfq:growth=4"})]


def test_charts_say_what_they_draw(visit_fake: VisitFake) -> None:
    page = visit_fake().open("charts")
    chart = page.locator(".chart").filter(has=page.get_by_role("heading", name="Throughput"))
    canvas = chart.locator("canvas")
    expect(canvas).to_have_attribute("aria-label", re.compile(r"Throughput\. Completion tokens/s [\d,.]+"))
    page.wait_for_timeout(2500)
    assert int(chart.locator(".legend b").first.inner_text().replace(",", "").split(".")[0]) > 0
    drawn = canvas.evaluate(
        "(c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(Boolean)"
    )
    assert drawn
    canvas.focus()
    page.keyboard.press("ArrowLeft")
    assert re.match(r"\d+:\d+:\d+ [AP]M: Completion", page.locator("#announcement").inner_text())
    chart.get_by_role("button", name="Table").click()
    assert chart.locator("tbody tr").count() >= 2
    latency = page.locator(".chart").filter(has=page.get_by_role("heading", name="Time to first token"))
    assert re.search(r"median \d", latency.locator(".legend").inner_text().replace("\n", " "))


def test_models_are_unloaded_and_what_does_not_fit_is_said(visit_fake: VisitFake, fake: FakeServer) -> None:
    started = visit_fake()
    started.expected.add("409 (Conflict)")
    page = started.open("models")
    card = page.locator(".card").filter(has=page.get_by_role("heading", name="qwen2.5-0.5b-instruct"))
    expect(card.locator(".badge")).to_have_text("loaded")
    card.get_by_role("button", name="Unload").click()
    expect(card.locator(".badge")).to_have_text("unloaded")
    expect(card.get_by_role("button", name="Load", exact=True)).to_be_visible()
    llama = page.locator(".card").filter(has=page.get_by_role("heading", name="llama-3.2-1b-instruct"))
    expect(llama).to_contain_text("unloading qwen2.5-0.5b-instruct gives 0.6 GiB")
    llama.get_by_role("button", name="Load", exact=True).click()
    expect(page.locator(".notice.trouble")).to_contain_text("needs 1.3 GiB")
    assert [action for action, _ in fake.asked] == ["models/unload", "models/load"]


def test_a_drain_is_begun_and_ended(visit_fake: VisitFake, fake: FakeServer) -> None:
    page = visit_fake().open("models")
    page.get_by_role("button", name="Drain", exact=True).click()
    expect(page.locator("#server-state")).to_have_text("Draining, requests under way: 3")
    page.get_by_role("button", name="Take requests again").click()
    expect(page.locator("#server-state")).to_contain_text("Live")
    assert fake.asked == [("drain", {"is_draining": True}), ("drain", {"is_draining": False})]


def test_tenants_show_their_shares_and_usage(visit_fake: VisitFake, fake: FakeServer) -> None:
    page = visit_fake().open("tenants")
    expect(page.locator(".shares li")).to_have_count(3)
    page.wait_for_timeout(2500)
    search = page.locator(".shares li").first.inner_text().replace("\n", " ")
    assert re.match(r"search \d+%, entitled to 50%", search)
    assert "1.2M" in page.locator("#tenant-table").inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Usage as CSV").click()
    assert download.value.suggested_filename == "usage.csv"
    assert download.value.path().read_text().startswith("tenant,requests\n")
    page.get_by_role("button", name="Read the key file again").click()
    expect(page.get_by_text("The key file has been read.")).to_be_visible()
    assert fake.asked == [("tenants/reload", {})]


def test_a_server_that_goes_away_is_missed_and_found_again(visit_fake: VisitFake, fake: FakeServer) -> None:
    started = visit_fake()
    started.expected.update(("Failed to load resource", "net::ERR"))
    page = started.open("scheduler")
    expect(page.locator("#server-state")).to_contain_text("Live")
    started.page.context.set_offline(True)
    fake.end_streams()
    expect(page.locator("#server-state")).to_have_text("Connection lost")
    started.page.context.set_offline(False)
    expect(page.locator("#server-state")).to_contain_text("Live")


def test_who_has_an_admin_key_that_was_replaced_is_told_so_and_asks_no_more(
    visit_fake: VisitFake, fake: FakeServer
) -> None:
    started = visit_fake()
    started.expected.add("Failed to load resource")
    page = started.open("scheduler")
    expect(page.locator("#server-state")).to_contain_text("Live")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    fake.admin_key = "fs-another"
    fake.end_streams()
    expect(page.locator(".notice.trouble")).to_contain_text("This is not the admin key of this server")
    expect(page.locator("#playground")).to_be_visible()
    expect(page.locator(".views .for-admin").first).to_be_hidden()
    page.wait_for_timeout(1500)
    assert len([url for url in asked if "/admin/" in url]) == 1


@pytest.mark.parametrize(
    ("locale", "word"), [("zh-CN", "调度器"), ("en-GB", "Scheduler"), ("de-DE", "Scheduler")]
)
def test_the_page_speaks_its_visitors_language(visit_fake: VisitFake, locale: str, word: str) -> None:
    page = visit_fake(locale=locale).open("scheduler")
    expect(page.get_by_role("heading", level=1)).to_have_text(word)
    assert page.evaluate("document.documentElement.lang") == locale[:2].replace("de", "en")


def test_language_and_theme_are_switched_and_kept(visit_fake: VisitFake) -> None:
    page = visit_fake(color_scheme="light").open("scheduler")
    light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.get_by_role("button", name="中文").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("调度器")
    for _ in ("light", "dark"):
        page.locator("#switch-theme").click()
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert light != dark
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("调度器")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == dark
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Scheduler")
    expect(page.locator(".chip").first).to_be_visible()
    expect(page.locator("main")).not_to_contain_text(re.compile(r"[\u4e00-\u9fff]"))


@pytest.mark.parametrize("view", ["playground", "scheduler", "charts", "models", "tenants"])
def test_no_view_is_wider_than_its_screen(visit_fake: VisitFake, view: str) -> None:
    page = visit_fake().open(view)
    for width in (320, 390, 820, 1600, 2560):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = page.evaluate(
            """() => [...document.querySelectorAll("button, select, input, a")].filter((element) => {
                const { left, right, width } = element.getBoundingClientRect();
                const isShown = width && element.checkVisibility();
                const mayBe = element.closest(".table-scroll, .skip-link");
                return isShown && !mayBe && (left < -1 || right > innerWidth + 1);
            }).map((element) => element.outerHTML.slice(0, 100))"""
        )
        assert outside == [], width

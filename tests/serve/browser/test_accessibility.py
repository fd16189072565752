"""What axe-core finds, and what the keyboard reaches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from serve.browser.conftest import Visit

VisitFake = Callable[..., Visit]
VIEWS = ["playground", "scheduler", "charts", "models", "tenants"]


def findings(page: Page) -> list[str]:
    """All that axe-core finds, of any impact: what, how bad, where."""
    violations = Axe().run(page).response["violations"]
    return [
        f"{v['id']} ({v['impact']}): {v['help']}: {[n['target'] for n in v['nodes']][:3]}" for v in violations
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_view_has_a_barrier(visit_fake: VisitFake, theme: str) -> None:
    started = visit_fake(color_scheme=theme, reduced_motion="reduce")
    for view in VIEWS:
        page = started.open(view)
        for width in (1600, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(600)
            assert findings(page) == [], (view, width)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_neither_has_what_opens_over_it(visit_fake: VisitFake, theme: str) -> None:
    page = visit_fake(color_scheme=theme, locale="zh-CN", reduced_motion="reduce").open("scheduler")
    page.locator("#open-policy").click()
    expect(page.locator("#knobs input").first).to_be_visible()
    assert findings(page) == []
    page.keyboard.press("Escape")
    page.locator(".chip").first.click()
    assert findings(page) == []
    page.keyboard.press("Escape")
    page.locator("#as-table").click()
    assert findings(page) == []
    page.locator("#open-keys").click()
    assert findings(page) == []


def test_the_keyboard_reaches_everything_and_is_seen(visit_fake: VisitFake) -> None:
    page = visit_fake().open("scheduler")
    expect(page.locator(".chip").first).to_be_visible()
    page.get_by_role("button", name="Freeze").click()
    reachable = page.evaluate(
        """() => [...document.querySelectorAll("a[href], button, select, input, [tabindex='0']")]
            .filter((e) => e.checkVisibility() && !e.disabled).length"""
    )
    page.locator(".skip-link").focus()
    seen = []
    for _ in range(reachable - 1):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                """() => {
                    const element = document.activeElement;
                    const { outlineStyle, outlineWidth } = getComputedStyle(element);
                    const isSeen = outlineStyle !== "none" && outlineWidth !== "0px";
                    return [element.id || element.textContent.trim(), isSeen];
                }"""
            )
        )
    names = {name for name, _ in seen}
    assert len(names) == len(seen), "the same twice: something was not reached"
    assert [name for name, is_seen in seen if not is_seen] == []


def test_the_skip_link_leads_to_the_content(visit_fake: VisitFake) -> None:
    started = visit_fake()
    started.page.goto(started.url)
    page = started.page
    expect(page.locator(".suggestions")).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    page.get_by_role("link", name="Models").click()
    page.locator(".brand").focus()
    page.keyboard.press("Shift+Tab")
    expect(page.locator(".skip-link")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    expect(page.locator("#models")).to_be_visible()

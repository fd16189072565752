"""A browser, driven by Playwright, and pages that say what went wrong in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest

from serve.browser.fake_server import ADMIN_KEY, FakeServer, faking

try:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright
except ImportError:
    pytest.skip("playwright is not installed: make .venv/dev", allow_module_level=True)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 1000.0  # in milliseconds, as Playwright counts


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no browser is installed here: chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox"],  # it sees this server's pages alone, and CI runs as root
        )
        yield browser
        browser.close()


class Visit:
    """A page, all that it has asked for, and what it has complained of."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(20 * SECONDS)
        self.url = url
        self.hosts: set[str] = set()
        self.complaints: list[str] = []
        self.expected: set[str] = set()  # texts of complaints that a test brings about
        context.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self, view: str = "playground") -> Page:
        self.page.goto(f"{self.url}/#{view}")
        self.page.wait_for_selector(f".view#{view}:not([hidden])")
        return self.page

    def check(self) -> None:
        """No request has left the host, and nothing was wrong in the page."""
        assert self.hosts == {urlsplit(self.url).netloc}
        unexpected = [text for text in self.complaints if not any(e in text for e in self.expected)]
        assert not unexpected


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens pages: `visit(url, admin_key="...", viewport=..., color_scheme=..., locale=...)`."""
    with ExitStack() as stack:
        visits: list[Visit] = []

        def start(
            url: str, *, admin_key: str | None = None, api_key: str | None = None, **options: Any
        ) -> Visit:
            options = {"viewport": {"width": 1280, "height": 900}, "locale": "en-US", **options}
            context = stack.enter_context(browser.new_context(**options))
            for name, key in (("admin-key", admin_key), ("api-key", api_key)):
                if key is not None:
                    context.add_init_script(f"sessionStorage.setItem('fastserve.{name}', '{key}')")
            visits.append(Visit(context, url))
            return visits[-1]

        yield start
        for made in visits:
            made.check()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    server.run(10)
    with faking(server) as url:
        server.url = url
        yield server


@pytest.fixture
def visit_fake(visit: Callable[..., Visit], fake: FakeServer) -> Callable[..., Visit]:
    """Pages of the made-up server, for who has its admin key."""

    def start(**options: Any) -> Visit:
        return visit(fake.url, **{"admin_key": ADMIN_KEY, **options})

    return start

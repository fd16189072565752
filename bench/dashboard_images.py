"""Pictures of the dashboard for the documents, of a real server under the page's own demo load, into
docs/images/. Needs chromium; look at them before they are committed."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from fastserve.serve.key_file import add_admin_key
from report import CHECKOUT, DEFAULT_MODEL
from serve_overhead import read_url
from serve_watched import find_browser

_COLORS = 256  # of a picture: it is a quarter as large
_DEMO_MS = 25_000  # until there is something to see


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--to", type=Path, default=CHECKOUT / "docs" / "images")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        key_file = Path(folder) / "admin"
        key = add_admin_key(key_file)
        command = [
            sys.executable,
            "-m",
            "fastserve.cli.main",
            "serve",
            arguments.model,
            "--offline",
            "--json",
        ]
        command += ["--port", "0", "--policy", "mlfq", "--context-length", "2048", "--max-sequences", "10"]
        command += ["--kv-memory", "48MiB", "--kv-spill", "64MiB", "--admin-key-file", str(key_file)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            try:
                url = read_url(server)
                with sync_playwright() as playwright:
                    browser = playwright.chromium.launch(
                        executable_path=find_browser(), args=["--no-sandbox"]
                    )
                    take_all(browser, url, key, arguments.to)
                    browser.close()
            finally:
                server.terminate()


def take_all(browser: Browser, url: str, key: str, folder: Path) -> None:
    desk = open_page(browser, url, key, width=1360, height=850, theme="light", locale="en-US")
    desk.fill("#sampling-temperature", "0")
    desk.fill("#sampling-max_completion_tokens", "120")
    desk.fill("#message", "Explain to a child why the sky is blue.")
    desk.press("#message", "Enter")
    desk.wait_for_selector(".turn-facts:not(:empty)", timeout=60_000)
    desk.locator(".token").nth(14).hover()
    take(desk, folder / "dashboard-playground.png")
    desk.click("a[href='#scheduler']")
    desk.click("#toggle-demo")
    desk.wait_for_timeout(_DEMO_MS)
    take(desk, folder / "dashboard-scheduler.png")
    phone = open_page(browser, url, key, width=390, height=844, theme="dark", locale="zh-CN")
    phone.click("a[href='#scheduler']")
    phone.wait_for_timeout(3000)
    take(phone, folder / "dashboard-phone.png")
    desk.click("a[href='#charts']")
    desk.wait_for_timeout(3000)
    take(desk, folder / "dashboard-charts.png")
    desk.click("a[href='#scheduler']")
    desk.click("#toggle-demo")
    desk.wait_for_timeout(1000)


def open_page(
    browser: Browser, url: str, key: str, *, width: int, height: int, theme: str, locale: str
) -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if theme == "dark" else "light",
        locale=locale,
        reduced_motion="reduce",
    )
    context.add_init_script(f"sessionStorage.setItem('fastserve.admin-key', '{key}')")
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(".is-admin")
    return page


def take(page: Page, path: Path) -> None:
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(_COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

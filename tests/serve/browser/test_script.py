"""Modules of the page that can be wrong by themselves, called one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser

from serve.browser.conftest import Visit
from serve.browser.fake_server import FakeServer, faking


@pytest.fixture(scope="module")
def call(browser: Browser) -> Iterator[Callable[..., Any]]:
    """`call("history", "(m, a) => m.quantile(a, 0.5)", argument)`."""

    with faking(FakeServer()) as url, browser.new_context(locale="en-US") as context:
        page = Visit(context, url).open()

        def run(module: str, function: str, argument: Any = None) -> Any:
            script = (
                f"async (argument) => ({function})(await import('/dashboard/script/{module}.js'), argument)"
            )
            return page.evaluate(script, argument)

        yield run


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([0, 2, 0], 0.5, 1.5),
        ([4, 0, 0], 0.25, 0.25),
        ([1, 1, 2], 0.95, 2),  # beyond the last bound nothing is known
        ([0, 0, 0], 0.5, None),
    ],
)
def test_a_quantile_lies_within_its_bucket(call, counts, share, expected) -> None:
    histogram = {"bounds": [1, 2], "counts": counts}
    assert call("history", f"(m, histogram) => m.quantile(histogram, {share})", histogram) == expected


def test_a_rate_survives_an_engine_that_is_loaded_again(call) -> None:
    then = {"time": 10, "engines": [{"model": "a", "n": 100}, {"model": "gone", "n": 5}]}
    now = {"time": 12, "engines": [{"model": "a", "n": 40}, {"model": "new", "n": 7}]}
    assert call("history", "(m, [now, then]) => m.perSecond(now, then, (e) => e.n)", [now, then]) == 20


@pytest.mark.parametrize(
    ("most", "ticks"),
    [
        (7, [0, 2, 4, 6, 8]),
        (0, [0, 1]),
        (0.031, [0, 0.01, 0.02, 0.03, 0.04]),
        (1000, [0, 250, 500, 750, 1000]),
    ],
)
def test_an_axis_has_round_numbers(call, most, ticks) -> None:
    assert call("chart", "(m, most) => m.axisOf(most).ticks", most) == pytest.approx(ticks)


def test_an_axis_of_bytes_has_round_numbers_of_its_unit(call) -> None:
    ticks = call("chart", "(m, most) => m.axisOf(most, { isBinary: true }).ticks", 1.3 * 2**30)
    assert [tick / 2**30 for tick in ticks] == [0, 0.5, 1, 1.5]


def test_events_are_read_however_they_are_cut(call) -> None:
    text = 'data: {"a":1}\n\n: comment\n\ndata: two\ndata: lines\n\nevent: x\r\ndata: é\r\n\r\ndata: cut'
    for size in (1, 2, 3, 7, 1000):
        read = call(
            "server",
            """async (m, [text, size]) => {
                const bytes = new TextEncoder().encode(text);
                const chunks = [];
                for (let at = 0; at < bytes.length; at += size) chunks.push(bytes.slice(at, at + size));
                const pull = (c) => (chunks.length ? c.enqueue(chunks.shift()) : c.close());
                const body = new ReadableStream({ pull });
                const events = [];
                for await (const data of m.readEvents(new Response(body))) events.push(data);
                return events;
            }""",
            [text, size],
        )
        assert read == ['{"a":1}', "two\nlines", "é"]


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a\nb", "<p>a\nb</p>"),
        ("**bold** *it* `x<y`", "<p><strong>bold</strong> <em>it</em> <code>x&lt;y</code></p>"),
        ("snake_case_name 2 * 3 * 4", "<p>snake_case_name 2 * 3 * 4</p>"),
        ("# T\ntext", '<p class="heading heading-1">T</p><p>text</p>'),
        ("1. a\n2. b", "<ol><li>a</li><li>b</li></ol>"),
        ("3) a", '<ol start="3"><li>a</li></ol>'),
        ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
        ("> q\n> r", "<blockquote><p>q\nr</p></blockquote>"),
        ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
        (
            "[x](https://a.example/)",
            '<p><a href="https://a.example/" target="_blank" rel="noopener noreferrer">x</a></p>',
        ),
        ("```py\nif a:\n\n  b\n", '<pre tabindex="0" data-language="py"><code>if a:\n\n  b\n</code></pre>'),
        (
            "|a|b|\n|-|-|\n|1|2|",
            '<div class="table-scroll" tabindex="0"><table><thead><tr><th scope="col">a</th>'
            '<th scope="col">b</th></tr></thead>'
            "<tbody><tr><td>1</td><td>2</td></tr></tbody></table></div>",
        ),
    ],
)
def test_markdown_is_drawn_and_never_run(call, text: str, html: str) -> None:
    draw = """(m, text) => {
        const box = document.createElement("div");
        box.append(...m.renderMarkdown(text));
        return box.innerHTML;
    }"""
    assert call("markdown", draw, text) == html


@pytest.mark.parametrize(
    "text", ["*" * 5000, "[" * 5000, "`" * 4999, "> " * 3000, "- " * 3000, "_a" * 3000, "|" * 4000]
)
def test_markdown_that_is_odd_takes_no_longer(call, text: str) -> None:
    seconds = call(
        "markdown",
        """(m, text) => {
            const start = performance.now();
            m.renderMarkdown(text);
            return (performance.now() - start) / 1000;
        }""",
        text,
    )
    assert seconds < 0.5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (1, "1 s"),
        (59.4, "59.4 s"),
        (61, "1 min"),
        (7260, "2 h"),
        (90_000, "1 d"),
        (None, "–"),
    ],
)
def test_durations_are_short(call, seconds, text) -> None:
    assert call("format", "(m, seconds) => m.duration(seconds)", seconds) == text


def test_an_error_within_a_stream_is_the_servers(call) -> None:
    said = call(
        "completion",
        """(m) => {
            try {
                new m.Completion().feed({ error: { message: "the step has failed", code: "step_failed" } });
            } catch (error) {
                return [error.constructor.name, error.message, error.code];
            }
        }""",
    )
    assert said == ["ServerError", "the step has failed", "step_failed"]

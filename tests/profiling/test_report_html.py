"""The page of a report: complete, by itself, safe, and usable in a browser."""

import dataclasses
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tokenconv.profiling.report import write_report, write_sweep
from tokenconv.profiling.report.html import sweep_to_html, to_html
from tokenconv.profiling.results import Comparison, Point

MakeUp = Callable[..., Comparison]
HOSTILE = """<script>alert(1)</script>"'&{{ 7 }}$x_1$\u00e4\u6f22"""
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements of a page: tag, attributes and text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module", params=["comparison", "failed", "sweep"])
def page(
    request: pytest.FixtureRequest, made_up: MakeUp, failed: MakeUp, sweep: list[Point]
) -> Page:
    made = made_up()
    return Page(
        {
            "comparison": lambda: to_html(made),
            "failed": lambda: to_html(failed(made, "attention_only", "train")),
            "sweep": lambda: sweep_to_html(sweep, made.about),
        }[request.param]()
    )


def test_every_element_is_closed(page: Page):
    assert not page.open


def test_nothing_is_loaded(page: Page):
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        for key, value in attributes.items():
            where = value or ""
            assert not key.startswith("on"), f"{key} of {tag}"
            assert key not in ("src", "srcset", "data")
            if key.endswith("href"):
                assert where.startswith(("#", "points/")), where
            assert "url(" not in where or "url(#" in where
    (policy,) = [
        each["content"]
        for each in page.all("meta")
        if each.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )


def test_ids_are_unique_and_everything_that_is_pointed_at_is_there(page: Page):
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert {name for name, count in ids.items() if count > 1} == set()
    pointed: set[str] = set()
    for _, attributes in page.elements:
        for key, value in attributes.items():
            pointed |= set(re.findall(r"url\(#([^)]*)\)", value or ""))
            if key.endswith("href") and value and value.startswith("#"):
                pointed.add(value[1:])
            if key == "aria-labelledby" and value:
                pointed.add(value)
    assert pointed <= set(ids)
    assert any("clip" in key for _, attributes in page.elements for key in attributes)


def test_everything_has_a_label(page: Page):
    assert len(page.all("main")) == len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"
    assert all(section.get("aria-labelledby") for section in page.all("section"))
    assert len(page.all("svg")) == len(page.all("figure")) == len(page.all("figcaption")) > 0
    for picture in page.all("svg"):
        assert picture["role"] == "img"
        assert re.search(r"\d", picture["aria-label"] or ""), "the values in words"
    assert len(page.all("caption")) == len(page.all("table")) > 0
    assert all(header.get("scope") for header in page.all("th"))
    wide = [each for each in page.all("div") if each.get("class") == "wide"]
    assert len(wide) == len(page.all("table"))
    assert all(w["tabindex"] == "0" and w["role"] == "region" and w["aria-label"] for w in wide)


def test_pictures_take_the_colour_of_the_text(page: Page):
    styles = [a.get("style") or "" for _, a in page.elements]
    assert any("currentColor" in style for style in styles)
    assert not any("#010203" in style for style in styles)


def test_page_says_all_that_the_markdown_says(made_up: MakeUp):
    text = Page(to_html(made_up())).text
    for expected in (
        "pvt_v2_b0: attention_only, original, mix_ffn",
        "Inference of mix_ffn takes 2.25x the time of attention_only (2.14 to 2.36: slower;",
        "Warning: the machine was busy before",
        "2.250x (2.137-2.363)",
        "blocks.*.mlp.act",
        "blocks.7.mlp.act",
        "aten::_conv_depthwise2d",
        "tokenconv compare pvt_v2_b0 --block mix_ffn",
        "python 3.11.7, torch 2.15.0",
        "points above the slanted roof are served from caches",
        "The paired ratio.",
    ):
        assert expected in text


def test_what_failed_is_told(made_up: MakeUp, failed: MakeUp, sweep: list[Point]):
    text = Page(to_html(failed(made_up(), "mix_ffn", "train"))).text
    assert "Failed: A training step of mix_ffn: no memory left" in text
    assert "train mix_ffn 8.100 M 0.044 G - - failed" in text
    text = Page(sweep_to_html(sweep, {})).text
    assert "Failed: img-size=384,batch-size=8: no memory left" in text
    assert "384 8 - - - - - failed" in text


def test_without_a_command_or_findings_a_page_is_whole(made_up: MakeUp):
    alone = dataclasses.replace(made_up(), about={}, arms=made_up().arms[:1])
    page = Page(to_html(alone))
    assert not page.all("pre")
    assert "There is nothing to compare with the baseline." in page.text
    assert "What was inserted" not in page.text


def test_sweep_links_to_the_report_of_every_point(sweep: list[Point]):
    links = [a["href"] or "" for a in Page(sweep_to_html(sweep, {})).all("a")]
    reports = {link for link in links if not link.startswith("#")}
    assert len(reports) == 8
    assert "points/img-size%3D384%2Cbatch-size%3D4/report.html" in reports


def hostile(made_up: MakeUp) -> Comparison:
    made = made_up()
    renamed = dataclasses.replace(
        made.arms[2],
        name=HOSTILE,
        sites={f"{HOSTILE}.{name}": site for name, site in made.arms[2].sites.items()},
    )
    about = {**made.about, "model": HOSTILE, "command": f"tokenconv {HOSTILE}", HOSTILE: HOSTILE}
    return dataclasses.replace(
        made, arms=(*made.arms[:2], renamed), about=about, warnings=(HOSTILE,)
    )


def test_names_are_text_and_nothing_else(made_up: MakeUp):
    html = to_html(hostile(made_up))
    assert "<script>alert" not in html
    page = Page(html)
    assert len(page.all("script")) == 1
    assert page.text.count(HOSTILE) > 10
    labels = [picture["aria-label"] or "" for picture in page.all("svg")]
    assert any(HOSTILE in label for label in labels)


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, made_up: MakeUp, failed: MakeUp, sweep: list[Point]
) -> dict[str, Path]:
    """Pages by name."""
    made = {
        "comparison": made_up(),
        "failed": failed(made_up(), "mix_ffn", "train"),
        "hostile": hostile(made_up),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in (*made, "sweep")}
    for name, comparison in made.items():
        write_report(comparison, folders[name])
    write_sweep(sweep, folders["sweep"], made_up().about)
    return {name: folder / "report.html" for name, folder in folders.items()}


@dataclasses.dataclass
class Visit:
    """A page in a browser, and what happened there."""

    page: Any
    requests: list[str]
    complaints: list[str]


@pytest.fixture
def visit(browser: Any, files: dict[str, Path]) -> Iterator[Callable[..., Visit]]:
    """Opens a page, without a network."""
    contexts = []

    def opened(name: str, **context: Any) -> Visit:
        contexts.append(browser.new_context(offline=True, **context))
        page = contexts[-1].new_page()
        made = Visit(page, [], [])
        page.on("request", lambda request: made.requests.append(request.url))
        page.on("console", lambda message: made.complaints.append(message.text))
        page.on("pageerror", lambda error: made.complaints.append(str(error)))
        page.on("dialog", lambda dialog: made.complaints.append(dialog.message))
        page.goto(files[name].as_uri())
        return made

    yield opened
    for context in contexts:
        context.close()


PAGES = ("comparison", "failed", "hostile", "sweep")


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_has_nothing_to_complain_of(
    visit: Callable[..., Visit], files: dict[str, Path], name: str
):
    visited = visit(name)
    assert visited.requests == [files[name].as_uri()]
    assert visited.complaints == []
    assert files[name].stat().st_size < 2e6
    assert visited.page.locator("h1").is_visible()
    assert visited.page.locator("figure svg").count() > 4


COLUMN = "th:has(button:text-matches('^{}'))"


def column(table: Any, title: str) -> list[str]:
    """What stands under a title, from top to bottom."""
    return table.evaluate(
        """(table, title) => {
            const headers = [...table.tHead.rows[0].cells];
            const index = headers.findIndex((cell) => cell.textContent.startsWith(title));
            return [...table.tBodies[0].rows].map((row) => row.cells[index].textContent.trim());
        }""",
        title,
    )


@pytest.mark.slow
def test_a_click_sorts_by_numbers(visit: Callable[..., Visit]):
    table = visit("failed").page.locator("#figures ~ div table")
    header = table.locator(COLUMN.format("latency"))
    assert header.get_attribute("aria-sort") is None
    assert column(table, "latency")[0] == "20.0 (4.00)"
    up = ["20.0 (4.00)", "28.8 (5.76)", "45.0 (9.00)", "80.0 (16.0)", "115.2 (23.0)", "-"]
    header.locator("button").click()
    assert column(table, "latency") == up
    assert header.get_attribute("aria-sort") == "ascending"
    header.locator("button").click()
    assert column(table, "latency") == [*up[-2::-1], "-"], "what failed stays last"
    assert header.get_attribute("aria-sort") == "descending"


@pytest.mark.slow
def test_keys_sort_as_clicks_do(visit: Callable[..., Visit]):
    page = visit("comparison").page
    table = page.locator("#figures ~ div table")
    table.locator(COLUMN.format("latency")).locator("button").click()
    table.locator(COLUMN.format("arm")).locator("button").focus()
    for key, expected in (("Enter", "attention_only"), ("Space", "original")):
        page.keyboard.press(key)
        assert column(table, "arm")[0] == expected
    assert table.locator(COLUMN.format("arm")).get_attribute("aria-sort") == "descending"
    assert table.locator("th[aria-sort]").count() == 1, "sorted by one column"


@pytest.mark.slow
def test_totals_stay_at_the_end(visit: Callable[..., Visit]):
    table = visit("comparison").page.locator("#saved ~ div table")
    for _ in range(2):
        table.locator(COLUMN.format("mix_ffn")).locator("button").click()
        assert table.locator("tr").last.inner_text().startswith("all")


@pytest.mark.slow
def test_tables_are_there_without_scripts(visit: Callable[..., Visit]):
    page = visit("comparison", java_script_enabled=False).page
    assert page.locator("#figures ~ div tbody tr").count() == 6
    assert page.locator("th button").count() == 0, "no button that does nothing"


@pytest.mark.slow
def test_dark_and_light_differ(visit: Callable[..., Visit]):
    found = set()
    for scheme in ("light", "dark"):
        page = visit("comparison", color_scheme=scheme).page
        read = "(element, key) => getComputedStyle(element)[key]"
        back = page.locator("body").evaluate(read, "backgroundColor")
        text = page.locator("figure svg text").first.evaluate(read, "fill")
        assert back != text
        found |= {back, text}
    assert len(found) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_phone_scrolls_down_only(visit: Callable[..., Visit], name: str):
    page = visit(name, viewport={"width": 375, "height": 800}).page
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    table = page.locator(".wide").first
    assert table.evaluate("element => element.scrollWidth > element.clientWidth")
    letters = page.locator("figure svg text").first
    assert letters.bounding_box()["height"] >= 10

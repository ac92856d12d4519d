"""report.html in Chromium: it loads nothing, runs nothing strange, can be filtered, sorted, printed and read.

Without Chromium in /usr/bin these tests are skipped; with CI_BROWSER=1, as .ci/run has it, that is a failure.
"""

from __future__ import annotations

import html
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from builders import (
    DAY,
    FINISHED,
    NOW,
    PAYMENTS,
    audited,
    failed,
    key,
    key_id,
    numbered,
    run_of,
    user,
)
from endpoint import Json
from picture import ARGUMENTS, CHROMIUM, make_page
from test_page import hostile_run

import iam_audit
from iam_audit import Account, Run

if "CI_BROWSER" not in os.environ:
    pytest.importorskip("playwright")
from playwright.sync_api import sync_playwright

AXE = Path(sysconfig.get_path("purelib")) / "axe_core_python" / "axe.min.js"
WIDTHS = (360, 1280, 1920)
# Elements whose text does not fit, and those that reach out of the page; what scrolls may be longer than it shows
MISFITS = """() => {
  const found = [];
  if (document.documentElement.scrollWidth > innerWidth) found.push('the page is too wide');
  for (const one of document.querySelectorAll('h1,h2,h3,p,li,th,td,dt,dd,small,label,summary,.table')) {
    if (!one.checkVisibility()) continue;
    const box = one.getBoundingClientRect();
    if (box.left < 0 || box.right > innerWidth + 1 || one.scrollWidth > one.clientWidth + 1 && one.clientWidth)
      found.push(one.tagName + ': ' + one.textContent.slice(0, 60));
  }
  return found;
}"""
OVERLAPS = """() => {
  const found = [];
  for (const row of [...document.querySelectorAll('tr')].slice(0, 200)) {
    const boxes = [...row.cells].filter(cell => cell.checkVisibility()).map(cell => cell.getBoundingClientRect());
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1) found.push(row.textContent.slice(0, 60));
    }));
  }
  return found;
}"""

# What of the histogram is wider than its place: with large numbers it must fit on a phone too
BARS_OVER_NUMBERS = """() => [...document.querySelectorAll('.ages, .ages td')]
  .filter(cell => cell.scrollWidth > cell.clientWidth + 1).map(cell => cell.textContent)"""


@dataclass
class Tab:
    """An open page, with what it has told and asked for."""

    page: Any
    summary: Json
    url: str
    told: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def trend(run: Run) -> Run:
    for days in (90, 60, 30):
        figures = dict.fromkeys(iam_audit.RUN_GAPS, days)
        run.tracking.runs.append(
            {"started": iam_audit.iso(NOW - days * DAY), "audited": 9, **figures}
        )
    return run


def large_run() -> Run:
    outcomes = []
    for number in range(5000):
        place = Account(
            numbered(number),
            f"workload-{number}-prod",
            "ACTIVE",
            None,
            "a@example.com",
            "Workloads",
        )
        keys = [key(DAY * (400 + number % 999), DAY, key_id=key_id(f"{number}{n}")) for n in (1, 2)]
        outcomes.append(
            audited(*(user(f"person{n}.{number}", *keys) for n in range(10)), account=place)
        )
    return run_of(outcomes)


def first_run() -> Run:
    return run_of([audited(user("ann", key(DAY * 500, DAY), password=True), account=PAYMENTS)])


def run_with_failures() -> Run:
    return trend(
        run_of([*(failed(numbered(n), f"locked-{n}") for n in range(12)), audited(user("bob"))])
    )


RUNS = {
    "hostile": hostile_run,
    "first": first_run,
    "failures": run_with_failures,
    "large": large_run,
}


@pytest.fixture(scope="module")  # until it ends, Playwright's loop keeps others from asyncio.run
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        if "CI_BROWSER" in os.environ:
            pytest.fail(f"there is no Chromium at {CHROMIUM}")
        pytest.skip(f"there is no Chromium at {CHROMIUM}: apt-get install chromium")
    with sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield made
        made.close()


@pytest.fixture(scope="module", params=["demo", *RUNS])
def tab(
    request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tab]:
    folder = tmp_path_factory.mktemp("page")
    if request.param == "demo":
        path = make_page(folder / "reports").resolve()
        summary = iam_audit.read_summary(path.parent)
    else:
        run, path = RUNS[request.param](), folder / "report.html"
        summary = iam_audit.summary_document(run, FINISHED)
        path.write_text(iam_audit.report_page(run, summary), "utf-8")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    made = Tab(page, summary, path.as_uri())
    page.on("console", lambda message: made.told.append(message.text))
    page.on("pageerror", lambda error: made.told.append(str(error)))
    page.on("dialog", lambda dialog: made.told.append(dialog.message))
    page.on("request", lambda asked: made.requests.append(asked.url))
    page.goto(made.url)
    page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    yield made
    page.close()


def shown(tab: Tab, css: str) -> list[list[str]]:
    """The rows of a table that are shown, as texts of their cells."""
    rows = tab.page.evaluate(
        f"[...document.querySelectorAll('.{css} tbody tr')].filter(row => !row.hidden)"
        ".map(row => [...row.cells].map(cell => cell.textContent.trim()))"
    )
    assert isinstance(rows, list)
    return rows


def test_it_opens_loads_nothing_and_runs_only_our_script(tab: Tab) -> None:
    assert tab.requests == [tab.url]
    assert tab.told == []
    assert tab.page.title().startswith("IAM audit ")
    assert tab.page.evaluate("document.scripts.length") == 1
    assert (
        tab.page.evaluate(
            "[...document.images, ...document.querySelectorAll('iframe,object')].length"
        )
        == 0
    )


def test_filters_and_sorting(tab: Tab) -> None:
    page, everyone = tab.page, shown(tab, "findings")
    filters = page.locator(".filters").first
    for priority in sorted({row[0] for row in everyone}):
        filters.locator("select").select_option(priority)
        rows = shown(tab, "findings")
        assert [row[0] for row in rows] == [row[0] for row in everyone if row[0] == priority]
        assert filters.locator("output").text_content() == f"{len(rows)} of {len(everyone)} shown"
    filters.locator("select").select_option("")
    filters.get_by_label("Production only").check()
    assert shown(tab, "findings") == [row for row in everyone if ", production" in row[2]]
    filters.get_by_label("Production only").uncheck()
    filters.get_by_label("New since").check()
    assert shown(tab, "findings") == [row for row in everyone if "(new)" in row[1]]
    filters.get_by_label("New since").uncheck()
    filters.locator("input").first.fill("NO such Words")
    assert shown(tab, "findings") == []
    filters.locator("input").first.fill(everyone[0][3][:9].upper() if everyone else "")
    assert len(shown(tab, "findings")) >= min(1, len(everyone))
    filters.locator("input").first.fill("")
    assert shown(tab, "findings") == everyone
    heading = page.locator(".findings th").nth(4)
    for direction in ("ascending", "descending"):
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == direction
        ages = [int(row[4] or -1) for row in shown(tab, "findings")]
        assert ages == sorted(ages, reverse=direction == "descending")


def test_figures_and_accounts_are_those_of_summary_json(tab: Tab) -> None:
    summary, text = tab.summary, tab.page.inner_text("main > section:first-child")
    for phase in ("phase1", "phase2"):
        for level, number in summary["maturity"][phase]["accounts"].items():
            assert re.search(rf"{level}\s+{number:,} account", text)
    rows = {
        re.sub(r".*(\d{12})(, production)?$", r"\1", row[0]): row for row in shown(tab, "accounts")
    }
    assert rows.keys() == {one["id"] for one in summary["accounts"]}
    for one in summary["accounts"]:
        row = rows[one["id"]]
        assert one["result"] in row[-1]
        if one["result"] == "audited":
            gaps = one["gaps"]
            assert row[2:4] == [one["maturity"]["phase1"], one["maturity"]["phase2"]]
            assert row[4] == f"{gaps['console_users_without_mfa']} of {gaps['console_users']}"
            assert row[5] == f"{gaps['active_keys_older_than_max_age']} of {gaps['active_keys']}"
            api_keys = (gaps["active_api_keys_without_expiry"], gaps["active_api_keys"])
            assert row[6] == "{} of {}".format(*api_keys)
            assert row[7:-1] == [control["verdict"] for control in one["controls"].values()]
    charts = tab.page.evaluate(
        "[...document.querySelectorAll('svg title')].map(one => one.textContent)"
    )
    for name, title in zip(iam_audit.RUN_GAPS, charts, strict=True):
        assert f": {summary['gaps']['organization'][name]:,} " in title


def test_links_lead_to_files_of_the_run(tab: Tab) -> None:
    folder = Path(tab.url.removeprefix("file://")).parent
    links = tab.page.evaluate("[...document.links].map(link => link.href)")
    for link in links:
        assert link.startswith(folder.as_uri() + "/")
        if "demo" in tab.url or (folder / "summary.json").exists():
            assert Path(html.unescape(link).removeprefix("file://")).is_file()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_at_every_width(tab: Tab, scheme: str) -> None:
    tab.page.emulate_media(color_scheme=scheme, media="screen")
    large = len(tab.summary["accounts"]) > 1000
    for width in WIDTHS:
        tab.page.set_viewport_size({"width": width, "height": 900})
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.page.evaluate(BARS_OVER_NUMBERS) == []
        if not large:
            assert tab.page.evaluate(MISFITS) == []
            assert tab.page.evaluate(OVERLAPS) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(tab: Tab, scheme: str) -> None:
    if len(tab.summary["accounts"]) > 1000:
        pytest.skip("the same page as the others, with more rows")
    tab.page.emulate_media(color_scheme=scheme, media="screen")
    tab.page.set_viewport_size({"width": 1280, "height": 900})
    tab.page.evaluate(AXE.read_text("utf-8"))
    found = tab.page.evaluate("axe.run().then(result => result.violations)")
    assert [
        (one["id"], one["nodes"][0]["html"][:200])
        for one in found
        if one["impact"] in ("serious", "critical")
    ] == []


def test_it_prints(tab: Tab) -> None:
    if len(tab.summary["accounts"]) > 1000:
        pytest.skip("the same page as the others, with more rows")
    tab.page.emulate_media(media="print")
    pdf = tab.page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    [*_, width, height] = map(float, re.findall(rb"/MediaBox \[([^]]*)", pdf)[0].split())
    assert (round(width / 72 * 25.4), round(height / 72 * 25.4)) == (210, 297)
    assert not tab.page.locator(".filters").first.is_visible()
    tab.page.emulate_media(media="screen")
    assert tab.told == []


def test_without_scripts_all_of_it_can_be_read(browser: Any, tmp_path: Path) -> None:
    run = first_run()
    path = tmp_path / "report.html"
    path.write_text(iam_audit.report_page(run, iam_audit.summary_document(run, FINISHED)), "utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert not page.locator(".filters").first.is_visible()
    assert page.locator(".findings tbody tr").first.is_visible()
    assert page.locator(".accounts tbody tr").first.is_visible()
    context.close()

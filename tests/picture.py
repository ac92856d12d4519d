"""The README's picture: tests/report.png, the top of the demo's page, with some earlier runs for its trend.

`python tests/picture.py` needs Chromium in /usr/bin. The demo runs twice, and in between its first run is copied into
the past, with the figures that the organization might have had then.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from datetime import datetime, timedelta, timezone
from pathlib import Path

import demo

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PICTURE = Path(__file__).resolve().parent / "report.png"
# Weeks before now, and then: console users without MFA, active access keys, the old ones of them
PAST = [
    (26, 19, 31, 27),
    (22, 17, 31, 26),
    (17, 15, 29, 24),
    (13, 15, 27, 22),
    (9, 11, 26, 19),
    (4, 10, 24, 19),
]
NAMES = ("console_users_without_mfa", "active_keys", "active_keys_older_than_max_age")


def add_past(reports: Path, now: datetime) -> None:
    """Copy the one run in the folder into the past."""
    [made] = reports.glob("*Z")
    for weeks, *figures in PAST:
        started = now - timedelta(weeks=weeks)
        folder = reports / f"{started:%Y%m%dT%H%M%SZ}"
        shutil.copytree(made, folder)
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        summary["started"] = started.isoformat(timespec="seconds")
        summary["gaps"]["organization"].update(zip(NAMES, figures, strict=True))
        (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    shutil.rmtree(made)


def make_page(reports: Path) -> Path:
    """The page of the demo's organization with its past."""
    arguments = ["--output-dir", str(reports), "--quiet"]
    demo.main(arguments)
    add_past(reports, datetime.now(timezone.utc))
    demo.main(arguments)
    return reports / "latest" / "report.html"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.parse_args()
    from playwright.sync_api import (
        sync_playwright,
    )  # the tests take the rest of this file without it

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = make_page(Path(folder) / "reports")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        tab = browser.new_page(viewport={"width": 1280, "height": 1130})
        tab.goto(page.as_uri())
        tab.screenshot(path=PICTURE)
        browser.close()
    print(PICTURE, f"{PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

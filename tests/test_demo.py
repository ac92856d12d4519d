"""The demo, as a newcomer runs it: a process, in a folder of its own, on a machine whose AWS setup must not matter."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from endpoint import TIMEOUT

DEMO = Path(__file__).with_name("demo.py")
AUDITED = {  # ten member accounts; acquired-2018 is suspended
    *("111122223333", "222233334444", "333344445555", "444455556666", "555566667777"),
    *("666677778888", "777788889999", "888899990000", "999900001111"),
}
DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")


def run_demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # A profile and a proxy that do not exist: whoever used either would fail.
    traps = {
        "AWS_PROFILE": "a-real-profile",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    return subprocess.run(
        [sys.executable, str(DEMO), *options],
        cwd=folder,
        env=os.environ | traps,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def tables(folder: Path) -> dict[str, list[list[str]]]:
    """The rows of every account's CSV by account ID."""
    return {
        file.stem: list(csv.reader(file.open(newline="")))
        for file in folder.rglob("accounts/*.csv")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def finished(folder: Path) -> subprocess.CompletedProcess[str]:
    return run_demo(folder)


def test_audits_every_active_account(
    finished: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert finished.returncode == 0, finished.stderr
    assert set(tables(folder / "reports")) == AUDITED


def test_names_the_files_it_wrote(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    named = {
        folder / line.strip()
        for line in finished.stdout.partition("\nThe files of this run:\n")[2].splitlines()
    }
    [latest] = (folder / "reports").glob("*/latest")
    written = {file for file in latest.resolve().rglob("*") if file.is_file()}
    assert {file.resolve() for file in named} == written
    assert len(named) > len(AUDITED)  # summary.json at least is there too


def test_shows_users_keys_and_mfa_of_all_kinds(
    finished: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert finished.returncode == 0, finished.stderr
    header, *rows = [row for table in tables(folder / "reports").values() for row in table]
    seen = {name: {row[column] for row in rows} for column, name in enumerate(header)}
    assert seen["password_status"] >= {"Configurada", "No configurada"}
    assert {"Nunca", "N/A"} < seen["password_last_used"]
    assert seen["status"] >= {"Active", "Inactive", "N/A"}
    assert {"Nunca utilizada", "N/A"} < seen["last_used_date"]
    assert seen["mfa_status"] >= {
        "None",
        "Virtual",
        "Hardware",
        "SMS",
        "Security key+Virtual",
        "Hardware+Security key",
    }
    assert seen["account_name"] >= {
        "Data Lake, Staging",
        """'=HYPERLINK("http://203.0.113.7","Invoice")""",
    }
    assert seen["username"] >= {"<root_account>", "'=glue-loader", "lake,reader", "'@SUM.1+1"}


def test_shows_what_is_most_urgent_and_what_an_exception_covers(
    finished: subprocess.CompletedProcess[str], folder: Path
) -> None:
    """Somebody exposed, an API key for ever, an administrator's old key; exceptions that hold and have run out."""
    [path] = (folder / "reports").rglob("latest/findings.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(one["username"], one["finding"]): one for one in rows}
    assert found["mailer", "exposed-credential"]["priority"] == "1"
    assert found["BedrockAPIKey-k3mq", "api-key-without-expiry"]["ou"] == "Workloads/Production"
    boss = found["ana.torres", "key-older-than-1-year"]
    assert (boss["administrator"], boss["owner"]) == ("true", "payments")
    assert found["diego.rios", "key-older-than-1-year"]["administrator"] == "true"  # by their group
    covered = found["diego.rios", "console-without-mfa"]
    assert covered == rows[-1]
    assert (covered["exception"], bool(covered["until"])) == ("leaves the company soon", True)
    assert all(not one["exception"] for one in rows[:-1])
    for shown in (
        "exposed-credential",
        "api-key-without-expiry",
        "1 finding covered by exceptions",
        "settlement-export",
        "to be moved to a role by then",
    ):
        assert shown in finished.stdout, shown


def test_is_the_same_every_time(
    finished: subprocess.CompletedProcess[str], folder: Path, tmp_path: Path
) -> None:
    """Up to the dates, which are counted back from the start; the options behind the demo's own reach the program."""
    again = run_demo(tmp_path, "--output-dir", "again", "--exclude", "888899990000,999900001111")
    assert (finished.returncode, again.returncode) == (0, 0), again.stderr
    first = tables(folder / "reports")
    second = tables(tmp_path / "again")
    assert set(second) == AUDITED - {"888899990000", "999900001111"}
    for account_id, rows in second.items():
        assert undated(rows) == undated(first[account_id])


def undated(rows: list[list[str]]) -> list[list[str]]:
    return [[DATE.sub("DATE", cell) for cell in row] for row in rows]


def test_ends_as_the_program_ends(tmp_path: Path) -> None:
    refused = run_demo(tmp_path, "--workers", "0")
    assert refused.returncode == 2
    assert "files of this run" not in refused.stdout

"""Cells that no spreadsheet takes for formulas, CSVs that read back exactly, files that are whole or not there."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import stat
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from builders import MANAGEMENT, ONE, THREE, TWO, reach, summary_of
from conftest import Program, Serve
from endpoint import TIMEOUT, account, key, user
from hypothesis import given
from hypothesis import strategies as st

import iam_audit

cells = st.text(
    st.one_of(st.sampled_from("='\"+-@\t\r\n,; a"), st.characters(exclude_categories=["Cs"])),
    max_size=8,
)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\tname", "'\tname"),
        ("\rname", "'\rname"),
        ("x;=cmd|' /C calc'!A0", "x;'=cmd|' /C calc'!A0"),
        ("x;'=1", "x;''=1"),
        ("x,+1", "x,'+1"),
        ("x\t-1", "x\t'-1"),
        ("x\n@SUM(A1)", "x\n'@SUM(A1)"),
        ("=1;=2", "'=1;'=2"),
        ("\t=1", "'\t'=1"),
        ("x; =1", "x; =1"),
        ("name", "name"),
        ("", ""),
        ("a=1", "a=1"),
        ("<root_account>", "<root_account>"),
        ("2024-01-31T12:00:00+00:00", "2024-01-31T12:00:00+00:00"),
    ],
)
def test_formulas_get_an_apostrophe(text: str, cell: str) -> None:
    assert iam_audit.neutral(text) == cell
    assert iam_audit.original(cell) == text


@given(st.one_of(cells, st.text("='+;,\t\r\n a", max_size=6)))
def test_cells_read_back(text: str) -> None:
    """Also names that begin with apostrophes of their own, which must neither be lost nor be mistaken for ours."""
    assert iam_audit.original(iam_audit.neutral(text)) == text
    for field in re.split("[;,\t\n]", iam_audit.neutral(text)):
        assert not field.startswith(("=", "+", "-", "@", "\t", "\r"))


@given(cells)
def test_a_quoted_cell_is_the_neutral_one(text: str) -> None:
    """Whether or not it takes the short way; and no separator stands outside quotes."""
    cell = iam_audit.quoted(text)
    assert [*csv.reader(io.StringIO(cell, newline=""), strict=True)] == (
        [[iam_audit.neutral(text)]] if text else []
    )
    assert cell.startswith('"') or not re.search("[;,\t\r\n]", cell)


@given(st.lists(st.lists(cells, min_size=3, max_size=3), max_size=5))
def test_tables_read_back(tmp_path: Path, rows: list[list[str]]) -> None:
    """By the csv module as every Python has it; on disk each row ends in one line feed."""
    path = tmp_path / "table.csv"
    iam_audit.write_csv(path, ["a", "b", "c"], rows)
    with path.open(encoding="utf-8", newline="") as file:
        header, *read = csv.reader(file, strict=True)
    assert header == ["a", "b", "c"]
    assert [[iam_audit.original(cell) for cell in row] for row in read] == rows
    assert path.read_bytes().startswith(b"a,b,c\n")
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.program
def test_no_formula_begins_where_semicolons_separate(serve: Serve, run_program: Program) -> None:
    """As in a spreadsheet of Spain or Germany, whatever it makes of quotes in the middle of a row."""
    name = "one;=cmd|' /C calc'!A0;+1"
    result = run_program(serve(account(ONE, name, users=[user("ana")])).env())
    text = result.csv(ONE).read_text(encoding="utf-8")
    assert f'"{iam_audit.neutral(name)}"' in text
    assert not re.search(r"[;\n][=+\-@]", text)
    assert {iam_audit.original(row["account_name"]) for row in result.rows(ONE)} == {name}


@pytest.mark.program
def test_line_ends_within_a_cell_read_back(serve: Serve, run_program: Program) -> None:
    """The account's name comes by JSON, which lets them through."""
    name = "one\r\ntwo\nthree\rfour\tfive \"six\", 'seven'"
    result = run_program(serve(account(ONE, name, users=[user("ana")])).env())
    assert [row["account_name"] for row in result.rows(ONE)] == [name, name]


def test_a_file_is_there_in_full_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"

    def rows() -> Iterator[list[str]]:
        yield ["1"]
        assert not path.exists()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        iam_audit.write_csv(path, ["a"], rows())
    assert list(tmp_path.iterdir()) == []
    iam_audit.write_csv(path, ["a"], [["old"]])
    with pytest.raises(ZeroDivisionError):
        iam_audit.write_csv(path, ["a"], ([str(1 // n)] for n in (1, 0)))
    assert path.read_text(encoding="utf-8") == "a\nold\n"
    assert list(tmp_path.iterdir()) == [path]


@given(
    st.dictionaries(
        st.from_regex(r"[0-9]{12}", fullmatch=True),
        st.lists(st.lists(cells, min_size=2, max_size=2), max_size=4),
        max_size=5,
    )
)
def test_a_spool_gives_back_the_rows_by_account(
    tmp_path: Path, accounts: dict[str, list[list[str]]]
) -> None:
    """In whatever order they came; what stands in the file is what `write_csv` would have written."""
    spool = iam_audit.Spool(tmp_path / "spooled.csv")
    for account_id, rows in accounts.items():
        spool.add(account_id, rows)
    iam_audit.write_file(tmp_path / "spooled.csv", spool.lines(["a", "b"]))
    rows = [row for account_id in sorted(accounts) for row in accounts[account_id]]
    iam_audit.write_csv(tmp_path / "table.csv", ["a", "b"], rows)
    written = (tmp_path / "spooled.csv").read_bytes()
    assert written == (tmp_path / "table.csv").read_bytes()
    assert stat.S_IMODE((tmp_path / "spooled.csv").stat().st_mode) == 0o600


def test_a_spool_keeps_its_rows_on_disk(tmp_path: Path) -> None:
    """Beyond a megabyte, so that memory stays flat; and nothing is left of it that has a name."""
    spool = iam_audit.Spool(tmp_path / "credentials.csv")
    tracemalloc.start()
    try:
        for number in range(2000, 0, -1):
            spool.add(f"{number:012}", [["x" * 100, "\ud83d", f"{number}"]] * 100)
        kept, _ = tracemalloc.get_traced_memory()
        iam_audit.write_file(tmp_path / "credentials.csv", spool.lines(["a", "b", "c"]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 2_000_000
    assert peak < 4_000_000
    assert list(tmp_path.iterdir()) == [tmp_path / "credentials.csv"]
    with (tmp_path / "credentials.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    assert header == ["a", "b", "c"]
    assert [row[2] for row in rows[::100]] == [str(number) for number in range(1, 2001)]
    assert rows[0][1] == "\\ud83d"


def test_a_spool_that_cannot_write_says_which_file(tmp_path: Path) -> None:
    spool = iam_audit.Spool(tmp_path / "gone" / "credentials.csv")
    with pytest.raises(
        iam_audit.AuditError, match=r"^Cannot write .*/gone/credentials\.csv: No such"
    ):
        spool.add(ONE, [["x" * 1_100_000]])


@pytest.mark.program
def test_credentials_csv_has_every_credential_by_account(
    serve: Serve, run_program: Program
) -> None:
    """Whichever account is done first; with quotes against formulas; empty but for a header if there are none."""
    keys = [key("AKIA000000000000ANA2", created="2026-01-02"), key("AKIA000000000000ANA1")]
    endpoint = serve(
        account(THREE, "three", users=[user("=cmd", password=True, keys=keys), user("bea")]),
        account(ONE, "one;-1", users=[user("zoe", keys=[key("AKIA000000000000ZOE1")])]),
        account(TWO, "two", role="denied"),
    )
    result = run_program(endpoint.env())
    path = result.folder / "credentials.csv"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text(encoding="utf-8")
    assert "one;'-1" in text
    header, *rows = csv.reader(text.splitlines(), strict=True)
    assert tuple(header) == iam_audit.CREDENTIALS_COLUMNS
    found = [dict(zip(header, map(iam_audit.original, row), strict=True)) for row in rows]
    assert [(one["account_id"], one["username"], one["kind"]) for one in found] == [
        (ONE, "zoe", "access-key"),
        *((THREE, "=cmd", kind) for kind in ("password", "access-key", "access-key")),
    ]
    for one in found:
        if one["kind"] == "access-key":
            [row] = [
                row
                for row in result.rows(one["account_id"])
                if row["access_key_id"] == one["credential_id"]
            ]
            same = ("account_name", "status", "created_date", "last_used_date", "service_name")
            assert [one[name] for name in same] == [iam_audit.original(row[name]) for name in same]
    empty = run_program(serve(account(TWO, "two", role="denied")).env())
    assert (empty.folder / "credentials.csv").read_text(encoding="utf-8") == ",".join(header) + "\n"


def test_the_summary_is_written_last(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder without it is one of a run that did not finish."""
    reach(serve(account(ONE, "one"), account(TWO, "two")), monkeypatch)
    put_in_place: list[str] = []

    def replace(
        source: str, target: Path, rename: Callable[[str, Path], None] = os.replace
    ) -> None:
        put_in_place.append(target.name)
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert (
        iam_audit.main(["--role", "Audit", "--output-dir", str(tmp_path / "reports"), "--quiet"])
        == 0
    )
    assert {f"{ONE}.csv", f"{TWO}.csv"} <= set(put_in_place)
    assert put_in_place[-2:] == ["summary.json", "latest"]
    files = (path for path in tmp_path.rglob("*") if path.is_file())
    assert {path.name for path in files} == set(put_in_place[:-1])
    assert capsys.readouterr().out == ""


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    started = datetime(2026, 11, 23, 20, 50, tzinfo=timezone.utc)
    made = [iam_audit.make_run_folder(tmp_path / "reports", started) for _ in range(3)]
    assert made[0].name == "20261123T205000Z"
    assert len({*made}) == 3
    assert all((folder / "accounts").is_dir() for folder in made)


@pytest.mark.program
def test_new_folders_are_the_owners_alone_whatever_the_umask(
    serve: Serve, run_program: Program, tmp_path: Path
) -> None:
    """What is in the folders is checked after every run, by conftest.py."""
    output_dir = tmp_path / "a" / "b" / "reports"
    result = run_program(
        serve(account(ONE, "one")).env(), output_dir=output_dir, preexec_fn=lambda: os.umask(0)
    )
    assert result.csvs == {ONE}
    made = (output_dir, output_dir.parent, output_dir.parent.parent)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in made] == [0o700] * 3


@pytest.mark.program
def test_a_folder_that_is_there_is_left_as_it_is(
    serve: Serve, run_program: Program, tmp_path: Path
) -> None:
    (tmp_path / "notes.csv").write_text("mine", encoding="utf-8")
    (tmp_path / "notes.csv").chmod(0o600)
    mode = tmp_path.stat().st_mode
    run_program(serve(account(ONE, "one")).env(), output_dir=tmp_path)
    assert (tmp_path / "notes.csv").read_text(encoding="utf-8") == "mine"
    assert tmp_path.stat().st_mode == mode


@pytest.mark.program
def test_two_runs_in_the_same_second_get_a_folder_each(
    serve: Serve, program: Program, tmp_path: Path
) -> None:
    """Whichever second it starts in, another run has begun in it already."""
    now = datetime.now(timezone.utc)
    taken = {f"{now + timedelta(seconds=n):%Y%m%dT%H%M%SZ}" for n in range(TIMEOUT)}
    for name in taken:
        (tmp_path / name).mkdir(mode=0o700)
    endpoint = serve(account(ONE, "one", users=[user("ana", keys=[key("AKIA0000000000000ANA")])]))
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(program.start(endpoint.env(), output_dir=tmp_path))
            for _ in range(2)
        ]
        ended = [process.communicate(timeout=TIMEOUT) for process, _ in started]
        assert [process.returncode for process, _ in started] == [0, 0], ended
    made = {path for path in tmp_path.iterdir() if path.name not in {*taken, "latest"}}
    assert len(made) == 2
    for folder in made:
        assert (
            json.loads((folder / "summary.json").read_text(encoding="utf-8"))["totals"]["audited"]
            == 1
        )
        assert (folder / "accounts" / f"{ONE}.csv").exists()
    assert not any(any((tmp_path / name).iterdir()) for name in taken)


@pytest.mark.program
def test_summary_says_what_was_done(serve: Serve, run_program: Program) -> None:
    users = [
        user("ana", keys=[key("AKIA000000000000ANA1"), key("AKIA000000000000ANA2")]),
        user("bea"),
    ]
    endpoint = serve(
        account(
            ONE,
            "one",
            users=users,
            report_time="2026-01-02T03:04:05Z",
            paths=["o-test123456/r-test/ou-1/1/"],
        ),
        account(TWO, "two", role="denied"),
        account(THREE, "three", state="SUSPENDED"),
    )
    before = datetime.now(timezone.utc).replace(microsecond=0)
    result = run_program(endpoint.env(), role="audit/Role")
    summary = summary_of(result)
    assert isinstance(summary["format"], int)
    assert (summary["version"], summary["role"]) == (iam_audit.VERSION, "audit/Role")
    started, finished = (datetime.fromisoformat(summary[name]) for name in ("started", "finished"))
    assert before <= started <= finished <= datetime.now(timezone.utc)
    assert summary["caller"]["account"] == MANAGEMENT
    assert summary["organization"]["id"] == "o-test123456"
    assert summary["organization"]["management_account"] == MANAGEMENT
    assert [summary["totals"][name] for name in ("audited", "failed", "skipped", "users")] == [
        1,
        1,
        1,
        2,
    ]
    entries = {
        one: (entry["name"], entry["state"], entry["result"])
        for one, entry in result.accounts.items()
    }
    assert entries == {
        ONE: ("one", "ACTIVE", "audited"),
        TWO: ("two", "ACTIVE", "failed"),
        THREE: ("three", "SUSPENDED", "skipped"),
    }
    audited, failed = result.accounts[ONE], result.accounts[TWO]
    assert audited["report_generated"] == "2026-01-02T03:04:05+00:00"
    assert (audited["users"], audited["gaps"]["access_keys"]) == (2, 2)
    assert (failed["step"], failed["error"]["code"]) == ("AssumeRole", "AccessDenied")
    assert "sts:AssumeRole" in failed["error"]["message"]


def test_half_a_character_does_not_cost_the_file(tmp_path: Path) -> None:
    iam_audit.write_csv(tmp_path / "events.csv", ["user_agent"], [["half \ud83d"], ["whole"]])
    assert (tmp_path / "events.csv").read_text(
        encoding="utf-8"
    ) == "user_agent\nhalf \\ud83d\nwhole\n"

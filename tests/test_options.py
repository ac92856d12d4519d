"""The command line's options: what each takes, and what is refused before AWS is asked anything."""

from __future__ import annotations

import argparse
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from builders import ONE, THREE, TODAY, TWO, plan, reach
from conftest import Program, Serve
from endpoint import Endpoint, account

import iam_audit

# --- what is refused --------------------------------------------------------------------------------------------------

WRONG_OPTIONS: list[tuple[list[str], str]] = [  # options, what stderr quotes
    (["--profile", ""], "--profile"),
    (["--role", ""], "--role"),
    (
        ["--role", "arn:aws:iam::111111111111:role/Audit"],
        "--role: write Audit in place of 'arn:aws:iam::111111111111:role/Audit'",
    ),
    (
        ["--role", "arn:aws-cn:iam::111111111111:role/audit/IAMAuditRole"],
        "write audit/IAMAuditRole",
    ),
    (["--role", "arn:aws:iam::111111111111:user/ana"], "is not a role's name, or path and name"),
    (["--role", "arn:aws:sts::111111111111:assumed-role/Audit/me"], "is not a role's name"),
    (["--role", "Au dit"], "Au dit"),
    (["--role", "/Audit"], "write Audit in place of '/Audit'"),
    (["--role", "/audit/IAMAuditRole"], "write audit/IAMAuditRole"),
    (["--role", "/"], "'/' is not a role's name"),
    (
        ["--print", "scp-deny-access-keys", "--exempt-role", "Admin,/path/Break"],
        "--exempt-role: write path/Break in place of '/path/Break'",
    ),
    (["--role", "path/"], "path/"),
    (["--role", "x" * 65], "x" * 65),
    (["--role", "Audit\n"], "Audit"),
    (["--output-dir", ""], "--output-dir"),
    (["--accounts", ""], "--accounts"),
    (["--accounts", "12345678901"], "12345678901"),
    (["--accounts", "1234567890123"], "1234567890123"),
    (["--accounts", f"{ONE},abc"], "abc"),
    (["--accounts", f"{ONE},"], "--accounts"),
    (
        ["--accounts", "11111111111\N{ARABIC-INDIC DIGIT ONE}"],
        "11111111111\N{ARABIC-INDIC DIGIT ONE}",
    ),
    (["--exclude", "one"], "one"),
    (["--exclude", f"{ONE};{TWO}"], f"{ONE};{TWO}"),
    (["--accounts", f"{ONE},{TWO}", "--exclude", ONE], f"audited and left out: {ONE}\n"),
    (["--accounts", "@"], "''"),
    (["--exclude", f"{ONE},@more.txt"], "'@more.txt' is not an account ID"),
    (["--retry-failed", "--accounts", ONE], "--retry-failed: not allowed with argument --accounts"),
    (["--ou", "r-test"], "r-test"),
    (["--ou", "ou-ab12"], "ou-ab12"),
    (["--ou", "ou-ab12-CDEFGH34"], "ou-ab12-CDEFGH34"),
    (["--ou", "ou-ab12-cdefgh34,x"], "x"),
    (["--exclude-ou", "r-test"], "'r-test' is not the ID of an organizational unit"),
    (["--exclude-ou", ""], "--exclude-ou: ''"),
    (
        ["--ou", "ou-ab12-cdefgh34,ou-ab12-cdefgh35", "--exclude-ou", "ou-ab12-cdefgh35"],
        "audited and left out: ou-ab12-cdefgh35\n",
    ),
    (["--external-id", "x"], "x"),
    (["--external-id", ""], "--external-id"),
    (["--external-id", "with space"], "with space"),
    (["--external-id", "y" * 1225], "yyy"),
    (["--workers", "0"], "0"),
    (["--workers", "257"], "257"),
    (["--workers", "260"], "260"),
    (["--workers", "-1"], "-1"),
    (["--workers", "many"], "'many' is not auto or a number from 1 to 256"),
    (["--workers", "Auto"], "Auto"),
    (["--workers", ""], "''"),
    (["--workers", "1.5"], "1.5"),
    (["--report-timeout", "0"], "'0' is not a number of seconds above 0"),
    (["--report-timeout", "0.00"], "0.00"),
    (["--exempt-role", "Admin"], "--exempt-role: use it with --print scp-deny-access-keys"),
    (["--owner-tag", ""], "--owner-tag: ''"),
    (["--owner-tag", "owner,,team"], "--owner-tag: ''"),
    (["--report-timeout", "-5"], "-5"),
    (["--report-timeout", "nan"], "nan"),
    (["--report-timeout", "inf"], "inf"),
    (["--report-timeout", "soon"], "soon"),
    (
        [
            "--print",
            "scp-deny-access-keys",
            "--exempt-role",
            ",".join(f"{'x' * 60}{n}" for n in range(80)),
        ],
        "10,240",
    ),
    (["--print", "scp-deny-access-keys", "--exempt-role", "*/Admin"], "--print"),
    (["--print", "scp-deny-access-keys", "--exempt-role", "${aws:PrincipalTag/x}/y"], "--print"),
    (["--print", "caller-policy", "--role", "?/Audit"], "--print"),
    (["--unknown-option"], "--unknown-option"),
    (["--work", "3"], "--work"),  # no abbreviations: a later option may make one ambiguous
    (["surplus"], "surplus"),
]
WRONG_VALUES = [  # option, value
    *(
        ("--fail-on", value)
        for value in ("", "finding", "findings:0", "findings:8", "findings:", "findings:12")
    ),
    *(
        ("--fail-on", value)
        for value in ("findings:-1", "findings:a", "Findings", "findings 1", "changes", "4")
    ),
    *(
        ("--production", value)
        for value in ("(", "prod)", "[a", "*prod", "(?P<a>x)(?P<a>y)", "a{99999999999}", "\\")
    ),
    ("--production", "(" * 5000),
    *(
        (option, value)
        for option in ("--max-key-age", "--max-unused")
        for value in ("", "0", "000", "-1", "1.5", "ninety", "90d", "10000", " 90", "0x10")
    ),
    ("--max-key-age", "\N{ARABIC-INDIC DIGIT NINE}\N{ARABIC-INDIC DIGIT ZERO}"),
]


@pytest.mark.parametrize(
    ("options", "quoted"),
    WRONG_OPTIONS,
    ids=[" ".join(options)[:40] for options, _ in WRONG_OPTIONS],
)
def test_wrong_values_are_refused(
    options: list[str],
    quoted: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process, where nothing has been asked of AWS or written yet, as tests below show."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    role = [] if "--role" in options else ["--role", "Audit"]
    with pytest.raises(SystemExit) as ended:
        iam_audit.main([*role, *options])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    assert quoted in shown.err
    assert options[0] in shown.err or not options[0].startswith("--")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def reachable(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """An AWS that this process would talk to."""
    return reach(serve(account(ONE, "one")), monkeypatch)


@pytest.mark.parametrize(("option", "value"), WRONG_VALUES, ids=lambda text: ascii(text)[:30])
def test_a_wrong_value_is_refused_before_any_request(
    option: str, value: str, reachable: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        iam_audit.main(
            ["--role", "Audit", "--output-dir", str(tmp_path / "reports"), option, value]
        )
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}" in last
    assert repr(value) in last
    assert reachable.stats()["requests"] == {}
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["--since", "2024-01-31"], "--cloudtrail"),
        (["--cloudtrail", "--since", f"{TODAY + timedelta(days=2):%Y-%m-%d}"], "future"),
        (
            ["--cloudtrail", "--since", f"{TODAY + timedelta(minutes=10):%Y-%m-%dT%H:%M:%SZ}"],
            "future",
        ),
        *(
            (["--cloudtrail", "--since", text], repr(text))
            for text in ("yesterday", "2024-02-30", "31.01.2024", "")
        ),
        (["--cloudtrail", "--since", "0001-01-01T00:00:00+14:00"], "0001-01-01T00:00:00+14:00"),
        *(
            (["--previous", text], f"{text!r} is neither a folder nor an age such as 30d")
            for text in ("/dev/null/none", "30", "30D", "d", "1.5d", "30 d", "30days", "")
        ),
        (["--previous", "0d"], "--previous: '0' is not a number of days from 1 to 9999"),
        (["--previous", "10000d"], "'10000' is not a number of days"),
        (["--fail-on", "new-keys:1"], "new-keys:1"),
        (["--fail-on", "findings:1,keys"], "keys"),
    ],
)
def test_wrong_options_about_earlier_runs_are_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], value: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        iam_audit.parse_arguments(["--role", "Audit", *options])
    assert stop.value.code == 2
    assert value in capsys.readouterr().err


@pytest.mark.program
@pytest.mark.parametrize("options", [["--workers", "0"], ["--accounts", "12"], []])
def test_what_is_refused_costs_no_request(
    serve: Serve, run_program: Program, options: list[str]
) -> None:
    """Nor does a command line without --role."""
    endpoint = serve(account(ONE, "one"))
    result = run_program(endpoint.env(), *options, role="Audit" if options else None)
    assert (result.exit_code, result.stdout) == (2, "")
    assert (options or ["--role"])[-1] in result.stderr
    assert endpoint.stats()["requests"] == {}
    assert not result.output_dir.exists()


@pytest.mark.program
def test_a_wrong_value_ends_the_process_with_2(serve: Serve, program: Program) -> None:
    endpoint = serve(account(ONE, "one"))
    result = program(endpoint.env(), "--fail-on", "findings:8")
    assert result.exit_code == 2
    assert "'findings:8'" in result.stderr
    assert result.stdout == ""
    assert endpoint.stats()["requests"] == {}


# --- what is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.program
def test_the_edges_of_what_is_allowed_are_accepted(serve: Serve, run_program: Program) -> None:
    """The edges of what is allowed; and main() gives back the exit code."""
    endpoint = serve(*(account(one, one) for one in (ONE, TWO, THREE)))
    options = [
        "--workers",
        "256",
        "--report-timeout",
        "0.5",
        "--external-id",
        "ab",
        "--exclude",
        f" {TWO}, {THREE}",
        "--max-unused",
        "9999",
        "--owner-tag",
        "cost center, Besitzer\N{LATIN SMALL LETTER U WITH DIAERESIS}",
    ]
    result = run_program(endpoint.env(), *options, role="a/b+=,.@-/" + "x" * 64)
    assert (result.exit_code, result.csvs) == (0, {ONE}), result.stderr


@pytest.mark.program
def test_version_shows_the_version(program: Program) -> None:
    shown = subprocess.run(
        [program.python, program.path, "--version"], capture_output=True, text=True, check=True
    )
    assert iam_audit.VERSION in shown.stdout


@pytest.mark.program
def test_reports_is_the_default_folder(serve: Serve, program: Program, tmp_path: Path) -> None:
    command = [program.python, program.path, "--role", "Audit"]
    done = subprocess.run(
        command, env=serve(account(ONE, "one")).env(), cwd=tmp_path, capture_output=True, check=True
    )
    assert done.returncode == 0
    assert [path.stem for path in tmp_path.glob("reports/2*/accounts/*.csv")] == [ONE]


@pytest.mark.parametrize(
    "text", ["findings:1,new-keys", "new-keys,findings:1", "findings:1, new-keys"]
)
def test_fail_on_takes_both_in_any_order(text: str) -> None:
    assert iam_audit.parse_arguments(["--role", "Audit", "--fail-on", text]).fail_on == (1, True)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2024-01-31", "2024-01-31T00:00:00+00:00"),
        ("2024-01-31T12:00:00Z", "2024-01-31T12:00:00+00:00"),
        ("2024-01-31T12:00:00+02:00", "2024-01-31T10:00:00+00:00"),
    ],
)
def test_since_is_in_utc(text: str, moment: str) -> None:
    options = iam_audit.parse_arguments(["--role", "Audit", "--cloudtrail", "--since", text])
    assert options.since.isoformat() == moment


@pytest.mark.parametrize(
    ("text", "workers"), [("auto", 0), ("1", 1), ("9", 9), ("99", 99), ("199", 199), ("256", 256)]
)
def test_workers_takes_auto(text: str, workers: int) -> None:
    assert iam_audit.parse_workers(text) == workers


def test_previous_takes_a_folder_or_an_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "30d").mkdir()
    values = [options("--previous", text).previous for text in ("30d", "1d", "./30d", ".")]
    assert values == [timedelta(days=30), timedelta(days=1), Path("./30d"), Path()]


def options(*arguments: str) -> argparse.Namespace:
    return iam_audit.parse_arguments(["--role", "Audit", *arguments])


def test_the_plan_has_what_the_options_say() -> None:
    default, asked = plan(), plan("--max-unused", "45", "--owner-tag", "Besitzer, team")
    assert default.owner_tags == ("owner", "Owner", "team", "Team", "contact", "email")
    assert (default.max_unused, default.exceptions) == (timedelta(days=90), ())
    assert (asked.owner_tags, asked.max_unused) == (("Besitzer", "team"), timedelta(days=45))
    assert (default.workers, plan("--workers", "9").workers) == (0, 9)  # 0 stands for auto
    scope = plan("--exclude-ou", "ou-ab12-cdefgh34", "--retry-failed").scope
    assert scope == iam_audit.Scope(exclude_ous=frozenset(["ou-ab12-cdefgh34"]), retry_failed=True)


# --- exceptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_exceptions_are_read_from_their_file(
    mark: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iam_audit, "parse_exceptions", lambda text: (text,), raising=False)
    (path := tmp_path / "exceptions.csv").write_bytes(mark + "account_id,ä\r\n".encode())
    exceptions: tuple[object, ...] = plan("--exceptions", str(path)).exceptions
    assert exceptions == ("account_id,ä\r\n",)


def test_exceptions_that_cannot_be_used_are_refused_before_any_request(
    reachable: Endpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(_: str) -> None:
        raise iam_audit.AuditError("line 3, until: '2026-13-01' is not a date")

    monkeypatch.setattr(iam_audit, "parse_exceptions", refuse, raising=False)
    (path := tmp_path / "exceptions.csv").write_text("account_id\n", "utf-8")
    (tmp_path / "utf-16.csv").write_text("account_id\n", "utf-16")
    for name, said in (
        ("exceptions", "line 3, until: '2026-13-01'"),
        ("utf-16", "'utf-8' codec"),
        ("missing", "No such file or directory"),
    ):
        path = path.with_name(f"{name}.csv")
        with pytest.raises(SystemExit) as stopped:
            iam_audit.main(["--role", "Audit", "--output-dir", "x", "--exceptions", str(path)])
        assert stopped.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"argument --exceptions: {str(path)!r}: {said}" in last
    assert reachable.stats()["requests"] == {}

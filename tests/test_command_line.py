"""The program on the command line: what it prints where, and what a terminal shows of its progress."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from builders import ONE, THREE, TWO, reach
from conftest import TRACEBACK, Program, Result, Serve, screen
from endpoint import account, generate, key, root, rule, user

import iam_audit

pytestmark = pytest.mark.program


def test_main_gives_back_the_exit_code(
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reach(serve(account(ONE, "one"), account(TWO, "two", role="denied")), monkeypatch)
    assert (
        iam_audit.main(["--role", "Audit", "--output-dir", str(tmp_path / "a"), "--accounts", ONE])
        == 0
    )
    assert iam_audit.main(["--role", "Audit", "--output-dir", str(tmp_path / "b")]) == 3
    assert (
        iam_audit.main(
            ["--role", "Audit", "--output-dir", str(tmp_path / "c"), "--accounts", THREE]
        )
        == 1
    )
    assert THREE in capsys.readouterr().err


# --- what is printed --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(serve: Serve, run_program: Program) -> Result:
    """A run in which one account fails and one is skipped."""
    keys = [key("AKIA000000000000ANA1"), key("AKIA000000000000ANA2")]
    ana = user("ana", password=True, mfa=["GAHT12345678"], keys=keys)
    accounts = [
        account(ONE, "first", users=[ana, user("bea")], report_time="2026-01-02T03:04:05Z"),
        account(TWO, "second", role="denied"),
        account(THREE, "third", state="SUSPENDED"),
    ]
    return run_program(serve(*accounts).env())


def test_stdout_says_what_was_found(mixed: Result) -> None:
    assert mixed.exit_code == 3
    assert mixed.stderr == ""
    said = mixed.stdout
    for words in (
        "audited: 1 account",
        "2 users",
        "2 access keys",
        r"1 account could not be audited \(0 production\)",
        "skipped.*1 account",
    ):
        assert re.search(words, said, re.IGNORECASE), words
    assert re.search(rf"{TWO}.*second", said)
    assert re.search(rf"{THREE}.*third.*SUSPENDED", said)
    assert re.search(r"password and root data is up to \d+ days old", said)
    assert str(mixed.folder) in said


def test_quiet_says_nothing_where_nothing_needs_attention(
    serve: Serve, run_program: Program
) -> None:
    endpoint = serve(
        account(ONE, "one", users=[user("ana")]), account(TWO, "two", state="SUSPENDED")
    )
    result = run_program(endpoint.env(), "-q")
    assert (result.exit_code, result.stdout, result.stderr, result.csvs) == (0, "", "", {ONE})


def test_quiet_says_what_failed(serve: Serve, run_program: Program) -> None:
    result = run_program(
        serve(account(ONE, "one"), account(TWO, "no-role", role="denied")).env(), "--quiet"
    )
    assert (result.exit_code, result.stderr) == (3, "")
    for word in (TWO, "no-role", "AssumeRole", "AccessDenied", "trust"):
        assert word in result.stdout
    assert ONE not in result.stdout


def test_quiet_says_what_stopped_it(serve: Serve, run_program: Program) -> None:
    result = run_program(serve(organization=None).env(), "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "AWSOrganizationsNotInUseException" in result.stderr


def test_verbose_says_each_account_and_step(serve: Serve, run_program: Program) -> None:
    boss = root(password=True, virtual=True)
    ana, bea = (
        user(name, password=True, mfa=["GAHT12345678"], keys=[key(f"AKIA0000000000000{name}")])
        for name in ("ana", "bea")
    )
    endpoint = serve(
        account(ONE, "one", users=[ana, bea], root=boss), account(TWO, "two", role="denied")
    )
    result = run_program(endpoint.env(), "--verbose")
    lines = result.stderr.splitlines()
    steps = [
        "AssumeRole",
        "GenerateCredentialReport",
        "GetCredentialReport",
        "ListAccessKeys",
    ]
    steps += ["ListServiceSpecificCredentials", "GetAccountAuthorizationDetails"]
    for step in (*steps, "GetAccessKeyLastUsed", "ListMFADevices", "ListVirtualMFADevices"):
        assert len([line for line in lines if re.search(rf"{ONE}.*\b{step}\b", line)]) == 1, step
    assert any(re.search(rf"{TWO}.*AccessDenied", line) for line in lines)
    assert not TRACEBACK.search(result.stderr)
    assert result.stdout != ""


def test_verbose_shows_where_it_stopped(serve: Serve, run_program: Program) -> None:
    endpoint = serve(account(ONE, "one"), omit=["State", "Status"])
    assert TRACEBACK.search(run_program(endpoint.env(), "-v").stderr)
    assert not TRACEBACK.search(run_program(endpoint.env()).stderr)


def test_an_ascii_terminal_can_show_all_names(serve: Serve, run_program: Program) -> None:
    """cron's locale may be C."""
    endpoint = serve(account(ONE, "Se\xf1or \u4e2d", state="SUSPENDED"), account(TWO, "\xe9t\xe9"))
    result = run_program(
        {**endpoint.env(), "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    )
    assert result.exit_code == 0, result.stderr
    assert result.rows(TWO)[0]["account_name"] == "\xe9t\xe9"


# --- on a terminal ----------------------------------------------------------------------------------------------------


def test_progress_line_comes_and_goes(serve: Serve, program: Program) -> None:
    """Of how many accounts, how many failed; in the end nothing of it is left, and stdout has no escapes."""
    endpoint = serve(generate=generate(24, 3, missing_roles=0.25), latency=0.05)
    result = program.in_terminal(endpoint.env(), "--workers", "4")
    assert (result.exit_code, len(result.csvs)) == (3, 18)
    drawn = [line for line in re.split(r"\r|\x1b\[[0-9]*[A-Z]", result.terminal) if line]
    done = [int(found[1]) for line in drawn if (found := re.search(r"(\d+) of \d+", line))]
    assert len(set(done)) > 1
    assert done == sorted(done)
    assert any("24" in line and "failed" in line for line in drawn)
    assert any(re.search(r"\d:\d\d.*left", line) for line in drawn)
    assert not any(screen(result.terminal)), screen(result.terminal)


def test_progress_counts_what_the_total_counts(serve: Serve, program: Program) -> None:
    """Accounts that are skipped or out of scope are in both figures or in neither."""
    others = [account(f"20000000000{n}", "closed", state="SUSPENDED") for n in range(5)]
    endpoint = serve(*others, generate=generate(3, 1), latency=0.1, page=50)
    result = program.in_terminal(endpoint.env(), "--exclude", "100000000003")
    assert len(result.csvs) == 2
    found = re.findall(r"(\d+) of (\d+)", result.terminal)
    assert found
    assert all(int(done) <= int(total) for done, total in found), found


def test_progress_fits_a_narrow_terminal(serve: Serve, program: Program) -> None:
    """Also with stdout elsewhere: a line that wraps could not be taken away again."""
    endpoint = serve(generate=generate(8, 1, missing_roles=0.25), latency=0.1)
    result = program.in_terminal(endpoint.env(), "--workers", "2", columns=30)
    drawn = re.split(r"\r|\x1b\[[0-9]*[A-Z]", result.terminal)
    assert any(re.search(r"\d+ of \d+", line) for line in drawn)
    assert max(map(len, drawn)) <= 30


def test_progress_shows_on_a_terminal_that_knows_no_width(serve: Serve, program: Program) -> None:
    """A new pseudo-terminal, as a container may give, has 0 columns."""
    endpoint = serve(generate=generate(8, 1, missing_roles=0.25), latency=0.1)
    result = program.in_terminal(endpoint.env(), "--workers", "2", columns=0)
    assert re.search(r"\d+ of \d+ accounts, .*about \d:\d\d left\r", result.terminal)
    assert not any(screen(result.terminal)), screen(result.terminal)


def test_no_total_is_claimed_while_accounts_are_listed(serve: Serve, program: Program) -> None:
    """While accounts are listed, the line does not claim to know how many there are."""
    second_page = rule("ListAccounts", fields={"NextToken": "4"}, hold=True)
    endpoint = serve(generate=generate(6, 1), page=4, rules=[second_page])

    def list_the_rest(shown: str) -> str:
        if re.search(r"3 of 3\D", shown):
            endpoint.release()
        return ""

    result = program.in_terminal(endpoint.env(), answer=list_the_rest)
    assert len(result.csvs) == 6
    drawn = [line for line in re.split(r"\r|\x1b\[[0-9]*[A-Z]", result.terminal) if " of " in line]
    assert any(re.search(r"3 of 3\D", line) for line in drawn)
    assert not any(
        re.search(r"3 of 3 ", line) or "left" in line for line in drawn if "3 of 3" in line
    )


@pytest.mark.parametrize(
    ("options", "variables"), [(["--quiet"], {}), ([], {"TERM": "dumb"})], ids=["quiet", "dumb"]
)
def test_quiet_and_dumb_terminals_show_no_progress_line(
    serve: Serve, program: Program, options: list[str], variables: dict[str, str]
) -> None:
    endpoint = serve(account(ONE, "one"), latency=0.1)
    result = program.in_terminal({**endpoint.env(), **variables}, *options)
    assert (result.csvs, result.terminal) == ({ONE}, "")


def test_progress_and_verbose_share_a_terminal(serve: Serve, program: Program) -> None:
    endpoint = serve(account(ONE, "one", users=[user("ana")]), latency=0.1)
    result = program.in_terminal(endpoint.env(), "--verbose")
    shown = [line.rstrip() for line in screen(result.terminal) if line.strip()]
    assert any("ListAccessKeys" in line for line in shown)
    assert not any(" of 1" in line for line in shown), "a remnant of the progress line"

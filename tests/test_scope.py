"""Which accounts a run is about: lists in files, units left out, and what failed the last time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import (
    FIVE,
    FOUR,
    MANAGEMENT,
    ONE,
    SIX,
    THREE,
    TWO,
    again,
    ago,
    backdate,
    edit_summary,
    in_units,
    key_id,
    summary_of,
)
from conftest import Program, Result, Serve
from endpoint import TIMEOUT, Json, account, key, user

import iam_audit
from iam_audit import Account, AuditError, Organization, Scope

pytestmark = pytest.mark.program

NOBODY = "organization o-test123456 has no account"
UNIT, NESTED, OTHER = "ou-test-aaaaaaaa", "ou-test-bbbbbbbb", "ou-test-cccccccc"
ORGANIZATION = [
    in_units(ONE, "one", UNIT),
    in_units(TWO, "two", UNIT, NESTED),
    in_units(THREE, "three", OTHER),
    in_units(FOUR, "four"),
    in_units(FIVE, "five", UNIT, state="SUSPENDED"),
]


def skipped(result: Result) -> set[str]:
    return {one for one, entry in result.accounts.items() if entry["result"] == "skipped"}


# --- units left out ---------------------------------------------------------------------------------------------------

EXCLUDED: dict[str, tuple[list[str], set[str], set[str]]] = {  # options, audited, skipped
    "a unit and what is below it": (["--exclude-ou", UNIT], {THREE, FOUR}, set()),
    "a unit in another": (["--exclude-ou", NESTED], {ONE, THREE, FOUR}, {FIVE}),
    "two": (["--exclude-ou", f"{NESTED}, {OTHER}"], {ONE, FOUR}, {FIVE}),
    "a unit of those of --ou": (["--ou", UNIT, "--exclude-ou", NESTED], {ONE}, {FIVE}),
    "with --exclude": (["--exclude", ONE, "--exclude-ou", OTHER], {TWO, FOUR}, {FIVE}),
    "with --accounts": (["--accounts", f"{ONE},{FOUR}", "--exclude-ou", OTHER], {ONE, FOUR}, set()),
    "with the management account": (
        ["--include-management", "--exclude-ou", UNIT],
        {THREE, FOUR, MANAGEMENT},
        set(),
    ),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_units_are_left_out(serve: Serve, run_program: Program, name: str) -> None:
    options, audited, closed = EXCLUDED[name]
    endpoint = serve(*ORGANIZATION)
    result = run_program(endpoint.env(), *options)
    assert (result.exit_code, result.csvs, skipped(result)) == (0, audited, closed), result.stderr
    assert set(endpoint.stats()["assumed"]) == audited - {MANAGEMENT}


REFUSED: dict[str, tuple[list[str], str]] = {  # options, the whole message
    "an unknown unit": (
        ["--exclude-ou", f"{UNIT},ou-test-dddddddd"],
        f"--exclude-ou: {NOBODY} below ou-test-dddddddd",
    ),
    "an unknown unit of --ou": (
        ["--ou", f"{UNIT},ou-test-dddddddd"],
        f"--ou: {NOBODY} below ou-test-dddddddd",
    ),
    "unknown accounts": (
        ["--exclude", f"{TWO},555566667777,{SIX}"],
        f"--exclude: {NOBODY} 555566667777, {SIX}",
    ),
    "an account of such a unit": (
        ["--accounts", f"{ONE},{TWO}", "--exclude-ou", NESTED],
        f"--accounts: {TWO} is left out by --ou or --exclude-ou",
    ),
    "an account outside --ou": (
        ["--accounts", f"{ONE},{THREE}", "--ou", UNIT],
        f"--accounts: {THREE} is left out by --ou or --exclude-ou",
    ),
    "the management account": (
        ["--accounts", MANAGEMENT],
        f"--accounts: {MANAGEMENT} is the management account: add --include-management.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_the_organization_is_refused_before_any_account(
    serve: Serve, run_program: Program, name: str
) -> None:
    options, message = REFUSED[name]
    endpoint = serve(*ORGANIZATION, page=2)
    result = run_program(endpoint.env(), *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"iam_audit.py: {message}\n"
    assert endpoint.stats()["assumed"] == {}
    assert not list(result.output_dir.iterdir())


def test_units_are_not_left_out_where_accounts_have_no_paths(
    serve: Serve, run_program: Program
) -> None:
    result = run_program(serve(*ORGANIZATION, omit=["Paths"]).env(), "--exclude-ou", UNIT)
    assert result.exit_code == 1
    assert "Paths for --ou and --exclude-ou" in result.stderr
    everything = run_program(serve(*ORGANIZATION, omit=["Paths"]).env(), "--exclude", ONE)
    assert (everything.exit_code, everything.csvs) == (0, {TWO, THREE, FOUR})


def test_runs_without_those_units_are_a_scope_of_their_own(
    serve: Serve, program: Program, tmp_path: Path
) -> None:
    env = serve(*ORGANIZATION).env()
    (reports := tmp_path / "reports").mkdir(mode=0o700)
    whole = summary_of(again(program, env, reports))
    limited = summary_of(again(program, env, reports, "--exclude-ou", f"{OTHER},{NESTED}"))
    repeated = summary_of(again(program, env, reports, "--exclude-ou", f"{NESTED},{OTHER}"))
    assert "exclude_ous" not in whole["scope"]  # as earlier versions wrote it: the same scope
    assert limited["scope"] == {**whole["scope"], "exclude_ous": [NESTED, OTHER]}
    assert repeated["scope"] == limited["scope"]
    assert [len(one["runs"]) for one in (whole, limited, repeated)] == [1, 1, 2]


# --- lists in files ---------------------------------------------------------------------------------------------------

LIST = f"\ufeff# Ours\r\n\r\n{ONE}\r\n  {THREE}  # three\r\n#{FOUR}\r\n{FIVE}".encode()


@pytest.mark.parametrize(
    ("option", "audited"), [("--accounts", {ONE, THREE}), ("--exclude", {TWO, FOUR})]
)
def test_a_list_is_read_from_a_file(
    serve: Serve, run_program: Program, tmp_path: Path, option: str, audited: set[str]
) -> None:
    """One ID per line, with comments, blank lines, CRLF and a byte order mark."""
    (tmp_path / "ids.txt").write_bytes(LIST)
    result = run_program(serve(*ORGANIZATION).env(), option, f"@{tmp_path / 'ids.txt'}")
    assert (result.exit_code, result.csvs) == (0, audited)


def test_a_file_and_a_list_go_together(serve: Serve, run_program: Program, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_bytes(LIST)
    endpoint = serve(*ORGANIZATION)
    both = [f"--accounts=@{tmp_path / 'ids.txt'}", "--ou", f"{UNIT},{OTHER}", "--exclude-ou"]
    result = run_program(endpoint.env(), *both, NESTED)
    assert (result.exit_code, result.csvs, skipped(result)) == (0, {ONE, THREE}, {FIVE})
    refused = run_program(endpoint.env(), *both, NESTED, "--exclude", f"{TWO},{THREE}")
    assert refused.exit_code == 2
    assert f"audited and left out: {THREE}\n" in refused.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"{ONE}\r\n\r\n# x\r\n12345\r\n".encode(), "'12345' is not .* 12 digits (FILE, line 4)"),
        (f"{ONE}\n{TWO},{THREE}\n".encode(), f"'{TWO},{THREE}' is not .* (FILE, line 2)"),
        (b"\xff\xfe1\x001\x00", "FILE': 'utf-8' codec"),
        (b"# nothing yet\n\n", "FILE' has no account IDs"),
        (None, "FILE': No such file"),
    ],
    ids=["an ID", "two in a line", "UTF-16", "empty", "missing"],
)
def test_a_wrong_list_is_refused_with_its_file_and_line(
    serve: Serve, run_program: Program, tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "ids.txt"
    if content is not None:
        path.write_bytes(content)
    endpoint = serve(*ORGANIZATION)
    for option in ("--accounts", "--exclude"):
        result = run_program(endpoint.env(), option, f"@{path}")
        assert (result.exit_code, result.stdout) == (2, "")
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"iam_audit.py: error: argument {option}: ")
        for part in said.replace("FILE", str(path)).split(" .* "):
            assert part in last
    assert endpoint.stats()["requests"] == {}


# --- what failed the last time ----------------------------------------------------------------------------------------

OLD, NEW = key(key_id("OLD"), created=ago(100)), key(key_id("NEW"), created=ago(90))


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    folder = tmp_path / "reports"
    folder.mkdir(mode=0o700)
    return folder


def folders(reports: Path) -> list[Path]:
    """The runs' folders, without the link to the newest."""
    return [path for path in reports.iterdir() if not path.is_symlink()]


def three(one: str = "", two: str = "", three: str = "", **more: list[Json]) -> list[Json]:
    """Three accounts and a suspended one; `denied` is one whose role is denied."""
    roles = {ONE: one, TWO: two, THREE: three}
    accounts = []
    for account_id, role in roles.items():
        users = [user("svc", keys=more.get(f"keys_{account_id[0]}", [OLD]))]
        units = [UNIT] if account_id == TWO else [OTHER]
        options = {"role": role} if role else {}
        accounts.append(
            in_units(account_id, f"team-{account_id[0]}", *units, users=users, **options)
        )
    return [*accounts, account(FOUR, "closed", state="SUSPENDED")]


def earlier(program: Program, reports: Path, env: dict[str, str], days: int, *options: str) -> Path:
    """The folder of a run that began so many days ago."""
    result = again(program, env, reports, *options)
    folder = reports / result.folder.name
    backdate(folder, ago(days))
    return folder.rename(reports / f"{ago(days):%Y%m%dT%H%M%SZ}")


def test_a_retry_audits_what_failed_and_nothing_else(
    serve: Serve, program: Program, reports: Path
) -> None:
    """Then what failed in the retry, until nothing is left to do."""
    first = again(program, serve(*three(two="denied", three="denied")).env(), reports)
    assert (first.exit_code, set(first.failures)) == (3, {TWO, THREE})
    endpoint = serve(*three(one="denied", three="denied"))
    second = again(program, endpoint.env(), reports, "--retry-failed")
    assert (second.exit_code, second.csvs, set(second.failures)) == (3, {TWO}, {THREE})
    assert set(endpoint.stats()["by_account"]) - {MANAGEMENT} == {TWO, THREE}
    assert summary_of(second)["scope"]["accounts"] == [TWO, THREE]
    assert {one["id"] for one in summary_of(second)["out_of_scope"]} == {ONE, FOUR, MANAGEMENT}
    third = again(program, serve(*three(two="denied")).env(), reports, "--retry-failed")
    assert (third.exit_code, third.csvs) == (0, {THREE})
    assert set(folders(reports)) == {reports / one.folder.name for one in (first, second, third)}


@pytest.mark.parametrize("quiet", [False, True])
def test_a_retry_with_nothing_to_do_leaves_no_run(
    serve: Serve, program: Program, reports: Path, quiet: bool
) -> None:
    again(program, serve(*three()).env(), reports)
    [folder] = folders(reports)
    endpoint = serve(*three(two="denied"))
    options = ["--retry-failed", *(["--quiet"] if quiet else [])]
    with program.start(endpoint.env(), *options, output_dir=reports) as (process, _):
        shown = process.communicate(timeout=TIMEOUT)
    said = f"No account failed in {folder}: there is nothing to retry.\n"
    assert (process.returncode, shown) == (0, ("" if quiet else said, ""))
    assert folders(reports) == [folder]
    assert endpoint.stats()["assumed"] == {}


def test_a_retry_needs_a_finished_run_of_this_organization(
    serve: Serve, program: Program, reports: Path
) -> None:
    """Neither a run that was broken off nor one of another organization counts."""
    env = serve(*three(two="denied")).env()
    shutil.copytree(earlier(program, reports, env, 2), unfinished := reports / "20260101T000000Z")
    (unfinished / "summary.json").unlink()
    [other] = [folder for folder in folders(reports) if folder != unfinished]
    organization = {**iam_audit.read_summary(other)["organization"], "id": "o-other12345"}
    edit_summary(other, organization=organization)
    result = again(program, env, reports, "--retry-failed")
    assert (result.exit_code, result.stdout) == (1, "")
    said = "--retry-failed: no finished run of this organization in --output-dir."
    assert result.stderr == f"iam_audit.py: {said}\n"
    assert set(folders(reports)) == {unfinished, other}


def test_a_retry_ends_if_the_newest_run_cannot_be_read(
    serve: Serve, program: Program, reports: Path
) -> None:
    """An older run may tell of other failures."""
    env = serve(*three(two="denied")).env()
    earlier(program, reports, env, 2)
    newest = earlier(program, reports, env, 1)
    (newest / "summary.json").write_text("{", "utf-8")
    endpoint = serve(*three())
    result = again(program, endpoint.env(), reports, "--retry-failed")
    assert (result.exit_code, result.csvs) == (1, set())
    assert str(newest / "summary.json") in result.stderr
    assert endpoint.stats()["assumed"] == {}


def test_accounts_that_have_left_since_are_no_error(
    serve: Serve, program: Program, reports: Path
) -> None:
    again(program, serve(*three(two="denied", three="denied")).env(), reports)
    left = [one for one in three() if one["id"] != TWO]
    result = again(program, serve(*left).env(), reports, "--retry-failed")
    assert (result.exit_code, result.csvs, set(result.accounts)) == (0, {THREE}, {THREE})


def test_a_retry_where_all_have_left_audits_nothing(
    serve: Serve, program: Program, reports: Path
) -> None:
    again(program, serve(*three(two="denied")).env(), reports)
    endpoint = serve(*[one for one in three() if one["id"] != TWO])
    result = again(program, endpoint.env(), reports, "--retry-failed")
    assert (result.exit_code, result.accounts) == (0, {})
    assert endpoint.stats()["assumed"] == {}


NARROWED: dict[str, tuple[list[str], set[str]]] = {  # options, audited
    "--exclude": (["--exclude", f"{ONE},{TWO}"], {THREE}),
    "--exclude @FILE": (["--exclude", "@ids.txt"], {TWO}),
    "--ou": (["--ou", UNIT], {TWO}),
    "--exclude-ou": (["--exclude-ou", UNIT], {THREE}),
}


@pytest.mark.parametrize("name", NARROWED)
def test_other_options_narrow_a_retry(
    serve: Serve, program: Program, reports: Path, name: str
) -> None:
    options, audited = NARROWED[name]
    (reports.parent / "ids.txt").write_text(f"{THREE}\n", "utf-8")
    options = [text.replace("@", f"@{reports.parent}/") for text in options]
    again(program, serve(*three(two="denied", three="denied")).env(), reports)
    result = again(program, serve(*three()).env(), reports, "--retry-failed", *options)
    assert (result.exit_code, result.csvs) == (0, audited)


def test_a_retry_of_the_management_account_needs_its_option(
    serve: Serve, program: Program, reports: Path
) -> None:
    """Left out without a word, it would be forgotten."""
    included = "--include-management"
    broken = [*three(), account(MANAGEMENT, "management", report="user\n")]
    first = again(program, serve(*broken).env(), reports, included)
    assert set(first.failures) == {MANAGEMENT}
    env = serve(*three()).env()
    refused = again(program, env, reports, "--retry-failed")
    assert refused.exit_code == 1
    said = f"--retry-failed: {MANAGEMENT} is the management account: add {included}."
    assert said in refused.stderr
    result = again(program, env, reports, "--retry-failed", included)
    assert (result.exit_code, result.csvs) == (0, {MANAGEMENT})


@pytest.mark.parametrize("named", [False, True])
def test_a_retry_compares_with_the_run_before_the_failure(
    serve: Serve, program: Program, reports: Path, named: bool
) -> None:
    good = earlier(program, reports, serve(*three()).env(), 2)
    earlier(program, reports, serve(*three(two="denied")).env(), 1)
    previous = ["--previous", str(good)] if named else []
    options = [*previous, "--retry-failed", "--quiet", "--fail-on", "new-keys"]
    endpoint = serve(*three(keys_1=[OLD, NEW], keys_2=[OLD, NEW]))
    result = again(program, endpoint.env(), reports, *options)
    assert (result.exit_code, result.csvs) == (4, {TWO})
    found = summary_of(result)["changes"]["new_access_keys"]
    assert [(one["account_id"], one["access_key_id"]) for one in found] == [(TWO, key_id("NEW"))]
    # The account that was left alone still has its own baseline in the next run of all.
    later = again(program, endpoint.env(), reports, "--quiet", "--fail-on", "new-keys")
    found = summary_of(later)["changes"]["new_access_keys"]
    assert [one["account_id"] for one in found] == [ONE]


# --- without a run ----------------------------------------------------------------------------------------------------

Check = Callable[[Scope], None]


def listed() -> list[Account]:
    places = {ONE: UNIT, TWO: f"{UNIT}/{NESTED}", MANAGEMENT: OTHER}
    return [
        Account(one, one, "ACTIVE", f"o-test123456/r-test/{path}/{one}/")
        for one, path in places.items()
    ]


@pytest.fixture
def check() -> Check:
    organization = Organization("o-test123456", MANAGEMENT, "ALL")
    return lambda scope: iam_audit.check_scope(scope, organization, listed())


def ids(*names: str) -> frozenset[str]:
    return frozenset(names)


@pytest.mark.parametrize(
    "scope",
    [
        Scope(),
        Scope(ids(ONE), ids(TWO), ids(UNIT), exclude_ous=ids(NESTED)),
        Scope(ids(MANAGEMENT), include_management=True),
        Scope(ids(ONE, SIX), retry_failed=True),  # SIX has left
        Scope(ids(TWO), ous=ids(OTHER), retry_failed=True),
        Scope(ids(MANAGEMENT), exclude=ids(MANAGEMENT), retry_failed=True),
    ],
)
def test_a_scope_that_fits_is_taken(check: Check, scope: Scope) -> None:
    check(scope)


@pytest.mark.parametrize(
    ("scope", "named"),
    [
        (Scope(ids(SIX)), "--accounts"),
        (Scope(exclude=ids(SIX)), "--exclude"),
        (Scope(ids(ONE), exclude=ids(SIX), retry_failed=True), "--exclude"),
        (Scope(ous=ids("ou-test-dddddddd")), "--ou"),
        (Scope(exclude_ous=ids("ou-test-dddddddd")), "--exclude-ou"),
        (Scope(ids(TWO), exclude_ous=ids(UNIT)), "--accounts"),
        (Scope(ids(MANAGEMENT), retry_failed=True), "--retry-failed"),
    ],
)
def test_a_scope_that_does_not_fit_is_refused(check: Check, scope: Scope, named: str) -> None:
    with pytest.raises(AuditError, match=rf"^{named}: "):
        check(scope)


def test_an_account_without_a_path_is_below_no_unit() -> None:
    organization = Organization("o-test123456", MANAGEMENT, "ALL")
    one = Account(ONE, "one", "ACTIVE")
    assert not iam_audit.in_scope(one, organization, Scope(ous=ids(UNIT)))
    assert iam_audit.in_scope(one, organization, Scope(exclude_ous=ids(UNIT)))

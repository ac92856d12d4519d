"""What a run says: the terminal's summary, summary.json, findings.csv and the exit code, as values and as a process."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import endpoint as aws
import pytest
from builders import (
    DAY,
    FINISHED,
    FOUR,
    MANAGEMENT,
    NOW,
    ONE,
    PAYMENTS,
    SANDBOX,
    THREE,
    TWO,
    ago,
    audited,
    failed,
    key,
    organizations,
    plan,
    run_of,
    summary_of,
    user,
)
from conftest import Program, Result, Serve
from endpoint import Json
from hypothesis import given, settings
from hypothesis import strategies as st
from test_assess import KEY_FINDINGS

from iam_audit import (
    CONTROLS,
    FINDINGS_COLUMNS,
    GAP_COUNTS,
    LEVELS,
    ROOT,
    Account,
    AuditedAccount,
    Change,
    Control,
    Credential,
    EarlierRun,
    FailedAccount,
    Gaps,
    KnownException,
    Outcome,
    OutOfScopeAccount,
    Run,
    SkippedAccount,
    assess,
    exit_code,
    original,
    parse_arguments,
    reasons_of,
    summary_document,
    terminal_summary,
)

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
NO_OTHER_CREDENTIALS = {
    "active_api_keys": 0,
    "active_api_keys_without_expiry": 0,
    "active_api_keys_older_than_max_age": 0,
    "active_service_passwords": 0,
    "active_signing_certificates": 0,
}


def shown(found: Run, *, quiet: bool = False, width: int = 100) -> list[str]:
    """The lines that the terminal gets."""
    text = terminal_summary(found, summary_document(found, FINISHED), quiet, width, False)
    assert text == "" or text.endswith("\n")
    return text.split("\n")[:-1]


def document(found: Run) -> Json:
    """summary.json as its readers get it."""
    read: Json = json.loads(json.dumps(summary_document(found, FINISHED)))
    return read


def only(lines: Iterable[str], start: str) -> str:
    (line,) = [one for one in lines if one.startswith(start)]
    return line


def findings_shown(lines: Iterable[str]) -> list[tuple[int, str, str, str]]:
    """Priority, finding, account and user of each finding on the terminal."""
    found = (re.fullmatch(r"  ([1-7])  ([a-z0-9-]+) +(\d{12}) .{20} (.*)", line) for line in lines)
    return [(int(one[1]), one[2], one[3], one[4]) for one in found if one]


def many(number: int, *, first: int = 0) -> list[AuditedAccount]:
    """Accounts with a console user without MFA in each."""
    accounts = (
        Account(f"{100_000_000_000 + first + index}", f"team-{index}", "ACTIVE")
        for index in range(number)
    )
    return [audited(user("alice", password=True), account=one) for one in accounts]


def with_root(accounts: Iterable[AuditedAccount]) -> list[AuditedAccount]:
    return [dataclasses.replace(one, users=(user(ROOT), *one.users)) for one in accounts]


# --- the terminal -----------------------------------------------------------------------------------------------------

GAP_LABELS = {
    "console users": "console_users",
    "console users without MFA": "console_users_without_mfa",
    "access keys": "access_keys",
    "active keys": "active_keys",
    "inactive keys": "inactive_keys",
    "expired keys": "expired_keys",
    "active keys older than 120 days": "active_keys_older_than_max_age",
    "active keys older than 1 year": "active_keys_older_than_1_year",
    "active keys never used": "active_keys_never_used",
    "active keys not used for 90 days": "active_keys_not_used_for_90_days",
    "active keys used within 30 days": "active_keys_used_within_30_days",
    "root access keys": "root_access_keys",
    "users with two active keys": "users_with_two_active_keys",
    "active API keys": "active_api_keys",
    "active API keys without expiry": "active_api_keys_without_expiry",
    "active API keys older than 120 days": "active_api_keys_older_than_max_age",
    "active service passwords": "active_service_passwords",
    "active signing certificates": "active_signing_certificates",
}


def gap_table(lines: list[str]) -> dict[str, tuple[str, str]]:
    """The figures of the organization and of production by label; the columns must stand where their titles do."""
    start = lines.index(only(lines, "Gaps"))
    width = len(lines[start])
    table = {}
    for line in lines[start + 1 :]:
        if not (
            figures := re.fullmatch(
                r" *(\S.*?)  +([\d.,]+|no console users)  +([\d.,]+|no console users)",
                line,
            )
        ):
            break
        assert len(line) == width
        assert figures.end(2) == lines[start].index("organization") + len("organization")
        table[figures[1]] = (figures[2], figures[3])
    return table


def test_the_table_of_gaps_has_every_figure_in_its_place() -> None:
    """All figures differ, so that none can stand in for another."""
    found = run_of([audited(), audited(account=PAYMENTS)], "--max-key-age", "120")
    for index, figures in enumerate(found.audited):
        numbers: dict[str, Any] = {
            name: (index + 1) * 1000 - place for place, name in enumerate(GAP_COUNTS)
        }
        found.audited[index] = figures._replace(gaps=Gaps(**numbers))
    table = gap_table(shown(found))
    assert table.pop("MFA coverage percent") == ("0.0", "0.0")
    organization = {name: 3000 - 2 * place for place, name in enumerate(GAP_COUNTS)}
    production = {name: 2000 - place for place, name in enumerate(GAP_COUNTS)}
    assert table == {
        label: (f"{organization[name]:,}", f"{production[name]:,}")
        for label, name in GAP_LABELS.items()
    }


def test_coverage_is_given_for_the_organization_and_for_production() -> None:
    users = [user(name, password=True, mfa=["Virtual"]) for name in ("ann", "bob")]
    found = run_of(
        [audited(*users, user("eve", password=True)), audited(users[0], account=PAYMENTS)]
    )
    assert gap_table(shown(found))["MFA coverage percent"] == ("75.0", "100.0")


def phase(lines: list[str], number: int) -> list[str]:
    """What is said of a phase: its level, the numbers behind it, and the accounts at each level."""
    start = lines.index(only(lines, f"Phase {number}, "))
    level = lines[start].rpartition(": ")[2]
    below = itertools.takewhile(lambda line: line.startswith("  "), lines[start + 1 :])
    return [level, *(line.strip() for line in below)]


def test_where_there_are_no_console_users_there_is_no_coverage() -> None:
    found = run_of([audited(user("alice"))])
    lines = shown(found)
    assert gap_table(lines)["MFA coverage percent"] == ("no console users", "no console users")
    assert phase(lines, 1)[1] == "no console users"
    assert document(found)["gaps"]["organization"]["mfa_coverage_percent"] is None


def test_both_phases_show_level_number_and_accounts_at_each_level() -> None:
    outcomes: list[Outcome] = [
        audited(user("a", key(91 * DAY), password=True), user("b", password=True, mfa=["SMS"])),
        audited(user("c", key(DAY)), account=PAYMENTS),
        audited(account=Account("333333333333", "empty", "ACTIVE")),
        failed(),
        SkippedAccount(Account("555555555555", "old", "SUSPENDED")),
    ]
    lines = shown(run_of(outcomes))
    assert phase(lines, 1) == [
        "In Progress",
        "1 of 2 console users without MFA",
        "accounts: 1 Not Started, 1 In Progress, 2 Complete",
    ]
    assert phase(lines, 2) == [
        "In Progress",
        "1 of 2 active keys older than 90 days",
        "accounts: 1 Not Started, 1 In Progress, 1 Complete, 1 Advanced",
    ]


@pytest.mark.parametrize(
    ("outcomes", "level"),
    [
        ([], "Not Started"),
        ([failed()], "Not Started"),
        ([audited()], "Complete"),
        ([audited(), failed()], "In Progress"),
    ],
)
def test_what_decides_the_organizations_level_of_phase_1(
    outcomes: list[Outcome], level: str
) -> None:
    found = run_of(outcomes)
    assert phase(shown(found), 1)[0] == level
    assert document(found)["maturity"]["phase1"]["level"] == level


def test_what_was_not_audited_is_the_number_behind_the_level() -> None:
    """Where only that holds the organization back; and nothing is said of keys where there are none."""
    good = audited(user("a", password=True, mfa=["SMS"]), user("b", key(DAY)))
    lines = shown(run_of([good, failed()]))
    for number in (1, 2):
        assert phase(lines, number)[:2] == ["In Progress", "1 account could not be audited"]
    assert phase(shown(run_of([audited()])), 2)[:2] == ["Advanced", "no active keys"]


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ([audited()], "No findings in 1 audited account."),
        ([audited(), failed()], "No findings in 1 audited account."),
        ([failed()], "No findings in 0 audited accounts."),
        ([SkippedAccount(SANDBOX)], "No findings in 0 audited accounts."),
        ([], "No findings in 0 audited accounts."),
    ],
)
def test_no_findings_is_said_only_of_what_was_audited(outcomes: list[Outcome], said: str) -> None:
    assert [line for line in shown(run_of(outcomes)) if line.startswith("No findings")] == [said]


def test_the_five_accounts_with_the_largest_gaps_hold_the_organization_back() -> None:
    """Users without MFA and old keys weigh alike; accounts without a gap are not named, however few the others are."""
    sizes = {"1": 2, "2": 7, "3": 0, "4": 1, "5": 4, "6": 3, "7": 7}

    def of_size(digit: str, size: int) -> AuditedAccount:
        people = [user(f"u{n}", password=n % 2 == 0) for n in range(size)]
        people = [one if one.password else user(one.name, key(91 * DAY)) for one in people]
        return audited(
            *people, user("fine", key(DAY)), account=Account(digit * 12, f"team-{digit}", "ACTIVE")
        )

    title = "Accounts with the most gaps"
    lines = shown(run_of([of_size(*item) for item in sizes.items()]))
    start = lines.index(only(lines, title)) + 1
    assert [line[2:14] for line in lines[start : start + 5]] == [digit * 12 for digit in "27561"]
    assert lines[start].split() == ["2" * 12, "team-2", "4", "3", "0"]
    assert lines[start - 1].split()[-7:] == ["MFA", "over", "90", "days", "API,", "no", "expiry"]
    assert lines[start + 5] == ""
    few = shown(run_of([of_size("3", 0), of_size("1", 1)]))
    assert [line[2:14] for line in few[few.index(only(few, title)) + 1 :]][:2] == ["1" * 12, ""]
    assert title not in "".join(shown(run_of([of_size("3", 0)])))


def test_it_is_said_how_many_accounts_count_as_production() -> None:
    live = Account("333333333333", "live", "ACTIVE")
    found = run_of([audited(), audited(account=PAYMENTS), audited(account=live)])
    assert "3 accounts (2 production)" in only(shown(found), "Audited")
    assert document(found)["totals"]["production"] == 2


def test_the_oldest_active_key_is_shown_with_its_owner() -> None:
    found = run_of([audited(user("bob", key(1234 * DAY, key_id="AKIA00000000OLDEST01")))])
    line = only(shown(found), "  oldest active key")
    for part in ("1,234 days", "AKIA00000000OLDEST01", "bob", SANDBOX.id, SANDBOX.name):
        assert part in line
    assert not [
        line
        for line in shown(run_of([audited(user("bob"))]))
        if line.startswith("  oldest active key")
    ]


def test_three_of_a_kind_are_shown_and_a_line_stands_in_for_more() -> None:
    outcomes = [*many(12), audited(user("bob", key(400 * DAY, DAY)), account=PAYMENTS)]
    lines = shown(run_of(outcomes))
    assert only(lines, "What to fix") == "What to fix first (all 13 findings: findings.csv)"
    assert findings_shown(lines) == [
        (2, "key-older-than-1-year", PAYMENTS.id, "bob"),
        *((4, "console-without-mfa", f"{100_000_000_000 + index}", "alice") for index in range(3)),
    ]
    assert [line for line in lines if "more like it" in line] == ["     and 9 more like it"]
    reasons = [line for line in lines if "used within 30 days;" in line]
    assert len(reasons) == 1
    assert "AKIA0000000000000001" in reasons[0]
    assert "older than 1 year" in reasons[0]


@pytest.mark.parametrize(
    ("last", "more"),
    [
        (0, []),
        (1, []),
        (2, ["     and 1 more like it"]),
        (40, ["     and 39 more like it"]),
    ],
)
def test_ten_findings_are_shown_at_most(last: int, more: list[str]) -> None:
    """Nine of three kinds, and then some of a fourth, of which there is room for one."""
    sizes = {3: key(DAY, DAY), 5: key(91 * DAY), 6: key(91 * DAY, 60 * DAY)}
    users = [user(f"u{kind}{n}", one) for kind, one in sizes.items() for n in range(3)]
    users += [user(f"last{n}", key(DAY, status="Inactive")) for n in range(last)]
    lines = shown(run_of([audited(*users)]))
    assert f"(all {9 + last} findings: " in only(lines, "What to fix first")
    assert len(findings_shown(lines)) == min(9 + last, 10)
    assert [line for line in lines if "more like it" in line] == more


def test_findings_are_counted_by_priority() -> None:
    lines = shown(run_of(OF_PRIORITY.values()))
    start = lines.index(only(lines, "Findings by priority"))
    assert lines[start].split()[3:] == list("1234567")
    assert lines[start + 1].split() == ["to", "fix", *"1111111"]
    assert lines[start + 2] == ""  # there is no baseline to be new since


def test_new_findings_are_counted_where_there_is_a_baseline() -> None:
    found = run_of(OF_PRIORITY.values())
    found.tracking.earlier = EarlierRun(Path(), NOW - DAY, "o-test123456", {}, 90, [], {})
    found.findings = [one._replace(new=one.priority in (1, 5)) for one in found.findings]
    lines = shown(found)
    start = lines.index(only(lines, "Findings by priority"))
    assert lines[start + 2].split() == ["new", "since", "the", "baseline", *"1000100"]
    assert [one[0] for one in findings_shown(shown(found, quiet=True))] == [1]


def test_quiet_shows_each_finding_of_priority_1_and_no_other() -> None:
    """However many there are: nobody opens a file for what was never mailed."""
    production = [
        audited(*one.users, account=dataclasses.replace(one.account, name="prod"))
        for one in many(12)
    ]
    found = run_of([*production, *many(3, first=100)])
    lines = shown(found, quiet=True)
    assert findings_shown(lines) == [
        (1, "console-without-mfa", f"{100_000_000_000 + index}", "alice") for index in range(12)
    ]
    assert only(lines, "New findings") == "New findings of priority 1"
    assert len(lines) <= 3 + 2 * 12


def test_quiet_is_silent_where_nothing_is_of_priority_1() -> None:
    old = audited(user(ROOT), user("bob", key(400 * DAY, DAY)), account=PAYMENTS)
    found = run_of([old, *with_root(many(3))])
    assert len(found.findings) == 4
    assert shown(found, quiet=True) == []


def test_quiet_does_not_keep_failed_accounts_to_itself() -> None:
    lines = shown(run_of([failed(), audited()]), quiet=True)
    assert any("444444444444" in line for line in lines)
    assert findings_shown(lines) == []


@pytest.mark.parametrize("width", [80, 100, 120])
def test_neither_ids_nor_numbers_are_cut(width: int) -> None:
    """Names of accounts are, in columns, but not within a number."""
    account = Account("111111111111", "account-of-team-1234567890-in-prod", "ACTIVE")
    found = run_of([audited(user("U" * 64, key(12_345 * DAY), password=True), account=account)])
    lines = shown(found, width=width)
    assert f"account-of-team-{ELLIPSIS}" in "".join(lines)
    text = "\n".join(lines).replace("o-test123456", "")
    assert set(re.findall(r"AKIA\w*|U{2,}", text)) == {"AKIA0000000000000001", "U" * 64}
    assert set(re.findall(r"\b1[0-9,]{3,}", text)) == {"111111111111", "1234567890", "12,345"}
    assert sum("AKIA0000000000000001" in line for line in lines) == 2  # oldest key, and finding


@pytest.mark.parametrize("one", [one for one, _ in KEY_FINDINGS.values()], ids=list(KEY_FINDINGS))
@pytest.mark.parametrize("name", [ROOT, "alice"])
def test_reasons_are_never_cut(name: str, one: Credential) -> None:
    """Not even where all of them apply; root's keys have short names, their reasons are long."""
    key_id = "<root_access_key_1>" if name == ROOT else one.id
    found = run_of([audited(user(name, dataclasses.replace(one, id=key_id)))])
    text = " ".join(" ".join(shown(found)).split())
    for each in found.findings:
        assert f"{key_id}: {'; '.join(reasons_of(each, found.plan))} " in text


ANY_TEXT = st.text(max_size=90) | st.text(
    st.sampled_from(
        "abc \t\r\n\x00\x1b[31m]\x07\x7f\x9b\u202e\u2028\u200b,;'\"=<>\ud800\N{SNOWMAN}"
    ),
    max_size=120,
)


@settings(max_examples=100)
@given(organizations(ANY_TEXT, ANY_TEXT), st.booleans(), st.sampled_from([80, 100, 120]))
def test_no_name_makes_a_line_too_wide_or_steers_the_terminal(
    outcomes: list[Outcome], quiet: bool, width: int
) -> None:
    """But for a single word that is longer: an ARN or a path is not cut."""
    for line in shown(run_of(outcomes), quiet=quiet, width=width):
        assert line.isprintable()
        assert (
            line.startswith(("Files: ", "Page: ")) or len(line) <= width or len(line.split()) == 1
        )


@pytest.mark.parametrize("quiet", [False, True])
def test_large_figures_fit_as_well(quiet: bool) -> None:
    """An account can have 5,000 users with two keys each, an organization many thousand accounts."""
    account = Account("111111111111", "p" * 45 + "-prod", "ACTIVE")
    found = run_of([audited(user("x" * 64, key(9999 * DAY), password=True), account=account)])
    numbers: dict[str, Any] = dict.fromkeys(GAP_COUNTS, 10_002) | {
        "console_users_without_mfa": 5_001
    }
    large = Gaps(oldest_active_key=found.audited[0].gaps.oldest_active_key, **numbers)
    found.audited = [found.audited[0]._replace(gaps=large) for _ in range(10_000)]
    lines = shown(found, quiet=quiet)
    assert all(len(line) <= 100 or line.startswith("Files: ") for line in lines)
    if not quiet:
        most = lines[lines.index(only(lines, "Accounts with the most gaps")) + 1]
        assert most.split()[2:] == ["5,001", "10,002", "10,002"]
        assert gap_table(lines)["active keys"] == ("100,020,000", "100,020,000")


def test_the_columns_of_findings_align() -> None:
    names = ["a", "payments-production-europe-west-1", "b" * 20, ""]
    accounts = [Account(str(index) * 12, name, "ACTIVE") for index, name in enumerate(names)]
    found = run_of(
        [audited(user("alice", key(91 * DAY), password=True), account=one) for one in accounts]
    )
    lines = [line for line in shown(found) if re.match(r"  \d  ", line)]
    assert len(lines) == 7  # one of priority 1, three of each of the others
    assert {line.index(one.id) for one in accounts for line in lines if one.id in line} == {
        lines[0].index("1" * 12)
    }
    assert {line.index("alice") for line in lines} == {lines[0].index("alice")}


# --- what was not checked, exceptions, new API keys -------------------------------------------------------------------

API_KEYS, DETAILS = "ListServiceSpecificCredentials", "GetAccountAuthorizationDetails"


def test_what_was_not_checked_is_said_once_with_the_next_step() -> None:
    partly = [
        dataclasses.replace(one, not_checked={API_KEYS: "AccessDenied", DETAILS: "AccessDenied"})
        for one in many(7)
    ]
    other = dataclasses.replace(audited(), not_checked={API_KEYS: "ServiceFailure"})
    found = run_of([*partly, other, audited(account=PAYMENTS)])
    found.ous_why_not = "DescribeOrganizationalUnit: AccessDeniedException: not authorized"
    lines = shown(found)
    said = f"API keys were not checked in 7 accounts: {API_KEYS}: AccessDenied"
    start = lines.index(said)
    ids = ", ".join(f"{100_000_000_000 + number}" for number in range(5))
    assert lines[start + 1] == f"  {ids}, ..."
    assert lines[start + 2].startswith(f"  Next: add iam:{API_KEYS} to the role's policy")
    assert f"API keys were not checked in 1 account: {API_KEYS}: ServiceFailure" in lines
    said = "Owners, administrators and exposed keys were not checked in 7 accounts:"
    assert f"{said} {DETAILS}: AccessDenied" in " ".join(map(str.strip, lines))
    assert f"OU names were not read: {found.ous_why_not}" in lines
    assert "  Next: add organizations:DescribeOrganizationalUnit to the profile's policy." in lines
    assert not any("not checked" in line or "OU" in line for line in shown(found, quiet=True))
    made = document(found)
    assert made["not_checked"] == {
        API_KEYS: {"AccessDenied": 7, "ServiceFailure": 1},
        DETAILS: {"AccessDenied": 7},
    }
    assert made["ous_why_not"] == found.ous_why_not
    assert {one["id"]: one["not_checked"] for one in made["accounts"]}[PAYMENTS.id] == {}


def test_no_figure_is_given_where_api_keys_were_read_in_no_account() -> None:
    denied = dataclasses.replace(audited(), not_checked={API_KEYS: "AccessDenied"})
    names = ("active API keys", "active API keys without expiry", "active service passwords")
    for outcomes, figure in (([denied], "not checked"), ([denied, audited(account=PAYMENTS)], "0")):
        lines = shown(run_of(outcomes))
        for name in names:
            assert f"  {name:<36}{figure:>18}{figure:>18}" in lines


def exceptions_of(found: Run, *exceptions: KnownException) -> Run:
    found.plan = dataclasses.replace(found.plan, exceptions=exceptions)
    return found


def known(account_id: str, *, days: int = 30, line: int = 2, finding: str = "*") -> KnownException:
    until = (NOW + days * DAY).date()
    return KnownException(account_id, "*", "*", finding, until, "ticket 7", line)


def test_what_exceptions_cover_is_counted_apart() -> None:
    found = run_of(OF_PRIORITY.values())
    covering = known(PAYMENTS.id)
    found.findings = [
        one._replace(exception=covering if one.account == PAYMENTS else None)
        for one in found.findings
    ]
    found.tracking.urgent_new = [
        one for one in found.tracking.urgent_new if one.account != PAYMENTS
    ]
    exceptions_of(found, covering)
    lines = shown(found)
    assert "1 finding covered by exceptions" in lines
    assert PAYMENTS.id not in {one[2] for one in findings_shown(lines)}
    assert "all 6 findings" in only(lines, "What to fix first")
    assert document(found)["findings"] == {"1": 0, **dict.fromkeys("234567", 1)}
    assert document(found)["exceptions"] == {"applied": 1, "expired": [], "unused": []}
    assert findings_shown(shown(found, quiet=True)) == []


@pytest.mark.parametrize(
    ("one", "named"),
    [
        (known(SANDBOX.id, days=-1), "expired"),
        (known(SANDBOX.id, days=0), "unused"),  # it holds until the end of that day
        (known(SANDBOX.id), "unused"),
        (known("777777777777"), "unused"),  # the account has left the organization
        (known(failed().account.id), None),
        (known("*"), None),  # it may cover something in the account that failed
        (known(failed().account.id, days=-1), "expired"),
    ],
)
def test_exceptions_that_have_expired_or_cover_nothing_are_named(
    one: KnownException, named: str | None
) -> None:
    found = exceptions_of(run_of([audited(), failed()]), one)
    made, lines = document(found)["exceptions"], shown(found)
    assert [name for name in ("expired", "unused") if made[name]] == ([named] if named else [])
    text = f"  line 2: {one.account_id} * * *, until {one.until}: ticket 7"
    assert (text in lines) == (named is not None)
    assert (text in shown(found, quiet=True)) == (named == "expired")
    if named:
        assert made[named] == [{**one._asdict(), "until": one.until.isoformat()}]


def test_an_exception_beside_one_that_lasts_longer_is_not_unused() -> None:
    """Each of these covers a finding; only the one in line 4 has none."""
    found = run_of([audited(user("alice", password=True))])
    longer, shorter = known("*", days=90), known(SANDBOX.id, line=3)
    exceptions_of(found, longer, shorter, known(SANDBOX.id, line=4, finding="unused-key"))
    found.findings = [one._replace(exception=longer) for one in found.findings]
    made = document(found)["exceptions"]
    assert (made["applied"], [one["line"] for one in made["unused"]]) == (1, [4])


def test_an_exception_for_any_account_covers_nothing_if_all_were_read() -> None:
    left_out = OutOfScopeAccount(Account(MANAGEMENT, "management", "ACTIVE"))
    found = exceptions_of(run_of([audited(), left_out]), known("*"), known(MANAGEMENT, line=3))
    assert [one["line"] for one in document(found)["exceptions"]["unused"]] == [2]
    partly = dataclasses.replace(audited(), not_checked={API_KEYS: "AccessDenied"})
    found = exceptions_of(run_of([partly]), known("*"), known(SANDBOX.id, line=3))
    assert document(found)["exceptions"]["unused"] == []


def test_new_api_keys_are_among_the_new_keys() -> None:
    found = run_of([audited()])
    changed = Change(SANDBOX.id, SANDBOX.name, "ana", "ACCA1", "api-key-created", since=NOW)
    gone = changed._replace(key_id="AKIA1", change="access-key-came-and-went")
    other = changed._replace(key_id="ASCA1", change="api-key-deleted")
    found.tracking.earlier = EarlierRun(Path(), NOW - DAY, "o-test123456", {}, 90, [], {})
    found.tracking.changes = [changed, gone, other]
    for quiet in (False, True):
        lines = shown(found, quiet=quiet)
        start = lines.index("New keys since the last audit of their account")
        where = f"  {SANDBOX.id} {SANDBOX.name} ana"
        assert lines[start + 1 : start + 3] == [
            f"{where} ACCA1 (API key) (account not compared)",
            f"{where} AKIA1 deleted again (account not compared)",
        ]
    assert [one["change"] for one in document(found)["changes"]["new_access_keys"]] == [
        "api-key-created",
        "access-key-came-and-went",
    ]
    assert any(line.startswith("  API keys: 1 created, 1 deleted") for line in shown(found)), lines


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("NotAction iam:*, sts:*", "does not cover iam:* and sts:*"),
        ("NotAction a:B, c:D, e:F", "does not cover a:B, c:D and e:F"),
        ("Action iam:*", "covers only iam:*"),
        ("Resource arn:a", "covers only arn:a"),
        ("Bool aws:x true, false", "applies only if Bool aws:x true, false"),
        (
            "NotAction iam:* and NotResource arn:a and Bool aws:x a and b",
            "does not cover iam:*, does not cover arn:a, applies only if Bool aws:x a and b",
        ),
    ],
)
def test_a_limit_of_a_policy_is_a_sentence(condition: str, words: str) -> None:
    found = run_of([audited()])
    control = Control("partial", {"p-1": "RequireMFA"}, (), (condition,))
    found.controls = {SANDBOX.id: dict.fromkeys(CONTROLS, control)}
    assert f"partial: RequireMFA {words}" in " ".join(" ".join(shown(found)).split())


# --- the last line, colors --------------------------------------------------------------------------------------------


def test_the_last_line_names_the_page_if_there_is_one() -> None:
    found = run_of([audited()])
    assert shown(found)[-2:] == [f"Files: {found.folder}", f"Page: {found.folder}/report.html"]
    found.plan = dataclasses.replace(found.plan, page=False)
    assert shown(found)[-1] == f"Files: {found.folder}"
    assert document(found)["page"] is None


def test_colors_are_never_the_only_sign_and_never_in_the_mail() -> None:
    found = run_of([*OF_PRIORITY.values(), failed()])
    summary = summary_document(found, FINISHED)
    plain, colored = (
        terminal_summary(found, summary, False, 100, color) for color in (False, True)
    )
    codes = re.compile(r"\x1b\[(\d+)m")
    assert codes.sub("", colored) == plain
    assert set(codes.findall(colored)) == {"0", "1", "31", "33"}
    assert "\x1b[31m" in only(colored.splitlines(), "\x1b[1m\x1b[31m1 account could not")
    assert not codes.search(plain)
    assert not codes.search(terminal_summary(found, summary, True, 100, True))


@pytest.mark.program
@pytest.mark.parametrize(
    ("columns", "width", "env"),
    [
        (40, 80, {}),
        (90, 90, {}),
        (300, 120, {}),
        (90, 90, {"NO_COLOR": "1"}),
        (90, 90, {"NO_COLOR": ""}),
        (90, 90, {"TERM": "dumb"}),
    ],
)
def test_a_terminal_decides_width_and_color(
    columns: int, width: int, env: dict[str, str], serve: Serve, program: Program
) -> None:
    colored = env in ({}, {"NO_COLOR": ""})
    made = serve(aws.account(ONE, "one", role="denied"), aws.account(TWO, "two"))
    seen = program.in_terminal({**made.env(), **env}, everything=True, columns=columns).terminal
    text = seen[seen.index("Organization o-") :]
    assert ("\x1b[1m" in seen, "\x1b[31m" in seen) == (colored, colored)
    lines = re.sub(r"\x1b\[\d+m", "", text).splitlines()
    folded = [
        len(line) for line in lines if not re.match("Files|Page", line) and " " in line.strip()
    ]
    assert width - 20 < max(folded) <= width


# --- summary.json -----------------------------------------------------------------------------------------------------


def test_every_figure_is_given_per_account_and_in_total() -> None:
    alice = user("alice", key(400 * DAY, DAY, key_id="A1"), key(DAY, key_id="A2"), password=True)
    made = document(
        run_of(
            [
                audited(
                    user(ROOT, key(DAY, status="Inactive", key_id="R1")), alice, account=PAYMENTS
                ),
                audited(
                    user(
                        "bob",
                        key(100 * DAY, 95 * DAY),
                        key(DAY, status="Expired"),
                        password=True,
                        mfa=["SMS"],
                    )
                ),
                failed(),
            ]
        )
    )
    oldest = {
        "created": "2025-10-19T20:50:00+00:00",
        "account_id": "222222222222",
        "account_name": "payments-prod",
        "username": "alice",
        "access_key_id": "A1",
        "age_days": 400,
    }
    production = {
        "console_users": 1,
        "console_users_without_mfa": 1,
        "access_keys": 3,
        "active_keys": 2,
        "inactive_keys": 1,
        "expired_keys": 0,
        "active_keys_older_than_max_age": 1,
        "active_keys_older_than_1_year": 1,
        "active_keys_never_used": 1,
        "active_keys_not_used_for_90_days": 0,
        "active_keys_used_within_30_days": 1,
        "root_access_keys": 1,
        "users_with_two_active_keys": 1,
        **NO_OTHER_CREDENTIALS,
        "mfa_coverage_percent": 0.0,
        "oldest_active_key": oldest,
    }
    organization = {
        **production,
        "console_users": 2,
        "access_keys": 5,
        "active_keys": 3,
        "expired_keys": 1,
        "active_keys_older_than_max_age": 2,
        "active_keys_not_used_for_90_days": 1,
        "mfa_coverage_percent": 50.0,
    }
    for gaps in (*made["gaps"].values(), made["accounts"][1]["gaps"]):
        assert len(gaps.pop("active_key_ages")) == 7
    assert made["gaps"] == {"organization": organization, "production": production}
    sandbox, payments, locked = made["accounts"]
    assert (sandbox["id"], payments["id"], locked["id"]) == (
        SANDBOX.id,
        PAYMENTS.id,
        "444444444444",
    )
    assert payments["gaps"] == production
    assert (payments["production"], sandbox["production"]) == (True, False)
    assert sandbox["maturity"] == {"phase1": "Complete", "phase2": "In Progress"}
    assert locked["maturity"] == {"phase1": "Not Started", "phase2": "Not Started"}
    assert made["maturity"]["phase1"]["level"] == "In Progress"
    assert made["maturity"]["phase1"]["accounts"] == {
        "Not Started": 1,
        "In Progress": 1,
        "Complete": 1,
        "Advanced": 0,
    }
    assert made["findings"] == {"1": 1, "2": 2, "3": 0, "4": 0, "5": 1, "6": 0, "7": 1}


def test_the_settings_that_decided_are_in_the_summary() -> None:
    made = document(run_of([], "--production", "^pay|live$", "--max-key-age", "45"))
    assert (made["production_pattern"], made["max_key_age_days"]) == ("^pay|live$", 45)


def test_a_key_created_while_the_run_was_under_way_is_no_day_old() -> None:
    made = document(run_of([audited(user("alice", key(timedelta(seconds=-60))))]))
    assert made["gaps"]["organization"]["oldest_active_key"]["age_days"] == 0


def values_of(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """All values that are neither objects nor lists, with their place."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from values_of(each, f"{path}.{name}")
    elif isinstance(value, list):
        for each in value:
            yield from values_of(each, f"{path}[]")
    else:
        yield path, value


def test_dates_are_iso_8601_and_percentages_numbers() -> None:
    people = user("alice", key(DAY), password=True, mfa=["SMS"]), user("bob", password=True)
    made = document(run_of([audited(*people), failed()]))
    assert type(made["format"]) is int
    assert made["format"] >= 1
    dates = [
        value
        for path, value in values_of(made)
        if re.search(r"\.(started|finished|created|report_generated)$", path)
    ]
    assert len(dates) >= 5
    for text in dates:
        assert datetime.fromisoformat(text).utcoffset() == timedelta(0)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", text)
    percentages = [value for path, value in values_of(made) if path.endswith("percent")]
    assert len(percentages) == 3
    assert {type(value) for value in percentages} <= {float, type(None)}


@settings(max_examples=60)
@given(organizations())
def test_totals_of_the_document_are_the_sums_over_its_accounts(outcomes: list[Outcome]) -> None:
    found = run_of(outcomes)
    made = document(found)
    entries = [one for one in made["accounts"] if one["result"] == "audited"]
    for column, members in (
        ("organization", entries),
        ("production", [one for one in entries if one["production"]]),
    ):
        total = made["gaps"][column]
        for name in GAP_COUNTS:
            assert total[name] == sum(one["gaps"][name] for one in members), (column, name)
        oldest = [
            one["gaps"]["oldest_active_key"] for one in members if one["gaps"]["oldest_active_key"]
        ]
        assert total["oldest_active_key"] == min(
            oldest,
            key=lambda one: (one["created"], one["account_id"], one["username"]),
            default=None,
        )
        complete = total["console_users_without_mfa"] == 0
        coverage = total["mfa_coverage_percent"]
        assert (coverage is None or coverage == 100) == complete
        assert (coverage is None) == (total["console_users"] == 0)
    for phase in ("phase1", "phase2"):
        levels = Counter(
            one["maturity"][phase] for one in made["accounts"] if one["result"] != "skipped"
        )
        assert made["maturity"][phase]["accounts"] == {level: levels[level] for level in LEVELS}
    assert made["totals"]["users"] == sum(one["users"] for one in entries)
    results = Counter(one["result"] for one in made["accounts"])
    assert {name: made["totals"][name] for name in ("audited", "failed", "skipped")} == {
        name: results[name] for name in ("audited", "failed", "skipped")
    }
    priorities = Counter(one.priority for one in found.findings)
    assert made["findings"] == {str(number): priorities[number] for number in range(1, 8)}


@settings(max_examples=40)
@given(organizations(ANY_TEXT, ANY_TEXT))
def test_any_name_comes_through_json(outcomes: list[Outcome]) -> None:
    made = document(run_of(outcomes))
    assert [one["name"] for one in made["accounts"]] == [one.account.name for one in outcomes]


# --- exit codes -------------------------------------------------------------------------------------------------------

OF_PRIORITY: dict[int, AuditedAccount] = {
    1: audited(user("alice", password=True), account=PAYMENTS),
    2: audited(user("alice", key(400 * DAY))),
    3: audited(user("alice", key(DAY, DAY))),
    4: audited(user("alice", password=True)),
    5: audited(user("alice", key(91 * DAY))),
    6: audited(user("alice", key(91 * DAY, 60 * DAY))),
    7: audited(user("alice", key(DAY, status="Inactive"))),
}


@pytest.mark.parametrize("asked", range(1, 8))
@pytest.mark.parametrize("priority", OF_PRIORITY)
def test_fail_on_findings_of_a_priority_or_more_urgent(priority: int, asked: int) -> None:
    found = run_of([OF_PRIORITY[priority]])
    assert [one.priority for one in found.findings] == [priority]
    chosen = parse_arguments(["--role", "R", "--fail-on", f"findings:{asked}"]).fail_on
    assert exit_code(found, chosen) == (4 if priority <= asked else 0)


@pytest.mark.parametrize("priority", OF_PRIORITY)
def test_fail_on_findings_means_any(priority: int) -> None:
    found, chosen = (
        run_of([OF_PRIORITY[priority]]),
        parse_arguments(["--role", "R", "--fail-on", "findings"]).fail_on,
    )
    assert exit_code(found, chosen) == 4
    assert exit_code(run_of([audited()]), chosen) == 0


@pytest.mark.parametrize(
    "value", ["findings:1,findings:6", "findings:6,findings:1", "findings,findings:1"]
)
def test_each_of_several_reasons_to_fail_counts(value: str) -> None:
    chosen = parse_arguments(["--role", "R", "--fail-on", value]).fail_on
    assert exit_code(run_of([OF_PRIORITY[1]]), chosen) == 4
    assert exit_code(run_of([OF_PRIORITY[6]]), chosen) == 4


def test_findings_alone_are_no_failure() -> None:
    found = run_of(OF_PRIORITY.values())
    assert exit_code(found, parse_arguments(["--role", "R"]).fail_on) == 0


def test_failed_accounts_and_findings_have_a_code_of_their_own() -> None:
    """Both show in the code: one denied account in three hundred must not silence --fail-on."""
    found = run_of([OF_PRIORITY[2], failed()])
    for what, code in (("findings:1", 3), ("findings:2", 5), ("findings", 5), ("new-keys", 3)):
        chosen = parse_arguments(["--role", "R", "--fail-on", what]).fail_on
        assert exit_code(found, chosen) == code


# --- the whole program ------------------------------------------------------------------------------------------------

PROD, PLAIN, CLEAN, LOCKED = ONE, TWO, THREE, FOUR


def access_key(name: str, days: float, used: float | None = None, status: str = "Active") -> Json:
    last_used = None if used is None else ago(used)
    return aws.key(f"AKIA{name:0>16}", created=ago(days), last_used=last_used, status=status)


WORLD = [
    aws.account(
        PROD,
        "=payments-prod",
        root=aws.root(password=True, keys=[aws.root_key(last_rotated=ago(10), last_used=ago(200))]),
        users=[
            aws.user("-x", password=True, password_last_used=ago(1)),
            aws.user(
                "deploy",
                keys=[access_key("DEPLOY", 90.1, 30.1), access_key("DEPLOY2", 365.1, 30.1)],
            ),
            aws.user(
                "safe",
                password=True,
                mfa=[f"arn:aws:iam::{PROD}:mfa/safe"],
                keys=[access_key("SAFE", 89.9)],
            ),
        ],
    ),
    aws.account(
        PLAIN,
        "sandbox",
        root=aws.root(password=True, virtual=True),
        users=[
            aws.user("login", password=True),
            aws.user("keys", keys=[access_key("INUSE", 89.9, 29.9), access_key("UNUSED", 90.1)]),
            aws.user(
                "rest",
                keys=[
                    access_key("EXPIRED", 400, 1, "Expired"),
                    access_key("INACTIVE", 5, 1, "Inactive"),
                ],
            ),
        ],
    ),
    aws.account(CLEAN, "clean", users=[aws.user("young", keys=[access_key("YOUNG", 89.9)])]),
    aws.account(LOCKED, "locked-prod", role="denied"),
]

# priority, finding, account, user, key, age in days; in the order of findings.csv
EXPECTED = [
    ("1", "console-without-mfa", PROD, ROOT, "N/A", ""),  # an administrator
    ("1", "root-access-key", PROD, ROOT, "<root_access_key_1>", "10"),
    ("1", "console-without-mfa", PROD, "-x", "N/A", ""),
    ("2", "key-older-than-1-year", PROD, "deploy", "AKIA000000000DEPLOY2", "365"),
    ("3", "key-in-use", PLAIN, "keys", "AKIA00000000000INUSE", "89"),
    ("4", "console-without-mfa", PLAIN, "login", "N/A", ""),
    ("5", "unused-password", PROD, "safe", "N/A", ""),
    ("5", "unused-key", PLAIN, "keys", "AKIA0000000000UNUSED", "90"),
    ("6", "two-active-keys", PROD, "deploy", "N/A", ""),
    ("6", "key-older-than-90-days", PROD, "deploy", "AKIA0000000000DEPLOY", "90"),
    ("6", "two-active-keys", PLAIN, "keys", "N/A", ""),
    ("7", "inactive-key", PLAIN, "rest", "AKIA000000000EXPIRED", "400"),
    ("7", "inactive-key", PLAIN, "rest", "AKIA00000000INACTIVE", "5"),
]


def findings_csv(result: Result) -> list[dict[str, str]]:
    """findings.csv read back, cells as they were before they were made safe for spreadsheets."""
    with (result.folder / "findings.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    assert header == list(FINDINGS_COLUMNS)
    return [dict(zip(header, map(original, row), strict=True)) for row in rows]


def essence(rows: Iterable[dict[str, str]]) -> list[tuple[str, ...]]:
    columns = ("priority", "finding", "account_id", "username", "access_key_id", "age_days")
    return [tuple(row[column] for column in columns) for row in rows]


@pytest.fixture(scope="module")
def whole(serve: Serve, program: Program) -> Result:
    """All accounts; one of them fails, which goes before what --fail-on asks for."""
    return program(serve(*WORLD).env(), "--fail-on", "findings")


@pytest.mark.program
def test_findings_csv_has_every_finding_of_a_run(whole: Result) -> None:
    rows = findings_csv(whole)
    assert essence(rows) == EXPECTED
    assert {(row["account_id"], row["account_name"], row["production"]) for row in rows} == {
        (PROD, "=payments-prod", "true"),
        (PLAIN, "sandbox", "false"),
    }
    assert "aws iam delete-login-profile --user-name" in rows[2]["recommendation"]
    assert "-x" in rows[2]["recommendation"]
    text = (whole.folder / "findings.csv").read_text(encoding="utf-8")
    assert "'=payments-prod" in text
    assert ",'-x," in text


@pytest.mark.program
def test_summary_json_has_gaps_levels_and_findings_of_a_run(whole: Result) -> None:
    made = summary_of(whole)
    assert made["gaps"]["production"] == whole.accounts[PROD]["gaps"]
    del made["gaps"]["organization"]["active_key_ages"]
    assert made["gaps"]["organization"] == {
        "console_users": 5,
        "console_users_without_mfa": 3,
        "mfa_coverage_percent": 40.0,
        "access_keys": 9,
        "active_keys": 7,
        "inactive_keys": 1,
        "expired_keys": 1,
        "active_keys_older_than_max_age": 3,
        "active_keys_older_than_1_year": 1,
        "active_keys_never_used": 3,
        "active_keys_not_used_for_90_days": 1,
        "active_keys_used_within_30_days": 1,
        "root_access_keys": 1,
        "users_with_two_active_keys": 2,
        **NO_OTHER_CREDENTIALS,
        "oldest_active_key": {
            "created": ago(365.1).isoformat(),
            "account_id": PROD,
            "account_name": "=payments-prod",
            "username": "deploy",
            "access_key_id": "AKIA000000000DEPLOY2",
            "age_days": 365,
        },
    }
    assert made["gaps"]["production"]["access_keys"] == 4
    assert made["maturity"] == {
        "phase1": {
            "level": "In Progress",
            "accounts": {"Not Started": 1, "In Progress": 2, "Complete": 1, "Advanced": 0},
        },
        "phase2": {
            "level": "In Progress",
            "accounts": {"Not Started": 1, "In Progress": 2, "Complete": 1, "Advanced": 0},
        },
    }
    assert made["findings"] == {"1": 3, "2": 1, "3": 1, "4": 1, "5": 2, "6": 3, "7": 2}
    assert made["totals"]["production"] == 1
    assert {one: entry["maturity"]["phase1"] for one, entry in whole.accounts.items()} == {
        PROD: "In Progress",
        PLAIN: "In Progress",
        CLEAN: "Complete",
        LOCKED: "Not Started",
    }


@pytest.mark.program
def test_the_terminal_shows_gaps_and_findings_of_a_run(whole: Result) -> None:
    assert whole.exit_code == 5
    lines = whole.stdout.splitlines()
    assert gap_table(lines)["console users without MFA"] == ("3", "2")
    assert [one[1:3] for one in findings_shown(lines)] == [row[1:3] for row in EXPECTED[:10]]
    assert only(lines, "Audited").startswith(
        "Audited: 3 accounts (1 production), 7 users, 9 access keys"
    )
    assert all(len(line) <= 100 or line.startswith(("Files: ", "Page: ")) for line in lines)


@pytest.mark.program
def test_quiet_prints_the_findings_of_priority_1(serve: Serve, program: Program) -> None:
    result = program(serve(*WORLD).env(), "--exclude", LOCKED, "--quiet", "--fail-on", "findings:1")
    assert result.exit_code == 4
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert [(str(one[0]), *one[1:]) for one in findings_shown(lines)] == [
        row[:4] for row in EXPECTED if row[0] == "1"
    ]
    for row in EXPECTED[3:]:
        assert row[4] == "N/A" or row[4] not in result.stdout
    assert "Gaps" not in result.stdout
    assert essence(findings_csv(result)) == EXPECTED


@pytest.mark.program
@pytest.mark.parametrize(
    ("account_id", "what", "code"),
    [
        (PLAIN, "findings:2", 0),
        (PLAIN, "findings", 4),
        (CLEAN, "findings", 0),
    ],
)
def test_fail_on_counts_what_quiet_does_not_print(
    account_id: str, what: str, code: int, serve: Serve, program: Program
) -> None:
    result = program(serve(*WORLD).env(), "--accounts", account_id, "--quiet", "--fail-on", what)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "")
    assert essence(findings_csv(result)) == [row for row in EXPECTED if row[2] == account_id]


@pytest.mark.program
def test_an_audit_that_cannot_finish_goes_before_its_findings(
    serve: Serve, program: Program
) -> None:
    """The first page's account has findings; the second page is refused."""
    denied = aws.rule("ListAccounts", skip=2, error="AccessDeniedException")
    result = program(
        serve(WORLD[0], WORLD[1], page=1, rules=[denied]).env(), "--fail-on", "findings"
    )
    assert result.exit_code == 1
    assert result.csvs <= {PROD}
    assert "ListAccounts" in result.stderr


@pytest.mark.program
def test_production_and_key_age_decide_as_asked(serve: Serve, program: Program) -> None:
    """Production by ID, a key just over and another just under the limit."""
    options = [
        "--accounts",
        f"{PLAIN},{CLEAN}",
        "--production",
        f"^{PLAIN}$",
        "--max-key-age",
        "89",
    ]
    result = program(serve(*WORLD).env(), *options)
    assert result.exit_code == 0
    rows = findings_csv(result)
    assert essence(rows)[0] == ("1", "console-without-mfa", PLAIN, "login", "N/A", "")
    young = next(row for row in rows if row["account_id"] == CLEAN)
    assert young["reasons"] == "older than 89 days"
    assert {row["production"] for row in rows if row["account_id"] == PLAIN} == {"true"}


def test_outcomes_that_were_not_looked_into_have_no_gaps() -> None:
    """Accounts that are skipped, left out or failed add nothing to any figure, and hide nothing either."""
    left_out = OutOfScopeAccount(Account(MANAGEMENT, "management", "ACTIVE"))
    denied = FailedAccount(PAYMENTS, "AssumeRole", "AccessDenied", "no")
    made = document(run_of([audited(), SkippedAccount(PAYMENTS), left_out, denied]))
    assert made["gaps"]["organization"] == document(run_of([audited()]))["gaps"]["organization"]
    assert (
        made["gaps"]["organization"]["console_users"]
        == assess(audited(), plan(), NOW).gaps.console_users
        == 0
    )
    assert made["maturity"]["phase1"]["accounts"]["Not Started"] == 1

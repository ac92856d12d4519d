"""Assess, from users and keys to gaps, levels and findings: tables of cases for every rule and every boundary.

All of it is pure, so the clock stands still here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import re
import shlex
import stat
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import (
    CALLER,
    DAY,
    MANAGEMENT,
    NOW,
    PAYMENTS,
    SANDBOX,
    SECOND,
    audited,
    failed,
    key,
    organizations,
    plan,
    run_of,
    user,
)
from endpoint import TIMEOUT
from hypothesis import given, settings
from hypothesis import strategies as st

import iam_audit
from iam_audit import (
    ACCESS_KEY,
    ADVANCED,
    API_KEY,
    CERTIFICATES,
    COMPLETE,
    CREDENTIALS_COLUMNS,
    ENFORCED,
    FINDINGS_COLUMNS,
    GAP_COUNTS,
    IN_PROGRESS,
    KEY_AGES,
    LEVELS,
    MFA_REQUIRED,
    NOT_STARTED,
    ROOT,
    RULES,
    SERVICE_PASSWORD,
    SIGNING_CERTIFICATE,
    VERDICTS,
    Account,
    AccountFigures,
    AuditedAccount,
    AuditError,
    Caller,
    Credential,
    FailOn,
    Finding,
    Gaps,
    KnownException,
    OldestKey,
    Outcome,
    Plan,
    SkippedAccount,
    User,
    assess,
    controls_of,
    credential_rows,
    exit_code,
    finding_row,
    findings_of,
    is_production,
    most_urgent_first,
    neutral,
    organization_level,
    parse_exceptions,
    reasons_of,
    recommendation,
    total_gaps,
)


def gaps(*users: User, arguments: Sequence[str] = ()) -> Gaps:
    found: Gaps = assess(audited(*users), plan(*arguments), NOW).gaps
    return found


def counted(found: Gaps) -> dict[str, int]:
    """The figures that are not zero."""
    return {name: number for name in GAP_COUNTS if (number := getattr(found, name))}


def findings(one: AuditedAccount, *arguments: str) -> list[Finding]:
    return sorted(findings_of(one, plan(*arguments), NOW), key=most_urgent_first)


# --- production -----------------------------------------------------------------------------------------------------

PRODUCTION_NAMES = [
    *("payments-prod", "Production EU", "prd-web", "live-site"),
    *("prod", "PROD", "Prd", "LIVE", "production"),
    *(
        "eu.prod.web",
        "web_prod_eu",
        "web/prod",
        "(prod)",
        "prod: web",
        "web-live",
        "Live Site",
        "a prd b",
    ),
    *("data-prod-and-nonprod", "nonprod-and-prod"),
    # a word of their own that only ends like non, not or pre
    *(
        "canon-prod",
        "xenon production",
        "lebanon_prd",
        "pinot-live",
        "knot_prod",
        "spre-prod",
        "2pre-prod",
    ),
]
OTHER_NAMES = [
    *("nonprod", "non-prod", "non_production", "pre-prod", "preprod", "not-live"),
    *(
        "NonProd",
        "NON-PROD",
        "Non_Production",
        "non prod",
        "Pre-Production",
        "PRE PRD",
        "pre_live",
        "prelive",
    ),
    *(
        "not prod",
        "not_production",
        "web-non-prod",
        "web-preprod-eu",
        "eu_pre-prod_1",
        "notlive",
        "nonlive",
    ),
    *(
        "",
        "sandbox",
        "olive-oil",
        "delivery",
        "reproduction",
        "products",
        "producer",
        "alive",
        "lives",
        "livestream",
    ),
    *("liverpool", "approdo", "prds", "prodigy"),
]


@pytest.mark.parametrize("name", PRODUCTION_NAMES)
def test_the_default_takes_these_names_for_production(name: str) -> None:
    assert is_production(Account("111111111111", name, "ACTIVE"), plan().production)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_the_default_does_not_take_these_names_for_production(name: str) -> None:
    assert not is_production(Account("111111111111", name, "ACTIVE"), plan().production)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("^pay", True),
        ("^PAYMENTS", True),  # upper and lower case are alike
        ("^222222222222$", True),
        ("2{13}", False),
        ("/ou-ab12-workloads/", True),
        ("/OU-AB12-WORKLOADS/", True),
        ("sandboxes", False),
        ("prod$|^1", True),
        ("^prod", False),
    ],
)
def test_a_pattern_is_searched_in_name_id_and_path(pattern: str, expected: bool) -> None:
    assert is_production(PAYMENTS, plan("--production", pattern).production) is expected
    assert (
        assess(audited(account=PAYMENTS), plan("--production", pattern), NOW).production is expected
    )


def test_an_account_without_a_path_is_judged_by_name_and_id() -> None:
    nowhere = dataclasses.replace(PAYMENTS, path=None)
    assert is_production(nowhere, plan().production)
    assert not is_production(nowhere, plan("--production", "None|workloads").production)


# --- gaps -----------------------------------------------------------------------------------------------------------

ONE = {"access_keys": 1, "active_keys": 1}
NEVER = {**ONE, "active_keys_never_used": 1}
OLD = {"active_keys_older_than_max_age": 1}
YEAR = {**OLD, "active_keys_older_than_1_year": 1}
RECENT = {**ONE, "active_keys_used_within_30_days": 1}
IDLE = {**ONE, **OLD, "active_keys_not_used_for_90_days": 1}

KEY_GAPS: dict[str, tuple[Credential, dict[str, int]]] = {
    "new, never used": (key(timedelta(0)), NEVER),
    "90 days, never used": (key(90 * DAY), NEVER),
    "90 days and a second, never used": (key(90 * DAY + SECOND), {**NEVER, **OLD}),
    "365 days, never used": (key(365 * DAY), {**NEVER, **OLD}),
    "365 days and a second, never used": (key(365 * DAY + SECOND), {**NEVER, **YEAR}),
    "used just now": (key(60 * DAY, timedelta(0)), RECENT),
    "used since the run began": (key(60 * DAY, -60 * SECOND), RECENT),
    "used 30 days ago": (key(60 * DAY, 30 * DAY), RECENT),
    "used 30 days and a second ago": (key(60 * DAY, 30 * DAY + SECOND), ONE),
    "used 90 days ago": (key(91 * DAY, 90 * DAY), {**ONE, **OLD}),
    "used 90 days and a second ago": (key(91 * DAY, 90 * DAY + SECOND), IDLE),
    "old, used today": (key(800 * DAY, timedelta(0)), {**RECENT, **YEAR}),
    "old, not used for long": (key(800 * DAY, 400 * DAY), {**IDLE, **YEAR}),
    "inactive": (
        key(800 * DAY, 400 * DAY, status="Inactive"),
        {"access_keys": 1, "inactive_keys": 1},
    ),
    "inactive, never used": (
        key(800 * DAY, status="Inactive"),
        {"access_keys": 1, "inactive_keys": 1},
    ),
    "inactive, used lately": (
        key(DAY, DAY, status="Inactive"),
        {"access_keys": 1, "inactive_keys": 1},
    ),
    "expired": (key(800 * DAY, DAY, status="Expired"), {"access_keys": 1, "expired_keys": 1}),
    "of a status that AWS added": (key(800 * DAY, timedelta(0), status="New"), {**RECENT, **YEAR}),
}


@pytest.mark.parametrize(("one", "expected"), KEY_GAPS.values(), ids=KEY_GAPS)
def test_what_a_key_adds_to_the_gaps(one: Credential, expected: dict[str, int]) -> None:
    assert counted(gaps(user("alice", one))) == expected


@pytest.mark.parametrize(
    ("days", "old", "expected"),
    [
        ("30", 30 * DAY, 0),
        ("30", 30 * DAY + SECOND, 1),
        ("90", 90 * DAY + SECOND, 1),
        ("180", 180 * DAY, 0),
        ("180", 180 * DAY + SECOND, 1),
        ("1", DAY + SECOND, 1),
        ("9999", 9999 * DAY, 0),
    ],
)
def test_max_key_age_decides_which_keys_are_old(days: str, old: timedelta, expected: int) -> None:
    arguments = ["--max-key-age", days]
    assert (
        gaps(user("alice", key(old)), arguments=arguments).active_keys_older_than_max_age
        == expected
    )
    level = assess(audited(user("alice", key(old))), plan(*arguments), NOW).phase2
    assert level == (IN_PROGRESS if expected else COMPLETE)


CONSOLE_GAPS: dict[str, tuple[User, dict[str, int], float | None]] = {
    "password and MFA": (
        user("alice", password=True, mfa=["Virtual"]),
        {"console_users": 1},
        100.0,
    ),
    "password, no MFA": (
        user("alice", password=True),
        {"console_users": 1, "console_users_without_mfa": 1},
        0.0,
    ),
    "no password": (user("alice"), {}, None),
    "no password, MFA": (user("alice", mfa=["Hardware", "Virtual"]), {}, None),
    "root without credentials": (user(ROOT), {}, None),
    "root with password, no MFA": (
        user(ROOT, password=True),
        {"console_users": 1, "console_users_without_mfa": 1},
        0.0,
    ),
    "root with password and MFA": (
        user(ROOT, password=True, mfa=["Hardware"]),
        {"console_users": 1},
        100.0,
    ),
    "root with a key": (user(ROOT, key(DAY)), {**NEVER, "root_access_keys": 1}, None),
    "root with an inactive key": (
        user(ROOT, key(DAY, status="Inactive")),
        {"access_keys": 1, "inactive_keys": 1, "root_access_keys": 1},
        None,
    ),
    "two active keys": (
        user("alice", key(DAY), key(DAY)),
        {
            "access_keys": 2,
            "active_keys": 2,
            "active_keys_never_used": 2,
            "users_with_two_active_keys": 1,
        },
        None,
    ),
    "one of two keys active": (
        user("alice", key(DAY), key(DAY, status="Inactive")),
        {**NEVER, "access_keys": 2, "inactive_keys": 1},
        None,
    ),
}


@pytest.mark.parametrize(("one", "expected", "coverage"), CONSOLE_GAPS.values(), ids=CONSOLE_GAPS)
def test_what_a_user_adds_to_the_gaps(
    one: User, expected: dict[str, int], coverage: float | None
) -> None:
    found = gaps(one)
    assert counted(found) == expected
    assert found.mfa_coverage_percent == coverage


def test_an_account_without_users_has_no_gaps() -> None:
    figures = assess(audited(), plan(), NOW)
    assert counted(figures.gaps) == {}
    assert figures.gaps.oldest_active_key is None
    assert figures.gaps.mfa_coverage_percent is None
    assert (figures.users, figures.has_root) == (0, False)


def test_root_is_no_user_but_has_gaps_like_one() -> None:
    figures = assess(
        audited(user(ROOT, key(DAY), password=True), user("alice", password=True)), plan(), NOW
    )
    assert (figures.users, figures.has_root) == (1, True)
    assert figures.gaps.console_users == 2


@pytest.mark.parametrize(
    ("users", "without", "expected"),
    [
        (3, 1, 66.6),
        (3, 2, 33.3),
        (8, 1, 87.5),
        (3000, 1, 99.9),
        (100_000, 1, 99.9),
        (100_000, 99_999, 0.0),
    ],
)
def test_coverage_is_rounded_down_so_that_100_means_everyone(
    users: int, without: int, expected: float
) -> None:
    assert Gaps(
        console_users=users, console_users_without_mfa=without
    ).mfa_coverage_percent == pytest.approx(expected)


def test_the_oldest_active_key_is_found_with_its_owner() -> None:
    """Neither an older key that is inactive nor the younger ones of another account count."""
    first = audited(
        user("alice", key(500 * DAY, status="Inactive", key_id="A1"), key(200 * DAY, key_id="A2")),
        user("bob", key(300 * DAY, key_id="B1"), key(100 * DAY, key_id="B2")),
    )
    second = audited(user("carol", key(250 * DAY, key_id="C1")), account=PAYMENTS)
    figures = [assess(one, plan(), NOW) for one in (second, first)]
    expected = OldestKey(NOW - 300 * DAY, SANDBOX.id, SANDBOX.name, "bob", "B1")
    assert figures[1].gaps.oldest_active_key == expected
    assert total_gaps(figures).oldest_active_key == expected
    assert total_gaps(figures[:1]).oldest_active_key == OldestKey(
        NOW - 250 * DAY, PAYMENTS.id, PAYMENTS.name, "carol", "C1"
    )


# --- maturity -------------------------------------------------------------------------------------------------------

LEVEL_CASES: dict[str, tuple[list[User], str, str]] = {
    "no users at all": ([], COMPLETE, ADVANCED),
    "root without credentials": ([user(ROOT)], COMPLETE, ADVANCED),
    "everyone with MFA": ([user("alice", password=True, mfa=["Virtual"])], COMPLETE, ADVANCED),
    "a console user without MFA": (
        [user("alice", password=True, mfa=["Virtual"]), user("bob", password=True)],
        IN_PROGRESS,
        ADVANCED,
    ),
    "root's password without MFA": ([user(ROOT, password=True)], IN_PROGRESS, ADVANCED),
    "an active key of 90 days": ([user("alice", key(90 * DAY, DAY))], COMPLETE, COMPLETE),
    "an active key a second older": (
        [user("alice", key(90 * DAY + SECOND, DAY))],
        COMPLETE,
        IN_PROGRESS,
    ),
    "one old key among young ones": (
        [user("a", key(DAY)), user("b", key(91 * DAY))],
        COMPLETE,
        IN_PROGRESS,
    ),
    "an old key never used": ([user("alice", key(91 * DAY))], COMPLETE, IN_PROGRESS),
    "inactive and expired keys only": (
        [user("alice", key(800 * DAY, status="Inactive"), key(800 * DAY, status="Expired"))],
        COMPLETE,
        ADVANCED,
    ),
    "an old key of a status that AWS added": (
        [user("alice", key(91 * DAY, status="New"))],
        COMPLETE,
        IN_PROGRESS,
    ),
    "a young key of a status that AWS added": (
        [user("alice", key(DAY, status="New"))],
        COMPLETE,
        COMPLETE,
    ),
    "root's young key": ([user(ROOT, key(DAY))], COMPLETE, COMPLETE),
    "root's old key": ([user(ROOT, key(91 * DAY))], COMPLETE, IN_PROGRESS),
    "both gaps in one user": (
        [user("alice", key(91 * DAY), password=True)],
        IN_PROGRESS,
        IN_PROGRESS,
    ),
}


@pytest.mark.parametrize(("users", "phase1", "phase2"), LEVEL_CASES.values(), ids=LEVEL_CASES)
def test_what_decides_an_accounts_levels(users: list[User], phase1: str, phase2: str) -> None:
    figures = assess(audited(*users), plan(), NOW)
    assert (figures.phase1, figures.phase2) == (phase1, phase2)


@pytest.mark.parametrize(
    ("levels", "failures", "expected"),
    [
        ([], 0, NOT_STARTED),
        ([], 3, NOT_STARTED),
        ([ADVANCED], 0, ADVANCED),
        ([ADVANCED, ADVANCED], 1, IN_PROGRESS),
        ([ADVANCED, COMPLETE], 0, COMPLETE),
        ([COMPLETE, ADVANCED], 1, IN_PROGRESS),
        ([ADVANCED, IN_PROGRESS, COMPLETE], 0, IN_PROGRESS),
        ([IN_PROGRESS], 5, IN_PROGRESS),
    ],
)
def test_the_organizations_level_is_the_lowest_and_failures_hold_it_back(
    levels: list[str], failures: int, expected: str
) -> None:
    assert organization_level(levels, failures) == expected


@pytest.mark.parametrize("verdict", VERDICTS)
def test_phase_1_is_advanced_only_where_a_policy_prevents_the_gap_too(
    verdict: str, tmp_path: Path
) -> None:
    found = run_of([audited(user("alice", password=True, mfa=["SMS"]))])
    found.audited += run_of([audited(user("bob", password=True), account=PAYMENTS)]).audited
    control: Any = SimpleNamespace(verdict=verdict)
    found.controls = {one.id: {MFA_REQUIRED: control} for one in (SANDBOX, PAYMENTS)}
    found.folder, found.credentials = tmp_path, None
    iam_audit.write_tables(found)
    expected = ADVANCED if verdict == ENFORCED else COMPLETE
    assert [one.phase1 for one in found.audited] == [expected, IN_PROGRESS]


def test_the_order_of_the_levels_is_the_models() -> None:
    assert LEVELS == ("Not Started", "In Progress", "Complete", "Advanced")


# --- findings -------------------------------------------------------------------------------------------------------

MAX_AGE, IN_USE = "older than 90 days", "used within 30 days"
YEAR_OLD, UNUSED, NEVER_USED = "older than 1 year", "not used for 90 days", "never used"

KEY_FINDINGS: dict[str, tuple[Credential, tuple[int, str, set[str]] | None]] = {
    "new, never used": (key(timedelta(0)), None),
    "90 days, never used": (key(90 * DAY), None),
    "90 days and a second, never used": (
        key(90 * DAY + SECOND),
        (5, "unused-key", {NEVER_USED, MAX_AGE}),
    ),
    "365 days, never used": (key(365 * DAY), (5, "unused-key", {NEVER_USED, MAX_AGE})),
    "365 days and a second, never used": (
        key(365 * DAY + SECOND),
        (2, "key-older-than-1-year", {YEAR_OLD, NEVER_USED, MAX_AGE}),
    ),
    "new, in use": (key(timedelta(0), timedelta(0)), (3, "key-in-use", {IN_USE})),
    "used since the run began": (key(DAY, -60 * SECOND), (3, "key-in-use", {IN_USE})),
    "young, used 30 days ago": (key(60 * DAY, 30 * DAY), (3, "key-in-use", {IN_USE})),
    "young, used 30 days and a second ago": (key(60 * DAY, 30 * DAY + SECOND), None),
    "90 days, used at once": (key(90 * DAY, 90 * DAY), None),
    "91 days, used 90 days ago": (
        key(91 * DAY, 90 * DAY),
        (6, "key-older-than-90-days", {MAX_AGE}),
    ),
    "91 days, used a second before that": (
        key(91 * DAY, 90 * DAY + SECOND),
        (5, "unused-key", {UNUSED, MAX_AGE}),
    ),
    "91 days, used 31 days ago": (
        key(91 * DAY, 31 * DAY),
        (6, "key-older-than-90-days", {MAX_AGE}),
    ),
    "91 days, in use": (key(91 * DAY, DAY), (3, "key-in-use", {IN_USE, MAX_AGE})),
    "365 days, in use": (key(365 * DAY, DAY), (3, "key-in-use", {IN_USE, MAX_AGE})),
    "over a year, in use": (
        key(365 * DAY + SECOND, DAY),
        (2, "key-older-than-1-year", {YEAR_OLD, IN_USE, MAX_AGE}),
    ),
    "over a year, used 60 days ago": (
        key(400 * DAY, 60 * DAY),
        (2, "key-older-than-1-year", {YEAR_OLD, MAX_AGE}),
    ),
    "over a year, unused": (
        key(400 * DAY, 100 * DAY),
        (2, "key-older-than-1-year", {YEAR_OLD, UNUSED, MAX_AGE}),
    ),
    "inactive": (key(DAY, status="Inactive"), (7, "inactive-key", {"inactive"})),
    "inactive and old": (key(800 * DAY, DAY, status="Inactive"), (7, "inactive-key", {"inactive"})),
    "expired": (key(800 * DAY, status="Expired"), (7, "inactive-key", {"expired"})),
    "of a status that AWS added": (
        key(365 * DAY, DAY, status="New"),
        (3, "key-in-use", {IN_USE, MAX_AGE, "status New"}),
    ),
    "young, of a status that AWS added": (key(60 * DAY, 31 * DAY, status="New"), None),
}


@pytest.mark.parametrize("account", [SANDBOX, PAYMENTS], ids=["other", "production"])
@pytest.mark.parametrize(("one", "expected"), KEY_FINDINGS.values(), ids=KEY_FINDINGS)
def test_what_is_found_about_a_key(
    account: Account, one: Credential, expected: tuple[int, str, set[str]] | None
) -> None:
    """One finding at most, under its most urgent name, with all reasons; production changes nothing about it."""
    found = findings(audited(user("alice", one), account=account))
    assert [(each.priority, each.finding, set(reasons_of(each, plan()))) for each in found] == (
        [expected] if expected else []
    )
    assert all(
        len(set(reasons_of(each, plan()))) == len(reasons_of(each, plan())) for each in found
    )
    assert all((each.key, each.user, each.account) == (one, "alice", account) for each in found)


@pytest.mark.parametrize(("one", "expected"), KEY_FINDINGS.values(), ids=KEY_FINDINGS)
def test_a_key_of_root_is_urgent_whatever_its_status(
    one: Credential, expected: tuple[int, str, set[str]] | None
) -> None:
    """Whatever else holds for it stays among the reasons."""
    (found,) = findings(audited(user(ROOT, one)))
    if one.status in ("Active", "New"):
        assert (found.priority, found.finding) == (1, "root-access-key")
        assert set(reasons_of(found, plan())) == {
            "active root access key",
            *({"status New"} if one.status == "New" else ()),
            *(expected[2] if expected else ()),
        }
    else:
        assert (found.priority, found.finding) == (2, "inactive-root-access-key")
        assert reasons_of(found, plan()) == [f"{one.status.lower()} root key"]


USER_FINDINGS: dict[str, tuple[User, Account, tuple[int, set[str]] | None]] = {
    "without MFA": (user("alice", password=True), SANDBOX, (4, {"console user without MFA"})),
    "without MFA in production": (
        user("alice", password=True),
        PAYMENTS,
        (1, {"console user without MFA", "production"}),
    ),
    "with MFA in production": (user("alice", password=True, mfa=["SMS"]), PAYMENTS, None),
    "no password in production": (user("alice"), PAYMENTS, None),
    "root without credentials in production": (user(ROOT), PAYMENTS, None),
    "root without MFA": (
        user(ROOT, password=True),
        SANDBOX,
        (4, {"console user without MFA", "root"}),
    ),
    "root without MFA in production": (
        user(ROOT, password=True),
        PAYMENTS,
        (1, {"console user without MFA", "root", "production"}),
    ),
    "root with MFA": (user(ROOT, password=True, mfa=["Virtual"]), PAYMENTS, None),
}


@pytest.mark.parametrize(("one", "account", "expected"), USER_FINDINGS.values(), ids=USER_FINDINGS)
def test_what_is_found_about_a_user(
    one: User, account: Account, expected: tuple[int, set[str]] | None
) -> None:
    found = findings(audited(one, account=account))
    assert [
        (each.finding, each.priority, set(reasons_of(each, plan())), each.key) for each in found
    ] == ([("console-without-mfa", *expected, None)] if expected else [])


def test_a_user_and_his_keys_are_findings_of_their_own() -> None:
    alice = user(
        "alice",
        key(400 * DAY, key_id="A1"),
        key(DAY, status="Inactive", key_id="A2"),
        password=True,
    )
    found = findings(audited(alice))
    assert [(each.priority, each.finding, each.key.id if each.key else None) for each in found] == [
        (2, "key-older-than-1-year", "A1"),
        (4, "console-without-mfa", None),
        (7, "inactive-key", "A2"),
    ]


@pytest.mark.parametrize(
    ("days", "one", "expected"),
    [
        (
            "30",
            key(31 * DAY),
            (6, {"older than 30 days"}),
        ),  # never used, but too young to be called unused
        ("30", key(30 * DAY), None),
        ("30", key(91 * DAY), (5, {"never used", "older than 30 days"})),
        ("400", key(91 * DAY), (5, {"never used"})),
        ("400", key(91 * DAY, 60 * DAY), None),
        ("400", key(366 * DAY, 60 * DAY), (2, {"older than 1 year"})),
        ("400", key(401 * DAY, 60 * DAY), (2, {"older than 1 year", "older than 400 days"})),
    ],
)
def test_max_key_age_moves_one_rule_and_no_other(
    days: str, one: Credential, expected: tuple[int, set[str]] | None
) -> None:
    found = findings(audited(user("alice", one)), "--max-key-age", days)
    assert [
        (each.priority, set(reasons_of(each, plan("--max-key-age", days)))) for each in found
    ] == ([expected] if expected else [])


def finding(priority: int, production: bool, age: timedelta | None, where: str) -> Finding:
    """A finding at `account/user/key`; `age` None is one about a user."""
    account_id, name, key_id = where.split("/")
    one = None if age is None else key(age, key_id=key_id)
    account = Account(account_id, "x", "ACTIVE")
    return Finding(priority, "x", account, production, name, one, (), age or timedelta(0))


def test_findings_go_by_priority_production_age_account_and_name() -> None:
    expected = [
        finding(1, True, 9 * DAY, "3/z/k"),
        finding(1, True, None, "1/a/"),  # users have no age: after what has one
        finding(1, False, 99 * DAY, "1/a/k"),
        finding(2, True, 9 * DAY, "2/b/k"),
        finding(2, True, 8 * DAY + SECOND, "9/c/k"),
        finding(2, True, 8 * DAY, "1/d/k"),
        finding(2, True, 8 * DAY, "1/e/k1"),
        finding(2, True, 8 * DAY, "1/e/k2"),
        finding(2, True, 8 * DAY, "2/a/k"),
        finding(2, False, 999 * DAY, "1/a/k"),
        finding(4, False, None, "1/a/"),
        finding(4, False, None, "1/b/"),
        finding(4, False, None, "2/a/"),
        finding(7, True, DAY, "1/a/k"),
        finding(7, False, 999 * DAY, "1/a/k"),
    ]
    chance = random.Random(4)
    for _ in range(50):
        mixed = chance.sample(expected, len(expected))
        assert sorted(mixed, key=most_urgent_first) == expected


def test_findings_csv_has_these_columns() -> None:
    assert ",".join(FINDINGS_COLUMNS) == (
        "priority,finding,account_id,account_name,production,username,access_key_id,age_days,last_used_date,"
        "service_name,reasons,recommendation,owner,administrator,ou,older_than_max_age,controls,new,exception,until"
    )


def rows(*outcomes: Outcome, caller: Caller = CALLER) -> list[dict[str, str]]:
    found = run_of(outcomes, caller=caller)
    return [
        dict(zip(FINDINGS_COLUMNS, finding_row(one, found), strict=True)) for one in found.findings
    ]


def test_the_row_of_a_key_says_whose_it_is_and_how_old() -> None:
    (row,) = rows(audited(user("alice", key(400 * DAY, 12 * timedelta(hours=1))), account=PAYMENTS))
    assert "aws iam update-access-key" in row.pop("recommendation")
    assert row == {
        "priority": "2",
        "finding": "key-older-than-1-year",
        "account_id": "222222222222",
        "account_name": "payments-prod",
        "production": "true",
        "username": "alice",
        "access_key_id": "AKIA0000000000000001",
        "age_days": "400",
        "last_used_date": "2026-11-23T08:50:00+00:00",
        "service_name": "s3",
        "reasons": "older than 1 year; used within 30 days; older than 90 days",
        "owner": "",
        "administrator": "unknown",
        "ou": "",
        "older_than_max_age": "true",
        "controls": "CIS 5.0: 1.13; Security Hub: IAM.3",
        "new": "",
        "exception": "",
        "until": "",
    }


def test_the_row_of_a_user_says_that_no_key_is_meant() -> None:
    one = User("alice", True, NOW - DAY, (), (), owner="team-a", administrator="true")
    (row,) = rows(audited(one, account=dataclasses.replace(SANDBOX, ou="Sandboxes/Spain")))
    assert "aws iam delete-login-profile" in row.pop("recommendation")
    assert row == {
        "priority": "4",
        "finding": "console-without-mfa",
        "account_id": "111111111111",
        "account_name": "sandbox",
        "production": "false",
        "username": "alice",
        "access_key_id": "N/A",
        "age_days": "",
        "last_used_date": "2026-11-22T20:50:00+00:00",
        "service_name": "N/A",
        "reasons": "console user without MFA",
        "owner": "team-a",
        "administrator": "true",
        "ou": "Sandboxes/Spain",
        "older_than_max_age": "false",
        "controls": "CIS 5.0: 1.9; Security Hub: IAM.5, IAM.19",
        "new": "",
        "exception": "",
        "until": "",
    }


def test_what_was_never_used_is_said_in_the_words_of_the_accounts_csv() -> None:
    (of_key,) = rows(audited(user("alice", key(91 * DAY))))
    assert (of_key["last_used_date"], of_key["service_name"]) == ("Nunca utilizada", "N/A")
    (of_user,) = rows(audited(user("alice", password=True)))
    assert of_user["last_used_date"] == "Nunca"


@pytest.mark.parametrize(
    ("old", "expected"),
    [(90 * DAY, "90"), (91 * DAY - SECOND, "90"), (DAY - SECOND, "0"), (-60 * SECOND, "0")],
    ids=["whole days", "days are full ones", "first day", "created since the run began"],
)
def test_age_counts_whole_days(old: timedelta, expected: str) -> None:
    (row,) = rows(audited(user("alice", key(old, status="Inactive"))))
    assert row["age_days"] == expected


# --- recommendations ------------------------------------------------------------------------------------------------

PLAIN_NAMES = [
    *(
        "alice",
        "-x",
        "--profile",
        "=cmd",
        "@SUM(A1)",
        "+1",
        "smith,-john",
        "a,=1,+2,@3",
        "a b",
        "'",
        '"',
        "it's",
        "a'b\"c",
        "\\",
        "a\\",
        "''",
    ),
    *(
        "$(touch pwned)",
        "`touch pwned`",
        "$HOME",
        "${HOME}",
        "a;touch pwned",
        "a&touch pwned",
        "a|touch pwned",
    ),
    *(
        "a>pwned",
        "*",
        "~",
        "~root",
        "!!",
        "#",
        "{a,b}",
        "a\N{LATIN SMALL LETTER E WITH ACUTE}",
        "%s",
        "[a]",
        "?",
    ),
]
CONTROL_NAMES = [
    "a\nb",
    "a\ntouch pwned\n",
    "\r",
    "a\tb",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "a\x00b",
    "\x7f",
    "\x9b2J",
]
CONTROL_NAMES += ["a\u202eb", "a\u2028b", "\ud800"]


def command_of(text: str) -> str:
    """The command in a recommendation."""
    found = re.search(r"`(aws .*)`", text, re.DOTALL)
    assert found is not None, text
    return found[1]


def only_row(one: AuditedAccount) -> dict[str, str]:
    (row,) = rows(one)
    return row


Shell = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Runs a command line in /bin/sh and tells the arguments that its `aws` was given; nothing else may happen."""
    binaries, here = tmp_path_factory.mktemp("bin"), tmp_path_factory.mktemp("here")
    (binaries / "aws").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (binaries / "aws").chmod(stat.S_IRWXU)

    def run(command: str) -> list[str]:
        done = subprocess.run(
            ["/bin/sh"],  # on standard input, as a paste arrives
            input=(command + "\n").encode(),
            cwd=here,
            env={"PATH": f"{binaries}:/usr/bin:/bin", "HOME": "/nowhere"},
            capture_output=True,
            timeout=TIMEOUT,
        )
        assert (done.returncode, done.stderr) == (0, b""), command
        assert list(here.iterdir()) == [], command
        return done.stdout.decode().split("\0")[:-1]

    return run


def arguments_of(words: Sequence[str]) -> dict[str, str]:
    """The options of an AWS CLI command by name, found as the AWS CLI finds them, with argparse: it takes `-x` after
    `--user-name` for an option of its own, and ends the command with an error."""
    names = (
        "--user-name",
        "--access-key-id",
        "--status",
        "--target-principal",
        "--task-policy-arn",
    )
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in names:
        parser.add_argument(name, dest=name)
    return {
        name: value for name, value in vars(parser.parse_args(words)).items() if value is not None
    }


@pytest.mark.parametrize("name", PLAIN_NAMES, ids=ascii)
def test_a_shell_hands_the_aws_cli_the_name_as_it_is(shell: Shell, name: str) -> None:
    expected = {
        "--user-name": name,
        "--access-key-id": "AKIA0000000000000001",
        "--status": "Inactive",
    }
    cell = only_row(audited(user(name, key(91 * DAY))))["recommendation"]
    assert neutral(cell) == cell  # as it is in findings.csv
    command = command_of(cell)
    words = shell(command)
    assert words == shlex.split(command)[1:]
    assert words[:2] == ["iam", "update-access-key"]
    assert arguments_of(words[2:]) == expected

    del expected["--status"]
    words = shell(
        command_of(only_row(audited(user(name, key(DAY, status="Inactive"))))["recommendation"])
    )
    assert words[:2] == ["iam", "delete-access-key"]
    assert arguments_of(words[2:]) == expected

    words = shell(command_of(only_row(audited(user(name, password=True)))["recommendation"]))
    assert words[:2] == ["iam", "delete-login-profile"]
    assert arguments_of(words[2:]) == {"--user-name": name}


@pytest.mark.parametrize("name", CONTROL_NAMES, ids=ascii)
def test_no_control_character_gets_into_a_command(shell: Shell, name: str) -> None:
    for one in (
        user(name, key(91 * DAY)),
        user(name, key(DAY, status="Inactive")),
        user(name, password=True),
    ):
        text = only_row(audited(one))["recommendation"]
        assert text.isprintable()
        given_name = arguments_of(shell(command_of(text))[2:])["--user-name"]
        assert given_name == "".join(
            one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in name
        )


@pytest.mark.parametrize("key_id", ["$(touch pwned)", "-x", "a b", "'", "a\nb"], ids=ascii)
def test_a_key_id_is_quoted_too(shell: Shell, key_id: str) -> None:
    for status in ("Active", "Inactive"):
        text = only_row(audited(user("alice", key(91 * DAY, status=status, key_id=key_id))))[
            "recommendation"
        ]
        words = arguments_of(shell(command_of(text))[2:])
        assert words["--access-key-id"] == key_id.replace("\n", "\N{REPLACEMENT CHARACTER}")


@settings(max_examples=25)
@given(name=st.text(min_size=1, max_size=64))
def test_any_name_is_one_argument(shell: Shell, name: str) -> None:
    text = only_row(audited(user(name, key(91 * DAY))))["recommendation"]
    assert text.isprintable()
    assert list(arguments_of(shell(command_of(text))[2:])) == [
        "--user-name",
        "--access-key-id",
        "--status",
    ]


@pytest.mark.parametrize(
    ("one", "first"),
    [
        (key(DAY, DAY), "Move"),
        (
            key(400 * DAY, DAY),
            "Move",
        ),  # whatever its priority, a key in use needs a replacement first
        (key(400 * DAY), "Deactivate"),
        (key(91 * DAY, 91 * DAY), "Deactivate"),
        (key(91 * DAY, 60 * DAY), "Find"),
        (key(DAY, status="Inactive"), "Delete"),
        (key(DAY, DAY, status="Expired"), "Delete"),
    ],
)
def test_the_next_step_for_a_key(one: Credential, first: str) -> None:
    text = only_row(audited(user("alice", one)))["recommendation"]
    assert text.split()[0] == first
    assert SANDBOX.id in text
    assert "\n" not in text
    assert text.endswith(".")


@pytest.mark.parametrize("partition", ["aws", "aws-us-gov", "aws-cn"])
@pytest.mark.parametrize(
    ("one", "what", "commands"),
    [
        (
            user(ROOT, key(DAY)),
            "access key",
            {("iam", "list-access-keys"), ("iam", "delete-access-key")},
        ),
        (user(ROOT, password=True), "password", {("iam", "delete-login-profile")}),
    ],
    ids=["key", "password"],
)
def test_root_of_a_member_account_is_reached_with_assume_root(
    shell: Shell, partition: str, one: User, what: str, commands: set[tuple[str, ...]]
) -> None:
    caller = dataclasses.replace(CALLER, partition=partition)
    (row,) = rows(audited(one), caller=caller)
    session, *then = re.findall(r"`(aws [^`]*)`", row["recommendation"])
    words = shell(session)
    assert what in row["recommendation"]
    assert {tuple(shell(command)) for command in then} == commands
    assert words[:2] == ["sts", "assume-root"]
    assert arguments_of(words[2:]) == {
        "--target-principal": SANDBOX.id,
        "--task-policy-arn": f"arn=arn:{partition}:iam::aws:policy/root-task/IAMDeleteRootUserCredentials",
    }


def test_what_uses_a_key_of_root_is_moved_first() -> None:
    for account in (SANDBOX, Account(MANAGEMENT, "management", "ACTIVE")):
        used = only_row(audited(user(ROOT, key(400 * DAY, DAY)), account=account))["recommendation"]
        assert used.startswith("Move what uses it to temporary credentials (an IAM role), then ")
        unused = only_row(audited(user(ROOT, key(400 * DAY, 31 * DAY)), account=account))[
            "recommendation"
        ]
        assert re.match("Delete|Sign in", unused)


def test_nobody_is_sent_after_what_used_a_key_that_was_never_used() -> None:
    found = run_of([audited(user("alice", key(60 * DAY)))], "--max-key-age", "30")
    assert recommendation(found.findings[0], found).startswith("Ask its owner")


def test_root_of_the_management_account_must_sign_in() -> None:
    """AssumeRoot is for member accounts only."""
    management = Account(MANAGEMENT, "management", "ACTIVE")
    for one in (user(ROOT, key(DAY)), user(ROOT, password=True)):
        text = only_row(audited(one, account=management))["recommendation"]
        assert "assume-root" not in text
        assert "management account" in text


def test_an_ordinary_user_of_the_management_account_is_no_special_case() -> None:
    management = Account(MANAGEMENT, "management", "ACTIVE")
    text = only_row(audited(user("alice", key(91 * DAY)), account=management))["recommendation"]
    assert "update-access-key" in text


# --- credentials other than passwords and access keys -----------------------------------------------------------------


def other(
    kind: str,
    old: timedelta = DAY,
    *,
    status: str = "Active",
    expires: timedelta | None = None,
    credential_id: str = "ACCA0000000000000001",
) -> Credential:
    """A credential of this kind, created that long ago; it expires so long from now, or never."""
    until = None if expires is None else NOW + expires
    return Credential(credential_id, status, NOW - old, None, "bedrock.amazonaws.com", kind, until)


def owner_of(*others: Credential, name: str = "alice") -> User:
    return dataclasses.replace(user(name), others=others)


def with_days(max_unused: int = 90, max_key_age: int = 90) -> Plan:
    return dataclasses.replace(
        plan("--max-key-age", str(max_key_age)), max_unused=timedelta(days=max_unused)
    )


def found_in(*users: User, under: Plan | None = None, account: Account = SANDBOX) -> list[Finding]:
    under = under or plan()
    return sorted(findings_of(audited(*users, account=account), under, NOW), key=most_urgent_first)


NEW_GAPS: dict[str, tuple[Credential, dict[str, int], str]] = {
    "an API key that never expires": (
        other(API_KEY),
        {"active_api_keys": 1, "active_api_keys_without_expiry": 1},
        IN_PROGRESS,
    ),
    "an API key that expires": (
        other(API_KEY, 90 * DAY, expires=DAY),
        {"active_api_keys": 1},
        COMPLETE,
    ),
    "an API key older than the limit": (
        other(API_KEY, 90 * DAY + SECOND, expires=DAY),
        {"active_api_keys": 1, "active_api_keys_older_than_max_age": 1},
        IN_PROGRESS,
    ),
    "an inactive API key": (other(API_KEY, 900 * DAY, status="Inactive"), {}, ADVANCED),
    "an expired API key": (other(API_KEY, 900 * DAY, status="Expired"), {}, ADVANCED),
    "an API key of a status that AWS added": (
        other(API_KEY, expires=DAY, status="New"),
        {"active_api_keys": 1},
        COMPLETE,
    ),
    "an old password for a service": (
        other(SERVICE_PASSWORD, 900 * DAY),
        {"active_service_passwords": 1},
        COMPLETE,
    ),
    "an inactive password": (other(SERVICE_PASSWORD, status="Inactive"), {}, ADVANCED),
    "an old certificate": (
        other(SIGNING_CERTIFICATE, 900 * DAY),
        {"active_signing_certificates": 1},
        COMPLETE,
    ),
    "an inactive certificate": (other(SIGNING_CERTIFICATE, status="Inactive"), {}, ADVANCED),
}


@pytest.mark.parametrize(("one", "expected", "level"), NEW_GAPS.values(), ids=NEW_GAPS)
def test_what_other_credentials_add_to_the_gaps(
    one: Credential, expected: dict[str, int], level: str
) -> None:
    figures = assess(audited(owner_of(one)), plan(), NOW)
    assert counted(figures.gaps) == expected
    assert figures.phase2 == level
    assert figures.gaps.oldest_active_key is None
    assert sum(figures.gaps.active_key_ages) == 0


@pytest.mark.parametrize(
    ("not_checked", "users", "level"),
    [
        ({"ListServiceSpecificCredentials": "AccessDenied"}, [user("alice")], COMPLETE),
        ({"ListServiceSpecificCredentials": "AccessDenied"}, [], COMPLETE),
        (
            {"ListServiceSpecificCredentials": "AccessDenied"},
            [user("alice", key(91 * DAY))],
            IN_PROGRESS,
        ),
        ({"GetAccountAuthorizationDetails": "AccessDenied"}, [user("alice")], ADVANCED),
    ],
)
def test_nothing_is_claimed_of_api_keys_that_were_not_read(
    not_checked: dict[str, str], users: list[User], level: str
) -> None:
    figures = assess(dataclasses.replace(audited(*users), not_checked=not_checked), plan(), NOW)
    assert (figures.phase2, figures.not_checked) == (level, not_checked)


@pytest.mark.parametrize(
    ("old", "name"),
    [
        (timedelta(0), "< 30 days"),
        (-60 * SECOND, "< 30 days"),
        (30 * DAY - SECOND, "< 30 days"),
        (30 * DAY, "< 90 days"),
        (90 * DAY - SECOND, "< 90 days"),
        (90 * DAY, "< 180 days"),
        (180 * DAY, "< 1 year"),
        (365 * DAY - SECOND, "< 1 year"),
        (365 * DAY, "< 2 years"),
        (730 * DAY, "< 5 years"),
        (1825 * DAY - SECOND, "< 5 years"),
        (1825 * DAY, "older"),
        (9999 * DAY, "older"),
    ],
)
def test_active_access_keys_are_counted_by_age(old: timedelta, name: str) -> None:
    inactive = key(old, status="Inactive")
    found = gaps(user("alice", key(old), inactive), owner_of(other(API_KEY, old)))
    assert dict(zip(KEY_AGES, found.active_key_ages, strict=True)) == {
        **dict.fromkeys(KEY_AGES, 0),
        name: 1,
    }
    one = assess(audited(user("alice", key(old)), owner_of(other(API_KEY, old))), plan(), NOW)
    assert sum(total_gaps([one, one]).active_key_ages) == 2


def test_production_is_searched_in_the_names_of_the_ous_too() -> None:
    account = dataclasses.replace(SANDBOX, ou="Workloads/Prod")
    assert is_production(account, plan().production)
    assert not is_production(
        dataclasses.replace(account, ou="Workloads/NonProd"), plan().production
    )


NEW_FINDINGS: dict[str, tuple[User, list[tuple[int, str]]]] = {
    "an API key that never expires": (
        owner_of(other(API_KEY)),
        [(2, "api-key-without-expiry")],
    ),
    "an API key that expires": (owner_of(other(API_KEY, expires=DAY)), [(3, "api-key")]),
    "an old API key that expires": (
        owner_of(other(API_KEY, 900 * DAY, expires=DAY)),
        [(3, "api-key")],
    ),
    "an inactive API key": (owner_of(other(API_KEY, status="Inactive")), []),
    "an expired API key": (owner_of(other(API_KEY, status="Expired")), []),
    "a password for a service": (owner_of(other(SERVICE_PASSWORD)), [(5, "service-password")]),
    "an inactive one": (owner_of(other(SERVICE_PASSWORD, status="Inactive")), []),
    "a certificate": (owner_of(other(SIGNING_CERTIFICATE)), [(5, "signing-certificate")]),
    "an inactive certificate": (owner_of(other(SIGNING_CERTIFICATE, status="Inactive")), []),
    "root's certificate": (
        owner_of(other(SIGNING_CERTIFICATE), name=ROOT),
        [(2, "root-signing-certificate")],
    ),
    "root's inactive certificate": (
        owner_of(other(SIGNING_CERTIFICATE, status="Inactive"), name=ROOT),
        [],
    ),
    "an exposed user": (
        dataclasses.replace(user("alice"), exposed=True),
        [(1, "exposed-credential")],
    ),
    "an exposed user without MFA": (
        dataclasses.replace(user("alice", password=True), exposed=True),
        [(1, "exposed-credential"), (4, "console-without-mfa")],
    ),
    "two active keys of 30 days and a second": (
        user("alice", key(31 * DAY, key_id="A"), key(30 * DAY + SECOND, key_id="B")),
        [(6, "two-active-keys")],
    ),
    "two active keys, one of 30 days": (
        user("alice", key(80 * DAY, key_id="A"), key(30 * DAY, key_id="B")),
        [],
    ),
    "two old keys, one inactive": (
        user("alice", key(80 * DAY, key_id="A"), key(80 * DAY, status="Inactive", key_id="B")),
        [(7, "inactive-key")],
    ),
    "two active keys of root": (
        user(ROOT, key(80 * DAY, key_id="A"), key(80 * DAY, key_id="B")),
        [(1, "root-access-key"), (1, "root-access-key")],
    ),
}


@pytest.mark.parametrize(("one", "expected"), NEW_FINDINGS.values(), ids=NEW_FINDINGS)
def test_what_is_found_about_other_credentials(one: User, expected: list[tuple[int, str]]) -> None:
    found = found_in(one)
    assert [(each.priority, each.finding) for each in found] == expected
    for each in found:
        about_user = each.finding in (
            "exposed-credential",
            "two-active-keys",
            "console-without-mfa",
        )
        assert (each.key is None) == about_user


def signed_in(used: timedelta | None, changed: timedelta | None, *, name: str = "alice") -> User:
    """A console user with MFA, by when they last signed in and last changed the password."""
    return User(
        name,
        True,
        None if used is None else NOW - used,
        ("Virtual",),
        (),
        password_changed=None if changed is None else NOW - changed,
    )


@pytest.mark.parametrize(
    ("one", "max_unused", "unused"),
    [
        (signed_in(90 * DAY, 900 * DAY), 90, False),
        (signed_in(90 * DAY + SECOND, 900 * DAY), 90, True),
        (signed_in(90 * DAY + SECOND, None), 90, True),
        (signed_in(90 * DAY + SECOND, DAY), 90, True),  # what counts is the last use
        (signed_in(45 * DAY, DAY), 45, False),
        (signed_in(45 * DAY + SECOND, DAY), 45, True),
        (signed_in(None, 90 * DAY), 90, False),
        (signed_in(None, 90 * DAY + SECOND), 90, True),
        (signed_in(None, None), 1, False),  # nobody knows since when
        (signed_in(900 * DAY, 900 * DAY, name=ROOT), 90, False),
        (user("alice"), 1, False),
    ],
)
def test_a_password_is_unused_by_its_last_use_or_else_its_last_change(
    one: User, max_unused: int, unused: bool
) -> None:
    found = found_in(one, under=with_days(max_unused))
    assert [(each.priority, each.finding) for each in found] == (
        [(5, "unused-password")] if unused else []
    )
    if unused:
        assert reasons_of(found[0], with_days(max_unused)) == [f"not used for {max_unused} days"]


def test_a_password_is_one_finding_whatever_is_wrong_with_it() -> None:
    one = dataclasses.replace(signed_in(None, 91 * DAY), mfa=())
    (found,) = found_in(one)
    assert (found.priority, found.finding) == (4, "console-without-mfa")
    assert reasons_of(found, plan()) == ["console user without MFA", "not used for 90 days"]


@pytest.mark.parametrize(
    ("one", "max_unused", "unused"),
    [
        (key(45 * DAY), 45, False),
        (key(45 * DAY + SECOND), 45, True),
        (key(60 * DAY, 45 * DAY), 45, False),
        (key(60 * DAY, 45 * DAY + SECOND), 45, True),
        (key(200 * DAY, 150 * DAY), 180, False),
        (key(200 * DAY), 180, True),
    ],
)
def test_max_unused_decides_which_keys_are_unused(
    one: Credential, max_unused: int, unused: bool
) -> None:
    found = found_in(user("alice", one), under=with_days(max_unused, 365))
    assert [each.finding for each in found] == (["unused-key"] if unused else [])


def test_administrators_come_before_others_and_production_before_both() -> None:
    names = {"alice": "false", "bob": "true", "carol": "unknown"}
    users = [
        dataclasses.replace(user(name, key(400 * DAY, key_id=name)), administrator=word)
        for name, word in names.items()
    ]
    found = [*found_in(*users), *found_in(users[0], account=PAYMENTS)]
    order = [(each.account.name, each.user) for each in sorted(found, key=most_urgent_first)]
    assert order == [
        ("payments-prod", "alice"),
        ("sandbox", "bob"),
        ("sandbox", "alice"),
        ("sandbox", "carol"),
    ]


def test_the_age_of_a_password_is_that_of_its_last_change() -> None:
    """Within a priority the oldest comes first, be it a key or a password; what has no date comes last."""
    users = [
        signed_in(100 * DAY, None, name="a"),
        signed_in(100 * DAY, 100 * DAY, name="b"),
        signed_in(100 * DAY, 900 * DAY, name="c"),
        user("d", key(100 * DAY)),
    ]
    assert [each.user for each in found_in(*users)] == ["c", "b", "d", "a"]


# --- controls ---------------------------------------------------------------------------------------------------------

CONTROLS: dict[str, tuple[User, Plan, str]] = {
    "a user without MFA": (
        user("alice", password=True),
        plan(),
        "CIS 5.0: 1.9; Security Hub: IAM.5, IAM.19",
    ),
    "root without MFA": (user(ROOT, password=True), plan(), "CIS 5.0: 1.4; Security Hub: IAM.9"),
    "root's key": (user(ROOT, key(900 * DAY)), plan(), "CIS 5.0: 1.3; Security Hub: IAM.4"),
    "root's inactive key": (
        user(ROOT, key(DAY, status="Inactive")),
        plan(),
        "CIS 5.0: 1.3; Security Hub: IAM.4",
    ),
    "an old key": (
        user("alice", key(91 * DAY, 60 * DAY)),
        plan(),
        "CIS 5.0: 1.13; Security Hub: IAM.3",
    ),
    "a key older than another limit": (
        user("alice", key(91 * DAY, 60 * DAY)),
        with_days(90, 89),
        "",
    ),
    "a key older than a year": (
        user("alice", key(400 * DAY, 60 * DAY)),
        plan(),
        "CIS 5.0: 1.13; Security Hub: IAM.3",
    ),
    "a key older than a year under another limit": (
        user("alice", key(400 * DAY, 60 * DAY)),
        with_days(90, 91),
        "",
    ),
    "an old key in use": (
        user("alice", key(91 * DAY, DAY)),
        plan(),
        "CIS 5.0: 1.13; Security Hub: IAM.3",
    ),
    "an unused key": (
        user("alice", key(95 * DAY)),
        with_days(90, 365),
        "CIS 5.0: 1.11; Security Hub: IAM.8",
    ),
    "an unused key at 45 days": (
        user("alice", key(95 * DAY)),
        with_days(45, 365),
        "CIS 5.0: 1.11; Security Hub: IAM.22",
    ),
    "an unused key at 60 days": (user("alice", key(95 * DAY)), with_days(60, 365), "CIS 5.0: 1.11"),
    "an unused key at 44 days": (user("alice", key(95 * DAY)), with_days(44, 365), ""),
    "an unused password": (
        signed_in(95 * DAY, None),
        plan(),
        "CIS 5.0: 1.11; Security Hub: IAM.8",
    ),
    "an old and unused key": (
        user("alice", key(95 * DAY)),
        plan(),
        "CIS 5.0: 1.11, 1.13; Security Hub: IAM.8, IAM.3",
    ),
    "an inactive key": (user("alice", key(DAY, status="Inactive")), plan(), ""),
    "an API key": (owner_of(other(API_KEY)), plan(), ""),
}


@pytest.mark.parametrize(("one", "under", "expected"), CONTROLS.values(), ids=CONTROLS)
def test_the_controls_of_a_finding(one: User, under: Plan, expected: str) -> None:
    (found,) = found_in(one, under=under)
    assert controls_of(found, under) == expected


def test_the_control_of_two_active_keys() -> None:
    (found,) = found_in(user("alice", key(40 * DAY), key(40 * DAY)))
    assert controls_of(found, plan()) == "CIS 5.0: 1.12"


# --- rows and advice for other credentials ----------------------------------------------------------------------------


def test_the_row_of_an_api_key_says_nothing_of_its_last_use() -> None:
    (row,) = rows(audited(owner_of(other(API_KEY, 100 * DAY))))
    assert row["access_key_id"] == "ACCA0000000000000001"
    assert (row["age_days"], row["last_used_date"]) == ("100", "")
    assert (row["service_name"], row["older_than_max_age"]) == ("bedrock.amazonaws.com", "true")


def test_the_row_of_a_user_without_password_has_no_last_use() -> None:
    (row,) = rows(audited(dataclasses.replace(user("alice"), exposed=True)))
    assert (row["access_key_id"], row["last_used_date"], row["service_name"]) == ("N/A",) * 3


@pytest.mark.parametrize("name", ["alice", "-x", "smith,-john", "a b", "$(touch pwned)"])
def test_the_commands_for_other_credentials_take_the_name_as_it_is(shell: Shell, name: str) -> None:
    service_specific = "service-specific-credential"
    cases = {
        API_KEY: ["update-" + service_specific, "delete-" + service_specific],
        SERVICE_PASSWORD: ["update-" + service_specific, "delete-" + service_specific],
        SIGNING_CERTIFICATE: [
            "list-signing-certificates",
            "update-signing-certificate",
            "delete-signing-certificate",
        ],
    }
    for kind, commands in cases.items():
        certificate = kind == SIGNING_CERTIFICATE
        one = other(kind, credential_id=CERTIFICATES[0] if certificate else "ACCA 1")
        cell = only_row(audited(owner_of(one, name=name)))["recommendation"]
        assert neutral(cell) == cell
        words = [shell(command) for command in re.findall(r"`(aws [^`]*)`", cell)]
        assert [each[1] for each in words] == commands
        for _, operation, *arguments in words:
            given = dict(each.removeprefix("--").split("=", 1) for each in arguments)
            assert given.pop("user-name") == name
            expected = (
                {"certificate-id": "ID"} if certificate else {f"{service_specific}-id": "ACCA 1"}
            )
            if operation.startswith("update"):
                expected["status"] = "Inactive"
            assert given == (expected if not operation.startswith("list") else {})


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (dataclasses.replace(user("a b"), exposed=True), ["list-access-keys", "update-access-key"]),
        (user("a b", key(40 * DAY), key(40 * DAY)), ["list-access-keys", "update-access-key"]),
        (signed_in(91 * DAY, None, name="a b"), ["delete-login-profile"]),
    ],
    ids=["exposed", "two keys", "unused password"],
)
def test_the_commands_for_a_user(shell: Shell, one: User, expected: list[str]) -> None:
    cell = only_row(audited(one))["recommendation"]
    words = [shell(command) for command in re.findall(r"`(aws [^`]*)`", cell)]
    assert [each[1] for each in words] == expected
    assert all("--user-name=a b" in each for each in words)
    assert SANDBOX.id in cell


def test_an_exposed_user_is_sent_to_awss_support_case_and_cloudtrail() -> None:
    """AWS says of the policy: do not remove it, follow the instructions of the support case."""
    cell = only_row(audited(dataclasses.replace(user("alice"), exposed=True)))["recommendation"]
    assert re.search("support case.*CloudTrail.*only then detach", cell)


def test_roots_certificate_is_deleted_with_assume_root_or_by_root(shell: Shell) -> None:
    one = owner_of(other(SIGNING_CERTIFICATE, credential_id=CERTIFICATES[0]), name=ROOT)
    cell = only_row(audited(one))["recommendation"]
    words = [shell(command)[:2] for command in re.findall(r"`(aws [^`]*)`", cell)]
    assert words == [
        ["sts", "assume-root"],
        ["iam", "list-signing-certificates"],
        ["iam", "delete-signing-certificate"],
    ]
    management = Account(MANAGEMENT, "management", "ACTIVE")
    cell = only_row(audited(one, account=management))["recommendation"]
    assert re.match("Sign in as root .* and delete the signing certificate", cell)


def test_every_rule_can_be_written_out() -> None:
    """No advice or reason has a placeholder that is not filled in, and each priority is one of 1 to 7."""
    words = dict.fromkeys(["name", "user", "key", "account", "kind", "partition"], "x")
    days = dict.fromkeys(["max_key_age", "max_unused", "status"], "x")
    for rule in RULES:
        assert "{" not in rule.advice.format(**words) + rule.reason.format(**days)
        assert 1 <= rule.priority <= 7


# --- credentials.csv --------------------------------------------------------------------------------------------------


def test_credentials_csv_has_these_columns() -> None:
    assert ",".join(CREDENTIALS_COLUMNS) == (
        "account_id,account_name,account_email,ou,production,username,owner,administrator,kind,credential_id,"
        "status,created_date,age_days,last_used_date,unused_days,service_name,expires,mfa_status"
    )


def cells_of(*users: User) -> list[list[str]]:
    """The cells of an account's rows of credentials.csv from `kind` on."""
    found = [*credential_rows(audited(*users), plan(), NOW)]
    assert all(len(row) == len(CREDENTIALS_COLUMNS) for row in found)
    return [[*row[8:]] for row in found]


DATES = {days: (NOW - days * DAY).isoformat() for days in (1, 10, 100)}
CREDENTIAL_CELLS: dict[str, tuple[User, str]] = {
    "a password": (
        signed_in(10 * DAY, 100 * DAY),
        f"password||Configurada|{DATES[100]}|100|{DATES[10]}|10|||Virtual",
    ),
    "a password never used": (
        signed_in(None, 100 * DAY),
        f"password||Configurada|{DATES[100]}|100|Nunca|100|||Virtual",
    ),
    "a password of which little is known": (
        signed_in(None, None),
        "password||Configurada|||Nunca||||Virtual",
    ),
    "root's password without a date": (
        User(ROOT, True, NOW - 10 * DAY, (), ()),
        f"password||Configurada|||{DATES[10]}|10|||None",
    ),
    "an access key": (
        user("alice", key(100 * DAY, 10 * DAY), mfa=["Hardware", "Virtual"]),
        f"access-key|AKIA0000000000000001|Active|{DATES[100]}|100|{DATES[10]}|10|s3||Hardware+Virtual",
    ),
    "an access key never used": (
        user("alice", key(100 * DAY, status="Inactive")),
        f"access-key|AKIA0000000000000001|Inactive|{DATES[100]}|100|Nunca utilizada|100|N/A||None",
    ),
    "an API key that never expires": (
        owner_of(other(API_KEY, 100 * DAY)),
        f"api-key|ACCA0000000000000001|Active|{DATES[100]}|100|||bedrock.amazonaws.com|never|None",
    ),
    "an API key that has expired": (
        owner_of(other(API_KEY, 100 * DAY, status="Expired", expires=-10 * DAY)),
        f"api-key|ACCA0000000000000001|Expired|{DATES[100]}|100|||bedrock.amazonaws.com|{DATES[10]}|None",
    ),
    "a password for a service": (
        owner_of(other(SERVICE_PASSWORD, DAY)),
        f"service-password|ACCA0000000000000001|Active|{DATES[1]}|1|||bedrock.amazonaws.com|never|None",
    ),
    "a certificate": (
        owner_of(Credential(CERTIFICATES[1], "Inactive", NOW - DAY, None, "", SIGNING_CERTIFICATE)),
        f"signing-certificate|<signing_certificate_2>|Inactive|{DATES[1]}|1|||||None",
    ),
}


@pytest.mark.parametrize(("one", "expected"), CREDENTIAL_CELLS.values(), ids=CREDENTIAL_CELLS)
def test_the_row_of_a_credential(one: User, expected: str) -> None:
    assert ["|".join(cells) for cells in cells_of(one)] == [expected]


def test_a_row_of_credentials_csv_says_whose_it_is() -> None:
    account = dataclasses.replace(SANDBOX, email="team@example.com", ou="Workloads/Prod")
    alice = dataclasses.replace(user("alice", key(DAY)), owner="payments", administrator="true")
    ((*whose, _kind),) = [
        row[:9] for row in credential_rows(audited(alice, account=account), plan(), NOW)
    ]
    assert whose == [
        *(SANDBOX.id, "sandbox", "team@example.com", "Workloads/Prod", "true"),
        *("alice", "payments", "true"),
    ]


def test_the_rows_of_an_account_come_by_user_and_kind() -> None:
    alice = dataclasses.replace(
        user("alice", key(2 * DAY, key_id="A1"), key(DAY, key_id="A2"), password=True),
        others=(
            other(API_KEY, credential_id="P1"),
            other(SERVICE_PASSWORD, credential_id="S1"),
            other(SIGNING_CERTIFICATE, credential_id="C1"),
        ),
    )
    found = cells_of(user(ROOT, password=True), alice, user("nobody"))
    assert [(kind, one_id) for kind, one_id, *_ in found] == [
        *(("password", ""), ("password", ""), (ACCESS_KEY, "A1"), (ACCESS_KEY, "A2")),
        *((API_KEY, "P1"), (SERVICE_PASSWORD, "S1"), (SIGNING_CERTIFICATE, "C1")),
    ]


# --- exceptions -------------------------------------------------------------------------------------------------------

HEADER = "account_id,username,credential_id,finding,until,reason\n"
A_ROW = f"{SANDBOX.id},alice,AKIA0000000000000001,key-in-use,2026-12-31,moved in May\n"


def test_a_file_of_exceptions_is_read() -> None:
    """Also as spreadsheets save it: CRLF, quotes, our own apostrophe, empty rows at the end."""
    text = HEADER + '*,*,*,*,2026-11-23,"one,\ntwo"\n' + A_ROW
    text += "*,'=cmd,N/A,unused-password,2027-01-01, later \n,,,,,\n\n"
    for each in (text, text.replace("\n", "\r\n")):
        first, second, third = parse_exceptions(each)
        assert first[:5] == ("*", "*", "*", "*", date(2026, 11, 23))
        assert first.reason.split() == ["one,", "two"]
        assert second == KnownException(
            SANDBOX.id,
            "alice",
            "AKIA0000000000000001",
            "key-in-use",
            date(2026, 12, 31),
            "moved in May",
            4,
        )
        assert (third.username, third.reason, third.line) == ("=cmd", "later", 5)


def test_a_file_of_exceptions_may_have_none() -> None:
    assert parse_exceptions(HEADER) == ()
    assert parse_exceptions(HEADER.strip()) == ()


@pytest.mark.parametrize(
    ("text", "line", "cell"),
    [
        ("", 1, "''"),
        ("\n" + HEADER, 1, "''"),
        (A_ROW, 1, SANDBOX.id),
        (HEADER.replace(",", ";"), 1, "account_id;username"),
        (HEADER.replace("until,reason", "reason,until"), 1, "reason,until"),
        (HEADER.replace("reason\n", "reason,ticket\n"), 1, "ticket"),
        (HEADER + A_ROW.replace(SANDBOX.id, "11111111111"), 2, "account_id '11111111111'"),
        (HEADER + A_ROW.replace(SANDBOX.id, "1111-1111-1111"), 2, "1111-1111-1111"),
        (HEADER + A_ROW.replace(SANDBOX.id, "\u0661" * 12), 2, "account_id"),
        (HEADER + A_ROW.replace(SANDBOX.id, ""), 2, "account_id ''"),
        (HEADER + A_ROW.replace("alice", ""), 2, "username ''"),
        (HEADER + A_ROW.replace("AKIA0000000000000001", " "), 2, "credential_id ' '"),
        (HEADER + A_ROW + A_ROW.replace("key-in-use", "key-in-us"), 3, "finding 'key-in-us'"),
        (HEADER + A_ROW.replace("2026-12-31", ""), 2, "until ''"),
        (HEADER + A_ROW.replace("2026-12-31", "31.12.2026"), 2, "until '31.12.2026'"),
        (HEADER + A_ROW.replace("2026-12-31", "20261231"), 2, "until '20261231'"),
        (HEADER + A_ROW.replace("2026-12-31", "2026-02-30"), 2, "until '2026-02-30'"),
        (HEADER + A_ROW.replace("2026-12-31", "2026-12-31T00:00"), 2, "until"),
        (HEADER + A_ROW.replace("moved in May", "  "), 2, "reason '  '"),
        (HEADER + A_ROW.replace(",moved in May", ""), 2, "5 cells"),
        (HEADER + A_ROW.replace("moved", "moved,"), 2, "7 cells"),
        (HEADER + '*,*,*,*,2026-12-31,"one\ntwo"\n' + A_ROW.replace("alice", ""), 4, "username"),
        (HEADER + A_ROW + '*,*,*,*,2026-12-31,"open\n', 3, ""),
        (HEADER + A_ROW + '*,"a"b,*,*,2026-12-31,x\n', 3, ""),
    ],
)
def test_a_malformed_file_of_exceptions_is_refused(text: str, line: int, cell: str) -> None:
    with pytest.raises(AuditError, match=rf"^line {line}: ") as raised:
        parse_exceptions(text)
    assert cell in str(raised.value)


def excepting(*lines: str, **cells: str) -> Plan:
    """A plan with these rows of exceptions; `cells` make one that covers all but for them."""
    columns = HEADER.strip().split(",")
    default = dict.fromkeys(columns, "*") | {"until": "2026-12-31", "reason": "known"} | cells
    text = HEADER + "".join(lines or [",".join(default[each] for each in columns)])
    return dataclasses.replace(plan(), exceptions=parse_exceptions(text))


OLD_KEY = user("alice", key(400 * DAY))


@pytest.mark.parametrize(
    ("cells", "one", "covered"),
    [
        ({}, OLD_KEY, True),
        ({"account_id": SANDBOX.id}, OLD_KEY, True),
        ({"account_id": PAYMENTS.id}, OLD_KEY, False),
        ({"username": "alice"}, OLD_KEY, True),
        ({"username": "alic"}, OLD_KEY, False),
        ({"username": "Alice"}, OLD_KEY, False),
        ({"credential_id": "AKIA0000000000000001"}, OLD_KEY, True),
        ({"credential_id": "AKIA0000000000000002"}, OLD_KEY, False),
        ({"credential_id": "N/A"}, OLD_KEY, False),
        ({"finding": "key-older-than-1-year"}, OLD_KEY, True),
        ({"finding": "unused-key"}, OLD_KEY, False),  # a reason, not its name
        ({"credential_id": "N/A"}, user("alice", password=True), True),
        ({"finding": "console-without-mfa"}, user("alice", password=True), True),
        ({"until": "2026-11-23"}, OLD_KEY, True),  # this very day
        ({"until": "2026-11-22"}, OLD_KEY, False),
        (
            {"credential_id": CERTIFICATES[0]},
            owner_of(other(SIGNING_CERTIFICATE, credential_id=CERTIFICATES[0])),
            True,
        ),
    ],
)
def test_what_an_exception_covers(cells: dict[str, str], one: User, covered: bool) -> None:
    under = excepting(**cells)
    (found,) = found_in(one, under=under)
    assert found.exception == (under.exceptions[0] if covered else None)


def test_the_last_day_of_an_exception_is_one_in_utc() -> None:
    under = excepting(until="2026-11-23")
    midnight = NOW.replace(hour=0, minute=0)
    for moment, covered in ((midnight + DAY - SECOND, True), (midnight + DAY, False)):
        (found,) = findings_of(audited(OLD_KEY), under, moment)
        assert (found.exception is not None) is covered


def test_of_several_exceptions_the_one_that_lasts_longest_covers() -> None:
    """Otherwise one would be called unused that will be needed."""
    days = ["2026-11-30", "2027-11-30", "2025-11-30", "2027-01-01"]
    under = excepting(*(f"*,*,*,*,{day},until {day}\n" for day in days))
    (found,) = found_in(OLD_KEY, under=under)
    assert found.exception == under.exceptions[1]


def test_what_is_covered_goes_to_the_end_and_changes_neither_gaps_nor_levels() -> None:
    users = [user("alice", key(400 * DAY, key_id="A")), user("bob", key(DAY, status="Inactive"))]
    under = excepting(username="alice", reason="=1+1")
    assert [each.user for each in found_in(*users)] == ["alice", "bob"]
    found = found_in(*users, under=under)
    assert [each.user for each in found] == ["bob", "alice"]
    assert assess(audited(*users), under, NOW) == assess(audited(*users), plan(), NOW)
    run = dataclasses.replace(run_of([]), plan=under)
    cells = [dict(zip(FINDINGS_COLUMNS, finding_row(each, run), strict=True)) for each in found]
    assert [(one["exception"], one["until"]) for one in cells] == [("", ""), ("=1+1", "2026-12-31")]


def test_what_is_covered_does_not_count_for_fail_on() -> None:
    covered = run_of([audited(OLD_KEY)])
    (found,) = found_in(OLD_KEY, under=excepting())
    fail_on = FailOn(7)
    assert exit_code(covered, fail_on) == 4
    covered.findings = [found]
    assert exit_code(covered, fail_on) == 0


@settings(max_examples=200)
@given(st.text(st.sampled_from(["*", ",", "\n", '"', "\r", "1", "a", ";", "\ufeff", "\x00"])))
def test_any_file_of_exceptions_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(AuditError):
        parse_exceptions(HEADER + text)


# --- properties -----------------------------------------------------------------------------------------------------


def all_users(outcomes: Iterable[Outcome]) -> list[tuple[Account, User]]:
    return [
        (one.account, each)
        for one in outcomes
        if isinstance(one, AuditedAccount)
        for each in one.users
    ]


def all_keys(outcomes: Iterable[Outcome]) -> list[tuple[Account, User, Credential]]:
    return [(account, one, each) for account, one in all_users(outcomes) for each in one.keys]


@settings(max_examples=60)
@given(organizations())
def test_totals_count_what_is_there_and_are_the_sum_over_accounts(outcomes: list[Outcome]) -> None:
    found = run_of(outcomes)
    total, users, keys = total_gaps(found.audited), all_users(outcomes), all_keys(outcomes)
    active = [each for _, _, each in keys if each.status == "Active"]
    for name in GAP_COUNTS:
        assert getattr(total, name) == sum(getattr(one.gaps, name) for one in found.audited)
    assert total.console_users == sum(one.password for _, one in users)
    assert total.console_users_without_mfa == sum(
        one.password and one.mfa == () for _, one in users
    )
    assert (
        total.access_keys
        == len(keys)
        == total.active_keys + total.inactive_keys + total.expired_keys
    )
    assert total.active_keys == len(active)
    assert total.active_keys_never_used == sum(one.last_used is None for one in active)
    assert total.active_keys_older_than_max_age == sum(
        one.created < NOW - 90 * DAY for one in active
    )
    assert total.active_keys_older_than_1_year == sum(
        one.created < NOW - 365 * DAY for one in active
    )
    assert total.root_access_keys == sum(one.name == ROOT for _, one, _ in keys)
    oldest = total.oldest_active_key
    assert (oldest.created if oldest else None) == min(
        (one.created for one in active), default=None
    )
    assert sum(one.users for one in found.audited) == sum(one.name != ROOT for _, one in users)


@settings(max_examples=60)
@given(organizations())
def test_every_gap_is_found_once_and_nothing_else_is(outcomes: list[Outcome]) -> None:
    found = run_of(outcomes).findings
    passwords = [one for one in found if one.finding == "console-without-mfa"]
    users = Counter((one.account.id, one.user) for one in passwords)
    pairs = {(one.account.id, one.user) for one in found if one.finding == "two-active-keys"}
    keys = Counter(one.key.id for one in found if one.key is not None)
    assert users == Counter(
        (account.id, one.name)
        for account, one in all_users(outcomes)
        if one.password and not one.mfa
    )
    assert pairs == {
        (account.id, one.name)
        for account, one in all_users(outcomes)
        if one.name != ROOT
        and len([each for each in one.keys if each.status == "Active"]) == 2
        and all(NOW - each.created > 30 * DAY for each in one.keys)
    }
    assert len(found) == len(passwords) + len(pairs) + len(keys)
    assert all(number == 1 for number in keys.values())
    harmless = {
        each.id
        for _, one, each in all_keys(outcomes)
        if one.name != ROOT
        and each.status == "Active"
        and NOW - each.created <= 90 * DAY
        and (each.last_used is None or NOW - each.last_used > 30 * DAY)
    }
    assert set(keys) == {each.id for _, _, each in all_keys(outcomes)} - harmless


def levels_of(outcomes: Iterable[Outcome]) -> dict[str, tuple[int, int]]:
    """Both phases' levels, as ranks, of each account and of the organization (under the key "")."""
    found = run_of(outcomes)

    def ranks(of_account: Callable[[AccountFigures], str]) -> dict[str, int]:
        names = {one.account.id: of_account(one) for one in found.audited}
        names[""] = organization_level(list(names.values()), len(found.failed))
        return {who: LEVELS.index(level) for who, level in names.items()}

    first, second = ranks(lambda one: one.phase1), ranks(lambda one: one.phase2)
    return {who: (first[who], second[who]) for who in first}


GAPS_TO_ADD = [
    user("zoe", password=True),
    user("zoe", key(91 * DAY)),
    user("zoe", key(DAY)),
    user("zoe", key(400 * DAY, DAY), key(DAY, DAY), password=True),
]


@settings(max_examples=60)
@given(organizations(), st.sampled_from(GAPS_TO_ADD), st.data())
def test_adding_a_gap_never_raises_a_level(
    outcomes: list[Outcome], gap: User, data: st.DataObject
) -> None:
    places = [index for index, one in enumerate(outcomes) if isinstance(one, AuditedAccount)]
    more = list(outcomes)
    if places:
        index = data.draw(st.sampled_from(places))
        place = outcomes[index]
        assert isinstance(place, AuditedAccount)
        more[index] = dataclasses.replace(place, users=(*place.users, gap))
    else:
        more.append(failed())
    before, after = levels_of(outcomes), levels_of(more)
    assert all(
        now <= then for who in before for now, then in zip(after[who], before[who], strict=True)
    )


@settings(max_examples=60)
@given(organizations(), st.data())
def test_an_account_that_fails_never_raises_the_organizations_level(
    outcomes: list[Outcome], data: st.DataObject
) -> None:
    before = levels_of(outcomes)[""]
    assert all(
        now <= then for now, then in zip(levels_of([*outcomes, failed()])[""], before, strict=True)
    )
    if outcomes:
        index = data.draw(st.integers(0, len(outcomes) - 1))
        account = outcomes[index].account
        if not isinstance(outcomes[index], SkippedAccount):
            outcomes[index] = failed(account.id, account.name)
            assert all(
                now <= then for now, then in zip(levels_of(outcomes)[""], before, strict=True)
            )


@settings(max_examples=60)
@given(organizations(), st.integers(1, 1000))
def test_a_longer_max_key_age_never_finds_more(outcomes: list[Outcome], days: int) -> None:
    strict, lax = (run_of(outcomes, "--max-key-age", str(number)) for number in (days, days + 1))
    for name in GAP_COUNTS:
        assert getattr(total_gaps(lax.audited), name) <= getattr(total_gaps(strict.audited), name)
    assert len(lax.findings) <= len(strict.findings)
    old = {
        one.id
        for _, _, one in all_keys(outcomes)
        if one.status == "Active" and NOW - one.created > days * DAY
    }
    assert old <= {one.key.id for one in strict.findings if one.key}

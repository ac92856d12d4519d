"""Assess, from users and keys to gaps, levels and findings: tables of cases for every rule and every boundary.

All of it is pure, so the clock stands still here.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
import shlex
import stat
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

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

from iam_audit import (
    ADVANCED,
    COMPLETE,
    FINDINGS_COLUMNS,
    GAP_COUNTS,
    IN_PROGRESS,
    LEVELS,
    NOT_STARTED,
    ROOT,
    Account,
    AccountFigures,
    AuditedAccount,
    Caller,
    Credential,
    Finding,
    Gaps,
    OldestKey,
    Outcome,
    SkippedAccount,
    User,
    assess,
    finding_row,
    findings_of,
    is_production,
    most_urgent_first,
    neutral,
    organization_level,
    phase1_level,
    reasons_of,
    recommendation,
    total_gaps,
)


def gaps(*users: User, arguments: Sequence[str] = ()) -> Gaps:
    return assess(audited(*users), plan(*arguments), NOW).gaps


def counted(found: Gaps) -> dict[str, int]:
    """The figures that are not zero."""
    return {name: number for name in GAP_COUNTS if (number := getattr(found, name))}


def findings(one: AuditedAccount, *arguments: str) -> list[Finding]:
    return sorted(findings_of(one, plan(*arguments), NOW), key=most_urgent_first)


# --- production -------------------------------------------------------------------------------------------------------

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


# --- gaps -------------------------------------------------------------------------------------------------------------

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


# --- maturity ---------------------------------------------------------------------------------------------------------

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


def test_phase_1_is_advanced_only_where_a_policy_prevents_the_gap_too() -> None:
    assert phase1_level(Gaps(console_users=2), True) == ADVANCED
    assert phase1_level(Gaps(console_users=2, console_users_without_mfa=1), True) == IN_PROGRESS


def test_the_order_of_the_levels_is_the_models() -> None:
    assert LEVELS == ("Not Started", "In Progress", "Complete", "Advanced")


# --- findings ---------------------------------------------------------------------------------------------------------

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
    return Finding(
        priority, "x", Account(account_id, "x", "ACTIVE"), production, name, one, None, ()
    )


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
        "service_name,reasons,recommendation"
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
    }


def test_the_row_of_a_user_says_that_no_key_is_meant() -> None:
    (row,) = rows(audited(User("alice", True, NOW - DAY, (), ())))
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


# --- recommendations --------------------------------------------------------------------------------------------------

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


def test_the_recommendation_is_the_rows_last_cell() -> None:
    found = run_of([audited(user("alice", key(91 * DAY)))])
    assert finding_row(found.findings[0], found)[-1] == recommendation(found.findings[0], found)


# --- properties -------------------------------------------------------------------------------------------------------


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
    users = Counter((one.account.id, one.user) for one in found if one.key is None)
    keys = Counter(one.key.id for one in found if one.key is not None)
    assert users == Counter(
        (account.id, one.name)
        for account, one in all_users(outcomes)
        if one.password and not one.mfa
    )
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

"""Track: what changed between two runs, and what CloudTrail says of it.

The program runs twice as a process, against an organization that changes in between. `story` is the one run over all
kinds of change, witness and account; its events and users stand in a table of cases, one case a user.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import TIMEOUT, Program, Result, Serve, check_what_always_holds, screen
from endpoint import (
    ACCOUNT_DEFAULTS,
    Endpoint,
    Json,
    account,
    credential_report,
    event,
    key,
    root,
    root_key,
    rule,
    user,
    world,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from organization import (
    AccountSpec,
    KeySpec,
    MotoServer,
    UserSpec,
    fill,
    iam_client,
    organizations_client,
)

import iam_audit
from iam_audit import Change, Event, KeyState, Trail, UserState

ONE, TWO, THREE, FOUR, FIVE, SIX = (digit * 12 for digit in "123456")
SEVEN, EIGHT, NINE, TEN, ELEVEN, TWELVE = (f"{prefix}{'0' * 10}" for prefix in ("70", "80", "90", "10", "11", "12"))
BUSY, DAMAGED, MANAGEMENT = "130000000000", "140000000000", "999999999999"

NOW = datetime.now(timezone.utc).replace(microsecond=0)
EARLIER = NOW - timedelta(days=10)
ALICE = "arn:aws:sts::999999999999:assumed-role/Admin/alice"
# Text from strangers: formulas for a spreadsheet, control sequences for a terminal.
MALLORY = "arn:aws:sts::999999999999:assumed-role/=cmd/\x1b[31mmallory"
AGENT = '=HYPERLINK("http://203.0.113.9")\x1b]0;owned\x07'
HOSTILE_NAME = "=pay\x1b[2Jments"


def ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def key_id(text: str) -> str:
    return f"AKIA{text:0>16}"


def mfa(name: str) -> str:
    return f"arn:aws:iam::{ONE}:mfa/{name}"


def lines(path: Path) -> list[str]:
    """A CSV as it is, its cells joined by `|`."""
    with path.open(encoding="utf-8", newline="") as file:
        return ["|".join(row) for row in csv.reader(file, strict=True)]


def changes(result: Result) -> list[str]:
    """changes.csv without its header."""
    header, *rows = lines(result.folder / "changes.csv")
    named = "account_id|account_name|username|access_key_id|change|before|after"
    assert header == f"{named}|witness|event_name|event_time|actor|source_ip"
    return rows


def changes_of(result: Result, account_id: str) -> list[str]:
    """An account's lines of changes.csv, from the user name on."""
    return [row.split("|", 2)[2] for row in changes(result) if row.startswith(account_id)]


def summary_of(result: Result) -> Json:
    assert result.summary is not None, result
    return result.summary


def backdate(folder: Path, started: datetime) -> None:
    """Make a run as old as that; what it found stays."""
    edit_summary(folder, started=started.isoformat())


def edit_summary(folder: Path, **changed: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changed}), "utf-8")


def again(program: Program, env: Mapping[str, str], reports: Path, *options: str) -> Result:
    """Run into a folder that holds earlier runs. The result shows the new run alone."""
    known = set(reports.iterdir())
    with program.start(env, *options, output_dir=reports) as (process, _):
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    view = reports.with_name(f"{reports.name}-{len(list(reports.parent.iterdir()))}")
    view.mkdir()
    for folder in set(reports.iterdir()) - known:
        shutil.copytree(folder, view / folder.name)
    result = Result(process.returncode, stdout, stderr, view)
    check_what_always_holds(result, env, verbose=False)
    return result


# --- the story: every kind of change, witness and account, in two runs ------------------------------------------------


class Case(NamedTuple):
    """A user in the earlier run and in this one (None: not there), the events, and the lines that come of it."""

    before: Json | None
    after: Json | None
    events: list[Json]
    rows: list[str]


def row(*cells: str, seen: Json | None = None) -> str:
    """A line of changes.csv from username to witness, and the rest by the witness's event."""
    if seen is None:
        return "|".join([*cells, "", "", "", ""])
    detail = seen["CloudTrailEvent"]
    when = detail["eventTime"].replace("Z", "+00:00")
    return "|".join([*cells, detail["eventName"], when, detail["userIdentity"]["arn"], detail["sourceIPAddress"]])


def key_cases() -> dict[str, Case]:
    """Access keys of users who are there all the time."""
    cases = {}
    hostile = {"actor": MALLORY, "user_agent": AGENT, "source_ip": "@SUM(1)"}
    made = event("CreateAccessKey", ago(1), user="key-created", key=key_id("CREATED"), **hostile)
    seen_safely = row("key-created", key_id("CREATED"), "access-key-created", "", "Active", "confirmed", seen=made)
    cases["key-created"] = Case(
        user("key-created"),
        user("key-created", keys=[key(key_id("CREATED"))]),
        [made],
        [seen_safely.replace("|@SUM", "|'@SUM")],
    )
    by_himself = event("DeleteAccessKey", ago(2), key=key_id("DELETED"), actor=f"arn:aws:iam::{ONE}:user/key-deleted")
    cases["key-deleted"] = Case(
        user("key-deleted", keys=[key(key_id("DELETED"))]),
        user("key-deleted"),
        [by_himself],
        [row("key-deleted", key_id("DELETED"), "access-key-deleted", "Active", "", "confirmed", seen=by_himself)],
    )
    switches = [("ON", "Active"), ("ON", "Inactive"), ("ON", "Active"), ("OFF", "Inactive"), ("OFF", "Inactive")]
    turns = [
        event("UpdateAccessKey", ago(9 - n), user="switched", key=key_id(which), status=status)
        for n, (which, status) in enumerate(switches)
    ]
    cases["switched"] = Case(
        user("switched", keys=[key(key_id("OFF")), key(key_id("ON"), status="Inactive")]),
        user("switched", keys=[key(key_id("OFF"), status="Inactive"), key(key_id("ON"))]),
        turns,
        [
            row("switched", key_id("ON"), "access-key-activated", "Inactive", "Active", "confirmed", seen=turns[2]),
            row("switched", key_id("OFF"), "access-key-deactivated", "Active", "Inactive", "confirmed", seen=turns[4]),
        ],
    )
    came = event("CreateAccessKey", ago(3), user="visitor", key=key_id("WENT"))
    went = event("DeleteAccessKey", ago(2.5), user="visitor", key=key_id("WENT"), actor=MALLORY)
    cases["visitor"] = Case(
        user("visitor"),
        user("visitor"),
        [came, went],
        [row("visitor", key_id("WENT"), "access-key-came-and-went", "", "", "confirmed", seen=went)],
    )
    used = {"created": "2024-01-01T00:00:00Z", "service": "sts"}
    cases["used"] = Case(
        user("used", password=True, mfa=[mfa("used")], keys=[key(key_id("USED"), **used)]),
        user(
            "used",
            password=True,
            password_last_used=ago(1),
            mfa=[mfa("used")],
            keys=[key(key_id("USED"), last_used=ago(1), **used)],
        ),
        [],
        [],
    )
    return cases


def sign_in_cases() -> dict[str, Case]:
    """Passwords and MFA devices of users who are there all the time."""
    cases = {}
    added = event("EnableMFADevice", ago(1.1), user="mfa-added", serial=mfa("mfa-added"))
    cases["mfa-added"] = Case(
        user("mfa-added", password=True),
        user("mfa-added", password=True, mfa=[mfa("mfa-added")]),
        [added],
        [row("mfa-added", "", "mfa-added", "None", "Virtual", "confirmed", seen=added)],
    )
    removed = event("DeactivateMFADevice", ago(1.2), user="mfa-removed", serial=mfa("mfa-removed"))
    cases["mfa-removed"] = Case(
        user("mfa-removed", password=True, mfa=[mfa("mfa-removed")]),
        user("mfa-removed", password=True),
        [removed],
        [row("mfa-removed", "", "mfa-removed", "Virtual", "None", "confirmed", seen=removed)],
    )
    off = event("DeactivateMFADevice", ago(1.4), user="mfa-changed", serial=mfa("mfa-changed"))
    on = event("EnableMFADevice", ago(1.3), user="mfa-changed", serial="GAHT12345678")
    cases["mfa-changed"] = Case(
        user("mfa-changed", password=True, mfa=[mfa("mfa-changed")]),
        user("mfa-changed", password=True, mfa=["GAHT12345678"]),
        [on, off],
        [row("mfa-changed", "", "mfa-changed", "Virtual", "Hardware", "confirmed", seen=on)],
    )
    enabled = event("CreateLoginProfile", ago(1.5), user="console-enabled")
    cases["console-enabled"] = Case(
        user("console-enabled"),
        user("console-enabled", password=True),
        [enabled],
        [row("console-enabled", "", "console-enabled", "No configurada", "Configurada", "confirmed", seen=enabled)],
    )
    disabled = event("DeleteLoginProfile", ago(1.6), user="console-disabled")
    cases["console-disabled"] = Case(
        user("console-disabled", password=True),
        user("console-disabled"),
        [disabled],
        [row("console-disabled", "", "console-disabled", "Configurada", "No configurada", "confirmed", seen=disabled)],
    )
    return cases


def user_cases() -> dict[str, Case]:
    """Users who came or went, with their keys."""
    cases = {}
    born = event("CreateUser", ago(1.7), user="user-created")
    key_born = event("CreateAccessKey", ago(1.65), user="user-created", key=key_id("BORN"))
    cases["user-created"] = Case(
        None,
        user("user-created", password=True, keys=[key(key_id("BORN"))]),
        [born, key_born],
        [
            row("user-created", "", "user-created", "", "", "confirmed", seen=born),
            row("user-created", key_id("BORN"), "access-key-created", "", "Active", "confirmed", seen=key_born),
        ],
    )
    gone = event("DeleteUser", ago(1.8), user="user-deleted")
    key_gone = event("DeleteAccessKey", ago(1.85), user="user-deleted", key=key_id("GONE"))
    cases["user-deleted"] = Case(
        user("user-deleted", password=True, keys=[key(key_id("GONE"), status="Inactive")]),
        None,
        [gone, key_gone],
        [
            row("user-deleted", "", "user-deleted", "", "", "confirmed", seen=gone),
            row("user-deleted", key_id("GONE"), "access-key-deleted", "Inactive", "", "confirmed", seen=key_gone),
        ],
    )
    return cases


# Never a witness: calls that failed, calls to another service, what is older than the earlier run.
DENIED_CALL = event("DeleteAccessKey", ago(2.1), user="denied", key=key_id("DENIED"), error_code="AccessDenied")
OTHER_SERVICE = event("CreateUser", ago(2.2), user="transfer", eventSource="transfer.amazonaws.com")
TOO_OLD = event("DeleteLoginProfile", ago(11), user="before")
FAR_TOO_OLD = event("DeleteLoginProfile", ago(91), user="before")
LEFT_OUT = [DENIED_CALL, OTHER_SERVICE, TOO_OLD, FAR_TOO_OLD]


def unconfirmed_cases() -> dict[str, Case]:
    """Changes that no event explains."""
    cases = {}
    cases["denied"] = Case(
        user("denied", keys=[key(key_id("DENIED"))]),
        user("denied"),
        [DENIED_CALL],
        [row("denied", key_id("DENIED"), "access-key-deleted", "Active", "", "not found")],
    )
    cases["transfer"] = Case(
        None, user("transfer"), [OTHER_SERVICE], [row("transfer", "", "user-created", "", "", "not found")]
    )
    cases["before"] = Case(
        user("before", password=True, mfa=[mfa("before")]),
        user("before", mfa=[mfa("before")]),
        [TOO_OLD, FAR_TOO_OLD],
        [row("before", "", "console-disabled", "Configurada", "No configurada", "not found")],
    )
    other_key = event("DeleteAccessKey", ago(2.3), user="no-event", key=key_id("OTHER"))
    cases["no-event"] = Case(
        user("no-event", keys=[key(key_id("SILENT"))]),
        user("no-event"),
        [other_key],
        [row("no-event", key_id("SILENT"), "access-key-deleted", "Active", "", "not found")],
    )
    only_created = event("CreateAccessKey", ago(2.4), user="contradicted", key=key_id("LIES"))
    cases["contradicted"] = Case(
        user("contradicted", keys=[key(key_id("LIES"))]),
        user("contradicted"),
        [only_created],
        [row("contradicted", key_id("LIES"), "access-key-deleted", "Active", "", "contradicted", seen=only_created)],
    )
    return cases


CASES = {**key_cases(), **sign_in_cases(), **user_cases(), **unconfirmed_cases()}
ODD_NAMES = ["=x", "'x", "'=x", "''+x", "+a", "@b", "-c"]
# More than two pages, newest first: the event that explains the new user is the last to come.
CROWD = [event("CreateUser", ago(8) + timedelta(minutes=n), user=f"crowd-{n:03}") for n in range(120)]
# AWS's own word for root where it is the user that an MFA device is for:
# https://docs.aws.amazon.com/awscloudtrail/latest/userguide/cloudtrail-event-reference-aws-console-sign-in-events.html
ROOT_ARN = f"arn:aws:iam::{ELEVEN}:root"
ROOT_EVENTS = [
    event("DeleteAccessKey", ago(4.2), actor=ROOT_ARN, key=key_id("OLDROOT")),
    event("CreateAccessKey", ago(4.1), actor=ROOT_ARN, key=key_id("NEWROOT")),
    event("EnableMFADevice", ago(4), actor=ROOT_ARN, user="AWS ROOT USER", serial=f"arn:aws:iam::{ELEVEN}:mfa/root"),
]
MANAGED = event("CreateAccessKey", ago(0.5), user="boss", key=key_id("BOSS"))
JOINED = event("CreateUser", ago(0.6), user="newcomer")


def without_root(made: Json) -> Json:
    """The account, with a credential report that lacks root."""
    header, _, *rows = credential_report({**ACCOUNT_DEFAULTS, **made}, "aws", "Z").split("\n")
    return {**made, "report": "\n".join([header, *rows])}


def with_key(account_id: str, name: str, number: int, **options: Any) -> Json:
    """An account whose only user has that many keys."""
    keys = [key(key_id(f"{account_id[:3]}K{n}")) for n in range(number)]
    return account(account_id, name, users=[user("machine", keys=keys)], **options)


def uncovered(account_id: str, name: str, number: int = 1, **options: Any) -> Json:
    """An account with so many console users without MFA, each with a key."""
    users = [user(f"person-{n}", password=True, keys=[key(key_id(f"{account_id[:3]}P{n}"))]) for n in range(number)]
    return account(account_id, name, users=users, **options)


def accounts_before() -> list[Json]:
    return [
        account(MANAGEMENT, "management", users=[user("boss")]),
        account(ONE, "payments", users=[case.before for case in CASES.values() if case.before is not None]),
        with_key(TWO, "no-witness", 0),
        uncovered(THREE, "failed-then", role="denied"),
        uncovered(FOUR, "failed-now"),
        uncovered(FIVE, "suspended-now"),
        uncovered(SIX, "left"),
        uncovered(EIGHT, "excluded-now"),
        uncovered(NINE, "excluded-then"),
        account(TEN, "=odd", users=[user(name, keys=[key(key_id(f"ODD{n}"))]) for n, name in enumerate(ODD_NAMES)]),
        account(ELEVEN, "root", root=root(password=True, keys=[root_key(last_rotated="2024-01-01T00:00:00Z")])),
        account(TWELVE, "root-row-gone", root=root(password=True, mfa=True, keys=[root_key()])),
        account(BUSY, "busy"),
        with_key(DAMAGED, "damaged-trail", 0),
    ]


def accounts_after() -> list[Json]:
    new_root = root(password=True, virtual=True, keys=[root_key(last_rotated=ago(4.1))])
    users = [case.after for case in CASES.values() if case.after is not None]
    return [
        account(MANAGEMENT, "management", users=[user("boss", keys=[key(key_id("BOSS"))])], events=[MANAGED]),
        account(ONE, HOSTILE_NAME, users=users, events=[each for case in CASES.values() for each in case.events]),
        with_key(TWO, "no-witness", 1, deny=["LookupEvents"], events=[event("CreateUser", ago(1), user="unseen")]),
        uncovered(THREE, "failed-then", 2),
        uncovered(FOUR, "failed-now", 2, role="denied"),
        uncovered(FIVE, "suspended-now", 0, state="SUSPENDED"),
        uncovered(SEVEN, "joined", events=[JOINED]),
        uncovered(EIGHT, "excluded-now", 0),
        uncovered(NINE, "excluded-then", 0),
        account(TEN, "=odd", users=[user(name, keys=[key(key_id(f"ODD{n}"))]) for n, name in enumerate(ODD_NAMES)]),
        account(ELEVEN, "root", root=new_root, events=ROOT_EVENTS),
        without_root(account(TWELVE, "root-row-gone")),
        account(BUSY, "busy", users=[user("crowd-000")], events=CROWD),
        with_key(DAMAGED, "damaged-trail", 1),
    ]


RULES = [
    rule("LookupEvents", BUSY, error="ThrottlingException", times=1),
    rule("LookupEvents", BUSY, error="InternalFailure", status=500, skip=3, times=1),
    rule("LookupEvents", DAMAGED, raw='{"Events": [{"EventName": "CreateUser", "CloudTrailEvent": "{"}]}'),
]


class Story(NamedTuple):
    """Both runs, and what the endpoint was asked in each; `text` is what the terminal shows in the end."""

    first: Result
    first_stats: Json
    second: Result
    second_stats: Json
    text: str


@pytest.fixture(scope="module")
def story(serve: Serve, program: Program) -> Story:
    """A Region that CloudTrail does not record IAM in; the second run has a terminal, for hostile text to steer."""
    endpoint = serve(*accounts_before())
    env = {**endpoint.env(), "AWS_REGION": "eu-central-1", "AWS_DEFAULT_REGION": "eu-central-1"}
    first = program(env, "--include-management", "--exclude", NINE)
    first_stats = endpoint.stats()
    backdate(first.folder, EARLIER)
    serve(*accounts_after(), rules=RULES, record=True)
    options = ["--include-management", "--exclude", EIGHT, "--previous", str(first.folder), "--cloudtrail"]
    second = program.in_terminal(env, *options, everything=True)
    text = "\n".join(screen(second.terminal))  # refuses control sequences
    return Story(first, first_stats, second, endpoint.stats(), text)


@pytest.mark.program
def test_the_first_run_is_the_baseline(story: Story) -> None:
    assert not (story.first.folder / "changes.csv").exists()
    assert not (story.first.folder / "events.csv").exists()
    assert summary_of(story.first)["changes"] is None
    assert summary_of(story.first)["cloudtrail"] is None
    assert "baseline" in story.first.stdout
    assert "baseline" not in story.text


@pytest.mark.program
@pytest.mark.parametrize("name", CASES)
def test_changes_of_a_user(story: Story, name: str) -> None:
    rows = [each for each in changes_of(story.second, ONE) if each.split("|")[0] == name]
    assert rows == CASES[name].rows


@pytest.mark.program
def test_no_change_but_those(story: Story) -> None:
    assert len(changes_of(story.second, ONE)) == sum(len(case.rows) for case in CASES.values())


@pytest.mark.program
def test_a_renamed_account_is_compared_under_its_new_name(story: Story) -> None:
    names = {each.split("|")[1] for each in changes(story.second) if each.startswith(ONE)}
    assert names == {"'" + HOSTILE_NAME}


@pytest.mark.program
def test_names_with_apostrophes_in_the_csv_compare_as_unchanged(story: Story) -> None:
    assert {each["username"] for each in story.first.rows(TEN)} >= {"'=x", "'x", "''=x", "'''+x", "'+a", "'@b", "'-c"}
    assert changes_of(story.second, TEN) == []


@pytest.mark.program
def test_roots_key_is_replaced_and_root_gets_mfa(story: Story) -> None:
    """The report has no ID of root's key: only its creation date tells that it is another one."""
    gone, made, enabled = ROOT_EVENTS
    name, slot = "<root_account>", "<root_access_key_1>"
    assert changes_of(story.second, ELEVEN) == [
        row(name, "", "mfa-added", "None", "Virtual", "confirmed", seen=enabled),
        row(name, slot, "access-key-created", "", "Active", "confirmed", seen=made),
        row(name, slot, "access-key-deleted", "Active", "", "confirmed", seen=gone),
    ]


@pytest.mark.program
def test_a_missing_root_row_is_no_change(story: Story) -> None:
    assert changes_of(story.second, TWELVE) == []


@pytest.mark.program
def test_accounts_that_joined_or_left_are_one_line_each(story: Story) -> None:
    assert [each for each in changes(story.second) if "|account-" in each] == [
        f"{SIX}|left|||account-left|||||||",
        f"{SEVEN}|joined|||account-joined|||||||",
    ]
    assert len(changes_of(story.second, SIX)) == len(changes_of(story.second, SEVEN)) == 1


@pytest.mark.program
@pytest.mark.parametrize("account_id", [THREE, FOUR, FIVE, EIGHT, NINE])
def test_an_account_that_one_run_did_not_audit_is_not_compared(story: Story, account_id: str) -> None:
    assert changes_of(story.second, account_id) == []


@pytest.mark.program
@pytest.mark.parametrize(("account_id", "code"), [(TWO, "AccessDeniedException"), (DAMAGED, "DamagedEvent")])
def test_no_witness_where_the_lookup_fails(story: Story, account_id: str, code: str) -> None:
    """The account still counts as audited, and its changes as changes."""
    made = key_id(f"{account_id[:3]}K0")
    assert changes_of(story.second, account_id) == [
        row("machine", made, "access-key-created", "", "Active", "unavailable")
    ]
    assert story.second.accounts[account_id]["result"] == "audited"
    assert code in summary_of(story.second)["cloudtrail"]["unavailable"][account_id]
    assert re.search(rf"no witness in 1 account \({account_id}\): LookupEvents: {code}\n", story.text)
    assert "the role must allow cloudtrail:LookupEvents" in story.text


@pytest.mark.program
def test_only_those_accounts_lack_a_witness(story: Story) -> None:
    assert set(summary_of(story.second)["cloudtrail"]["unavailable"]) == {TWO, DAMAGED}


@pytest.mark.program
def test_all_pages_of_a_throttled_account(story: Story) -> None:
    """The explaining event is on the third page; one request is throttled, one answered with an error of AWS's own."""
    assert changes_of(story.second, BUSY) == [row("crowd-000", "", "user-created", "", "", "confirmed", seen=CROWD[0])]
    assert story.second_stats["by_account"][BUSY]["LookupEvents"] == 9 + 2 + 1 + 1
    assert sum(each.startswith(BUSY) for each in lines(story.second.folder / "events.csv")) == 120


@pytest.mark.program
def test_one_event_name_at_a_time(story: Story) -> None:
    """Nine names, one request each where a page holds all; none in an account that cannot be entered."""
    asked = {one: made.get("LookupEvents", 0) for one, made in story.second_stats["by_account"].items()}
    assert asked[ONE] == asked[TEN] == asked[MANAGEMENT] == 9
    assert asked.get(FOUR, 0) == asked.get(FIVE, 0) == asked.get(EIGHT, 0) == 0


@pytest.mark.program
def test_the_management_account_is_asked_with_the_profiles_own_credentials(story: Story) -> None:
    expected = [row("boss", key_id("BOSS"), "access-key-created", "", "Active", "confirmed", seen=MANAGED)]
    assert changes_of(story.second, MANAGEMENT) == expected
    assert MANAGEMENT not in story.second_stats["assumed"]


@pytest.mark.program
def test_the_region_that_records_iam_is_asked(story: Story) -> None:
    scopes = {scope for scope in story.second_stats["scopes"] if scope.startswith("cloudtrail/")}
    assert scopes == {"cloudtrail/us-east-1"}


@pytest.mark.program
def test_the_session_policy_allows_cloudtrail_only_where_it_is_asked(story: Story) -> None:
    def allowed(stats: Json) -> set[str]:
        [statement] = json.loads(stats["assumed"][ONE]["Policy"])["Statement"]
        assert statement["Effect"] == "Allow"
        return set(statement["Action"])

    without, with_it = allowed(story.first_stats), allowed(story.second_stats)
    assert not any(action.startswith("cloudtrail:") for action in without)
    assert with_it - without == {"cloudtrail:LookupEvents"}
    assert without < with_it
    assert "LookupEvents" not in story.first_stats["requests"]


@pytest.mark.program
def test_at_most_two_lookups_a_second_in_an_account_and_accounts_side_by_side(story: Story) -> None:
    """By the endpoint's own clock, and with room for a busy machine: without pacing nine take a few milliseconds."""
    times = defaultdict(list)
    for second, account_id, action in story.second_stats["recorded"]:
        if action == "LookupEvents":
            times[account_id].append(second)
    assert set(times) == {MANAGEMENT, ONE, TWO, THREE, SEVEN, NINE, TEN, ELEVEN, TWELVE, BUSY, DAMAGED}
    whole = {one: made for one, made in times.items() if one not in (TWO, DAMAGED)}  # those stop at the first refusal
    for account_id, made in whole.items():
        assert made[-1] - made[0] > 0.5 * (len(made) - 1) - 0.4, account_id
        assert max(sum(start <= one < start + 1 for one in made) for start in made) <= 4, account_id
    assert max(made[0] for made in whole.values()) < min(made[-1] for made in whole.values())
    # TWO's bucket lasts for a burst of two: whatever else came faster would have been refused.
    assert story.second_stats["errors"].get("ThrottlingException", 0) <= 1 + 2


@pytest.mark.program
def test_events_csv(story: Story) -> None:
    """All events but those left out; oldest first, over all accounts."""
    header, *rows = lines(story.second.folder / "events.csv")
    assert header == (
        "account_id|account_name|event_time|event_name|username|access_key_id|actor|source_ip|user_agent|event_id"
    )
    of_cases = [each for case in CASES.values() for each in case.events]
    expected = {each["EventId"] for each in [*of_cases, *CROWD, *ROOT_EVENTS, MANAGED, JOINED]}
    expected -= {each["EventId"] for each in LEFT_OUT}
    assert {each.rsplit("|", 1)[1] for each in rows} == expected
    assert len(rows) == len(expected) == summary_of(story.second)["cloudtrail"]["events"]
    times = [each.split("|")[2] for each in rows]
    assert times == sorted(times)
    assert len({each.split("|")[0] for each in rows}) == 5  # else the order over all accounts shows nothing


@pytest.mark.program
@pytest.mark.parametrize(
    ("case", "number", "expected"),
    [
        # what a spreadsheet would take for a formula begins with an apostrophe
        ("key-created", 0, f"CreateAccessKey|key-created|{key_id('CREATED')}|{MALLORY}|'@SUM(1)|'{AGENT}"),
        # the caller, since no user is named
        ("key-deleted", 0, f"DeleteAccessKey|key-deleted|{key_id('DELETED')}|arn:aws:iam::{ONE}:user/key-deleted|"
                           "198.51.100.7|aws-cli/2.31.0"),
        ("mfa-added", 0, f"EnableMFADevice|mfa-added||{ALICE}|198.51.100.7|aws-cli/2.31.0"),
    ],
)  # fmt: skip
def test_a_line_of_events_csv(story: Story, case: str, number: int, expected: str) -> None:
    made = CASES[case].events[number]
    [found] = [each for each in lines(story.second.folder / "events.csv") if each.endswith(made["EventId"])]
    when = made["EventTime"].replace("Z", "+00:00")
    assert found == f"{ONE}|'{HOSTILE_NAME}|{when}|{expected}|{made['EventId']}"


@pytest.mark.program
def test_events_of_root_bear_its_name(story: Story) -> None:
    rows = [each.split("|") for each in lines(story.second.folder / "events.csv") if each.startswith(ELEVEN)]
    assert [(each[3], each[4], each[5]) for each in rows] == [
        ("DeleteAccessKey", "<root_account>", key_id("OLDROOT")),
        ("CreateAccessKey", "<root_account>", key_id("NEWROOT")),
        ("EnableMFADevice", "<root_account>", ""),
    ]


@pytest.mark.program
def test_hostile_text_is_shown_without_its_control_characters(story: Story) -> None:
    """`screen` has refused what would steer the terminal; here it must have come that far at all."""
    assert "=pay\N{REPLACEMENT CHARACTER}[2Jments" in story.text
    assert "\N{REPLACEMENT CHARACTER}[31mmallory" in story.text


@pytest.mark.program
def test_what_the_summary_counts(story: Story) -> None:
    summary = summary_of(story.second)
    found = summary["changes"]
    assert found["since"] == EARLIER.isoformat()
    assert found["folder"] == str(story.first.folder)
    assert found["console_users_without_mfa"] == {"fixed": 4, "new": 3}
    assert (found["accounts_compared"], found["accounts_not_compared"]) == (8, 5)
    assert {kind: number for kind, number in found["counts"].items() if number} == {
        "access-key-created": 6,
        "access-key-deleted": 6,
        "access-key-activated": 1,
        "access-key-deactivated": 1,
        "access-key-came-and-went": 1,
        "mfa-added": 2,
        "mfa-removed": 1,
        "mfa-changed": 1,
        "console-enabled": 1,
        "console-disabled": 2,
        "user-created": 3,
        "user-deleted": 1,
        "account-joined": 1,
        "account-left": 1,
    }
    assert found["witnesses"] == {"confirmed": 19, "not found": 4, "contradicted": 1, "unavailable": 2}
    assert {(one["access_key_id"], one["witness"]) for one in found["new_access_keys"]} == {
        (key_id("BOSS"), "confirmed"),
        (key_id("BORN"), "confirmed"),
        (key_id("CREATED"), "confirmed"),
        (key_id("WENT"), "confirmed"),
        ("<root_access_key_1>", "confirmed"),
        (key_id(f"{TWO[:3]}K0"), "unavailable"),
        (key_id(f"{DAMAGED[:3]}K0"), "unavailable"),
    }


@pytest.mark.program
def test_what_the_terminal_says(story: Story) -> None:
    found = summary_of(story.second)["changes"]
    assert "without MFA: 4 fixed, 3 new" in story.text
    assert "access keys: 6 deleted, 1 deactivated, 6 created" in story.text
    assert "1 joined, 1 left" in story.text
    assert re.search(r"not compared: 5 accounts", story.text)
    assert "19 confirmed" in story.text
    for one in found["new_access_keys"]:
        assert re.search(rf"{one['account_id']} .*{re.escape(one['access_key_id'])}", story.text), one


# --- windows, partitions, keys that came and went: runs that wait for CloudTrail, side by side ------------------------


class Job(NamedTuple):
    """A run over one account with --cloudtrail; `earlier`: after a run that began so many days ago, if any."""

    account: str
    earlier: float | None
    options: list[str]
    keys: tuple[int, int] = (0, 0)  # of the only user: in the earlier run, and in this one
    events: tuple[Json, ...] = ()


def pair(name: str, came: float, went: float) -> tuple[Json, Json]:
    """A key that was created and deleted again."""
    return (
        event("CreateAccessKey", ago(came), user="machine", key=key_id(name)),
        event("DeleteAccessKey", ago(went), user="machine", key=key_id(name)),
    )


def created(*days: float) -> tuple[Json, ...]:
    return tuple(event("CreateUser", ago(day), user=f"user-{day:g}") for day in days)


def deleted(account_id: str, days: float) -> Json:
    return event("DeleteAccessKey", ago(days), user="machine", key=key_of(account_id))


def key_of(account_id: str) -> str:
    """The first that `with_key` makes."""
    return key_id(f"{account_id[:3]}K0")


QUIET = ("--quiet", "--fail-on", "new-keys")
JOBS = {
    "first run": Job(ONE, None, [], events=created(31, 29, 1)),
    "since after the earlier run": Job(TWO, 5, ["--since", f"{ago(1):%Y-%m-%dT%H:%M:%SZ}"], (1, 0), (deleted(TWO, 2),)),
    "since 120 days": Job(THREE, None, ["--since", f"{ago(120):%Y-%m-%d}"], events=created(91, 89)),
    "earlier run of 100 days ago": Job(FOUR, 100, [], (1, 0), (deleted(FOUR, 91), *created(89))),
    "came and went": Job(FIVE, 5, ["--quiet", "--fail-on", "findings:1,new-keys"], (1, 1), pair("BRIEF", 2, 1)),
    "since before the earlier run": Job(
        SIX,
        5,
        ["--since", f"{ago(20):%Y-%m-%dT%H:%M:%SZ}", *QUIET],
        (1, 0),
        (*pair("BRIEF", 12, 11), deleted(SIX, 10)),
    ),
}
PARTITIONS = {"aws-us-gov": ("us-gov-east-1", "us-gov-west-1"), "aws-cn": ("cn-northwest-1", "cn-north-1")}


class Looked(NamedTuple):
    """What the jobs found, and what became of a run in each other partition."""

    jobs: dict[str, Result]
    partitions: dict[str, tuple[Result, Json]]


@pytest.fixture(scope="module")
def looked(serve: Serve, program: Program, tmp_path_factory: pytest.TempPathFactory) -> Looked:
    """Each job with an account of its own, since CloudTrail counts calls by account."""
    env = serve(*(with_key(job.account, "one", job.keys[0]) for job in JOBS.values())).env()
    base = program(env).folder
    serve(*(with_key(job.account, "one", job.keys[1], events=list(job.events)) for job in JOBS.values()))

    def look(job: Job) -> Result:
        options = ["--accounts", job.account, "--cloudtrail", *job.options]
        if job.earlier is not None:
            earlier = tmp_path_factory.mktemp("earlier") / base.name
            shutil.copytree(base, earlier)
            backdate(earlier, ago(job.earlier))
            options += ["--previous", str(earlier)]
        return program(env, *options)

    def look_elsewhere(partition: str) -> tuple[Result, Json]:
        region, _ = PARTITIONS[partition]
        described = world(account(ONE, "one", events=list(created(1))), partition=partition)
        with Endpoint(described) as endpoint:
            there = {**endpoint.env(), "AWS_REGION": region, "AWS_DEFAULT_REGION": region}
            return program(there, "--cloudtrail"), endpoint.stats()

    with ThreadPoolExecutor(len(JOBS) + len(PARTITIONS)) as pool:
        elsewhere = {partition: pool.submit(look_elsewhere, partition) for partition in PARTITIONS}
        here = {name: pool.submit(look, job) for name, job in JOBS.items()}
        return Looked(
            {name: each.result() for name, each in here.items()},
            {name: each.result() for name, each in elsewhere.items()},
        )


def users_in_events(result: Result) -> list[str]:
    return [each.split("|")[4] for each in lines(result.folder / "events.csv")[1:]]


@pytest.mark.program
@pytest.mark.parametrize(
    ("name", "users", "days"),
    [
        ("first run", ["user-29", "user-1"], 30),
        ("since after the earlier run", [], 1),
        ("since 120 days", ["user-89"], 90),
        ("earlier run of 100 days ago", ["user-89"], 90),
    ],
)
def test_how_far_back_cloudtrail_is_asked(looked: Looked, name: str, users: list[str], days: int) -> None:
    assert users_in_events(looked.jobs[name]) == users
    since = datetime.fromisoformat(summary_of(looked.jobs[name])["cloudtrail"]["since"])
    assert abs(since - ago(days)) < timedelta(minutes=10)  # the run began a little after this module


@pytest.mark.program
def test_the_summary_says_that_cloudtrail_does_not_reach_back_to_the_earlier_run(looked: Looked) -> None:
    result = looked.jobs["earlier run of 100 days ago"]
    assert changes_of(result, FOUR) == [row("machine", key_of(FOUR), "access-key-deleted", "Active", "", "not found")]
    assert "90 days" in result.stdout.partition("CloudTrail")[2]


@pytest.mark.program
@pytest.mark.parametrize("name", ["first run", "since after the earlier run"])
def test_else_the_summary_does_not_say_so(looked: Looked, name: str) -> None:
    """Where --since leaves days out, it is not CloudTrail that has forgotten them."""
    assert "90 days" not in looked.jobs[name].stdout.partition("CloudTrail")[2]


@pytest.mark.program
def test_a_key_that_came_and_went_counts_as_new(looked: Looked) -> None:
    result = looked.jobs["came and went"]
    [_, went] = JOBS["came and went"].events
    assert changes_of(result, FIVE) == [
        row("machine", key_id("BRIEF"), "access-key-came-and-went", "", "", "confirmed", seen=went)
    ]
    assert result.exit_code == 4
    assert key_id("BRIEF") in result.stdout
    assert key_of(FIVE) not in result.stdout


@pytest.mark.program
def test_accounts_out_of_scope_have_not_left(looked: Looked) -> None:
    """The earlier run audited them all, this one only FIVE."""
    result = looked.jobs["came and went"]
    assert not [each for each in changes(result) if "account-left" in each]
    found = summary_of(result)["changes"]
    assert (found["accounts_compared"], found["accounts_not_compared"]) == (1, len(JOBS) - 1)


@pytest.mark.program
def test_what_happened_before_the_earlier_run_is_no_witness(looked: Looked) -> None:
    """--since makes events.csv longer; what the earlier run has seen the end of did not happen since that run."""
    result = looked.jobs["since before the earlier run"]
    assert changes_of(result, SIX) == [row("machine", key_of(SIX), "access-key-deleted", "Active", "", "not found")]
    assert (result.exit_code, result.stdout) == (0, "")
    assert len(users_in_events(result)) == 3


@pytest.mark.program
@pytest.mark.parametrize("partition", PARTITIONS)
def test_other_partitions_record_iam_elsewhere(looked: Looked, partition: str) -> None:
    result, stats = looked.partitions[partition]
    assert {scope for scope in stats["scopes"] if scope.startswith("cloudtrail/")} == {
        f"cloudtrail/{PARTITIONS[partition][1]}"
    }
    assert users_in_events(result) == ["user-1"]


# --- night after night into the same folder: --quiet, --fail-on, --previous -------------------------------------------

MANY = [key_id(f"MANY{n:02}") for n in range(12)]


def nightly_world(night: int) -> list[Json]:
    """Until the third night nothing changes."""
    if night < 3:
        one = [
            user("ana", password=True, mfa=[mfa("ana")]),
            user("bob", password=True),
            user("svc", keys=[key(key_id("KEPT"), created=ago(200))]),
        ]
    else:
        one = [
            user("ana", password=True),
            user("bob", password=True, mfa=[mfa("bob")]),
            user("carl", password=True),
            user("svc", keys=[key(each, created=ago(1)) for each in MANY]),
            user("dora", mfa=[mfa("dora")]),
        ]
    return [account(ONE, "one", users=one), account(TWO, "two")]


class Nights(NamedTuple):
    runs: list[Result]
    named: Result


@pytest.fixture(scope="module")
def nights(serve: Serve, program: Program, tmp_path_factory: pytest.TempPathFactory) -> Nights:
    reports = tmp_path_factory.mktemp("nights") / "reports"
    reports.mkdir(mode=0o700)
    runs: list[Result] = []
    for night in (1, 2, 3):
        env = serve(*nightly_world(night)).env()
        runs.append(again(program, env, reports, *QUIET))
    first = reports / runs[0].folder.name
    named = again(program, env, reports, "--previous", str(first), "--fail-on", "findings:1")
    return Nights(runs, named)


@pytest.mark.program
def test_nothing_is_printed_where_nothing_changed(nights: Nights) -> None:
    """Neither on the first night, which has nothing to compare with, nor on the second."""
    assert [(night.exit_code, night.stdout, night.stderr) for night in nights.runs[:2]] == [(0, "", "")] * 2
    assert changes(nights.runs[1]) == []
    assert not (nights.runs[0].folder / "changes.csv").exists()


@pytest.mark.program
def test_quiet_prints_new_keys_and_lost_mfa_and_nothing_else(nights: Nights) -> None:
    third = nights.runs[2]
    assert third.exit_code == 4
    shown = [line for line in third.stdout.splitlines() if line.startswith("  ")]
    assert [line for line in shown if "AKIA" in line] == [f"  {ONE} one svc {made}" for made in MANY[:10]]
    assert re.search(r"\b2 more\b", third.stdout)
    text = re.sub(r".*AKIA.*|.*\b2 more\b.*", "", third.stdout)
    named = [line.split()[-1] for line in text.splitlines() if line.startswith("  ")]
    assert named == ["ana", "carl", "ana"]  # without MFA now: ana, carl; MFA removed: ana
    assert not re.search(r"bob|dora|two|KEPT", third.stdout)
    assert len(third.stdout.splitlines()) == 10 + 1 + 3 + 3  # keys, how many more, people, three headings


@pytest.mark.program
def test_the_newest_run_is_compared_with(nights: Nights) -> None:
    found = summary_of(nights.runs[2])["changes"]
    assert Path(found["folder"]).name == nights.runs[1].folder.name
    assert found["console_users_without_mfa"] == {"fixed": 1, "new": 2}
    assert [each.split("|")[7] for each in changes(nights.runs[2])] == [""] * (12 + 5)  # CloudTrail was not asked


def then_and_now(then: str, now: str) -> dict[str, str]:
    """All accounts are in both runs."""
    return {"then": then, "now": now, "compared_then": then, "compared_now": now}


@pytest.mark.program
def test_levels_then_and_now(nights: Nights) -> None:
    levels = summary_of(nights.runs[2])["changes"]["maturity"]
    assert levels == {
        "phase1": then_and_now("In Progress", "In Progress"),
        "phase2": then_and_now("In Progress", "Complete"),
    }
    assert "phase 2: In Progress, now Complete" in nights.named.stdout


@pytest.mark.program
def test_previous_names_another_run(nights: Nights) -> None:
    """And new keys alone do not count where --fail-on asks for findings."""
    assert Path(summary_of(nights.named)["changes"]["folder"]).name == nights.runs[0].folder.name
    assert [each.split("|", 7)[:7] for each in changes(nights.named)] == [
        each.split("|", 7)[:7] for each in changes(nights.runs[2])
    ]
    assert nights.named.exit_code == 0


@pytest.mark.program
def test_new_keys_are_asked_for_and_there_is_no_earlier_run(nights: Nights) -> None:
    assert nights.runs[0].exit_code == 0  # though there is a key, of 200 days


# --- the runs that are there ------------------------------------------------------------------------------------------

ANOTHER = {"id": "o-another0000", "management_account": MANAGEMENT, "management_account_included": False}


def settled() -> list[Json]:
    """An organization in which nothing changes: one active root key, keys of users, roots with and without MFA."""
    ana, bob = user("ana", keys=[key(key_id("ANA"))]), user("bob", password=True, keys=[key(key_id("BOB"))])
    return [
        account(ONE, "payments", users=[ana, bob]),
        account(TWO, "root", users=[bob], root=root(password=True)),
        without_root(account(THREE, "rootless", users=[bob])),
        account(FOUR, "root-key", root=root(password=True, virtual=True, keys=[root_key()])),
        account(FIVE, "empty"),  # root has a row there, and nobody has anything
    ]


@pytest.fixture(scope="module")
def base(serve: Serve, program: Program) -> Path:
    """The folder of a run over `settled`, to be copied and spoiled."""
    return program(serve(*settled()).env()).folder


@pytest.fixture(scope="module")
def history(serve: Serve, program: Program, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run among unfinished ones, one of another organization, four of the same second, and things that are no run."""
    reports = tmp_path_factory.mktemp("history") / "reports"

    def copy(name: str, started: datetime, audited: int, **changed: Any) -> None:
        shutil.copytree(base, reports / name)
        totals = {**json.loads((base / "summary.json").read_text("utf-8"))["totals"], "audited": audited}
        edit_summary(reports / name, started=started.isoformat(), totals=totals, **changed)

    for month in range(1, 13):
        started = datetime(2024, month, 1, tzinfo=timezone.utc)
        copy(f"{started:%Y%m%dT%H%M%SZ}", started, month)
    for number, suffix in ((101, ""), (102, "-2"), (110, "-10"), (109, "-9")):
        copy(f"20250101T000000Z{suffix}", datetime(2025, 1, 1, tzinfo=timezone.utc), number)
    copy("20250102T000000Z", datetime(2025, 1, 2, tzinfo=timezone.utc), 0)
    (reports / "20250102T000000Z" / "summary.json").unlink()
    copy("20250103T000000Z", datetime(2025, 1, 3, tzinfo=timezone.utc), 0, organization=ANOTHER)
    copy("kept for the auditors", datetime(2025, 1, 4, tzinfo=timezone.utc), 0)
    (reports / "20250105T000000Z").write_text("no folder")
    return again(program, serve(*settled()).env(), reports, "--fail-on", "new-keys,findings:1")


@pytest.mark.program
def test_a_finding_alone_fails_a_run_that_asks_for_new_keys_too(history: Result) -> None:
    assert summary_of(history)["changes"]["new_access_keys"] == []
    assert history.exit_code == 4


@pytest.mark.program
def test_the_newest_finished_run_of_this_organization_is_found(history: Result) -> None:
    found = summary_of(history)["changes"]
    assert Path(found["folder"]).name == "20250101T000000Z-10"
    assert changes(history) == []


@pytest.mark.program
def test_the_last_twelve_runs_are_shown(history: Result) -> None:
    summary = summary_of(history)
    audited = [*range(6, 13), 101, 102, 109, 110, 5]
    assert [one["audited"] for one in summary["runs"]] == audited
    assert summary["runs"][0] == {
        "started": "2024-06-01T00:00:00+00:00",
        "audited": 6,
        "console_users_without_mfa": 4,
        "active_keys": 5,
        "active_keys_older_than_max_age": 5,
    }
    table = re.findall(r"^(20\d\d-\S+) +(\d+) +4 +5 +5$", history.stdout, re.MULTILINE)
    assert [int(number) for _, number in table] == audited
    assert table[-1][0] == summary["started"]


# --- earlier runs that are damaged ------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new, 1)

    return change


def without_accounts(folder: Path) -> None:
    path = folder / "summary.json"
    summary = json.loads(path.read_text("utf-8"))
    del summary["accounts"]
    path.write_text(json.dumps(summary), "utf-8")


CSV, SUMMARY = f"accounts/{ONE}.csv", "summary.json"
DAMAGES: dict[str, tuple[str, Damage]] = {
    "header": (CSV, rewritten(CSV, replaced(b"username", b"user"))),
    "row of another account": (CSV, rewritten(CSV, replaced(f"\n{ONE}".encode(), f"\n{TWO}".encode()))),
    "row missing in the middle": (CSV, rewritten(CSV, lambda text: re.sub(rb"\n.*,ana,.*", b"", text))),
    "row missing at the end": (CSV, rewritten(CSV, lambda text: text[: text[:-1].rindex(b"\n") + 1])),
    "truncated in a row": (CSV, rewritten(CSV, lambda text: text[:-40])),
    "truncated in the last word": (CSV, rewritten(CSV, lambda text: text[:-2])),
    "empty": (CSV, rewritten(CSV, lambda _: b"")),
    "zeros": (CSV, rewritten(CSV, lambda text: b"\0" * len(text))),
    "a cell more": (CSV, rewritten(CSV, replaced(b",Active,", b",Active,x,"))),
    "unknown word": (CSV, rewritten(CSV, replaced(b",Active,", b",Activo,"))),
    "not UTF-8": (CSV, rewritten(CSV, replaced(b"payments", b"pa\xffyments"))),
    "missing": (CSV, lambda folder: (folder / CSV).unlink()),
    "no JSON": (SUMMARY, rewritten(SUMMARY, lambda text: text[:-20])),
    "summary not UTF-8": (SUMMARY, rewritten(SUMMARY, replaced(b"payments", b"pa\xffyments"))),
    "summary is a list": (SUMMARY, rewritten(SUMMARY, lambda text: b"[" + text + b"]")),
    "summary without accounts": (SUMMARY, without_accounts),
    "another format": (SUMMARY, lambda folder: edit_summary(folder, format=999)),
    "of another tool": (SUMMARY, lambda folder: edit_summary(folder, tool="other")),
    "no date": (SUMMARY, lambda folder: edit_summary(folder, started="yesterday")),
    "an unknown level": (SUMMARY, rewritten(SUMMARY, replaced(b'"level": "In Progress"', b'"level": "Foo"'))),
    "an account's unknown level": (SUMMARY, rewritten(SUMMARY, replaced(b'"phase2": "Advanced"', b'"phase2": "Foo"'))),
    "a number that is none": (SUMMARY, lambda folder: edit_summary(folder, max_key_age_days="90")),
    "a date before the first": (SUMMARY, lambda folder: edit_summary(folder, started="0001-01-01T00:00:00+14:00")),
}
# Whether --previous names it, and what is damaged how.
REFUSED: dict[str, tuple[bool, str, Damage]] = {
    "damaged CSV": (False, *DAMAGES["row missing at the end"]),
    "named, damaged CSV": (True, *DAMAGES["header"]),
    "named, without a summary": (True, SUMMARY, lambda folder: (folder / SUMMARY).unlink()),
    "named, of another organization": (True, "", lambda folder: edit_summary(folder, organization=ANOTHER)),
}


def spoiled(base: Path, reports: Path, damage: Damage) -> Path:
    """A damaged copy of the run."""
    folder = reports / base.name
    shutil.copytree(base, folder)
    damage(folder)
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed_and_the_file_named(base: Path, tmp_path: Path, name: str) -> None:
    damaged, damage = DAMAGES[name]
    folder = spoiled(base, tmp_path, damage)
    with pytest.raises(iam_audit.AuditError, match=re.escape(str(folder / damaged))):
        iam_audit.open_tracking(tmp_path, None, "o-test123456")


def test_without_damage_all_is_well(base: Path, tmp_path: Path) -> None:
    """Else the tests around this one would say nothing."""
    folder = spoiled(base, tmp_path, lambda _: None)
    tracking = iam_audit.open_tracking(tmp_path, None, "o-test123456")
    assert tracking.earlier is not None
    assert tracking.earlier.folder == folder
    assert set(tracking.earlier.accounts) >= {ONE, TWO, THREE, FOUR, FIVE}


class Refusals(NamedTuple):
    runs: dict[str, tuple[Result, Path]]
    stats: Json


@pytest.fixture(scope="module")
def refusals(serve: Serve, program: Program, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Refusals:
    """A run after each damaged one, and what the endpoint was asked in all of them."""
    endpoint = serve(*settled())

    def attempt(name: str) -> tuple[Result, Path]:
        named, _, damage = REFUSED[name]
        folder = spoiled(base, tmp_path_factory.mktemp("damaged") / "reports", damage)
        options = ["--previous", str(folder)] if named else []
        return again(program, endpoint.env(), folder.parent, *options), folder

    with ThreadPoolExecutor(2) as pool:
        return Refusals(dict(zip(REFUSED, pool.map(attempt, REFUSED), strict=True)), endpoint.stats())


@pytest.mark.program
@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_earlier_run_is_refused(refusals: Refusals, name: str) -> None:
    result, folder = refusals.runs[name]
    _, damaged, _ = REFUSED[name]
    assert result.exit_code == 1
    assert str(folder / damaged) in result.stderr
    assert list(folder.parent.iterdir()) == [folder]  # nothing is left of the run that could not start


@pytest.mark.program
def test_no_account_is_entered_before_the_earlier_run_is_known_to_be_whole(refusals: Refusals) -> None:
    assert refusals.stats["requests"]["DescribeOrganization"] == len(REFUSED)
    assert "AssumeRole" not in refusals.stats["requests"]


@pytest.mark.parametrize("account_id", [ONE, FIVE])
def test_a_csv_cut_anywhere_is_noticed(base: Path, tmp_path: Path, account_id: str) -> None:
    """A change would be made of it. Where only the last line feed is gone all cells are there still."""
    path = spoiled(base, tmp_path, lambda _: None) / "accounts" / f"{account_id}.csv"
    whole = path.read_bytes()
    for size in range(len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(iam_audit.AuditError, match=re.escape(str(path))):
            iam_audit.open_tracking(tmp_path, None, "o-test123456")


# --- the pure functions: changes, witnesses, events -------------------------------------------------------------------

ACCOUNT = iam_audit.Account(ONE, "one", "ACTIVE")


ON, OFF = "Configurada", "No configurada"


def state(password_status: str = OFF, mfa_status: str = "None", **keys: str) -> UserState:
    """`keys` are their status and, after a slash, the day of creation."""
    parts = {name: text.partition("/") for name, text in keys.items()}
    made = {name: KeyState(status, f"2024-01-{day or '01'}") for name, (status, _, day) in parts.items()}
    return UserState(password_status, mfa_status, made)


ROOT = "<root_account>"
ROOT_KEYS = ("<root_access_key_1>", "<root_access_key_2>")


def root_state(*keys: str) -> UserState:
    return state(**dict(zip(ROOT_KEYS, keys)))


TRANSITIONS: dict[str, tuple[dict[str, UserState], dict[str, UserState], list[str]]] = {
    "nothing": ({}, {}, []),
    "the same": ({"ana": state(ON, "Virtual", K="Active")}, {"ana": state(ON, "Virtual", K="Active")}, []),
    "key created": ({"ana": state()}, {"ana": state(K="Active")}, ["ana|K|access-key-created||Active"]),
    "inactive key created": ({"ana": state()}, {"ana": state(K="Inactive")}, ["ana|K|access-key-created||Inactive"]),
    "key deleted": ({"ana": state(K="Expired")}, {"ana": state()}, ["ana|K|access-key-deleted|Expired|"]),
    "key rotated": (
        {"ana": state(A="Active")},
        {"ana": state(B="Active")},
        ["ana|A|access-key-deleted|Active|", "ana|B|access-key-created||Active"],
    ),
    "activated": (
        {"ana": state(K="Inactive")},
        {"ana": state(K="Active")},
        ["ana|K|access-key-activated|Inactive|Active"],
    ),
    "activated after it expired": (
        {"ana": state(K="Expired")},
        {"ana": state(K="Active")},
        ["ana|K|access-key-activated|Expired|Active"],
    ),
    "deactivated": (
        {"ana": state(K="Active")},
        {"ana": state(K="Inactive")},
        ["ana|K|access-key-deactivated|Active|Inactive"],
    ),
    "expired": (
        {"ana": state(K="Active")},
        {"ana": state(K="Expired")},
        ["ana|K|access-key-deactivated|Active|Expired"],
    ),
    "inactive key expired": ({"ana": state(K="Inactive")}, {"ana": state(K="Expired")}, []),
    "MFA added": ({"ana": state()}, {"ana": state(mfa_status="SMS")}, ["ana||mfa-added|None|SMS"]),
    "MFA removed": (
        {"ana": state(mfa_status="Security key+Virtual")},
        {"ana": state()},
        ["ana||mfa-removed|Security key+Virtual|None"],
    ),
    "MFA changed": (
        {"ana": state(mfa_status="Virtual")},
        {"ana": state(mfa_status="Security key+Virtual")},
        ["ana||mfa-changed|Virtual|Security key+Virtual"],
    ),
    "console enabled": ({"ana": state(OFF)}, {"ana": state(ON)}, [f"ana||console-enabled|{OFF}|{ON}"]),
    "console disabled": ({"ana": state(ON)}, {"ana": state(OFF)}, [f"ana||console-disabled|{ON}|{OFF}"]),
    "console and MFA at once": (
        {"ana": state(OFF)},
        {"ana": state(ON, "Hardware")},
        [f"ana||console-enabled|{OFF}|{ON}", "ana||mfa-added|None|Hardware"],
    ),
    "user created, with password and keys": (
        {},
        {"ana": state(ON, "Virtual", K="Active", L="Inactive")},
        ["ana||user-created||", "ana|K|access-key-created||Active", "ana|L|access-key-created||Inactive"],
    ),
    "user deleted, with password and key": (
        {"ana": state(ON, "Virtual", K="Active")},
        {},
        ["ana||user-deleted||", "ana|K|access-key-deleted|Active|"],
    ),
    "user renamed, whose keys stay": (
        {"ana": state(K="Active", L="Active")},
        {"ana.b": state(K="Active", M="Active")},
        [
            "ana||user-deleted||",
            "ana.b||user-created||",
            "ana.b|L|access-key-deleted|Active|",
            "ana.b|M|access-key-created||Active",
        ],
    ),
    "user renamed, his key activated": (
        {"ana": state(K="Inactive")},
        {"ana.b": state(K="Active")},
        ["ana||user-deleted||", "ana.b||user-created||", "ana.b|K|access-key-activated|Inactive|Active"],
    ),
    "root's keys in other slots": (
        {ROOT: root_state("Active/01", "Inactive/02")},
        {ROOT: root_state("Inactive/02", "Inactive/01")},
        [f"{ROOT}|{ROOT_KEYS[1]}|access-key-deactivated|Active|Inactive"],
    ),
    "root's second key moves up when the first is deleted": (
        {ROOT: root_state("Active/01", "Active/02")},
        {ROOT: root_state("Active/02")},
        [f"{ROOT}|{ROOT_KEYS[1]}|access-key-deleted|Active|"],
    ),
    "root's key replaced by an active one": (
        {ROOT: state(K="Inactive/01")},
        {ROOT: state(K="Active/02")},
        [f"{ROOT}|K|access-key-deleted|Inactive|", f"{ROOT}|K|access-key-created||Active"],
    ),
    "key of another user": (
        {"ana": state(K="Active"), "bob": state()},
        {"ana": state(), "bob": state(K="Active")},
        ["ana|K|access-key-deleted|Active|", "bob|K|access-key-created||Active"],
    ),
    "users by name": ({"b": state(), "a": state()}, {}, ["a||user-deleted||", "b||user-deleted||"]),
    "names in upper and lower case": (
        {"Ana": state()},
        {"ana": state()},
        ["Ana||user-deleted||", "ana||user-created||"],
    ),
    "root missing now": ({ROOT: state(ON, "None", K="Active")}, {}, []),
    "root missing then": ({}, {ROOT: state(ON, "None", K="Active")}, []),
    "root's password": ({ROOT: state(ON)}, {ROOT: state(OFF)}, [f"{ROOT}||console-disabled|{ON}|{OFF}"]),
    "root's key created": ({ROOT: state()}, {ROOT: state(K="Active")}, [f"{ROOT}|K|access-key-created||Active"]),
    "root's key replaced": (
        {ROOT: state(K="Active/01")},
        {ROOT: state(K="Active/02")},
        [f"{ROOT}|K|access-key-deleted|Active|", f"{ROOT}|K|access-key-created||Active"],
    ),
    "root's key deactivated": (
        {ROOT: state(K="Active/01")},
        {ROOT: state(K="Inactive/01")},
        [f"{ROOT}|K|access-key-deactivated|Active|Inactive"],
    ),
}


@pytest.mark.parametrize("name", TRANSITIONS)
def test_changes_between_two_states(name: str) -> None:
    before, after, expected = TRANSITIONS[name]
    found = list(iam_audit.changes_between(ACCOUNT, before, after))
    assert ["|".join(change[2:7]) for change in found] == expected
    assert all(change[:2] == (ONE, "one") and change[7:] == ("", None) for change in found)


def happened(name: str, day: int, user: str = "ana", key_id: str = "", status: str = "") -> Event:
    moment = datetime(2024, 1, day, tzinfo=timezone.utc)
    return Event(moment, name, user, key_id, status, ALICE, "192.0.2.1", "agent", f"{name}-{day}")


EXPLANATIONS = {
    "access-key-created": ("CreateAccessKey", "", "DeleteAccessKey", ""),
    "access-key-deleted": ("DeleteAccessKey", "", "CreateAccessKey", ""),
    "access-key-activated": ("UpdateAccessKey", "Active", "UpdateAccessKey", "Inactive"),
    "access-key-deactivated": ("UpdateAccessKey", "Inactive", "UpdateAccessKey", "Active"),
    "mfa-added": ("EnableMFADevice", "", "DeactivateMFADevice", ""),
    "mfa-removed": ("DeactivateMFADevice", "", "EnableMFADevice", ""),
    "console-enabled": ("CreateLoginProfile", "", "DeleteLoginProfile", ""),
    "console-disabled": ("DeleteLoginProfile", "", "CreateLoginProfile", ""),
    "user-created": ("CreateUser", "", "DeleteUser", ""),
    "user-deleted": ("DeleteUser", "", "CreateUser", ""),
}


@pytest.mark.parametrize("kind", EXPLANATIONS)
def test_the_witness_of_a_change(kind: str) -> None:
    """What explains it, whatever else happened; only without that, what contradicts it; never what is about another."""
    explains, set_to, contradicts, set_back = EXPLANATIONS[kind]
    key = "K" if kind.startswith("access-key") else ""
    change = Change(ONE, "one", "ana", key, kind)
    about_others = [
        happened(explains, 9, "bob", "K2", set_to),
        *([happened(explains, 9, "ana", "K2", set_to)] if key else []),
        happened("UpdateAccessKey", 9, "ana", "K", "Expired"),
    ]
    others = {name for name in iam_audit.EVENT_NAMES if name not in (explains, contradicts, "UpdateAccessKey")}
    about_others += [happened(name, 9, "ana", key) for name in others]

    def witness(*events: Event) -> tuple[str, Event | None]:
        found = iam_audit.with_witness(change, Trail(tuple(sorted([*events, *about_others]))))
        assert found[:7] == change[:7]
        return found.witness, found.event

    first, last = (happened(explains, day, "ana", key, set_to) for day in (2, 4))
    against = [happened(contradicts, day, "ana", key, set_back) for day in (1, 3, 5)]
    assert witness() == ("not found", None)
    assert witness(first, last) == ("confirmed", last)
    assert witness(first, last, *against) == ("confirmed", last)
    assert witness(*against) == ("contradicted", against[-1])


@pytest.mark.parametrize("name", ["EnableMFADevice", "DeactivateMFADevice"])
def test_the_witness_of_changed_mfa_is_either_event(name: str) -> None:
    change = Change(ONE, "one", "ana", "", "mfa-changed")
    seen = happened(name, 3)
    assert iam_audit.with_witness(change, Trail((seen,))) == change._replace(witness="confirmed", event=seen)
    others = Trail((happened("CreateUser", 3), happened(name, 4, "bob")))
    assert iam_audit.with_witness(change, others) == change._replace(witness="not found")


@pytest.mark.parametrize("kind", ["access-key-created", "mfa-changed", "user-deleted"])
def test_without_a_trail_there_is_no_witness(kind: str) -> None:
    change = Change(ONE, "one", "ana", "K", kind)
    assert iam_audit.with_witness(change, None) == change
    assert iam_audit.with_witness(change, Trail(error="denied")) == change._replace(witness="unavailable")


def test_roots_keys_are_known_by_their_owner() -> None:
    """Its ID in the snapshot is none that CloudTrail has."""
    change = Change(ONE, "one", ROOT, "<root_access_key_1>", "access-key-deleted")
    seen = happened("DeleteAccessKey", 3, ROOT, "AKIA0000000000000001")
    other = happened("DeleteAccessKey", 4, "ana", "AKIA0000000000000002")
    assert iam_audit.with_witness(change, Trail((seen, other))).event == seen
    assert iam_audit.with_witness(change, Trail((other,))).witness == "not found"


CREATED, DELETED = happened("CreateAccessKey", 1, key_id="K"), happened("DeleteAccessKey", 2, key_id="K")


@pytest.mark.parametrize(
    ("before", "after", "trail", "expected"),
    [
        ({}, {}, Trail((CREATED, DELETED)), [DELETED]),
        ({"ana": state(L="Active")}, {"ana": state(L="Active")}, Trail((CREATED, DELETED)), [DELETED]),
        ({}, {}, Trail((CREATED,)), []),
        ({}, {}, Trail((DELETED,)), []),
        ({"ana": state(K="Active")}, {}, Trail((CREATED, DELETED)), []),  # deleted, as the comparison says itself
        ({}, {"ana": state(K="Active")}, Trail((CREATED, DELETED)), []),  # created, and seen before it was deleted
        ({}, {}, None, []),
        ({}, {}, Trail(error="denied"), []),
        ({}, {}, Trail((CREATED, happened("DeleteAccessKey", 2, key_id="L"))), []),
        ({}, {}, Trail((happened("CreateAccessKey", 1), happened("DeleteAccessKey", 2))), []),  # without any key's ID
        ({}, {}, Trail((CREATED, happened("UpdateAccessKey", 2, key_id="K", status="Inactive"))), []),
    ],
)
def test_keys_that_came_and_went(
    before: dict[str, UserState], after: dict[str, UserState], trail: Trail | None, expected: list[Event]
) -> None:
    found = list(iam_audit.came_and_went(ACCOUNT, before, after, trail))
    assert found == [Change(ONE, "one", "ana", "K", "access-key-came-and-went", event=each) for each in expected]
    assert [iam_audit.with_witness(change, trail).witness for change in found] == ["confirmed"] * len(expected)


RECORD: Json = event("DeleteUser", "2024-05-06T07:08:09Z", user="ana")["CloudTrailEvent"]
OF_ROOT = {"type": "Root", "arn": ROOT_ARN, "accountId": ELEVEN}
OF_ROLE = {"type": "AssumedRole", "arn": ALICE, "sessionContext": {"sessionIssuer": {"userName": "Admin"}}}
RECORDS: dict[str, tuple[Json, dict[str, str]]] = {
    "named user": ({}, {"user": "ana", "actor": ALICE, "key_id": "", "status": ""}),
    "caller on itself": (
        {"requestParameters": None, "userIdentity": {"type": "IAMUser", "userName": "bob", "arn": "arn:bob"}},
        {"user": "bob", "actor": "arn:bob"},
    ),
    "a caller's name is not the target's": (
        {"userIdentity": {"type": "IAMUser", "userName": "bob", "arn": "arn:bob"}},
        {"user": "ana", "actor": "arn:bob"},
    ),
    "a role's session is no user": (
        {"requestParameters": {"accessKeyId": "K"}, "userIdentity": OF_ROLE},
        {"user": "", "key_id": "K"},
    ),
    "root on itself": (
        {"requestParameters": {"accessKeyId": "K"}, "userIdentity": OF_ROOT},
        {"user": ROOT, "key_id": "K"},
    ),
    "root on a user": ({"userIdentity": OF_ROOT}, {"user": "ana"}),
    "root's session by AssumeRoot": (
        {"requestParameters": None, "userIdentity": {**OF_ROOT, "sessionContext": {"assumedRoot": "true"}}},
        {"user": ROOT, "actor": ROOT_ARN},
    ),
    "AWS's name for root": (
        {"requestParameters": {"userName": "AWS ROOT USER", "serialNumber": "x"}, "userIdentity": OF_ROOT},
        {"user": ROOT},
    ),
    "key of the response": (
        {"responseElements": {"accessKey": {"accessKeyId": "K", "userName": "ana", "status": "Active"}}},
        {"user": "ana", "key_id": "K"},
    ),
    "user of the response": (
        {
            "requestParameters": None,
            "userIdentity": OF_ROLE,
            "responseElements": {"accessKey": {"accessKeyId": "K", "userName": "ana"}},
        },
        {"user": "ana", "key_id": "K"},
    ),
    "key and status of the request": (
        {"requestParameters": {"userName": "ana", "accessKeyId": "K", "status": "Inactive"}},
        {"user": "ana", "key_id": "K", "status": "Inactive"},
    ),
    "an AWS service as the caller": (
        {"userIdentity": {"type": "AWSService", "invokedBy": "sso.amazonaws.com"}},
        {"actor": "sso.amazonaws.com"},
    ),
    "nothing known of the caller": ({"userIdentity": None, "sourceIPAddress": None}, {"actor": "", "source_ip": ""}),
    "IAM in China": ({"eventSource": "iam.cn-north-1.amazonaws.com.cn"}, {"user": "ana"}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_an_event_from_its_record(name: str) -> None:
    changed, expected = RECORDS[name]
    found = iam_audit.event_of({**RECORD, **changed})
    assert found is not None
    assert found.time == datetime(2024, 5, 6, 7, 8, 9, tzinfo=timezone.utc)
    assert found.name == "DeleteUser"
    assert found.id == RECORD["eventID"]
    assert {field: getattr(found, field) for field in expected} == expected


@pytest.mark.parametrize(
    "changed",
    [{"errorCode": "AccessDenied"}, {"errorCode": "NoSuchEntityException", "errorMessage": "gone"}]
    + [{"eventSource": source} for source in ("transfer.amazonaws.com", "identitystore.amazonaws.com", "iamx.example")],
)
def test_records_that_are_no_event_of_iam_or_failed(changed: Json) -> None:
    assert iam_audit.event_of({**RECORD, **changed}) is None


names = st.text(st.sampled_from("='+-@,.\"\\\t abC"), min_size=1, max_size=6).filter(lambda name: name != ROOT)
moments = st.datetimes(datetime(2015, 1, 1), datetime(2030, 1, 1), timezones=st.just(timezone.utc))
keys = st.builds(
    iam_audit.AccessKey,
    st.text("ABC1", min_size=16, max_size=20),
    st.sampled_from(["Active", "Inactive", "Expired"]),
    moments,
    st.none(),
    st.just("N/A"),
)
kinds = st.lists(st.sampled_from(["Hardware", "SMS", "Security key", "Virtual"]), unique=True)
people = st.builds(
    iam_audit.User,
    names,
    st.booleans(),
    st.none(),
    kinds.map(lambda each: tuple(sorted(each))),
    st.lists(keys, max_size=2, unique_by=lambda each: each.id).map(tuple),
)


@given(st.lists(people, max_size=4, unique_by=lambda one: one.name))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_compares_as_unchanged(tmp_path: Path, users: list[iam_audit.User]) -> None:
    audited = iam_audit.AuditedAccount(ACCOUNT, NOW, tuple(users))
    path = tmp_path / "account.csv"
    iam_audit.write_csv(path, iam_audit.CSV_COLUMNS, iam_audit.rows_of(audited))
    read = iam_audit.read_states(path, ONE)
    after = iam_audit.states_of(iam_audit.rows_of(audited))
    assert list(iam_audit.changes_between(ACCOUNT, read, after)) == []
    assert set(read) == {one.name for one in users}


@pytest.mark.parametrize("account_id", [TWO, THREE])
def test_a_missing_root_row_is_neither_fixed_nor_new(base: Path, account_id: str) -> None:
    """Root has a password and no MFA in the one report (TWO's earlier, THREE's new one), and no row in the other."""
    bob = iam_audit.User("bob", True, None, (), (iam_audit.AccessKey(key_id("BOB"), "Active", ago(1), None, "N/A"),))
    users = [bob] if account_id == TWO else [iam_audit.User(ROOT, True, None, (), ()), bob]
    tracking = iam_audit.open_tracking(base.parent, None, "o-test123456")
    iam_audit.track_account(
        tracking, iam_audit.AuditedAccount(iam_audit.Account(account_id, "one", "ACTIVE"), NOW, tuple(users))
    )
    assert tracking.compared == {account_id}
    assert (tracking.mfa_fixed, tracking.mfa_new) == (0, [])


@pytest.mark.parametrize(("name", "figures"), [("robert", (0, 0)), ("someone", (1, 1))])
def test_a_renamed_user_without_mfa_is_neither_fixed_nor_new(base: Path, name: str, figures: tuple[int, int]) -> None:
    """His key tells that he is the same; whoever has another key is somebody else."""
    made = iam_audit.AccessKey(key_id("BOB" if name == "robert" else "NEW"), "Active", ago(1), None, "N/A")
    users = (iam_audit.User(name, True, None, (), (made,)),)
    tracking = iam_audit.open_tracking(base.parent, None, "o-test123456")
    iam_audit.track_account(tracking, iam_audit.AuditedAccount(iam_audit.Account(THREE, "one", "ACTIVE"), NOW, users))
    assert (tracking.mfa_fixed, len(tracking.mfa_new)) == figures


EVENT = iam_audit.Event(NOW, "DeleteAccessKey", "ana", "K", "", "arn:aws:iam::111111111111:user/eve", "", "", "")


@pytest.mark.parametrize(
    ("what", "witness", "event", "line"),
    [
        ("access-key-created", "", None, "ana K"),
        ("access-key-created", "not found", None, "ana K"),
        ("access-key-created", "confirmed", EVENT, "ana K by user/eve"),
        ("access-key-created", "contradicted", EVENT, "ana K (contradicted by CloudTrail)"),
        (iam_audit.CAME_AND_WENT, "confirmed", EVENT, "ana K deleted again by user/eve"),
    ],
)
def test_nobody_is_named_who_did_something_else(
    what: str, witness: str, event: iam_audit.Event | None, line: str
) -> None:
    change = iam_audit.Change(ONE, "one", "ana", "K", what, witness=witness, event=event)
    assert iam_audit.change_line(change) == f"{ONE} one {line}"


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["--since", "2024-01-31"], "--cloudtrail"),
        (["--cloudtrail", "--since", f"{NOW + timedelta(days=2):%Y-%m-%d}"], "future"),
        (["--cloudtrail", "--since", f"{NOW + timedelta(minutes=10):%Y-%m-%dT%H:%M:%SZ}"], "future"),
        *((["--cloudtrail", "--since", text], repr(text)) for text in ("yesterday", "2024-02-30", "31.01.2024", "")),
        (["--cloudtrail", "--since", "0001-01-01T00:00:00+14:00"], "0001-01-01T00:00:00+14:00"),
        (["--previous", "/dev/null/none"], "/dev/null/none"),
        (["--fail-on", "new-keys:1"], "new-keys:1"),
        (["--fail-on", "findings:1,keys"], "keys"),
    ],
)
def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str], options: list[str], value: str) -> None:
    with pytest.raises(SystemExit) as stop:
        iam_audit.parse_arguments(["--role", "Audit", *options])
    assert stop.value.code == 2
    assert value in capsys.readouterr().err


@pytest.mark.parametrize("text", ["findings:1,new-keys", "new-keys,findings:1", "findings:1, new-keys"])
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


# --- against moto -----------------------------------------------------------------------------------------------------


@pytest.mark.program
def test_an_organization_on_moto_that_changes(program: Program, tmp_path: Path) -> None:
    """What an administrator does by API calls between two runs into the same folder."""
    virtual = ("Virtual",)
    users = (
        UserSpec("ana", password=True),
        UserSpec("bob", password=True, mfa=virtual),
        UserSpec("svc", keys=(KeySpec(), KeySpec(status="Inactive"))),
        UserSpec("old", password=True, keys=(KeySpec(),)),
    )
    accounts = [AccountSpec("payments", ONE, users=users), AccountSpec("closing", TWO), AccountSpec("same", THREE)]
    reports = tmp_path / "reports"
    reports.mkdir(mode=0o700)
    with MotoServer() as server:
        made = fill(server, accounts)
        role = accounts[0].role
        svc, old = made.accounts[ONE].users["svc"], made.accounts[ONE].users["old"]
        run = again(program, server.env(), reports, "--role", role)
        assert run.exit_code == 0, run.stderr
        iam = iam_client(server, ONE)
        [serial] = made.accounts[ONE].users["bob"].serials
        iam.delete_login_profile(UserName="ana")
        iam.deactivate_mfa_device(UserName="bob", SerialNumber=serial)
        iam.delete_access_key(UserName="svc", AccessKeyId=svc.keys[0].id)
        iam.update_access_key(UserName="svc", AccessKeyId=svc.keys[1].id, Status="Active")
        new = iam.create_access_key(UserName="svc")["AccessKey"]["AccessKeyId"]
        iam.delete_access_key(UserName="old", AccessKeyId=old.keys[0].id)
        iam.delete_login_profile(UserName="old")
        iam.delete_user(UserName="old")
        iam.create_user(UserName="young")
        organizations_client(server).close_account(AccountId=TWO)
        server.expire_reports()
        result = again(program, server.env(), reports, "--role", role)
    ana = "ana||console-disabled|Configurada|No configurada|"
    bob = "bob||mfa-removed|Virtual|None|"
    svc_rows = [
        f"svc|{svc.keys[0].id}|access-key-deleted|Active||",
        f"svc|{svc.keys[1].id}|access-key-activated|Inactive|Active|",
        f"svc|{new}|access-key-created||Active|",
    ]
    old_rows = ["old||user-deleted|||", f"old|{old.keys[0].id}|access-key-deleted|Active||"]
    expected = [ana, bob, *old_rows, *sorted(svc_rows), "young||user-created|||"]
    assert changes(result) == [f"{ONE}|payments|{each}||||" for each in expected]
    found = summary_of(result)["changes"]
    assert found["console_users_without_mfa"] == {"fixed": 2, "new": 1}
    assert (found["accounts_compared"], found["accounts_not_compared"]) == (2, 1)


# --- cost -------------------------------------------------------------------------------------------------------------

# A process of its own, so that pytest is not in the figures: it writes the CSVs of 1,000 accounts into a folder, and
# prints what it costs to read that run and to compare as many accounts with it.
COST = """
import resource, sys
from datetime import datetime, timezone
from pathlib import Path
import iam_audit

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)

def people(run):
    yield iam_audit.User(iam_audit.ROOT, False, None, (), ())
    for n in range(50):
        made = [f"AKIA{n:010}{k}{run if (n, k) == (7, 0) else 0:05}" for k in range(n % 3)]
        keys = tuple(iam_audit.AccessKey(key_id, "Active", NOW, None, "N/A") for key_id in made)
        yield iam_audit.User(f"person-number-{n:03}", n % 2 == 0, None, ("Virtual",) * (n % 4 // 2), keys)

def account(number, run):
    return iam_audit.AuditedAccount(iam_audit.Account(f"{10**11 + number}", "some name", "ACTIVE"), NOW, run)

def write(folder):
    first = account(0, tuple(people(1)))
    iam_audit.write_csv(folder / "100000000000.csv", iam_audit.CSV_COLUMNS, iam_audit.rows_of(first))
    text = (folder / "100000000000.csv").read_text("utf-8")
    for number in range(1000):
        (folder / f"{10**11 + number}.csv").write_text(text.replace("100000000000", f"{10**11 + number}"), "utf-8")

def spent():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def peak_memory():
    # in MB; Linux counts into ru_maxrss what the process was before it became this program: that of pytest
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

folder = Path(sys.argv[1])
write(folder / "accounts")
now = tuple(people(2))
before = spent()
tracking = iam_audit.open_tracking(folder.parent, None, "o-test123456")
for number in range(1000):
    iam_audit.track_account(tracking, account(number, now))
print(spent() - before, peak_memory(), len(tracking.compared), len(tracking.changes))
"""


@pytest.mark.program
def test_comparing_a_thousand_accounts_is_cheap(program: Program, base: Path, tmp_path: Path) -> None:
    """Less than 2 s of CPU and, SDK and all, 100 MB."""
    folder = tmp_path / base.name
    (folder / "accounts").mkdir(parents=True)
    summary = json.loads((base / "summary.json").read_text("utf-8"))
    [entry] = [one for one in summary["accounts"] if one["id"] == ONE]
    entry = {**entry, "users": 50, "gaps": {**entry["gaps"], "access_keys": 49}}
    accounts = [{**entry, "id": f"{100000000000 + number}"} for number in range(1000)]
    (folder / "summary.json").write_text(json.dumps({**summary, "accounts": accounts}), "utf-8")
    command = [program.python, "-c", COST, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(Path(program.path).parent)}
    for _ in range(3):  # what else the machine does can only add to the CPU time
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=TIMEOUT
        )
        seconds, megabytes, compared, changed = map(float, done.stdout.split())
        if seconds < 2:
            break
    assert (compared, changed) == (1000, 2000)
    assert seconds < 2
    assert megabytes < 100


@pytest.mark.program
def test_a_run_that_is_only_in_the_table_does_not_stop_the_audit(
    serve: Serve, program: Program, base: Path, tmp_path: Path
) -> None:
    good = spoiled(base, tmp_path / "reports", lambda _: None)
    other = good.with_name("20200101T000000Z")
    other.mkdir()
    (other / "summary.json").write_text("{", encoding="utf-8")
    result = again(program, serve(*settled()).env(), good.parent)
    assert Path(summary_of(result)["changes"]["folder"]).name == good.name
    assert "20200101T000000Z" in result.stdout


@pytest.mark.program
def test_quiet_says_where_nothing_could_be_compared(
    serve: Serve, program: Program, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What has changed in an account that failed shows in no comparison; whoever reads the mail must know."""
    reports = tmp_path_factory.mktemp("blind")
    endpoint = serve(account(ONE, "one", role="denied"), account(TWO, "two"))
    assert again(program, endpoint.env(), reports, "--quiet").exit_code == 3
    endpoint.update({"accounts": [account(ONE, "one"), account(TWO, "two"), account(THREE, "joined")]})
    said = again(program, endpoint.env(), reports, "--quiet").stdout
    assert (
        said
        == f"""\
Not compared, because the earlier run had not audited them: 2 accounts
  {ONE} one
  {THREE} joined
"""
    )
    assert again(program, endpoint.env(), reports, "--quiet").stdout == ""


@pytest.mark.program
def test_new_keys_where_nothing_could_be_compared(
    serve: Serve, program: Program, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Their own dates tell: a key created while an account failed, or in one that joined, must not slip through."""
    reports = tmp_path_factory.mktemp("elsewhere")
    endpoint = serve(account(ONE, "one", role="denied"), account(TWO, "two"))
    again(program, endpoint.env(), reports)
    soon = datetime.now(timezone.utc) + timedelta(minutes=1)
    users = {
        one: [
            user("svc", keys=[key(key_id(f"{one[0]}OLD"), created=ago(20)), key(key_id(f"{one[0]}NEW"), created=soon)])
        ]
        for one in (ONE, THREE)
    }
    accounts = [
        account(ONE, "one", users=users[ONE]),
        account(TWO, "two"),
        account(THREE, "joined", users=users[THREE]),
    ]
    endpoint.update({"accounts": accounts})
    result = again(program, endpoint.env(), reports, "--quiet", "--fail-on", "new-keys")
    assert result.exit_code == 4
    assert result.stdout.startswith(f"""\
New access keys since the earlier run
  {ONE} one svc {key_id("1NEW")} (account not compared)
  {THREE} joined svc {key_id("3NEW")} (account not compared)
Not compared""")
    assert changes(result) == [f"{THREE}|joined|||account-joined|||||||"]
    found = summary_of(result)["changes"]["new_access_keys"]
    assert [(one["access_key_id"], one["change"], one["account_compared"]) for one in found] == [
        (key_id("1NEW"), "access-key-created", False),
        (key_id("3NEW"), "access-key-created", False),
    ]
    assert again(program, endpoint.env(), reports, "--quiet", "--fail-on", "new-keys").exit_code == 0


@pytest.mark.program
def test_levels_that_only_other_accounts_or_another_age_explain(
    serve: Serve, program: Program, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reports = tmp_path_factory.mktemp("levels")
    old = user("ana", password=True, keys=[key(key_id("OLD"), created=ago(60))])
    endpoint = serve(account(ONE, "one", users=[old]), account(TWO, "two", users=[old]))
    again(program, endpoint.env(), reports, "--max-key-age", "30")
    result = again(program, endpoint.env(), reports)
    assert "phase 1: In Progress, now In Progress\n" in result.stdout
    assert "phase 2: In Progress, now Complete\n  --max-key-age was 30, now 90: " in result.stdout
    assert summary_of(result)["changes"]["max_key_age_days_then"] == 30
    endpoint.update({"accounts": [account(ONE, "one", users=[old], state="SUSPENDED"), account(TWO, "two")]})
    result = again(program, endpoint.env(), reports)
    endpoint.update({"accounts": [account(ONE, "one", users=[old]), account(TWO, "two")]})
    result = again(program, endpoint.env(), reports)
    assert "phase 1: Complete, now In Progress (the accounts compared: Complete, now Complete)\n" in result.stdout
    assert "--max-key-age was" not in result.stdout


@pytest.mark.program
def test_levels_where_no_account_is_compared(
    serve: Serve, program: Program, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reports = tmp_path_factory.mktemp("none-compared")
    endpoint = serve(account(ONE, "one"))
    again(program, endpoint.env(), reports)
    endpoint.update({"accounts": [account(ONE, "one", role="denied")]})
    result = again(program, endpoint.env(), reports)
    assert "phase 1: Complete, now Not Started\n  phase 2: Advanced, now Not Started\n" in result.stdout
    phase1 = summary_of(result)["changes"]["maturity"]["phase1"]
    assert phase1 == {"then": "Complete", "now": "Not Started", "compared_then": None, "compared_now": None}

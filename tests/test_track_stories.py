"""Track over HTTP: what changed between two runs, and what CloudTrail says of it.

The program runs twice, against an organization that changes in between. `story` is one run over all kinds of change,
witness and account; its events and users stand in a table of cases, one case per user.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from builders import (
    FIVE,
    FOUR,
    MANAGEMENT,
    ONE,
    SIX,
    THREE,
    TODAY,
    TWO,
    Damage,
    again,
    ago,
    backdate,
    changes,
    changes_of,
    edit_summary,
    key_id,
    lines,
    replaced,
    rewritten,
    spoiled,
    summary_of,
    without_root,
)
from conftest import Program, Result, Serve, screen
from endpoint import (
    Endpoint,
    Json,
    account,
    event,
    key,
    root,
    root_key,
    rule,
    user,
    world,
)
from organization import (
    AccountSpec,
    KeySpec,
    MotoServer,
    UserSpec,
    fill,
    iam_client,
    organizations_client,
)

pytestmark = pytest.mark.program

SEVEN, EIGHT, NINE, TEN, ELEVEN, TWELVE = (
    f"{prefix}{'0' * 10}" for prefix in ("70", "80", "90", "10", "11", "12")
)
BUSY, DAMAGED = "130000000000", "140000000000"

EARLIER = TODAY - timedelta(days=10)
ALICE = "arn:aws:sts::999999999999:assumed-role/Admin/alice"
# Text from strangers: formulas for a spreadsheet, control sequences for a terminal.
MALLORY = "arn:aws:sts::999999999999:assumed-role/=cmd/\x1b[31mmallory"
AGENT = '=HYPERLINK("http://203.0.113.9")\x1b]0;owned\x07'
HOSTILE_NAME = "=pay\x1b[2Jments"


def mfa(name: str) -> str:
    return f"arn:aws:iam::{ONE}:mfa/{name}"


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
    return "|".join(
        [
            *cells,
            detail["eventName"],
            when,
            detail["userIdentity"]["arn"],
            detail["sourceIPAddress"],
        ]
    )


def key_cases() -> dict[str, Case]:
    """Access keys of users who are there all the time."""
    cases = {}
    hostile = {"actor": MALLORY, "user_agent": AGENT, "source_ip": "@SUM(1)"}
    made = event("CreateAccessKey", ago(1), user="key-created", key=key_id("CREATED"), **hostile)
    seen_safely = row(
        "key-created", key_id("CREATED"), "access-key-created", "", "Active", "confirmed", seen=made
    )
    cases["key-created"] = Case(
        user("key-created"),
        user("key-created", keys=[key(key_id("CREATED"))]),
        [made],
        [seen_safely.replace("|@SUM", "|'@SUM")],
    )
    by_himself = event(
        "DeleteAccessKey",
        ago(2),
        key=key_id("DELETED"),
        actor=f"arn:aws:iam::{ONE}:user/key-deleted",
    )
    cases["key-deleted"] = Case(
        user("key-deleted", keys=[key(key_id("DELETED"))]),
        user("key-deleted"),
        [by_himself],
        [
            row(
                "key-deleted",
                key_id("DELETED"),
                "access-key-deleted",
                "Active",
                "",
                "confirmed",
                seen=by_himself,
            )
        ],
    )
    switches = [
        ("ON", "Active"),
        ("ON", "Inactive"),
        ("ON", "Active"),
        ("OFF", "Inactive"),
        ("OFF", "Inactive"),
    ]
    turns = [
        event("UpdateAccessKey", ago(9 - n), user="switched", key=key_id(which), status=status)
        for n, (which, status) in enumerate(switches)
    ]
    cases["switched"] = Case(
        user("switched", keys=[key(key_id("OFF")), key(key_id("ON"), status="Inactive")]),
        user("switched", keys=[key(key_id("OFF"), status="Inactive"), key(key_id("ON"))]),
        turns,
        [
            row(
                "switched",
                key_id("ON"),
                "access-key-activated",
                "Inactive",
                "Active",
                "confirmed",
                seen=turns[2],
            ),
            row(
                "switched",
                key_id("OFF"),
                "access-key-deactivated",
                "Active",
                "Inactive",
                "confirmed",
                seen=turns[4],
            ),
        ],
    )
    came = event("CreateAccessKey", ago(3), user="visitor", key=key_id("WENT"))
    went = event("DeleteAccessKey", ago(2.5), user="visitor", key=key_id("WENT"), actor=MALLORY)
    cases["visitor"] = Case(
        user("visitor"),
        user("visitor"),
        [came, went],
        [
            row(
                "visitor",
                key_id("WENT"),
                "access-key-came-and-went",
                "",
                "",
                "confirmed",
                seen=went,
            )
        ],
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
        [
            row(
                "console-enabled",
                "",
                "console-enabled",
                "No configurada",
                "Configurada",
                "confirmed",
                seen=enabled,
            )
        ],
    )
    disabled = event("DeleteLoginProfile", ago(1.6), user="console-disabled")
    cases["console-disabled"] = Case(
        user("console-disabled", password=True),
        user("console-disabled"),
        [disabled],
        [
            row(
                "console-disabled",
                "",
                "console-disabled",
                "Configurada",
                "No configurada",
                "confirmed",
                seen=disabled,
            )
        ],
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
            row(
                "user-created",
                key_id("BORN"),
                "access-key-created",
                "",
                "Active",
                "confirmed",
                seen=key_born,
            ),
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
            row(
                "user-deleted",
                key_id("GONE"),
                "access-key-deleted",
                "Inactive",
                "",
                "confirmed",
                seen=key_gone,
            ),
        ],
    )
    return cases


# Never a witness: calls that failed, calls to another service, what is older than the earlier run.
DENIED_CALL = event(
    "DeleteAccessKey", ago(2.1), user="denied", key=key_id("DENIED"), error_code="AccessDenied"
)
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
        None,
        user("transfer"),
        [OTHER_SERVICE],
        [row("transfer", "", "user-created", "", "", "not found")],
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
        [
            row(
                "contradicted",
                key_id("LIES"),
                "access-key-deleted",
                "Active",
                "",
                "contradicted",
                seen=only_created,
            )
        ],
    )
    return cases


CASES = {**key_cases(), **sign_in_cases(), **user_cases(), **unconfirmed_cases()}
ODD_NAMES = ["=x", "'x", "'=x", "''+x", "+a", "@b", "-c"]
# More than two pages, newest first: the event that explains the new user is the last to come.
CROWD = [
    event("CreateUser", ago(8) + timedelta(minutes=n), user=f"crowd-{n:03}") for n in range(120)
]
# AWS's own word for root where it is the user that an MFA device is for:
# https://docs.aws.amazon.com/awscloudtrail/latest/userguide/cloudtrail-event-reference-aws-console-sign-in-events.html
ROOT_ARN = f"arn:aws:iam::{ELEVEN}:root"
ROOT_EVENTS = [
    event("DeleteAccessKey", ago(4.2), actor=ROOT_ARN, key=key_id("OLDROOT")),
    event("CreateAccessKey", ago(4.1), actor=ROOT_ARN, key=key_id("NEWROOT")),
    event(
        "EnableMFADevice",
        ago(4),
        actor=ROOT_ARN,
        user="AWS ROOT USER",
        serial=f"arn:aws:iam::{ELEVEN}:mfa/root",
    ),
]
MANAGED = event("CreateAccessKey", ago(0.5), user="boss", key=key_id("BOSS"))
JOINED = event("CreateUser", ago(0.6), user="newcomer")


def with_key(account_id: str, name: str, number: int, **options: Any) -> Json:
    """An account whose only user has that many keys."""
    keys = [key(key_id(f"{account_id[:3]}K{n}")) for n in range(number)]
    return account(account_id, name, users=[user("machine", keys=keys)], **options)


def uncovered(account_id: str, name: str, number: int = 1, **options: Any) -> Json:
    """An account with so many console users without MFA, each with a key."""
    users = [
        user(f"person-{n}", password=True, keys=[key(key_id(f"{account_id[:3]}P{n}"))])
        for n in range(number)
    ]
    return account(account_id, name, users=users, **options)


def accounts_before() -> list[Json]:
    return [
        account(MANAGEMENT, "management", users=[user("boss")]),
        account(
            ONE,
            "payments",
            users=[case.before for case in CASES.values() if case.before is not None],
        ),
        with_key(TWO, "no-witness", 0),
        uncovered(THREE, "failed-then", role="denied"),
        uncovered(FOUR, "failed-now"),
        uncovered(FIVE, "suspended-now"),
        uncovered(SIX, "left"),
        uncovered(EIGHT, "excluded-now"),
        uncovered(NINE, "excluded-then"),
        account(
            TEN,
            "=odd",
            users=[user(name, keys=[key(key_id(f"ODD{n}"))]) for n, name in enumerate(ODD_NAMES)],
        ),
        account(
            ELEVEN,
            "root",
            root=root(password=True, keys=[root_key(last_rotated="2024-01-01T00:00:00Z")]),
        ),
        account(
            TWELVE,
            "root-row-gone",
            users=[user("zoe")],
            root=root(password=True, mfa=True, keys=[root_key()]),
        ),
        account(BUSY, "busy"),
        with_key(DAMAGED, "damaged-trail", 0),
    ]


def accounts_after() -> list[Json]:
    new_root = root(password=True, virtual=True, keys=[root_key(last_rotated=ago(4.1))])
    users = [case.after for case in CASES.values() if case.after is not None]
    return [
        account(
            MANAGEMENT,
            "management",
            users=[user("boss", keys=[key(key_id("BOSS"))])],
            events=[MANAGED],
        ),
        account(
            ONE,
            HOSTILE_NAME,
            users=users,
            events=[each for case in CASES.values() for each in case.events],
        ),
        with_key(
            TWO,
            "no-witness",
            1,
            deny=["LookupEvents"],
            events=[event("CreateUser", ago(1), user="unseen")],
        ),
        uncovered(THREE, "failed-then", 2),
        uncovered(FOUR, "failed-now", 2, role="denied"),
        uncovered(FIVE, "suspended-now", 0, state="SUSPENDED"),
        uncovered(SEVEN, "joined", events=[JOINED]),
        uncovered(EIGHT, "excluded-now", 0),
        uncovered(NINE, "excluded-then", 0),
        account(
            TEN,
            "=odd",
            users=[user(name, keys=[key(key_id(f"ODD{n}"))]) for n, name in enumerate(ODD_NAMES)],
        ),
        account(ELEVEN, "root", root=new_root, events=ROOT_EVENTS),
        without_root(account(TWELVE, "root-row-gone", users=[user("zoe")])),
        account(BUSY, "busy", users=[user("crowd-000")], events=CROWD),
        with_key(DAMAGED, "damaged-trail", 1),
    ]


RULES = [
    rule("LookupEvents", BUSY, error="ThrottlingException", times=1),
    rule("LookupEvents", BUSY, error="InternalFailure", status=500, skip=3, times=1),
    rule(
        "LookupEvents",
        DAMAGED,
        raw='{"Events": [{"EventName": "CreateUser", "CloudTrailEvent": "{"}]}',
    ),
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
    # No limit of the endpoint's own: calls that a busy machine sends late come closer together than they were paced.
    serve(*accounts_after(), rules=RULES, record=True, lookup_rate=None)
    options = [
        "--include-management",
        "--exclude",
        EIGHT,
        "--previous",
        str(first.folder),
        "--cloudtrail",
    ]
    second = program.in_terminal({**env, "NO_COLOR": "1"}, *options, everything=True)
    text = "\n".join(screen(second.terminal))  # refuses control sequences
    return Story(first, first_stats, second, endpoint.stats(), text)


def test_the_first_run_is_the_baseline(story: Story) -> None:
    assert not (story.first.folder / "changes.csv").exists()
    assert not (story.first.folder / "events.csv").exists()
    assert summary_of(story.first)["changes"] is None
    assert summary_of(story.first)["cloudtrail"] is None
    assert "this run is the baseline" in story.first.stdout
    assert "this run is the baseline" not in story.text


@pytest.mark.parametrize("name", CASES)
def test_a_users_changes_are_lines_with_their_witness(story: Story, name: str) -> None:
    rows = [each for each in changes_of(story.second, ONE) if each.split("|")[0] == name]
    assert rows == CASES[name].rows


def test_nothing_else_counts_as_a_change(story: Story) -> None:
    assert len(changes_of(story.second, ONE)) == sum(len(case.rows) for case in CASES.values())


def test_a_renamed_account_is_compared_under_its_new_name(story: Story) -> None:
    names = {each.split("|")[1] for each in changes(story.second) if each.startswith(ONE)}
    assert names == {"'" + HOSTILE_NAME}


def test_names_with_apostrophes_in_the_csv_compare_as_unchanged(story: Story) -> None:
    assert {each["username"] for each in story.first.rows(TEN)} >= {
        "'=x",
        "'x",
        "''=x",
        "'''+x",
        "'+a",
        "'@b",
        "'-c",
    }
    assert changes_of(story.second, TEN) == []


def test_roots_key_is_replaced_and_root_gets_mfa(story: Story) -> None:
    """The report has no ID of root's key: only its creation date tells that it is another one."""
    gone, made, enabled = ROOT_EVENTS
    name, slot = "<root_account>", "<root_access_key_1>"
    assert changes_of(story.second, ELEVEN) == [
        row(name, "", "mfa-added", "None", "Virtual", "confirmed", seen=enabled),
        row(name, slot, "access-key-created", "", "Active", "confirmed", seen=made),
        row(name, slot, "access-key-deleted", "Active", "", "confirmed", seen=gone),
    ]


def test_a_missing_root_row_is_no_change(story: Story) -> None:
    assert changes_of(story.second, TWELVE) == []


def test_accounts_that_joined_or_left_are_one_line_each(story: Story) -> None:
    assert [each for each in changes(story.second) if "|account-" in each] == [
        f"{SIX}|left|||account-left|||||||",
        f"{SEVEN}|joined|||account-joined|||||||",
    ]
    assert len(changes_of(story.second, SIX)) == len(changes_of(story.second, SEVEN)) == 1


@pytest.mark.parametrize("account_id", [THREE, FOUR, FIVE, EIGHT, NINE])
def test_an_account_that_one_run_did_not_audit_is_not_compared(
    story: Story, account_id: str
) -> None:
    assert changes_of(story.second, account_id) == []


@pytest.mark.parametrize(
    ("account_id", "code"), [(TWO, "AccessDeniedException"), (DAMAGED, "DamagedEvent")]
)
def test_no_witness_where_the_lookup_fails(story: Story, account_id: str, code: str) -> None:
    """The account still counts as audited, and its changes as changes."""
    made = key_id(f"{account_id[:3]}K0")
    assert changes_of(story.second, account_id) == [
        row("machine", made, "access-key-created", "", "Active", "unavailable")
    ]
    assert story.second.accounts[account_id]["result"] == "audited"
    assert code in summary_of(story.second)["cloudtrail"]["unavailable"][account_id]
    assert re.search(rf"asked in 1 account: LookupEvents: {code}\n  {account_id}\n", story.text)
    assert "add cloudtrail:LookupEvents to the role's policy" in story.text


def test_only_those_accounts_lack_a_witness(story: Story) -> None:
    assert set(summary_of(story.second)["cloudtrail"]["unavailable"]) == {TWO, DAMAGED}


def test_all_pages_are_read_though_the_account_is_throttled(story: Story) -> None:
    """The explaining event is on the third page; one request is throttled, one answered with an error of AWS's own."""
    assert changes_of(story.second, BUSY) == [
        row("crowd-000", "", "user-created", "", "", "confirmed", seen=CROWD[0])
    ]
    assert story.second_stats["by_account"][BUSY]["LookupEvents"] == 16 + 2 + 1 + 1
    assert sum(each.startswith(BUSY) for each in lines(story.second.folder / "events.csv")) == 120


def test_events_are_asked_for_one_name_at_a_time(story: Story) -> None:
    """Sixteen names, one request each where a page holds all; none in an account that cannot be entered."""
    asked = {
        one: made.get("LookupEvents", 0) for one, made in story.second_stats["by_account"].items()
    }
    assert asked[ONE] == asked[TEN] == asked[MANAGEMENT] == 16
    assert asked.get(FOUR, 0) == asked.get(FIVE, 0) == asked.get(EIGHT, 0) == 0


def test_the_management_account_is_asked_with_the_profiles_own_credentials(story: Story) -> None:
    expected = [
        row("boss", key_id("BOSS"), "access-key-created", "", "Active", "confirmed", seen=MANAGED)
    ]
    assert changes_of(story.second, MANAGEMENT) == expected
    assert MANAGEMENT not in story.second_stats["assumed"]


def test_the_region_that_records_iam_is_asked(story: Story) -> None:
    scopes = {scope for scope in story.second_stats["scopes"] if scope.startswith("cloudtrail/")}
    assert scopes == {"cloudtrail/us-east-1"}


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


def test_at_most_two_lookups_a_second_in_an_account_and_accounts_side_by_side(story: Story) -> None:
    """By the endpoint's own clock, on a machine of any speed: without pacing nine take a few milliseconds."""
    recorded = story.second_stats["recorded"]
    of_iam = {action for _, account_id, action in recorded if account_id == ONE} - {"LookupEvents"}
    times: dict[str, list[float]] = defaultdict(list)
    last_of_iam: dict[str, float] = {}
    for second, account_id, action in recorded:
        if action == "LookupEvents":
            times[account_id].append(second)
        elif action in of_iam:
            last_of_iam[account_id] = second
    assert set(times) == {
        MANAGEMENT,
        ONE,
        TWO,
        THREE,
        SEVEN,
        NINE,
        TEN,
        ELEVEN,
        TWELVE,
        BUSY,
        DAMAGED,
    }
    whole = {
        one: made for one, made in times.items() if one not in (TWO, DAMAGED)
    }  # those stop at the first refusal
    late = 0.0  # seconds by which this machine was late at most; the throttled account goes slower on purpose
    for account_id in set(whole) - {BUSY}:
        ideal = (last_of_iam[account_id] + 0.5 * number for number in itertools.count())
        late = max(late, *(at - due for at, due in zip(whole[account_id], ideal)))
    for account_id, made in whole.items():
        assert made[-1] - last_of_iam[account_id] > 0.5 * (len(made) - 1), account_id
        assert (
            max(sum(begin <= one < begin + 1 for one in made) for begin in made) <= 4 + 2 * late
        ), account_id
    assert max(made[0] for made in whole.values()) < min(made[-1] for made in whole.values())
    assert story.second_stats["errors"]["ThrottlingException"] == 1  # by a rule


def test_events_csv_has_every_event_that_counts_oldest_first(story: Story) -> None:
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
    assert (
        len({each.split("|")[0] for each in rows}) == 5
    )  # else the order over all accounts shows nothing


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
def test_a_line_of_events_csv_says_who_did_what_to_whom(
    story: Story, case: str, number: int, expected: str
) -> None:
    made = CASES[case].events[number]
    [found] = [
        each for each in lines(story.second.folder / "events.csv") if each.endswith(made["EventId"])
    ]
    when = made["EventTime"].replace("Z", "+00:00")
    assert found == f"{ONE}|'{HOSTILE_NAME}|{when}|{expected}|{made['EventId']}"


def test_events_of_root_bear_its_name(story: Story) -> None:
    rows = [
        each.split("|")
        for each in lines(story.second.folder / "events.csv")
        if each.startswith(ELEVEN)
    ]
    assert [(each[3], each[4], each[5]) for each in rows] == [
        ("DeleteAccessKey", "<root_account>", key_id("OLDROOT")),
        ("CreateAccessKey", "<root_account>", key_id("NEWROOT")),
        ("EnableMFADevice", "<root_account>", ""),
    ]


def test_hostile_text_is_shown_without_its_control_characters(story: Story) -> None:
    """`screen` has refused what would steer the terminal; here it must have come that far at all."""
    assert "=pay\N{REPLACEMENT CHARACTER}[2Jments" in story.text
    assert "\N{REPLACEMENT CHARACTER}[31mmallory" in story.text


def test_the_summary_counts_changes_and_witnesses(story: Story) -> None:
    summary = summary_of(story.second)
    found = summary["changes"]
    assert found["since"] == EARLIER.isoformat()
    assert found["folder"] == str(story.first.folder)
    assert found["console_users_without_mfa"] == {"fixed": 4, "new": 3}
    assert (found["accounts_compared"], found["accounts_not_compared"]) == (8, 4)
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
    assert found["witnesses"] == {
        "confirmed": 19,
        "not found": 4,
        "contradicted": 1,
        "unavailable": 2,
    }
    assert {(one["access_key_id"], one["witness"]) for one in found["new_access_keys"]} == {
        (key_id("BOSS"), "confirmed"),
        (key_id("BORN"), "confirmed"),
        (key_id("CREATED"), "confirmed"),
        (key_id("WENT"), "confirmed"),
        ("<root_access_key_1>", "confirmed"),
        (key_id(f"{TWO[:3]}K0"), "unavailable"),
        (key_id(f"{DAMAGED[:3]}K0"), "unavailable"),
    }


def test_the_terminal_names_counts_and_new_keys(story: Story) -> None:
    found = summary_of(story.second)["changes"]
    assert "without MFA, root included: 4 fixed, 3 new" in story.text
    assert "access keys: 6 created, 6 deleted, " in story.text
    assert "1 joined, 1 left" in story.text
    assert re.search(r"not compared: 4 accounts", story.text)
    assert "CloudTrail has confirmed 19 changes" in story.text
    for one in found["new_access_keys"]:
        assert re.search(rf"{one['account_id']} .*{re.escape(one['access_key_id'])}", story.text), (
            one
        )


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
    "since after the earlier run": Job(
        TWO, 5, ["--since", f"{ago(1):%Y-%m-%dT%H:%M:%SZ}"], (1, 0), (deleted(TWO, 2),)
    ),
    "since 120 days": Job(THREE, None, ["--since", f"{ago(120):%Y-%m-%d}"], events=created(91, 89)),
    "earlier run of 100 days ago": Job(FOUR, 100, [], (1, 0), (deleted(FOUR, 91), *created(89))),
    "came and went": Job(
        FIVE, 5, ["--quiet", "--fail-on", "findings:1,new-keys"], (1, 1), pair("BRIEF", 2, 1)
    ),
    "since before the earlier run": Job(
        SIX,
        5,
        ["--since", f"{ago(20):%Y-%m-%dT%H:%M:%SZ}", *QUIET],
        (1, 0),
        (*pair("BRIEF", 12, 11), deleted(SIX, 10)),
    ),
}
PARTITIONS = {
    "aws-us-gov": ("us-gov-east-1", "us-gov-west-1"),
    "aws-cn": ("cn-northwest-1", "cn-north-1"),
}


class Looked(NamedTuple):
    """What the jobs found, and what became of a run in each other partition."""

    jobs: dict[str, Result]
    partitions: dict[str, tuple[Result, Json]]


@pytest.fixture(scope="module")
def looked(serve: Serve, program: Program, tmp_path_factory: pytest.TempPathFactory) -> Looked:
    """Each job with an account of its own, since CloudTrail counts calls by account."""
    env = serve(*(with_key(job.account, "one", job.keys[0]) for job in JOBS.values())).env()
    base = program(env).folder
    serve(
        *(
            with_key(job.account, "one", job.keys[1], events=list(job.events))
            for job in JOBS.values()
        )
    )

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


@pytest.mark.parametrize(
    ("name", "users", "days"),
    [
        ("first run", ["user-29", "user-1"], 30),
        ("since after the earlier run", [], None),
        ("since 120 days", ["user-89"], 90),
        ("earlier run of 100 days ago", ["user-89"], 90),
    ],
)
def test_how_far_back_cloudtrail_is_asked(
    looked: Looked, name: str, users: list[str], days: int | None
) -> None:
    assert users_in_events(looked.jobs[name]) == users
    summary = summary_of(looked.jobs[name])
    started = datetime.fromisoformat(summary["started"])
    asked = ago(1) if days is None else started - timedelta(days=days)
    assert abs(datetime.fromisoformat(summary["cloudtrail"]["since"]) - asked) <= timedelta(
        seconds=1
    )


def test_the_summary_says_that_cloudtrail_does_not_reach_back_to_the_earlier_run(
    looked: Looked,
) -> None:
    result = looked.jobs["earlier run of 100 days ago"]
    assert changes_of(result, FOUR) == [
        row("machine", key_of(FOUR), "access-key-deleted", "Active", "", "not found")
    ]
    assert "CloudTrail keeps events for 90 days" in result.stdout.partition("CloudTrail since")[2]


@pytest.mark.parametrize("name", ["first run", "since after the earlier run"])
def test_the_summary_does_not_blame_cloudtrail_for_what_since_leaves_out(
    looked: Looked, name: str
) -> None:
    """Where --since leaves days out, it is not CloudTrail that has forgotten them."""
    assert (
        "CloudTrail keeps events for 90 days"
        not in looked.jobs[name].stdout.partition("CloudTrail since")[2]
    )


def test_a_key_that_came_and_went_counts_as_new(looked: Looked) -> None:
    result = looked.jobs["came and went"]
    [_, went] = JOBS["came and went"].events
    assert changes_of(result, FIVE) == [
        row("machine", key_id("BRIEF"), "access-key-came-and-went", "", "", "confirmed", seen=went)
    ]
    assert result.exit_code == 4
    assert key_id("BRIEF") in result.stdout
    assert key_of(FIVE) not in result.stdout


def test_accounts_out_of_scope_have_not_left(looked: Looked) -> None:
    """The earlier run audited them all, this one only FIVE."""
    result = looked.jobs["came and went"]
    assert not [each for each in changes(result) if "account-left" in each]
    found = summary_of(result)["changes"]
    assert (found["accounts_compared"], found["accounts_not_compared"]) == (1, 0)


def test_what_happened_before_the_earlier_run_is_no_witness(looked: Looked) -> None:
    """--since makes events.csv longer; what the earlier run has seen the end of did not happen since that run."""
    result = looked.jobs["since before the earlier run"]
    assert changes_of(result, SIX) == [
        row("machine", key_of(SIX), "access-key-deleted", "Active", "", "not found")
    ]
    assert (result.exit_code, result.stdout) == (0, "")
    assert len(users_in_events(result)) == 3


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


def test_nothing_is_printed_where_nothing_changed(nights: Nights) -> None:
    """Neither on the first night, which has nothing to compare with, nor on the second."""
    assert [(night.exit_code, night.stdout, night.stderr) for night in nights.runs[:2]] == [
        (0, "", "")
    ] * 2
    assert changes(nights.runs[1]) == []
    assert not (nights.runs[0].folder / "changes.csv").exists()


def test_quiet_prints_new_keys_and_lost_mfa_and_nothing_else(nights: Nights) -> None:
    third = nights.runs[2]
    assert third.exit_code == 4
    shown = [line for line in third.stdout.splitlines() if line.startswith("  ")]
    assert [line for line in shown if "AKIA" in line] == [
        f"  {ONE} one svc {made}" for made in MANY[:10]
    ]
    assert re.search(r"\b2 more\b", third.stdout)
    text = re.sub(r".*AKIA.*|.*\b2 more\b.*", "", third.stdout)
    named = [line.split()[-1] for line in text.splitlines() if line.startswith("  ")]
    assert named == ["ana", "carl", "ana"]  # without MFA now: ana, carl; MFA removed: ana
    assert not re.search(r"bob|dora|two|KEPT", third.stdout)
    assert (
        len(third.stdout.splitlines()) == 1 + 10 + 1 + 3 + 3
    )  # which run it is, keys, how many more, people, three headings


def test_the_newest_run_is_compared_with(nights: Nights) -> None:
    found = summary_of(nights.runs[2])["changes"]
    assert Path(found["folder"]).name == nights.runs[1].folder.name
    assert found["console_users_without_mfa"] == {"fixed": 1, "new": 2}
    assert [each.split("|")[7] for each in changes(nights.runs[2])] == [""] * (
        12 + 5
    )  # CloudTrail was not asked


def then_and_now(then: str, now: str) -> dict[str, str]:
    """All accounts are in both runs."""
    return {"then": then, "now": now, "compared_now": now}


def test_levels_are_shown_then_and_now(nights: Nights) -> None:
    levels = summary_of(nights.runs[2])["changes"]["maturity"]
    assert levels == {
        "phase1": then_and_now("In Progress", "In Progress"),
        "phase2": then_and_now("In Progress", "Complete"),
    }
    assert "Phase 2: Complete (was In Progress)" in nights.named.stdout


def test_previous_compares_with_the_run_it_names(nights: Nights) -> None:
    """And new keys alone do not count where --fail-on asks for findings."""
    assert Path(summary_of(nights.named)["changes"]["folder"]).name == nights.runs[0].folder.name
    assert [each.split("|", 7)[:7] for each in changes(nights.named)] == [
        each.split("|", 7)[:7] for each in changes(nights.runs[2])
    ]
    assert nights.named.exit_code == 0


def test_no_key_is_new_where_there_is_no_earlier_run(nights: Nights) -> None:
    assert nights.runs[0].exit_code == 0  # though there is a key, of 200 days


# --- the runs that are there ------------------------------------------------------------------------------------------


def run_name(started: datetime) -> str:
    """The name of a run's folder."""
    return f"{started:%Y%m%dT%H%M%SZ}"


ANOTHER = {
    "id": "o-another0000",
    "management_account": MANAGEMENT,
    "management_account_included": False,
}


def settled() -> list[Json]:
    """An organization in which nothing changes: one active root key, keys of users, roots with and without MFA."""
    ana, bob = (
        user("ana", keys=[key(key_id("ANA"))]),
        user("bob", password=True, keys=[key(key_id("BOB"))]),
    )
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
def history(
    serve: Serve, program: Program, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Result:
    """A run among unfinished ones, one of another organization, four of the same second, and things that are no run.

    Their summaries do not tell of the runs before them.
    """
    reports = tmp_path_factory.mktemp("history") / "reports"

    def copy(name: str, started: datetime, audited: int, **changed: Any) -> None:
        shutil.copytree(base, reports / name)
        totals = {
            **json.loads((base / "summary.json").read_text("utf-8"))["totals"],
            "audited": audited,
        }
        started_at = started.isoformat()
        edit_summary(reports / name, started=started_at, totals=totals, runs=None, **changed)

    for number in range(1, 13):
        copy(run_name(ago(30 - number)), ago(30 - number), number)
    for number, suffix in ((101, ""), (102, "-2"), (110, "-10"), (109, "-9")):
        copy(f"{run_name(ago(9))}{suffix}", ago(9), number)
    copy(run_name(ago(8)), ago(8), 0)
    (reports / run_name(ago(8)) / "summary.json").unlink()
    copy(run_name(ago(7)), ago(7), 0, organization=ANOTHER)
    copy("kept for the auditors", ago(6), 0)
    (reports / run_name(ago(5))).write_text("no folder")
    return again(program, serve(*settled()).env(), reports, "--fail-on", "new-keys,findings:1")


def test_a_finding_alone_fails_a_run_that_asks_for_new_keys_too(history: Result) -> None:
    assert summary_of(history)["changes"]["new_access_keys"] == []
    assert history.exit_code == 4


def test_the_newest_finished_run_of_this_organization_is_found(history: Result) -> None:
    found = summary_of(history)["changes"]
    assert Path(found["folder"]).name == f"{run_name(ago(9))}-10"
    assert changes(history) == []


def test_the_last_runs_are_in_the_summary_and_twelve_are_shown(history: Result) -> None:
    summary = summary_of(history)
    audited = [*range(1, 13), 101, 102, 109, 110, 5]
    assert [one["audited"] for one in summary["runs"]] == audited
    assert summary["runs"][0] == {
        "started": ago(29).isoformat(),
        "audited": 1,
        "console_users_without_mfa": 4,
        "active_keys": 5,
        "active_keys_older_than_max_age": 5,
    }
    table = re.findall(r"^(20\d\d-\S+) +(\d+) +4 +5 +5$", history.stdout, re.MULTILINE)
    assert [int(number) for _, number in table][-12:] == audited[-12:]
    assert table[-1][0] == summary["started"]


# --- earlier runs that are damaged ------------------------------------------------------------------------------------


CSV, SUMMARY = f"accounts/{ONE}.csv", "summary.json"
# What is damaged how in the run that --previous names.
REFUSED: dict[str, tuple[str, Damage]] = {
    "damaged CSV": (CSV, rewritten(CSV, replaced(b"username", b"user"))),
    "missing CSV": (CSV, lambda folder: (folder / CSV).unlink()),
    "without a summary": (SUMMARY, lambda folder: (folder / SUMMARY).unlink()),
    "of another organization": ("", lambda folder: edit_summary(folder, organization=ANOTHER)),
}


class Refusals(NamedTuple):
    runs: dict[str, tuple[Result, Path]]
    stats: Json


@pytest.fixture(scope="module")
def refusals(
    serve: Serve, program: Program, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Refusals:
    """A run after each damaged one, and what the endpoint was asked in all of them."""
    endpoint = serve(*settled())

    def attempt(name: str) -> tuple[Result, Path]:
        _, damage = REFUSED[name]
        folder = spoiled(base, tmp_path_factory.mktemp("damaged") / "reports", damage)
        return again(program, endpoint.env(), folder.parent, "--previous", str(folder)), folder

    with ThreadPoolExecutor(2) as pool:
        return Refusals(
            dict(zip(REFUSED, pool.map(attempt, REFUSED), strict=True)), endpoint.stats()
        )


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_run_that_previous_names_is_refused(refusals: Refusals, name: str) -> None:
    result, folder = refusals.runs[name]
    damaged, _ = REFUSED[name]
    assert result.exit_code == 1
    assert str(folder / damaged) in result.stderr
    assert list(folder.parent.iterdir()) == [
        folder
    ]  # nothing is left of the run that could not start


def test_no_account_is_entered_before_the_earlier_run_is_known_to_be_whole(
    refusals: Refusals,
) -> None:
    assert refusals.stats["requests"]["DescribeOrganization"] == len(REFUSED)
    assert "AssumeRole" not in refusals.stats["requests"]


def test_a_run_that_is_only_in_the_table_does_not_stop_the_audit(
    serve: Serve, program: Program, base: Path, tmp_path: Path
) -> None:
    good = spoiled(base, tmp_path / "reports", lambda folder: edit_summary(folder, runs=None))
    other = good.with_name(run_name(ago(5)))
    other.mkdir()
    (other / "summary.json").write_text("{", encoding="utf-8")
    result = again(program, serve(*settled()).env(), good.parent)
    assert Path(summary_of(result)["changes"]["folder"]).name == good.name
    assert other.name in result.stdout
    assert other.name not in again(program, serve(*settled()).env(), good.parent, "--quiet").stdout


# --- accounts that could not be compared ------------------------------------------------------------------------------


def test_quiet_is_silent_on_clean_accounts_without_a_baseline(
    serve: Serve, program: Program, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Neither an account that failed before nor one that joined hides what is urgent there."""
    reports = tmp_path_factory.mktemp("blind")
    endpoint = serve(account(ONE, "one", role="denied"), account(TWO, "two"))
    assert again(program, endpoint.env(), reports, "--quiet").exit_code == 3
    endpoint.update(
        {"accounts": [account(ONE, "one"), account(TWO, "two"), account(THREE, "joined")]}
    )
    assert again(program, endpoint.env(), reports, "--quiet").stdout == ""
    assert again(program, endpoint.env(), reports, "--quiet").stdout == ""


def test_new_keys_are_told_by_their_dates_where_nothing_could_be_compared(
    serve: Serve, program: Program, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Their own dates tell: a key created while an account failed, or in one that joined, must not slip through."""
    reports = tmp_path_factory.mktemp("elsewhere")
    endpoint = serve(account(ONE, "one", role="denied"), account(TWO, "two"))
    again(program, endpoint.env(), reports)
    soon = datetime.now(timezone.utc) + timedelta(minutes=1)
    users = {
        one: [
            user(
                "svc",
                keys=[
                    key(key_id(f"{one[0]}OLD"), created=ago(20)),
                    key(key_id(f"{one[0]}NEW"), created=soon),
                ],
            )
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
    assert result.stdout.splitlines()[1:] == [
        "New keys since the last audit of their account",
        f"  {ONE} one svc {key_id('1NEW')} (account not compared)",
        f"  {THREE} joined svc {key_id('3NEW')} (account not compared)",
    ]
    assert changes(result) == [f"{THREE}|joined|||account-joined|||||||"]
    found = summary_of(result)["changes"]["new_access_keys"]
    assert [(one["access_key_id"], one["change"], one["account_compared"]) for one in found] == [
        (key_id("1NEW"), "access-key-created", False),
        (key_id("3NEW"), "access-key-created", False),
    ]
    assert (
        again(program, endpoint.env(), reports, "--quiet", "--fail-on", "new-keys").exit_code == 0
    )


def test_a_level_says_whether_other_accounts_or_another_age_explain_it(
    serve: Serve, program: Program, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reports = tmp_path_factory.mktemp("levels")
    old = user("ana", password=True, keys=[key(key_id("OLD"), created=ago(60))])
    endpoint = serve(account(ONE, "one", users=[old]), account(TWO, "two", users=[old]))
    again(program, endpoint.env(), reports, "--max-key-age", "30")
    result = again(program, endpoint.env(), reports)
    assert "Phase 1: unchanged (In Progress)\n" in result.stdout
    assert (
        "Phase 2: Complete (was In Progress)\n  --max-key-age was 30 and is 90 now: "
        in result.stdout
    )
    assert summary_of(result)["changes"]["max_key_age_days_then"] == 30
    endpoint.update(
        {"accounts": [account(ONE, "one", users=[old], state="SUSPENDED"), account(TWO, "two")]}
    )
    result = again(program, endpoint.env(), reports)
    endpoint.update({"accounts": [account(ONE, "one", users=[old]), account(TWO, "two")]})
    result = again(program, endpoint.env(), reports)
    # ONE is compared with the run before the last
    assert "Phase 1: unchanged (In Progress)\n  Phase 2: unchanged (Complete)\n" in result.stdout
    assert "--max-key-age was" not in result.stdout
    endpoint.update({"accounts": [account(TWO, "two"), account(THREE, "three", users=[old])]})
    result = again(program, endpoint.env(), reports)
    assert (
        "Phase 1: In Progress (was Complete); in the accounts compared: Complete\n" in result.stdout
    )


def test_no_level_is_compared_where_no_account_is(
    serve: Serve, program: Program, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reports = tmp_path_factory.mktemp("none-compared")
    endpoint = serve(account(ONE, "one"))
    again(program, endpoint.env(), reports)
    endpoint.update({"accounts": [account(ONE, "one", role="denied")]})
    result = again(program, endpoint.env(), reports)
    assert (
        "Phase 1: Not Started (not compared)\n  Phase 2: Not Started (not compared)\n"
        in result.stdout
    )
    phase1 = summary_of(result)["changes"]["maturity"]["phase1"]
    assert phase1 == {
        "then": None,
        "now": "Not Started",
        "compared_now": None,
    }


# --- against moto -----------------------------------------------------------------------------------------------------
def test_what_an_administrator_changes_on_moto_is_found(program: Program, tmp_path: Path) -> None:
    """What an administrator does by API calls between two runs into the same folder."""
    virtual = ("Virtual",)
    users = (
        UserSpec("ana", password=True),
        UserSpec("bob", password=True, mfa=virtual),
        UserSpec("svc", keys=(KeySpec(), KeySpec(status="Inactive"))),
        UserSpec("old", password=True, keys=(KeySpec(),)),
    )
    accounts = [
        AccountSpec("payments", ONE, users=users),
        AccountSpec("closing", TWO),
        AccountSpec("same", THREE),
    ]
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

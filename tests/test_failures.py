"""What goes wrong, seen over HTTP: one account's trouble stops no other, and nothing looks complete that is not."""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from builders import (
    MANAGEMENT,
    ONE,
    THREE,
    TWO,
    numbered,
    profile_env,
    released,
    until,
    with_constants,
    written,
)
from conftest import TRACEBACK, Program, Result, Serve, screen
from endpoint import (
    TIMEOUT,
    Endpoint,
    Json,
    access_key_id,
    account,
    generate,
    key,
    root,
    rule,
    secret_of,
    user,
)

pytestmark = pytest.mark.program

MFA_SERIAL = f"arn:aws:iam::{MANAGEMENT}:mfa/auditor"
ROLE_ACTIONS = [
    *(
        "GenerateCredentialReport",
        "GetCredentialReport",
        "ListUsers",
        "ListAccessKeys",
        "GetAccessKeyLastUsed",
    ),
    *("ListMFADevices", "ListVirtualMFADevices", "GetLoginProfile"),
    *("ListServiceSpecificCredentials", "GetAccountAuthorizationDetails"),
]
LIST = ROLE_ACTIONS[-1]  # of all users; where it is denied, ListUsers lists them
LISTS = [LIST, "ListUsers"]
SPARED = set(ROLE_ACTIONS[-2:])  # their denial fails no account
CALLER_ACTIONS = ["GetCallerIdentity", "DescribeOrganization", "ListAccounts", "AssumeRole"]


def full(account_id: str, name: str, **options: Any) -> Json:
    """An account of which the program asks everything that it can ask."""
    ana = user("ana", password=True, mfa=["GAHT12345678"], keys=[key(f"AKIA{account_id}0ANA")])
    new = user("new", in_report=False, password=True)
    return account(
        account_id, name, users=[ana, new], root=root(password=True, virtual=True), **options
    )


def for_each_action(options: Callable[[str], Json]) -> tuple[list[Json], dict[str, str]]:
    """An account for each action of the role, and one more; and which action belongs to which account."""
    actions = dict(zip(map(numbered, range(len(ROLE_ACTIONS))), ROLE_ACTIONS, strict=True))
    accounts = [
        full(account_id, action, **options(action)) for account_id, action in actions.items()
    ]
    return [*accounts, full(ONE, "well")], actions


# --- an account cannot be read ----------------------------------------------------------------------------------------


def test_a_denied_role_fails_its_account_and_says_what_to_look_at(
    serve: Serve, run_program: Program
) -> None:
    """AWS does not say why; the person is told what to look at."""
    result = run_program(serve(account(ONE, "one"), account(TWO, "no role", role="denied")).env())
    assert (result.exit_code, result.csvs) == (3, {ONE})
    assert result.failures == {TWO: ("AssumeRole", "AccessDenied")}
    assert re.search(f"{TWO}.*no role", result.stdout)
    for word in ("AssumeRole", "AccessDenied", "exist", "trust", "SCP"):
        assert word in result.stdout


def test_a_denied_action_fails_its_account_and_is_named(serve: Serve, run_program: Program) -> None:
    """But for the two that roles of older deployments lack: what only they tell is not checked."""
    accounts, actions = for_each_action(lambda action: {"deny": [action]})
    result = run_program(serve(*accounts).env())
    vital = {one: action for one, action in actions.items() if action not in SPARED}
    assert (result.exit_code, result.csvs) == (3, {ONE, *actions} - vital.keys())
    assert result.failures == {one: (action, "AccessDenied") for one, action in vital.items()}
    for action in vital.values():
        assert f"iam:{action}" in result.stdout


def denied(number: int, *, first: int = 0) -> list[Json]:
    accounts = []
    for n in range(first, first + number):
        accounts.append(account(numbered(n), f"no-role-{n}", role="denied"))
    return accounts


def test_ten_accounts_of_a_cause_are_listed_and_the_others_counted(
    serve: Serve, run_program: Program
) -> None:
    unlisted = [account(numbered(n), "no-list", deny=LISTS) for n in range(20, 30)]
    result = run_program(serve(*denied(13), *unlisted).env())
    assert len(result.failures) == 23
    shown = re.findall(r"^    (\d{12}) (no-[a-z]+)", result.stdout, re.MULTILINE)
    assert len(set(shown)) == len(shown)
    assert [name for _, name in shown].count("no-role") == 10
    assert [name for _, name in shown].count("no-list") == 10
    assert re.findall("^    and .*", result.stdout, re.MULTILINE) == [
        "    and 3 more, in summary.json"
    ]


PROBABLY_WRONG = (
    "iam_audit.py: AssumeRole was denied in all of the first 20 accounts: the name of role Audit or "
    "its trust policy is probably wrong; the run goes on.\n"
)


@pytest.mark.parametrize("options", [[], ["--quiet"]], ids=["loud", "quiet"])
def test_a_role_denied_in_the_first_20_accounts_is_said_at_once_and_once(
    serve: Serve, program: Program, options: list[str]
) -> None:
    endpoint = serve(*denied(25), account(ONE, "one", report_delay=None))
    with program.start(endpoint.env(), "--workers", "4", *options) as (process, output_dir):
        assert process.stderr is not None
        assert process.stderr.readline() == PROBABLY_WRONG  # while the run waits for a report
        endpoint.update({"accounts": [*denied(25), account(ONE, "one")]})
        result = program.finish(process, output_dir, endpoint.env())
    assert (result.exit_code, len(result.failures), result.csvs) == (3, 25, {ONE})
    assert result.stderr == ""  # nothing more


def other_denial(account_id: str) -> Json:
    role = f"arn:aws:iam::{account_id}:role/Audit"
    return rule("AssumeRole", fields={"RoleArn": role}, error="RegionDisabledException", status=403)


@pytest.mark.parametrize(
    ("accounts", "rules"),
    [
        (denied(19), []),
        ([account(ONE, "one"), *denied(25)], []),
        ([account(ONE, "one", report_delay=None), *denied(25)], []),
        (denied(25), [other_denial(numbered(0))]),
        (denied(25), [rule("AssumeRole", error="ValidationError")]),
        ([account(numbered(n), "one", deny=LISTS) for n in range(25)], []),
    ],
    ids=["fewer", "one audited", "one in hand", "another cause", "no denial", "another step"],
)
def test_nothing_is_said_of_the_role_where_it_may_be_right(
    serve: Serve, run_program: Program, accounts: list[Json], rules: list[Json]
) -> None:
    """One worker: the first account's role is assumed before the others are tried."""
    env = serve(*accounts, rules=rules).env()
    result = run_program(env, "--workers", "1", "--report-timeout", "2")
    assert (result.exit_code, result.stderr) == (3, "")


def test_an_error_nobody_has_thought_of_fails_its_account_at_once(
    serve: Serve, run_program: Program
) -> None:
    """It fails the account at once, whichever action it is."""
    accounts, actions = for_each_action(lambda _: {})
    rules = [
        rule(action, one, error="Novelty", message="never seen", status=400 + n % 4 * 3)
        for n, (one, action) in enumerate(actions.items())
    ]
    endpoint = serve(*accounts, rules=rules)
    result = run_program(endpoint.env())
    assert (result.exit_code, result.csvs) == (3, {ONE})
    assert result.failures == {one: (action, "Novelty") for one, action in actions.items()}
    assert "never seen" in result.stdout
    counts = endpoint.stats()["by_account"]
    repeated = {
        action for one, action in actions.items() if counts[one][action] > counts[ONE][action]
    }
    assert not repeated


def answer_of(action: str, result: str) -> str:
    return f"<{action}Response><{action}Result>{result}</{action}Result></{action}Response>"


def as_report(content: bytes) -> str:
    content64 = base64.b64encode(content).decode()
    generated = "<GeneratedTime>2026-01-02T03:04:05Z</GeneratedTime>"
    return answer_of(
        "GetCredentialReport",
        f"<Content>{content64}</Content><ReportFormat>text/csv</ReportFormat>{generated}",
    )


HEADER = (
    "user,arn,user_creation_time,password_enabled,password_last_used,password_last_changed,password_next_rotation,mfa_active,"
    "access_key_1_active,access_key_1_last_rotated,access_key_1_last_used_date,access_key_1_last_used_region,"
    "access_key_1_last_used_service,access_key_2_active,access_key_2_last_rotated,access_key_2_last_used_date,"
    "access_key_2_last_used_region,access_key_2_last_used_service,cert_1_active,cert_1_last_rotated,cert_2_active,"
    "cert_2_last_rotated"
)
KEYS = "false,N/A,N/A,N/A,N/A,false,N/A,N/A,N/A,N/A,false,N/A,false,N/A"


def row(name: str, account_id: str, **cells: str) -> str:
    made = {
        "created": "2024-01-31T12:00:00Z",
        "password": "true",
        "last_used": "no_information",
        "mfa": "false",
        "keys": KEYS,
    }
    made.update(cells)
    resource_id = "root" if name.startswith("<") else f"user/{name}"
    arn = f"arn:aws:iam::{account_id}:{resource_id}"
    return f"{name},{arn},{made['created']},{made['password']},{made['last_used']},N/A,N/A,{made['mfa']},{made['keys']}"


def report(*rows: str, header: str = HEADER) -> str:
    return "\n".join([header, *rows])


def damaged_reports(one: str) -> dict[str, str | Json]:
    """What GetCredentialReport gives that is not a report of this account."""
    boss, ana = row("<root_account>", one), row("ana", one)
    return {
        "nothing": "",
        "no report at all": "no report",
        "HTML": "<html><body>Service Unavailable, try again</body></html>",
        "JSON": '{"user": "ana"}',
        "a column is missing": report(header=HEADER.replace(",mfa_active", "")),
        "cut off within a row": report(boss, ana)[:-60],
        "cut off within a quoted cell": report(boss, ana.replace("ana,", '"ana,', 1)),
        "cut off within the last cell": report(boss, ana.removesuffix("N/A") + '"N/A'),
        "more cells than columns": report(boss, ana + ",more"),
        "another account's": {"account": THREE},
        "one row of another account": report(boss, ana, row("bea", THREE)),
        "two rows of one user": report(boss, ana, ana),
        "no ARN": report(boss, ana.replace(f"arn:aws:iam::{one}:user/ana", "ana")),
        "no date": report(boss, row("ana", one, last_used="last week")),
        "no creation date": report(boss, row("ana", one, created="sometime")),
        "no boolean": report(boss, row("ana", one, mfa="perhaps")),
        "password unclear": report(row("<root_account>", one, password="perhaps")),
        "root key without a date": report(
            row("<root_account>", one, keys="true" + KEYS.removeprefix("false"))
        ),
    }


def test_what_is_no_report_of_its_account_fails_it(serve: Serve, run_program: Program) -> None:
    cases = [*damaged_reports(""), "not UTF-8", "not base64", "no content"]
    ids = {numbered(number): name for number, name in enumerate(cases)}
    ana = user("ana", keys=[key("AKIA0000000000000ANA")])
    accounts = [
        account(one, name, users=[ana], report=damaged_reports(one).get(name))
        for one, name in ids.items()
    ]
    raw = {
        "not UTF-8": as_report(
            report(row("an\xe4", numbered(cases.index("not UTF-8")))).encode("latin-1")
        ),
        "not base64": as_report(b"").replace("<Content>", "<Content>%%%"),
        "no content": answer_of("GetCredentialReport", "<ReportFormat>text/csv</ReportFormat>"),
    }
    rules = [
        rule("GetCredentialReport", numbered(cases.index(name)), raw=body)
        for name, body in raw.items()
    ]
    result = run_program(serve(*accounts, full(ONE, "well"), rules=rules).env())
    assert (result.exit_code, result.csvs) == (3, {ONE})
    assert {one: step for one, (step, _) in result.failures.items()} == dict.fromkeys(
        ids, "GetCredentialReport"
    )
    codes = {ids[one]: code for one, (_, code) in result.failures.items()}
    assert codes["another account's"] == codes["one row of another account"] == codes["no ARN"]
    assert codes["another account's"] != codes["nothing"]


def test_users_of_another_account_fail_the_account(serve: Serve, run_program: Program) -> None:
    """Whatever mixes accounts up must show."""
    member = (
        f"<member><Path>/</Path><UserName>ana</UserName><UserId>1</UserId><Arn>arn:aws:iam::{THREE}:user/ana</Arn>"
        "<CreateDate>2024-01-31T12:00:00Z</CreateDate></member>"
    )
    body = f"<UserDetailList>{member}</UserDetailList><IsTruncated>false</IsTruncated>"
    users = answer_of(LIST, body)
    result = run_program(
        serve(account(ONE, "one"), account(TWO, "two"), rules=[rule(LIST, TWO, raw=users)]).env()
    )
    assert (result.exit_code, result.csvs) == (3, {ONE})
    assert result.failures[TWO][0] == LIST


def test_a_report_that_is_never_ready_is_given_up_at_the_deadline(
    serve: Serve, run_program: Program
) -> None:
    """Asked for after 2 s at first, then less and less often, and at the deadline no more."""
    expired = rule("GetCredentialReport", THREE, error="ReportExpired", status=410)
    accounts = [
        account(ONE, "one"),
        account(TWO, "two", report_delay=None),
        account(THREE, "three"),
    ]
    endpoint = serve(*accounts, rules=[expired], record=True)
    result = run_program(endpoint.env(), "--report-timeout", "10")
    assert (result.exit_code, result.csvs) == (3, {ONE})
    assert result.failures[TWO][0] == "GenerateCredentialReport"
    assert result.failures[THREE][0] == "GetCredentialReport"
    assert "ReportExpired" in result.stdout
    assert "--report-timeout" in result.stdout
    recorded = endpoint.stats()["recorded"]
    asked = [
        at for at, one, action in recorded if (one, action) == (TWO, "GenerateCredentialReport")
    ]
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
    # 2, 2.2, 2.42 and 2.66 s, then what is left of the 10. On a loaded machine each is longer, and there are fewer;
    # yet the last but one is always over before the 10 s are, and the last one is not.
    assert 2 <= len(pauses) <= 5
    assert all(pause > 0.9 * least for pause, least in zip(pauses[:-1], (2, 2.2, 2.42, 2.66)))
    assert asked[-2] - asked[0] < 10
    assert asked[-1] - asked[0] > 9.5


def test_the_time_for_a_report_begins_with_the_first_answer_that_is_not_throttling(
    serve: Serve, run_program: Program
) -> None:
    """Twelve throttled calls take more than a second, whatever the machine."""
    throttled = rule("GenerateCredentialReport", ONE, error="Throttling", times=12)
    endpoint = serve(account(ONE, "one", report_delay=0.1), rules=[throttled])
    result = run_program(endpoint.env(), "--report-timeout", "0.5")
    assert (result.exit_code, result.csvs) == (0, {ONE})
    assert endpoint.stats()["throttled"] == 12


def test_not_yet_is_waited_out(serve: Serve, run_program: Program) -> None:
    not_yet = [
        ("GenerateCredentialReport", "LimitExceeded", 409),
        ("GetCredentialReport", "ReportNotPresent", 410),
        ("GetCredentialReport", "ReportExpired", 410),
        ("GetCredentialReport", "ReportInProgress", 404),
    ]
    rules = [
        rule(action, numbered(n), error=code, status=status, times=1)
        for n, (action, code, status) in enumerate(not_yet)
    ]
    accounts = [full(numbered(n), code) for n, (_, code, _) in enumerate(not_yet)]
    endpoint = serve(*accounts, full(ONE, "started", report_delay=0.5), rules=rules)
    result = run_program(endpoint.env())
    assert (result.exit_code, len(result.csvs)) == (0, 5)
    counts = endpoint.stats()["by_account"]
    assert {counts[one]["GenerateCredentialReport"] for one in result.csvs} == {2}


def list_of_users(*users: tuple[str, str]) -> str:
    """The list of users with these names and creation dates."""
    ids = {name: f"AIDA{zlib.crc32((name + created).encode()):016}" for name, created in users}
    members = "".join(
        f"<member><Path>/</Path><UserName>{name}</UserName><UserId>{ids[name]}</UserId>"
        f"<Arn>arn:aws:iam::{ONE}:user/{name}</Arn><CreateDate>{created}</CreateDate></member>"
        for name, created in users
    )
    body = f"<UserDetailList>{members}</UserDetailList><IsTruncated>false</IsTruncated>"
    return answer_of(LIST, body)


def test_a_user_created_while_the_report_is_generated_is_read(
    serve: Serve, run_program: Program
) -> None:
    """Users are listed before the report is there; it can know one who was not listed yet."""
    now = datetime.now(timezone.utc)
    young = user(
        "young", password=True, created=now, keys=[key("AKIA0000000000YOUNG1", created=now)]
    )
    gone = user("gone", in_list=False, password=True, created=now - timedelta(minutes=10))
    users = [user("old"), young, gone]
    first = rule(LIST, ONE, raw=list_of_users(("old", "2024-01-31T12:00:00Z")), times=1)
    endpoint = serve(account(ONE, "one", users=users, report_delay=1), rules=[first])
    rows = run_program(endpoint.env()).rows(ONE)
    assert [(one["username"], one["password_status"], one["access_key_id"]) for one in rows] == [
        ("<root_account>", "No configurada", "N/A"),
        ("old", "No configurada", "N/A"),
        ("young", "Configurada", "AKIA0000000000YOUNG1"),
    ]
    counts = endpoint.stats()["by_account"][ONE]
    assert (counts[LIST], counts["ListAccessKeys"]) == (2, 2)


@pytest.mark.parametrize("then", ["is there", "is gone when read", "is gone when listed once more"])
def test_keys_and_password_are_of_the_same_user_though_another_had_the_name(
    serve: Serve, run_program: Program, then: str
) -> None:
    """The keys of the one and the password of the other must not stand side by side, whether or not the other stays."""
    now, in_list = datetime.now(timezone.utc), then != "is gone when read"
    ana = user(
        "ana",
        password=True,
        created=now,
        keys=[key("AKIA000000000000NEW1", created=now)],
        in_list=in_list,
    )
    listed = [rule(LIST, ONE, raw=list_of_users(("ana", "2024-01-31T12:00:00Z")), times=1)]
    listed += [rule(LIST, ONE, raw=list_of_users())] * (then == "is gone when listed once more")
    none = "<AccessKeyMetadata></AccessKeyMetadata><IsTruncated>false</IsTruncated>"
    no_keys = rule("ListAccessKeys", ONE, raw=answer_of("ListAccessKeys", none), times=1)
    endpoint = serve(account(ONE, "one", users=[ana], report_delay=1), rules=[*listed, no_keys])
    rows = run_program(endpoint.env()).rows(ONE)
    assert [(one["username"], one["password_status"], one["access_key_id"]) for one in rows] == [
        ("<root_account>", "No configurada", "N/A"),
        *[("ana", "Configurada", "AKIA000000000000NEW1")] * (then == "is there"),
    ]


def test_a_creation_date_that_differs_costs_nobody_their_row(
    serve: Serve, run_program: Program
) -> None:
    """Years ago, by a second: the user was not created meanwhile and must not vanish."""
    ana = user("ana", created="2024-01-31T12:00:01Z", keys=[key("AKIA00000000000ANA01")])
    listed = rule(LIST, ONE, raw=list_of_users(("ana", "2024-01-31T12:00:00Z")))
    endpoint = serve(account(ONE, "one", users=[ana], report_delay=1), rules=[listed])
    result = run_program(endpoint.env())
    assert [one["access_key_id"] for one in result.rows(ONE)] == ["N/A", "AKIA00000000000ANA01"]
    assert endpoint.stats()["by_account"][ONE][LIST] == 1


def test_the_step_is_the_one_that_failed(serve: Serve, run_program: Program) -> None:
    """Even while others are under way: here keys are read as a report without content comes."""
    users = [user(f"user-{n}", keys=[key(f"AKIA000000000000{n:04}")]) for n in range(20)]
    time_alone = (
        "<GeneratedTime>2026-01-02T03:04:05Z</GeneratedTime><ReportFormat>text/csv</ReportFormat>"
    )
    damaged = rule(
        "GetCredentialReport", ONE, raw=answer_of("GetCredentialReport", time_alone), delay=0.6
    )
    slow = [rule("ListAccessKeys", ONE, delay=2.3), rule("GetAccessKeyLastUsed", ONE, delay=0.5)]
    endpoint = serve(account(ONE, "one", users=users, report_delay=1), rules=[damaged, *slow])
    assert run_program(endpoint.env()).failures == {ONE: ("GetCredentialReport", "KeyError")}


def test_a_key_whose_last_use_is_denied_fails_the_account(
    serve: Serve, run_program: Program
) -> None:
    """AWS may answer AccessDenied for a key that is no longer there: the account fails, it does not look clean."""
    denied = rule("GetAccessKeyLastUsed", ONE, error="AccessDenied", status=403)
    result = run_program(serve(full(ONE, "one"), rules=[denied]).env())
    assert result.failures == {ONE: ("GetAccessKeyLastUsed", "AccessDenied")}
    assert result.csvs == set()


# --- what is waited out -----------------------------------------------------------------------------------------------

HALF = f"<{LIST}Response><{LIST}Result><UserDetailList><mem"
TROUBLES: dict[str, Json] = {
    "Throttling": {"error": "Throttling", "message": "Rate exceeded", "status": 400, "times": 4},
    "TooManyRequests": {"error": "TooManyRequestsException", "status": 429, "times": 4},
    "500": {"error": "InternalFailure", "status": 500, "times": 1},
    "503 in HTML": {
        "raw": "<html><body>Service Unavailable</body></html>",
        "status": 503,
        "times": 1,
    },
    "dropped": {"drop": True, "times": 1},
    "half an answer": {"raw": HALF, "times": 1},
}


def test_trouble_with_any_action_of_the_role_is_waited_out(
    serve: Serve, run_program: Program
) -> None:
    """Of every kind, each in an account of its own: all are audited, at the cost of the repeated call alone."""
    cases = [(trouble, action) for trouble in TROUBLES for action in [*ROLE_ACTIONS, "AssumeRole"]]
    ids = {numbered(number): case for number, case in enumerate(cases)}
    accounts = [full(one, f"{action}: {trouble}") for one, (trouble, action) in ids.items()]
    rules = [
        rule(action, one, **TROUBLES[trouble])
        for one, (trouble, action) in ids.items()
        if action != "AssumeRole"
    ]
    rules += [
        rule(action, one, **TROUBLES[trouble] | {"times": 1})
        for one, (trouble, action) in ids.items()
        if action == "AssumeRole"
    ]
    endpoint = serve(*accounts, full(ONE, "well"), rules=rules)
    result = run_program(endpoint.env())
    assert (result.exit_code, result.csvs) == (0, {*ids, ONE}), result.stdout
    counts = endpoint.stats()["by_account"]
    for one, (trouble, action) in ids.items():
        times = 1 if action == "AssumeRole" else TROUBLES[trouble]["times"]
        assert counts[one] == {**counts[ONE], action: counts[ONE][action] + times}, (
            trouble,
            action,
        )
        assert [row[2:5] for row in result.table(one)] == [row[2:5] for row in result.table(ONE)]


@pytest.mark.parametrize("trouble", ["Throttling", "503 in HTML", "dropped"])
def test_trouble_with_any_action_of_the_caller_is_waited_out(
    serve: Serve, run_program: Program, trouble: str
) -> None:
    rules = [rule(action, **TROUBLES[trouble] | {"times": 1}) for action in CALLER_ACTIONS]
    endpoint = serve(account(ONE, "one"), rules=rules)
    result = run_program(endpoint.env())
    assert (result.exit_code, result.csvs) == (0, {ONE}), result.stderr
    requests = endpoint.stats()["requests"]
    assert {action: requests[action] for action in CALLER_ACTIONS} == dict.fromkeys(
        CALLER_ACTIONS, 2
    )


# How long an answer is waited for: as long as the program takes to load, about half a second. On a machine that is ten
# times as slow both the answers and the loading take ten times as long.
LESS_PATIENT = """
import os, sys, time
sys.path.insert(0, os.path.dirname(os.environ["PROGRAM"]))
began = time.monotonic()
import iam_audit
iam_audit.READ_TIMEOUT = time.monotonic() - began
iam_audit.Pace.PATIENCE, iam_audit.TRANSIENT_ATTEMPTS = 0.5, 2
raise SystemExit(iam_audit.main())
"""


def test_trouble_that_does_not_end_fails_the_account(
    serve: Serve, program: Program, tmp_path: Path
) -> None:
    """With less patience than the program has, which would take minutes."""
    (tmp_path / "less_patient.py").write_text(LESS_PATIENT, encoding="utf-8")
    less_patient = Program(str(tmp_path / "less_patient.py"), program.python, lambda: tmp_path)
    troubles: dict[str, tuple[str, Json]] = {
        numbered(1): ("Throttling", {"error": "Throttling"}),
        numbered(2): ("InternalFailure", {"error": "InternalFailure", "status": 500}),
        numbered(3): ("ConnectionClosedError", {"drop": True}),
        numbered(4): ("ReadTimeoutError", {"hang": True}),
    }
    rules = [rule(LIST, one, **trouble) for one, (_, trouble) in troubles.items()]
    rules.append(rule("ListAccessKeys", TWO, hang=True, times=1))
    accounts = [full(ONE, "well"), full(TWO, "slow once"), *(account(one, one) for one in troubles)]
    result = less_patient({**serve(*accounts, rules=rules).env(), "PROGRAM": program.path})
    assert (result.exit_code, result.csvs) == (3, {ONE, TWO})
    assert result.failures == {one: (LIST, code) for one, (code, _) in troubles.items()}


def test_a_session_that_expires_is_renewed(serve: Serve, run_program: Program) -> None:
    """Once, although seven calls find out at the same time."""
    users = [user(f"user-{n}") for n in range(20)]
    expired = rule("ListAccessKeys", ONE, error="ExpiredToken", status=403, times=7, hold=True)
    endpoint = serve(account(ONE, "one", users=users), rules=[expired])
    with released(endpoint, lambda: endpoint.stats()["held"] == 7):
        result = run_program(endpoint.env())
    assert (result.exit_code, len(result.rows(ONE))) == (0, 21)
    counts = endpoint.stats()["by_account"][ONE]
    assert (counts["AssumeRole"], counts["ListAccessKeys"]) == (2, 27)


def test_a_session_that_stays_expired_is_renewed_once_and_fails_the_account(
    serve: Serve, run_program: Program
) -> None:
    endpoint = serve(account(ONE, "one"), rules=[rule(LIST, ONE, error="ExpiredToken", status=403)])
    result = run_program(endpoint.env())
    assert result.failures == {ONE: (LIST, "ExpiredToken")}
    assert endpoint.stats()["by_account"][ONE]["AssumeRole"] == 2


def test_accounts_fail_once_the_callers_own_session_has_ended(
    serve: Serve, run_program: Program
) -> None:
    ended = rule("AssumeRole", error="ExpiredToken", status=403, skip=1)
    result = run_program(
        serve(
            account(ONE, "one"), account(TWO, "two"), account(THREE, "three"), rules=[ended]
        ).env(),
        "--workers",
        "1",
    )
    assert (result.exit_code, len(result.csvs)) == (3, 1)
    assert set(result.failures.values()) == {("AssumeRole", "ExpiredToken")}
    assert "sign in" in result.stdout


def test_accounts_whose_role_is_throttled_hold_up_no_other(
    serve: Serve, run_program: Program
) -> None:
    """Though there are as many of them as may ask for a role at once."""
    slow = [numbered(n) for n in range(4)]
    rules = [
        rule(
            "AssumeRole",
            fields={"RoleArn": f"arn:aws:iam::{one}:role/Audit"},
            error="Throttling",
            times=9,
        )
        for one in slow
    ]
    endpoint = serve(
        *(account(one, "slow") for one in slow), account(ONE, "one"), rules=rules, record=True
    )
    result = run_program(endpoint.env())
    assert (result.exit_code, len(result.csvs)) == (0, 5)
    last_asked = {
        one: at for at, one, action in endpoint.stats()["recorded"] if action == "AssumeRole"
    }
    assert min(last_asked, key=last_asked.__getitem__) == ONE


# --- the audit cannot start or finish ---------------------------------------------------------------------------------

PAGE = "<html><body>Blocked by the proxy</body></html>"
PROXY = ["could not be understood", "HTTPS_PROXY"]
STOPS: dict[str, tuple[Json, list[str]]] = {  # options of the world, what stderr says
    "expired at the start": (
        {"rules": [rule("GetCallerIdentity", error="ExpiredToken", status=403)]},
        ["ExpiredToken", "Sign in again, for example with `aws sso login --profile default`."],
    ),
    "an access key that AWS does not know": (
        {"rules": [rule("GetCallerIdentity", error="InvalidClientTokenId", status=403)]},
        ["InvalidClientTokenId", "exists and is active", "aws_session_token"],
    ),
    "a proxy's page": ({"rules": [rule("GetCallerIdentity", raw=PAGE)]}, PROXY),
    "a proxy's page that is no XML": (
        {"rules": [rule("GetCallerIdentity", raw=f"<!DOCTYPE html>{PAGE}<br>")]},
        PROXY,
    ),
    "a proxy's refusal": ({"rules": [rule("GetCallerIdentity", raw=PAGE, status=403)]}, PROXY),
    "a proxy's refusal later": ({"rules": [rule("ListAccounts", raw=PAGE, status=403)]}, PROXY),
    "a proxy that reaches nobody": (
        {"rules": [rule("GetCallerIdentity", raw=PAGE, status=503)]},
        PROXY,
    ),
    "not an organization": (
        {"organization": None},
        ["AWSOrganizationsNotInUseException", "organization"],
    ),
    "DescribeOrganization denied": (
        {"rules": [rule("DescribeOrganization", error="AccessDenied")]},
        ["DescribeOrganization", "AccessDenied"],
    ),
    "ListAccounts denied": (
        {"rules": [rule("ListAccounts", error="AccessDenied")]},
        ["ListAccounts", "AccessDenied", "management account"],
    ),
    "a proxy's page for the organization": (
        {"rules": [rule("DescribeOrganization", raw=PAGE)]},
        PROXY,
    ),
    "a proxy's page for the accounts": ({"rules": [rule("ListAccounts", raw=PAGE)]}, PROXY),
    "neither State nor Status": ({"omit": ["State", "Status"]}, ["botocore", "State"]),
    "an error with escapes": (
        {"rules": [rule("ListAccounts", error="Odd", message="\x1b[31mred\x1b]0;title\x07")]},
        ["Odd", "red"],
    ),
}


@pytest.mark.parametrize("stop", STOPS)
def test_what_keeps_the_audit_from_starting_is_said_in_a_line(
    serve: Serve, run_program: Program, program_versions: dict[str, str], stop: str
) -> None:
    options, said = STOPS[stop]
    endpoint = serve(account(ONE, "one"), **options)
    result = run_program(endpoint.env())
    assert (result.exit_code, result.csvs, result.stdout) == (1, set(), "")
    for word in said:
        assert word in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.files == []
    assert list(result.output_dir.glob("*")) == [], "an empty run folder is left"
    assert "Blocked" not in result.stderr
    assert endpoint.stats()["assumed"] == {}
    if stop == "neither State nor Status":
        assert program_versions["botocore"] in result.stderr


def test_where_listing_breaks_off_what_is_finished_is_kept(
    serve: Serve, run_program: Program, tmp_path: Path
) -> None:
    """What has been finished is kept; nothing says that it is all."""
    denied = rule("ListAccounts", error="AccessDenied", fields={"NextToken": "3"}, hold=True)
    accounts = [account(ONE, "one"), account(TWO, "two"), account(THREE, "three")]
    endpoint = serve(*accounts, page=3, rules=[denied])
    with released(endpoint, lambda: written(tmp_path, ONE) and written(tmp_path, TWO)):
        result = run_program(endpoint.env(), output_dir=tmp_path / "reports")
    assert (result.exit_code, result.csvs) == (1, {ONE, TWO})
    assert "ListAccounts" in result.stderr


def role_profile(name: str, *, source: str = "source_profile = base", mfa: bool = True) -> str:
    serial = f"mfa_serial = {MFA_SERIAL}\n" if mfa else ""
    return f"[{name}]\nrole_arn = arn:aws:iam::{MANAGEMENT}:role/Operator\n{source}\n{serial}"


CORRECT_IT = "Correct profile p; check with `aws sts get-caller-identity --profile p`."
SIGN_IN_AGAIN = "Sign in again, for example with `aws sso login --profile p`."
SSO = "sso_account_id = 999999999999\nsso_role_name = Admin\n"
START = "sso_region = us-east-1\nsso_start_url = https://example.awsapps.com/start\n"
MISCONFIGURED: dict[str, tuple[str, list[str]]] = {  # lines of the config file, what stderr says
    "unknown": ("", ["(p)", "`aws configure list-profiles`"]),
    "no credentials": (
        "[profile p]\n",
        ["NoCredentials", "Profile p has none", "--profile", "AWS_PROFILE"],
    ),
    "no SSO token": (
        f"[profile p]\nsso_session = corp\n{SSO}[sso-session corp]\n{START}",
        ["SSOTokenLoadError", SIGN_IN_AGAIN],
    ),
    "no SSO token, the older way": (
        f"[profile p]\n{SSO}{START}",
        ["SSOTokenLoadError", SIGN_IN_AGAIN],
    ),
    "no such session": (f"[profile p]\nsso_session = corp\n{SSO}", ["corp", CORRECT_IT]),
    "credential_process missing": (
        "[profile p]\ncredential_process = /nowhere/it --now\n",
        ["/nowhere/it", "No such file", CORRECT_IT],
    ),
    "credential_process is no program": (
        "[profile p]\ncredential_process = /etc/hostname\n",
        ["/etc/hostname", CORRECT_IT],
    ),
    "credential_process fails": (
        "[profile p]\ncredential_process = sh -c 'echo no luck >&2; exit 3'\n",
        ["no luck", CORRECT_IT],
    ),
    "credential_process says nothing": (
        "[profile p]\ncredential_process = true\n",
        ["JSONDecodeError", CORRECT_IT],
    ),
    "no secret key": (
        "[profile p]\naws_access_key_id = AKIA0000000000000001\n",
        ["missing: aws_secret_access_key", CORRECT_IT],
    ),
    "no source": (
        f"[profile p]\nrole_arn = arn:aws:iam::{MANAGEMENT}:role/Operator\n",
        ["source_profile or credential_source", CORRECT_IT],
    ),
    "source unknown": (role_profile("profile p", source="source_profile = gone"), ["gone"]),
    "no config file": ("[profile p", ["ConfigParseError", "Correct profile"]),
}


@pytest.mark.parametrize("which", MISCONFIGURED)
def test_a_misconfigured_profile_stops_the_run_before_any_request_and_says_what_to_do(
    serve: Serve, run_program: Program, tmp_path: Path, which: str
) -> None:
    config, said = MISCONFIGURED[which]
    endpoint = serve(account(ONE, "one"))
    result = run_program(profile_env(endpoint, tmp_path, config), "--profile", "p")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    for words in said:
        assert words in result.stderr
    assert endpoint.stats()["requests"] == {}


def test_an_expired_sso_token_stops_the_run_and_says_how_to_sign_in(
    serve: Serve, run_program: Program, tmp_path: Path
) -> None:
    """As `aws sso login` left it in the cache, a day after."""
    cache = tmp_path / ".aws" / "sso" / "cache"
    cache.mkdir(parents=True)
    token = {"startUrl": "https://example.awsapps.com/start", "region": "us-east-1"}
    token |= {"accessToken": "gone", "expiresAt": "2026-01-01T00:00:00Z"}
    name = hashlib.sha1(b"corp").hexdigest()
    (cache / f"{name}.json").write_text(json.dumps(token), encoding="utf-8")
    config = f"[profile p]\nsso_session = corp\n{SSO}[sso-session corp]\n{START}"
    endpoint = serve(account(ONE, "one"))
    result = run_program(profile_env(endpoint, tmp_path, config), "--profile", "p")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert SIGN_IN_AGAIN in result.stderr
    assert endpoint.stats()["requests"] == {}


def test_half_the_credentials_in_the_environment_are_none(
    serve: Serve, run_program: Program
) -> None:
    env = serve(account(ONE, "one")).env()
    del env["AWS_SECRET_ACCESS_KEY"]
    result = run_program(env)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "missing: AWS_SECRET_ACCESS_KEY" in result.stderr


def test_the_profiles_own_role_that_is_denied_is_not_taken_for_the_audit_role(
    serve: Serve, run_program: Program, tmp_path: Path
) -> None:
    refused = rule("AssumeRole", MANAGEMENT, error="AccessDenied", status=403)
    endpoint = serve(account(MANAGEMENT, "management"), rules=[refused])
    env = profile_env(endpoint, tmp_path, role_profile("profile p", mfa=False))
    result = run_program(env, "--profile", "p")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "the profile's own role, not the audit role: its trust policy" in result.stderr
    assert "README" not in result.stderr
    assert endpoint.stats()["requests"] == {"AssumeRole": 1}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "EndpointConnectionError"),
        ("AWS_ENDPOINT_URL", "http://nowhere.invalid", "EndpointConnectionError"),
        ("HTTPS_PROXY", "http://127.0.0.1:9", "ProxyConnectionError"),
    ],
)
def test_without_a_network_the_proxy_is_what_to_look_at(
    serve: Serve, run_program: Program, variable: str, value: str, said: str
) -> None:
    env = serve(account(ONE, "one")).env()
    del env["AWS_ENDPOINT_URL"]
    result = run_program({**env, variable: value})
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert said in result.stderr
    assert "Check the network, HTTPS_PROXY" in result.stderr


MFA_PROFILES = {
    "its own": (role_profile("profile mgmt"), "mgmt", {}),
    "of its source": (
        role_profile("profile mgmt", source="source_profile = hop", mfa=False)
        + role_profile("profile hop"),
        "mgmt",
        {},
    ),
    "the default profile's": (role_profile("default"), None, {}),
    "by AWS_PROFILE": (role_profile("profile mgmt"), None, {"AWS_PROFILE": "mgmt"}),
}


@pytest.mark.parametrize("which", MFA_PROFILES)
def test_mfa_is_refused_where_no_terminal_can_ask_for_the_code(
    serve: Serve, program: Program, tmp_path: Path, which: str
) -> None:
    """Standard input is a pipe that never ends, as under some job runners: reading from it would hang."""
    config, profile, variables = MFA_PROFILES[which]
    endpoint = serve(account(ONE, "one"))
    env = {**profile_env(endpoint, tmp_path, config), **variables}
    options = ["--profile", profile] if profile else []
    with program.start(env, *options, stdin=subprocess.PIPE, start_new_session=True) as (
        process,
        output_dir,
    ):
        assert process.wait(TIMEOUT) == 1
        assert process.stderr is not None
        said = process.stderr.read()
    assert "mfa_serial" in said
    assert "terminal" in said
    assert not TRACEBACK.search(said)
    assert endpoint.stats()["requests"] == {}
    assert not list(output_dir.glob("*"))


def test_an_mfa_profile_that_is_not_used_asks_for_nothing(
    serve: Serve, program: Program, tmp_path: Path
) -> None:
    """Credentials of the environment go before AWS_PROFILE: nobody is asked anything."""
    endpoint = serve(account(ONE, "one"))
    env = {**endpoint.env(), "AWS_PROFILE": "mgmt", "AWS_CONFIG_FILE": str(tmp_path / "config")}
    (tmp_path / "config").write_text(role_profile("profile mgmt"), encoding="utf-8")
    result = program(env, start_new_session=True)
    assert (result.exit_code, result.csvs) == (0, {ONE}), result.stderr


def test_the_mfa_code_is_asked_for_once_before_anything_else(
    serve: Serve, program: Program, tmp_path: Path
) -> None:
    """One prompt, before anything else is asked of AWS; and role chaining goes on to work."""
    code = {"SerialNumber": MFA_SERIAL, "TokenCode": "246810"}
    rules = [
        rule("AssumeRole", MANAGEMENT, fields=code),
        rule("AssumeRole", MANAGEMENT, error="AccessDenied", status=403),
    ]
    endpoint = serve(
        account(MANAGEMENT, "management"), account(ONE, "one"), account(TWO, "two"), rules=rules
    )
    asked_before: list[Json] = []

    def type_code(shown: str) -> str:
        if "MFA code" not in shown:
            return ""
        asked_before.append(endpoint.stats()["requests"])
        return "246810\n"

    env = profile_env(endpoint, tmp_path, role_profile("profile mgmt"))
    result = program.in_terminal(env, "--profile", "mgmt", "--include-management", answer=type_code)
    assert (result.exit_code, result.csvs) == (0, {MANAGEMENT, ONE, TWO}), result
    assert asked_before == [{}]
    assert "246810" not in result.terminal
    assert endpoint.stats()["requests"]["AssumeRole"] == 3


def test_ctrl_c_at_the_prompt_ends_the_run(serve: Serve, program: Program, tmp_path: Path) -> None:
    endpoint = serve(account(ONE, "one"))
    env = profile_env(endpoint, tmp_path, role_profile("profile mgmt"))
    result = program.in_terminal(
        env, "--profile", "mgmt", answer=lambda shown: "\x03" if "MFA code" in shown else ""
    )
    assert result.exit_code == 130
    assert endpoint.stats()["requests"] == {}


# --- files cannot be written ------------------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_made_is_refused_before_any_request(
    serve: Serve, run_program: Program, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    endpoint = serve(account(ONE, "one"))
    for output_dir in (tmp_path / "file", tmp_path / "file" / "reports", Path("/proc/reports")):
        result = run_program(endpoint.env(), output_dir=output_dir)
        assert (result.exit_code, result.stdout) == (1, "")
        assert str(output_dir) in result.stderr
    assert endpoint.stats()["requests"] == {}


def test_a_full_disk_ends_the_run_and_leaves_no_half_file(
    serve: Serve, run_program: Program, tmp_path: Path
) -> None:
    """A limit on the size of files stands for it: write() fails in the middle of a file in either case."""
    large = account(TWO, "large", users=[user(f"user-{n:03d}") for n in range(120)])
    endpoint = serve(
        account(ONE, "one"), large, rules=[rule("GetCredentialReport", TWO, hold=True)]
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    with released(endpoint, lambda: endpoint.stats()["held"] and written(tmp_path, ONE)):
        result = run_program(endpoint.env(), output_dir=tmp_path / "reports", preexec_fn=limit)
    assert (result.exit_code, result.csvs, result.summary) == (1, {ONE}, None)
    assert "Cannot write" in result.stderr
    assert "large" in result.stderr.lower()  # File too large


# --- interrupted ------------------------------------------------------------------------------------------------------

READ_TIMEOUT = 30  # seconds; what an ending that waited for a server would take


def prompt(started: float, signalled: float) -> float:
    """How many seconds an ending may take: six times what the run had taken until the signal came.

    That is 2 s on an idle machine, which needs 0.1, and ten times as much on one that is ten times as slow. An ending
    that waits for a server takes longer than the limit on any machine.
    """
    return min(6 * (signalled - started), 0.9 * READ_TIMEOUT)


@pytest.mark.parametrize(
    ("action", "signum"),
    [
        ("GetCallerIdentity", signal.SIGINT),
        ("DescribeOrganization", signal.SIGTERM),
        ("ListAccounts", signal.SIGINT),
        ("AssumeRole", signal.SIGTERM),
        ("ListAccessKeys", signal.SIGINT),
    ],
)
def test_a_signal_ends_the_run_though_a_server_does_not_answer(
    serve: Serve, program: Program, action: str, signum: signal.Signals
) -> None:
    second_page = {"NextToken": "5"} if action == "ListAccounts" else {}
    rules = [
        rule(action, ONE),
        rule(action, hang=True, fields=second_page),
    ]  # account ONE alone goes well
    endpoint = serve(
        account(ONE, "one"), full(TWO, "two"), generate=generate(20, 2), page=5, rules=rules
    )
    began = time.monotonic()
    with program.start(endpoint.env()) as (process, output_dir):
        until(lambda: endpoint.stats()["hung"])
        audits = action not in ("GetCallerIdentity", "DescribeOrganization")
        if audits:
            until(lambda: written(output_dir, ONE))
        limit = prompt(began, time.monotonic())
        result, seconds = program.end(process, output_dir, signum, endpoint.env())
    assert result.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 143}[signum]
    assert seconds < limit
    assert result.summary is None
    assert result.csvs >= ({ONE} if audits else set())
    assert TWO not in result.csvs or action == "ListAccounts"


def test_ctrl_c_ends_the_wait_for_a_report_and_a_second_one_disturbs_nothing(
    serve: Serve, program: Program
) -> None:
    endpoint = serve(account(ONE, "one"), account(TWO, "two", report_delay=None))
    began = time.monotonic()
    with program.start(endpoint.env()) as (process, output_dir):
        until(lambda: written(output_dir, ONE))
        limit = prompt(began, time.monotonic())
        process.send_signal(signal.SIGINT)
        result, seconds = program.end(process, output_dir, signal.SIGINT, endpoint.env())
    assert (result.exit_code, result.csvs, result.summary) == (130, {ONE}, None)
    assert seconds < limit


@pytest.mark.parametrize("trouble", ["closed", "full", "without a reader"])
def test_losing_stderr_costs_no_audit(serve: Serve, program: Program, trouble: str) -> None:
    endpoint = serve(account(ONE, "one"), account(TWO, "two"))
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full:
        stderr = {"closed": None, "full": full, "without a reader": writer}[trouble]
        close = functools.partial(os.close, 2) if trouble == "closed" else None
        with program.start(endpoint.env(), "--verbose", stderr=stderr, preexec_fn=close) as (
            process,
            output_dir,
        ):
            os.close(writer)
            stdout, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert "Audited: 2 accounts" in stdout
    assert Result(0, stdout, "", output_dir).csvs == {ONE, TWO}
    assert list(output_dir.glob("*/summary.json"))


def test_the_exit_code_is_right_though_nobody_reads_stderr(serve: Serve, program: Program) -> None:
    endpoint = serve(account(ONE, "one"), account(TWO, "two", report_delay=None))
    with (
        open("/dev/full", "wb") as full,
        program.start(endpoint.env(), stderr=full) as (process, output_dir),
    ):
        until(lambda: written(output_dir, ONE))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == 143


# Runs the program and sends it SIGTERM at the first call of a function of the standard library that comes once an
# account's CSV is there: before the call begins or, with AFTER, when it has done its work.
AT_THAT_MOMENT = """
import functools, os, pathlib, pydoc, runpy, signal, sys, time
reports = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1])
owner, _, name = os.environ["FUNCTION"].rpartition(".")
owner, after = pydoc.locate(owner), "AFTER" in os.environ
original, sent = getattr(owner, name), []

def send_once():
    if not sent and any(reports.glob("*/accounts/*.csv")):
        sent.append(True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # a thread waits here until the main thread has had its signal

@functools.wraps(original)
def interrupted(*args, **kwargs):
    if not after:
        send_once()
    answer = original(*args, **kwargs)
    if after:
        send_once()
    return answer

setattr(owner, name, interrupted)
runpy.run_path(os.environ["PROGRAM"], run_name="__main__")
"""
MOMENTS = {
    # run again, the loop could wait for ever for what it had taken and not begun
    "the loop has taken a callback": ("asyncio.events.Handle._run", False),
    "the loop has run a callback": ("asyncio.events.Handle._run", True),
    "a wait is over": ("asyncio.events.TimerHandle._run", False),
    "a call is handed to a thread": ("queue.Queue.put", False),
    "a call is handed to a thread, whose queue is locked": ("queue.PriorityQueue._put", False),
    "a call has been handed to a thread": ("queue.Queue.put", True),
    "a thread hands its answer to the loop": (
        "asyncio.base_events.BaseEventLoop.call_soon_threadsafe",
        False,
    ),
    "a thread has handed its answer to the loop": (
        "asyncio.base_events.BaseEventLoop.call_soon_threadsafe",
        True,
    ),
    "a file is begun": ("tempfile.mkstemp", True),
    "a CSV is moved to its place": ("os.replace", False),
    "a CSV is in its place": ("os.replace", True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_the_worst_moment_ends_the_run(
    serve: Serve, program: Program, tmp_path: Path, moment: str
) -> None:
    """A signal can come between any two steps. Here some accounts are finished, some at work, one waits for its report.

    One of those at work is slow: it is still at work when all others are finished, and often waits for its turn.
    """
    (tmp_path / "iam_audit.py").write_text(AT_THAT_MOMENT, encoding="utf-8")
    at_that_moment = Program(str(tmp_path / "iam_audit.py"), program.python, lambda: tmp_path)
    endpoint = serve(
        account(TWO, "waits for its report", report_delay=None),
        generate=[generate(100, 6), generate(1, 100, first=201, account={"rate": 2})],
        latency=0.2,
    )
    function, after = MOMENTS[moment]
    env = {
        **endpoint.env(),
        "PROGRAM": program.path,
        "FUNCTION": function,
        **({"AFTER": "yes"} if after else {}),
    }
    with at_that_moment.start(env, "--report-timeout", str(TIMEOUT // 2)) as (process, output_dir):
        result = program.finish(process, output_dir, env)
    assert (result.exit_code, result.summary) == (143, None)
    assert result.csvs
    assert result.csvs.isdisjoint([TWO, "100000000201"])


def test_the_files_are_written_though_the_reader_of_stdout_goes_away(
    serve: Serve, program: Program
) -> None:
    """`iam_audit.py | head`: the files are written, and nobody gets a traceback."""
    endpoint = serve(account(ONE, "one"))
    with program.start(endpoint.env()) as (process, output_dir):
        assert process.stdout is not None
        process.stdout.close()
        process.wait(TIMEOUT)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert list(output_dir.glob("*/summary.json"))


def test_a_full_stdout_ends_with_1_and_costs_no_file(serve: Serve, program: Program) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full_disk:
        result = program(serve(account(ONE, "one")).env(), stdout=full_disk)
    assert (result.exit_code, result.csvs) == (1, {ONE})
    assert "No space left" in result.stderr


# --- secrets ----------------------------------------------------------------------------------------------------------

TOKEN = "IQoJb3JpZ2luX2VjE" + base64.b64encode(bytes(range(200))).decode()
SIGNATURE = "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7"


def signature_does_not_match(token: str) -> str:
    """What AWS says: it quotes the request and what is signed of it."""
    return (
        "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access "
        "Key and signing method. Consult the service documentation for details.\n\nThe Canonical String for this "
        "request should have been\n'POST\n/\n\ncontent-type:application/x-www-form-urlencoded; charset=utf-8\n"
        "host:iam.amazonaws.com\n"
        f"x-amz-date:20261123T000000Z\nx-amz-security-token:{token}\n\ncontent-type;host;x-amz-security-token\n"
        f"{SIGNATURE}'\n\nThe String-to-Sign should have been\n'AWS4-HMAC-SHA256\n20261123T000000Z\n"
        f"20261123/us-east-1/iam/aws4_request\n{SIGNATURE}'\n"
    )


def broken_assume_role(account_id: str, token: str) -> str:
    """XML that breaks off behind the credentials; what botocore says of it quotes it all."""
    key_id = access_key_id(account_id)
    return (
        f"<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>{key_id}</AccessKeyId>"
        f"<SecretAccessKey>{secret_of(key_id)}</SecretAccessKey><SessionToken>{token}</SessionToken>"
    )


def test_no_secret_is_told_of_accounts_that_fail(serve: Serve, run_program: Program) -> None:
    """conftest.py looks for them in everything that a run writes; here are the answers that hold some."""
    mismatch: Json = {"error": "SignatureDoesNotMatch", "status": 403}
    whole = broken_assume_role(THREE, TOKEN)
    no_token = (
        whole.replace(f"<SessionToken>{TOKEN}</SessionToken>", "")
        + "</Credentials></AssumeRoleResult></AssumeRoleResponse>"
    )
    odd_date = (
        whole
        + "<Expiration>soon</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>"
    )
    rules = [
        rule(LIST, numbered(1), message=signature_does_not_match(TOKEN), **mismatch),
        rule(LIST, numbered(2), message=f"Signature {SIGNATURE} is wrong", **mismatch),
        rule("AssumeRole", numbered(3), message=signature_does_not_match(TOKEN), **mismatch),
        rule("AssumeRole", numbered(4), raw=broken_assume_role(numbered(4), TOKEN), times=1),
        rule("AssumeRole", numbered(5), raw=no_token),
        rule("AssumeRole", numbered(6), raw=odd_date),
        rule(
            LIST,
            numbered(7),
            error="InvalidClientTokenId",
            status=403,
            message=f"The token {TOKEN} is invalid",
        ),
    ]
    accounts = [account(numbered(n), f"account-{n}") for n in range(1, 8)]
    result = run_program(serve(*accounts, rules=rules).env(), "-v")
    assert (result.exit_code, result.csvs) == (3, {numbered(4)})
    assert len(result.failures) == 6
    assert "The request signature we calculated does not match" in result.stdout


@pytest.mark.parametrize("verbose", [[], ["--verbose"]], ids=["terse", "verbose"])
@pytest.mark.parametrize("action", ["GetCallerIdentity", "ListAccounts"])
def test_no_secret_is_told_when_the_caller_fails(
    serve: Serve, run_program: Program, action: str, verbose: list[str]
) -> None:
    mismatch = rule(
        action, error="SignatureDoesNotMatch", status=403, message=signature_does_not_match(TOKEN)
    )
    result = run_program(serve(account(ONE, "one"), rules=[mismatch]).env(), "--verbose")
    assert result.exit_code == 1
    assert action in result.stderr


def test_no_secret_is_told_when_the_profiles_own_role_fails(
    serve: Serve, run_program: Program, tmp_path: Path
) -> None:
    broken = rule("AssumeRole", MANAGEMENT, raw=broken_assume_role(MANAGEMENT, TOKEN))
    endpoint = serve(account(MANAGEMENT, "management"), rules=[broken])
    env = profile_env(endpoint, tmp_path, role_profile("profile mgmt", mfa=False))
    result = run_program(env, "--profile", "mgmt", "--verbose")
    assert result.exit_code == 1
    assert secret_of(access_key_id(MANAGEMENT)) not in result.stderr
    assert set(endpoint.stats()["requests"]) == {"AssumeRole"}


# --- terminal ---------------------------------------------------------------------------------------------------------


def test_names_cannot_steer_the_terminal(serve: Serve, program: Program) -> None:
    """Of accounts that fail, are skipped, are audited; `screen` refuses whatever could. XML lets less through."""
    evil = "\x1b[31mred\x1b]0;title\x07\r\x1b[2J\x9b1A\u202egnp.exe"
    endpoint = serve(
        account(ONE, f"one {evil}"),
        account(TWO, f"two {evil}", role="denied"),
        account(THREE, f"three {evil}", state="SUSPENDED"),
        rules=[rule(LIST, ONE, error="Odd", message="\x9b31m\x85\u202egnp.exe")],
    )
    env = {**endpoint.env(), "NO_COLOR": "1"}
    result = program.in_terminal(env, "--verbose", everything=True)
    assert result.exit_code == 3
    shown = "\n".join(screen(result.terminal))
    for word in ("one ", "two ", "three ", "Odd"):
        assert word in shown
    plain = program(endpoint.env(), "--verbose")
    for steering in ("\x1b", "\x07", "\x9b", "\x85", "\u202e", "\r"):
        assert steering not in plain.stdout + plain.stderr


# --- the profile's own credentials ------------------------------------------------------------------------------------

PROCESS = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
if (folder / "ask").exists():
    (folder / "new").write_text(str(os.getpid()))
    os.replace(folder / "new", folder / "process_id")  # whoever reads it finds all of it
    time.sleep(3600)
credentials = {"Version": 1, "AccessKeyId": sys.argv[2], "SecretAccessKey": sys.argv[3]}
soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 300))
print(json.dumps({**credentials, "Expiration": soon}))
"""


def process_env(endpoint: Endpoint, folder: Path) -> dict[str, str]:
    """A profile whose credential_process waits for somebody as soon as a file `ask` exists."""
    caller = endpoint.env()
    (folder / "process.py").write_text(PROCESS, encoding="utf-8")
    keys = f"{caller['AWS_ACCESS_KEY_ID']} {caller['AWS_SECRET_ACCESS_KEY']}"
    command = f"{sys.executable} {folder / 'process.py'} {folder} {keys}"
    return profile_env(endpoint, folder, f"[profile waits]\ncredential_process = {command}\n")


def is_running(process_id: int) -> bool:
    stat = Path(f"/proc/{process_id}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the process is not ended")
def test_credentials_whose_refresh_hangs_fail_the_accounts_that_need_them(
    serve: Serve, program: Program, tmp_path: Path
) -> None:
    """Not the run: it ends, and so does the process that was waiting."""
    patient = with_constants(program, tmp_path, REFRESH_TIMEOUT=10.0)
    endpoint = serve(generate=generate(40, 1), latency=0.05)
    env = process_env(endpoint, tmp_path)
    with patient.start(env, "--profile", "waits", "--workers", "1") as (process, output_dir):
        until(lambda: list(output_dir.glob("*/accounts/*.csv")))
        (tmp_path / "ask").touch()
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    result = Result(process.returncode, stdout, stderr, output_dir)
    assert result.exit_code == 3, result
    assert set(result.failures.values()) == {("profile credentials", "RefreshTimeout")}
    assert 0 < len(result.failures) < 40
    said = " ".join(stdout.split())
    assert "no answer to the refresh within 10 s" in said
    assert (
        "sign in again (for example with `aws sso login`), or fix the profile's credential_process"
        in said
    )
    until(lambda: not is_running(int((tmp_path / "process_id").read_text())))


def test_an_access_key_that_no_partition_knows_is_refused_as_the_first_one_did(
    serve: Serve, run_program: Program
) -> None:
    """Without a Region each partition is asked; another one that does not answer is not the reason."""
    refused = rule("GetCallerIdentity", error="InvalidClientTokenId", status=403, times=1)
    silent = rule("GetCallerIdentity", drop=True)
    env = serve(account(ONE, "one"), rules=[refused, silent]).env()
    del env["AWS_DEFAULT_REGION"]
    result = run_program(env)
    assert result.exit_code == 1
    assert "GetCallerIdentity: InvalidClientTokenId" in result.stderr


@pytest.mark.parametrize(
    "proxy",
    [
        "http://me:s3cr3t@127.0.0.1:9",
        "socks5://me:s3cr3t@127.0.0.1:9",
        "http://me:s3#cr3t@127.0.0.1:9",
        "http://me:s3/cr3t@127.0.0.1:9",
        "http://me:s3?cr3t@127.0.0.1:9",
        "socks5://m#e:s3/cr3t@127.0.0.1:9",
        "me:s3cr3t@127.0.0.1:9",
    ],
)
@pytest.mark.parametrize("verbose", [[], ["--verbose"]], ids=["terse", "verbose"])
def test_the_password_of_a_proxy_is_masked(
    serve: Serve, run_program: Program, proxy: str, verbose: list[str]
) -> None:
    env = serve(account(ONE, "one")).env()
    del env["AWS_ENDPOINT_URL"]
    result = run_program({**env, "HTTPS_PROXY": proxy}, *verbose)
    assert result.exit_code == 1
    assert "***" in result.stderr
    assert not re.search("s3|cr3t", result.stderr)


# --- signals ----------------------------------------------------------------------------------------------------------


def test_a_lost_terminal_ends_the_run_like_sigterm(serve: Serve, program: Program) -> None:
    endpoint = serve(account(ONE, "one"), account(TWO, "two", report_delay=None))
    with program.start(endpoint.env()) as (process, output_dir):
        until(lambda: list(output_dir.glob(f"*/accounts/{ONE}.csv")))
        result, _ = program.end(process, output_dir, signal.SIGHUP, endpoint.env())
    assert (result.exit_code, result.csvs, result.summary) == (129, {ONE}, None)
    assert "stopped by SIGHUP" in result.stderr


def test_under_nohup_a_lost_terminal_ends_nothing(serve: Serve, program: Program) -> None:
    endpoint = serve(account(ONE, "one"), account(TWO, "two", report_delay=2))
    ignore = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    with program.start(endpoint.env(), preexec_fn=ignore) as (process, output_dir):
        until(lambda: list(output_dir.glob(f"*/accounts/{ONE}.csv")))
        result, _ = program.end(process, output_dir, signal.SIGHUP, endpoint.env())
    assert (result.exit_code, result.csvs) == (0, {ONE, TWO})


def test_a_job_in_the_background_that_ignores_ctrl_c_goes_on(
    serve: Serve, program: Program
) -> None:
    endpoint = serve(account(ONE, "one"), account(TWO, "two", report_delay=2))
    ignore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with program.start(endpoint.env(), preexec_fn=ignore) as (process, output_dir):
        until(lambda: list(output_dir.glob(f"*/accounts/{ONE}.csv")))
        result, _ = program.end(process, output_dir, signal.SIGINT, endpoint.env())
    assert (result.exit_code, result.csvs) == (0, {ONE, TWO})


def test_interrupted_while_the_sdk_is_loaded_there_is_no_traceback(
    serve: Serve, program: Program
) -> None:
    """That is most of the first half second. Python tells what it imports as it does so."""
    env = {**serve(account(ONE, "one")).env(), "PYTHONPROFILEIMPORTTIME": "1"}
    with program.start(env) as (process, _):
        assert process.stderr is not None
        for line in process.stderr:
            if "botocore" in line or "urllib3" in line:
                break
        process.send_signal(signal.SIGINT)
        stderr = process.stderr.read()
        assert process.wait(TIMEOUT) == -signal.SIGINT
    assert not [line for line in stderr.splitlines() if not line.startswith("import time:")]

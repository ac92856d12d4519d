"""How AWS is called: whose credentials sign what, how many requests over how many connections, in which partition."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.credentials import Credentials
from builders import MANAGEMENT, ONE, TWO, numbered, profile_env, reach, released
from conftest import Program, Serve
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
    world,
)

import iam_audit

# --- whose credentials ------------------------------------------------------------------------------------------------


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> Endpoint:
    """The endpoint with two accounts, and the environment in which the SDK finds it here."""
    endpoint = serve(
        account(ONE, "one", users=[user("ana")]),
        account(TWO, "two", users=[user("bea"), user("cleo")]),
    )
    return reach(endpoint, monkeypatch)


async def connected(workers: int = 4) -> iam_audit.Aws:
    return iam_audit.connect(boto3.Session(), workers)


def session_of(account_id: str) -> Credentials:
    """Credentials that the endpoint takes for those of the role in that account."""
    key_id = access_key_id(account_id)
    return Credentials(key_id, secret_of(key_id), f"IQoJTOKEN.{account_id}.9999999999.")


def names(answer: Any) -> list[str]:
    return [one["UserName"] for one in answer["Users"]]


def test_botocore_signs_with_the_credentials_that_the_handler_gives_it(
    in_this_process: Endpoint,
) -> None:
    """It does so without promising it: this is what notices when a new botocore no longer does."""
    aws = asyncio.run(connected())
    assert names(iam_audit.call_as(session_of(ONE), aws.iam.list_users, {})) == ["ana"]
    assert names(iam_audit.call_as(session_of(TWO), aws.iam.list_users, {})) == ["bea", "cleo"]
    by_account = in_this_process.stats()["by_account"]
    assert (by_account[ONE], by_account[TWO]) == ({"ListUsers": 1}, {"ListUsers": 1})


def test_each_call_has_credentials_of_its_own_whichever_thread_makes_it(
    in_this_process: Endpoint,
) -> None:
    aws = asyncio.run(connected())
    both_ready = threading.Barrier(2, timeout=TIMEOUT)

    def wait_for_the_other(**_: Any) -> None:
        both_ready.wait()

    aws.iam.meta.events.register(
        "before-call.iam", wait_for_the_other
    )  # each has its credentials, none has signed
    seen: dict[str, list[str]] = {}

    def list_users(account_id: str) -> None:
        seen[account_id] = names(iam_audit.call_as(session_of(account_id), aws.iam.list_users, {}))

    threads = [threading.Thread(target=list_users, args=[one]) for one in (ONE, TWO)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {ONE: ["ana"], TWO: ["bea", "cleo"]}


def test_nothing_is_sent_without_an_accounts_credentials(in_this_process: Endpoint) -> None:
    """Neither before a call nor after one, whether it went well or not."""
    aws = asyncio.run(connected())
    in_this_process.reset()
    with pytest.raises(LookupError):
        aws.iam.list_users()
    iam_audit.call_as(session_of(ONE), aws.iam.list_users, {})
    with pytest.raises(aws.iam.exceptions.NoSuchEntityException):
        iam_audit.call_as(session_of(ONE), aws.iam.list_access_keys, {"UserName": "nobody"})
    with pytest.raises(LookupError):
        aws.iam.list_users()
    assert in_this_process.stats()["requests"] == {"ListUsers": 1, "ListAccessKeys": 1}


def test_every_client_waits_10_s_for_a_connection_and_30_s_for_an_answer(
    in_this_process: Endpoint,
) -> None:
    aws = asyncio.run(connected())
    clients = (aws.sts, aws.organizations, aws.iam, aws.cloudtrail)
    configs: list[Any] = [client.meta.config for client in clients]
    assert {(config.connect_timeout, config.read_timeout) for config in configs} == {(10, 30)}


def test_the_audit_runs_where_it_may_not_choose_a_cpu(
    in_this_process: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is for speed only, and some sandboxes forbid it."""

    def forbidden(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden, raising=False)
    assert iam_audit.main(["--role", "Audit", "--output-dir", str(tmp_path), "--quiet"]) == 0
    assert in_this_process.stats()["by_account"][ONE]["GetAccountAuthorizationDetails"] == 1


# --- how many requests ------------------------------------------------------------------------------------------------


def busy_account(number: int, report_delay: float = 0) -> Json:
    """Account `number` has that many users of each kind."""
    one = numbered(number)
    users = [
        made
        for n in range(number)
        for made in (
            user(f"plain-{n}"),
            user(f"console-{n}", password=True),
            user(f"mfa-{n}", mfa=[f"arn:aws:iam::{one}:mfa/{n}"]),
            user(
                f"both-{n}",
                password=True,
                mfa=["GAHT12345678"],
                keys=[key(f"AKIA{one}BOTH{n:04d}")],
            ),
            user(
                f"keys-{n}",
                keys=[key(f"AKIA{one}{slot}KEY{n:04d}", status="Inactive") for slot in "AB"],
            ),
            user(f"young-{n}", in_report=False),
            user(f"gone-{n}", in_list=False, password=True),
        )
    ]
    made_root = root(password=True, mfa=bool(number % 2))
    return account(one, f"account-{number}", users=users, root=made_root, report_delay=report_delay)


def requests_of(number: int) -> Counter[str]:
    """What that account may cost; six of the seven kinds of users are there."""
    return Counter(
        {
            "AssumeRole": 1,
            "GenerateCredentialReport": 1,
            "GetCredentialReport": 1,
            # once more where the new report has a user whom the first list lacks
            "ListServiceSpecificCredentials": 1 + min(number, 1),
            "GetAccountAuthorizationDetails": 1 + min(number, 1),
            "ListAccessKeys": 6 * number,
            "GetAccessKeyLastUsed": 3 * number,
            "ListMFADevices": 4
            * number,  # a password, MFA, or both; and the young one, of whom no report tells
            "ListVirtualMFADevices": number % 2,
            "GetLoginProfile": number,
        }
    )


@pytest.mark.program
def test_requests_are_as_many_as_they_must_be(serve: Serve, run_program: Program) -> None:
    """Side by side, each signed as its own account's: the endpoint verifies and counts by the signer's account."""
    sizes = [*range(6), 24]
    endpoint = serve(*map(busy_account, sizes), latency=0.01)
    result = run_program(endpoint.env(), "--workers", "16")
    assert result.exit_code == 0, result
    stats = endpoint.stats()
    counted = {number: Counter(stats["by_account"][numbered(number)]) for number in sizes}
    assert counted == {number: +requests_of(number) for number in sizes}
    assert stats["errors"] == {"NoSuchEntity": sum(sizes)}  # of GetLoginProfile
    assert 1 < max(stats["in_flight"].values()) <= 8


@pytest.mark.program
def test_users_are_read_while_the_report_is_waited_for(serve: Serve, run_program: Program) -> None:
    """As far as they do not need it, and with no more requests than without the wait."""
    one = numbered(5)
    second = rule("GenerateCredentialReport", one, skip=1, hold=True)
    endpoint = serve(busy_account(5, report_delay=1), latency=0.01, record=True, rules=[second])

    def read_meanwhile() -> bool:
        stats = endpoint.stats()
        return bool(stats["held"]) and stats["by_account"][one].get("ListAccessKeys", 0) >= 7

    with released(endpoint, read_meanwhile):
        result = run_program(endpoint.env())
    assert result.exit_code == 0, result
    stats = endpoint.stats()
    assert stats["by_account"][one] == requests_of(5) + Counter({"GenerateCredentialReport": 1})
    assert 1 < stats["in_flight"][one] <= 8
    asked = [action for _, account_id, action in stats["recorded"] if account_id == one]
    before, after = (
        asked[: asked.index("GetCredentialReport")],
        asked[asked.index("GetCredentialReport") :],
    )
    assert before[:2] == ["AssumeRole", "GenerateCredentialReport"]
    at_once = {"GetAccountAuthorizationDetails", "ListServiceSpecificCredentials"}
    assert set(before[2:4]) == at_once
    assert before.count("GenerateCredentialReport") == 2
    # A few at a time even now: what is read waits in memory
    assert before.count("ListAccessKeys") == 7
    assert {"ListMFADevices", "ListVirtualMFADevices", "GetLoginProfile"} <= set(after)
    assert not {"ListMFADevices", "ListVirtualMFADevices", "GetLoginProfile"} & set(before)


@pytest.mark.program
def test_every_report_is_started_before_many_users_are_read(
    serve: Serve, run_program: Program
) -> None:
    """So that the accounts' reports are generated side by side, however few requests may be in flight."""
    users = [user(f"user-{n}") for n in range(40)]
    endpoint = serve(
        account(ONE, "one", users=users), account(TWO, "two"), latency=0.01, record=True
    )
    assert run_program(endpoint.env(), "--workers", "1").exit_code == 0
    asked = [(account_id, action) for _, account_id, action in endpoint.stats()["recorded"]]
    started = asked.index((TWO, "GenerateCredentialReport"))
    assert (
        asked[:started].count((ONE, "ListAccessKeys")) < 10 < asked.count((ONE, "ListAccessKeys"))
    )


@pytest.mark.program
def test_without_a_report_that_can_be_started_nothing_else_is_asked(
    serve: Serve, run_program: Program
) -> None:
    """A role that may read nothing fails with the same step each time."""
    denied = [
        rule(action, ONE, error="AccessDenied", status=403)
        for action in ("GenerateCredentialReport", "GetAccountAuthorizationDetails")
    ]
    endpoint = serve(account(ONE, "one"), rules=denied)
    result = run_program(endpoint.env())
    assert result.failures == {ONE: ("GenerateCredentialReport", "AccessDenied")}
    assert endpoint.stats()["by_account"][ONE] == {"AssumeRole": 1, "GenerateCredentialReport": 1}


@pytest.mark.program
@pytest.mark.parametrize(("accounts", "pages"), [(19, 1), (20, 2)])
def test_the_organization_is_asked_once_and_listed_20_accounts_a_page(
    serve: Serve, run_program: Program, accounts: int, pages: int
) -> None:
    """20 accounts a page, the management account among them."""
    endpoint = serve(generate=generate(accounts, 0))
    result = run_program(
        endpoint.env(), "--exclude", ",".join(str(100000000001 + n) for n in range(accounts))
    )
    assert (result.exit_code, result.csvs) == (0, set())
    caller = endpoint.stats()["by_account"][MANAGEMENT]
    assert {
        name: caller[name] for name in ("GetCallerIdentity", "DescribeOrganization", "ListAccounts")
    } == {
        "GetCallerIdentity": 1,
        "DescribeOrganization": 1,
        "ListAccounts": pages,
    }


@pytest.mark.program
@pytest.mark.parametrize(("workers", "sizes"), [(1, (3, 12)), (12, (10, 60))])
def test_connections_do_not_grow_with_the_accounts(
    run_program: Program, workers: int, sizes: tuple[int, int]
) -> None:
    for accounts in sizes:
        latency = 0.01 if workers > 1 else 0.0  # so that several requests are in flight
        with Endpoint(world(generate=generate(accounts, 1), latency=latency)) as endpoint:
            result = run_program(endpoint.env(), "--workers", str(workers))
            assert len(result.csvs) == accounts
            opened = endpoint.stats()["connections"]
        assert opened["iam"] <= workers
        assert opened["sts"] <= workers + 1  # GetCallerIdentity has one of its own
        assert opened["organizations"] <= 2


@pytest.mark.program
def test_a_throttled_account_holds_up_no_other(serve: Serve, run_program: Program) -> None:
    """Even with one worker: whoever waits holds no thread."""
    throttled = rule("ListAccessKeys", ONE, error="Throttling", message="Rate exceeded", times=16)
    endpoint = serve(
        account(ONE, "one", users=[user("ana")]),
        generate=generate(5, 1),
        rules=[throttled],
        record=True,
    )
    result = run_program(endpoint.env(), "--workers", "1")
    assert (result.exit_code, len(result.csvs)) == (0, 6)
    recorded = [one for _, one, _ in endpoint.stats()["recorded"]]
    assert (
        len(recorded) - 1 - max(n for n, one in enumerate(recorded) if one not in (ONE, MANAGEMENT))
        >= 2
    )


# --- how many threads ------------------------------------------------------------------------------------------------


class Clocks:
    """Stands in for the module `time`: one second of it passes when the test says so."""

    def __init__(self) -> None:
        self.now = self.cpu = 0.0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.cpu

    def second(self, used: float) -> None:
        self.now, self.cpu = self.now + 1, self.cpu + used


async def sizes(
    monkeypatch: pytest.MonkeyPatch, size: int, seconds: list[tuple[int, float]]
) -> list[int]:
    """How many threads there are after each second; of each: so many calls unanswered, so much CPU used meanwhile."""
    clocks, answered = Clocks(), threading.Event()
    monkeypatch.setattr(iam_audit, "time", clocks)
    threads, calls, seen = iam_audit.Threads(size), list[Any](), list[int]()
    for unanswered, used in seconds:
        while len(calls) < unanswered:
            calls.append(asyncio.create_task(threads.run((True, 0), answered.wait)))
            await asyncio.sleep(0)
        clocks.second(used)
        calls.append(asyncio.create_task(threads.run((True, 0), answered.wait)))
        await asyncio.sleep(0)
        seen.append(threads.size)
    answered.set()
    await asyncio.gather(*calls)
    return seen


@pytest.mark.parametrize(
    ("size", "seconds", "expected"),
    [
        (0, [(400, 0.1), (400, 0.1), (400, 0.2), (400, 0.3), (400, 0.4)], [32, 64, 128, 256, 256]),
        (0, [(100, 0.43), (100, 0.42), (100, 0.84)], [24, 48, 72]),
        (0, [(100, 0.85), (100, 1.0)], [16, 16]),
        (0, [(19, 0.0)], [20]),
        (0, [(13, 0.0), (15, 0.0)], [16, 16]),
        (4, [(100, 0.1), (100, 0.1)], [4, 4]),
    ],
    ids=["doubled", "by half", "busy", "as wait", "none waited", "a number"],
)
def test_threads_are_added_while_calls_wait_and_the_cpu_does_not(
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    seconds: list[tuple[int, float]],
    expected: list[int],
) -> None:
    """With --workers auto, which is 0; a number of threads stays as it is."""
    assert asyncio.run(sizes(monkeypatch, size, seconds)) == expected


def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program run with --workers auto."""
    parse = iam_audit.parse_arguments

    def parse_arguments(argv: Any) -> Any:
        options = parse(argv)
        options.workers = 0
        return options

    monkeypatch.setattr(iam_audit, "parse_arguments", parse_arguments)


@pytest.mark.parametrize(
    ("options", "grows"),
    [
        ({"latency": 0.3, "accounts": {}}, True),
        ({"latency": 0.01, "accounts": {"rate": 4.0}}, False),
    ],
    ids=["far away", "throttled"],
)
def test_connections_grow_with_latency_and_not_with_throttling(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: Json, grows: bool
) -> None:
    """Eight accounts make 64 calls at a time at most. What is throttled pauses without a thread."""
    plan = generate(8, 14 if grows else 6, account=options["accounts"])
    endpoint = reach(serve(generate=plan, latency=options["latency"]), monkeypatch)
    automatic(monkeypatch)
    assert iam_audit.main(["--role", "Audit", "--output-dir", str(tmp_path), "--quiet"]) == 0
    stats = endpoint.stats()
    assert (stats["throttled"] > 20) == (not grows)
    assert (stats["connections"]["iam"] > 16) == grows
    assert stats["connections"]["iam"] <= 65
    # One of GetCallerIdentity, and at most one for each account's AssumeRole
    assert stats["connections"]["sts"] <= 1 + 8


# --- who asks, and where ----------------------------------------------------------------------------------------------


@pytest.mark.program
def test_cloudtrail_shows_who_asked(serve: Serve, run_program: Program) -> None:
    endpoint = serve(account(ONE, "one"))
    run_program(endpoint.env(), role="audit/IAMAuditRole")
    stats = endpoint.stats()
    assert stats["assumed"][ONE]["RoleArn"] == f"arn:aws:iam::{ONE}:role/audit/IAMAuditRole"
    assert stats["assumed"][ONE]["RoleSessionName"] == "iam-audit"
    assert stats["assumed"][ONE]["ExternalId"] is None
    for service in ("sts", "organizations", "iam"):
        assert f"iam-audit/{iam_audit.VERSION}" in stats["user_agents"][service]


@pytest.mark.program
def test_the_external_id_opens_the_roles_that_ask_for_it(
    serve: Serve, run_program: Program
) -> None:
    endpoint = serve(
        account(ONE, "one", external_id="x-1:2/3"), account(TWO, "two", external_id="other")
    )
    result = run_program(endpoint.env(), "--external-id", "x-1:2/3")
    assert result.csvs == {ONE}
    assert result.failures == {TWO: ("AssumeRole", "AccessDenied")}


@pytest.mark.program
@pytest.mark.parametrize(
    ("partition", "region", "named"),
    [
        ("aws", "us-east-1", False),
        ("aws-us-gov", "us-gov-west-1", False),
        ("aws-cn", "cn-north-1", False),
        ("aws-cn", "cn-north-1", True),
    ],
)
def test_a_run_stays_in_the_partition_that_knows_the_caller(
    serve: Serve, run_program: Program, partition: str, region: str, named: bool
) -> None:
    """Without a Region each partition is asked in turn who the caller is, until one knows them."""
    unknown = ["us-east-1", "us-gov-west-1", "cn-north-1"].index(region)
    nobody = rule(
        "GetCallerIdentity", error="InvalidClientTokenId", status=403, times=0 if named else unknown
    )
    ana = user("ana", password=True, mfa=[f"arn:{partition}:iam::{ONE}:mfa/ana"])
    boss = root(password=True, virtual=True)
    endpoint = serve(
        account(ONE, "one", users=[ana], root=boss), partition=partition, rules=[nobody]
    )
    env = endpoint.env()
    assert env["AWS_REGION"] == region
    if not named:
        env = {
            name: value
            for name, value in env.items()
            if name not in ("AWS_REGION", "AWS_DEFAULT_REGION")
        }
    result = run_program(env)
    assert result.exit_code == 0, result
    assert [row["mfa_status"] for row in result.rows(ONE)] == ["Virtual", "Virtual"]
    stats = endpoint.stats()
    assert stats["assumed"][ONE]["RoleArn"] == f"arn:{partition}:iam::{ONE}:role/Audit"
    asked = {scope for scope in stats["scopes"] if not scope.startswith("sts/")}
    assert asked == {f"iam/{region}", f"organizations/{region}"}


@pytest.mark.program
def test_a_key_that_no_partition_knows_stops_the_run(serve: Serve, run_program: Program) -> None:
    endpoint = serve(rules=[rule("GetCallerIdentity", error="InvalidClientTokenId", status=403)])
    env = {name: value for name, value in endpoint.env().items() if "REGION" not in name}
    result = run_program(env)
    assert result.exit_code == 1
    assert "InvalidClientTokenId" in result.stderr
    assert endpoint.stats()["requests"] == {"GetCallerIdentity": 3}


@pytest.mark.program
def test_sts_is_asked_in_the_region_of_the_profile(
    serve: Serve, run_program: Program, tmp_path: Path
) -> None:
    """It is where STS is asked; IAM and Organizations have one place for the whole partition."""
    endpoint = serve(account(ONE, "one"))
    env = profile_env(endpoint, tmp_path, "[profile base]\nregion = eu-central-1\n")
    result = run_program(
        {name: value for name, value in env.items() if "REGION" not in name}, "--profile", "base"
    )
    assert result.exit_code == 0, result
    assert {scope.partition("/")[0]: scope for scope in endpoint.stats()["scopes"]}[
        "sts"
    ] == "sts/eu-central-1"

"""The test endpoint, seen through plain boto3 calls: what it answers is what the SDK makes of AWS's answers."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError
from endpoint import (
    TIMEOUT,
    Endpoint,
    World,
    access_key_id,
    account,
    event,
    generate,
    iso,
    key,
    policy,
    root,
    root_key,
    rule,
    secret_of,
    user,
    world,
)

ONE, TWO = "111111111111", "222222222222"
NOW = datetime.now(timezone.utc)
ALICE = user(
    'al&"<ice',
    path="/staff/",
    password=True,
    password_last_used="2025-01-02T03:04:05Z",
    mfa=[f"arn:aws:iam::{ONE}:mfa/alice", "GAHT12345678"],
    keys=[
        key("AKIA0000000000000001", last_used="2025-02-03T04:05:06Z", service="ec2"),
        key("AKIA0000000000000002", status="Inactive"),
    ],
)
ACCOUNTS = [
    account(
        ONE,
        'One, "first"',
        users=[ALICE, user("bob"), user("gone", in_list=False), user("new", in_report=False)],
    ),
    account(
        TWO, "=two", root=root(password=True, virtual=True, keys=[root_key()]), state="SUSPENDED"
    ),
]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """A small world, with signatures verified; tests change it with `update`."""
    with Endpoint(world(*ACCOUNTS)) as started:
        yield started


def client(
    endpoint: Endpoint, service: str, read_timeout: float = TIMEOUT, /, **credentials: str
) -> Any:
    """A client of the caller, or with other credentials, that tries once."""
    key_id = access_key_id(endpoint.world.caller_account, caller=True)
    return boto3.client(  # type: ignore[call-overload]
        service,
        endpoint_url=endpoint.url,
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, read_timeout=read_timeout),
        **(
            credentials or {"aws_access_key_id": key_id, "aws_secret_access_key": secret_of(key_id)}
        ),
    )


def session(endpoint: Endpoint, account_id: str, **parameters: str) -> dict[str, str]:
    """Credentials of the role in an account, as AssumeRole gives them."""
    arn = f"arn:aws:iam::{account_id}:role/Audit"
    answer = client(endpoint, "sts").assume_role(
        RoleArn=arn, RoleSessionName="iam-audit", **parameters
    )["Credentials"]
    return {
        "aws_access_key_id": answer["AccessKeyId"],
        "aws_secret_access_key": answer["SecretAccessKey"],
        "aws_session_token": answer["SessionToken"],
    }


def member(endpoint: Endpoint, account_id: str = ONE, service: str = "iam") -> Any:
    """A client in an account."""
    return client(endpoint, service, **session(endpoint, account_id))


def refused(call: Any, **parameters: Any) -> tuple[str, int]:
    """Error code and HTTP status of a call that must fail."""
    with pytest.raises(ClientError) as caught:
        call(**parameters)
    error = caught.value.response
    return error["Error"]["Code"], error["ResponseMetadata"]["HTTPStatusCode"]


def test_sts_tells_who_asks_and_hands_out_sessions(endpoint: Endpoint) -> None:
    assert (
        client(endpoint, "sts").get_caller_identity()["Arn"]
        == "arn:aws:iam::999999999999:user/auditor"
    )
    arn = f"arn:aws:iam::{ONE}:role/audit/Role"
    answer = client(endpoint, "sts").assume_role(
        RoleArn=arn, RoleSessionName="me", Policy="{}", ExternalId="x-1"
    )
    left = answer["Credentials"]["Expiration"] - datetime.now(timezone.utc)
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    assert len(answer["Credentials"]["AccessKeyId"]) == 20
    assert len(answer["Credentials"]["SecretAccessKey"]) == 40
    assumed = endpoint.stats()["assumed"][ONE]
    assert assumed == {
        "RoleArn": arn, "RoleSessionName": "me", "Policy": "{}", "ExternalId": "x-1", "DurationSeconds": None,
    }  # fmt: skip
    identity = member(endpoint, service="sts").get_caller_identity()
    assert (identity["Account"], identity["Arn"]) == (
        ONE,
        f"arn:aws:sts::{ONE}:assumed-role/Audit/iam-audit",
    )


@pytest.mark.parametrize(
    "account_id", [TWO, "999999999999", "123456789012"], ids=["denied", "management", "unknown"]
)
def test_assume_role_is_denied(endpoint: Endpoint, account_id: str) -> None:
    endpoint.update({"accounts": [account(TWO, "two", role="denied")]})
    assume = client(endpoint, "sts").assume_role
    arn = f"arn:aws:iam::{account_id}:role/Audit"
    assert refused(assume, RoleArn=arn, RoleSessionName="me") == ("AccessDenied", 403)


def test_external_id_session_policy_and_scp_bind(endpoint: Endpoint) -> None:
    endpoint.update(
        {"accounts": [account(ONE, "one", external_id="secret", deny=["GetCredentialReport"])]}
    )
    with pytest.raises(ClientError, match="sts:AssumeRole on resource"):
        session(endpoint, ONE)
    policy = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": ["iam:List*"], "Resource": "*"}],
    }
    narrow = client(
        endpoint, "iam", **session(endpoint, ONE, ExternalId="secret", Policy=json.dumps(policy))
    )
    assert narrow.list_users()["Users"] == []
    assert refused(narrow.generate_credential_report) == ("AccessDenied", 403)
    wide = client(endpoint, "iam", **session(endpoint, ONE, ExternalId="secret"))
    assert wide.generate_credential_report()["State"] == "COMPLETE"
    with pytest.raises(ClientError, match="service control policy"):
        wide.get_credential_report()


def test_signatures_tokens_and_expiry_are_verified(endpoint: Endpoint) -> None:
    good, other = session(endpoint, ONE), session(endpoint, TWO)
    wrong_secret = {**good, "aws_secret_access_key": other["aws_secret_access_key"]}
    assert refused(client(endpoint, "iam", **wrong_secret).list_users) == (
        "SignatureDoesNotMatch",
        403,
    )
    mixed_up = {**good, "aws_session_token": other["aws_session_token"]}
    assert refused(client(endpoint, "iam", **mixed_up).list_users) == ("InvalidClientTokenId", 403)
    assert (
        refused(client(endpoint, "organizations", **wrong_secret).list_accounts)[0]
        == "InvalidSignatureException"
    )
    endpoint.update({"session_seconds": -1})
    assert refused(member(endpoint).list_users) == ("ExpiredToken", 403)
    endpoint.update({"verify_signatures": False, "session_seconds": 60})
    assert client(endpoint, "iam", **wrong_secret).list_users()["Users"]


def test_accounts_are_listed_page_by_page(endpoint: Endpoint) -> None:
    organizations = client(endpoint, "organizations")
    assert (
        organizations.describe_organization()["Organization"]["MasterAccountId"] == "999999999999"
    )
    endpoint.update({"generate": generate(45, 0), "empty_page": 1})
    pages = list(organizations.get_paginator("list_accounts").paginate())
    assert [len(page["Accounts"]) for page in pages] == [20, 0, 20, 8]
    listed = {one["Id"]: one for page in pages for one in page["Accounts"]}
    assert len(listed) == 48
    assert listed[ONE]["Name"] == 'One, "first"'
    assert listed[TWO]["State"] == listed[TWO]["Status"] == "SUSPENDED"
    assert listed[ONE]["Paths"] == [f"o-test123456/r-test/{ONE}/"]
    endpoint.update({"omit": ["State", "Paths"], "page": 5})
    page = organizations.list_accounts()
    assert len(page["Accounts"]) == 5
    assert not {"State", "Paths"} & set(page["Accounts"][0])
    endpoint.update({"organization": None})
    assert refused(organizations.list_accounts)[0] == "AWSOrganizationsNotInUseException"


def test_policies_are_listed_with_their_content_and_targets(endpoint: Endpoint) -> None:
    organizations = client(endpoint, "organizations")
    default = organizations.list_policies(Filter="SERVICE_CONTROL_POLICY")["Policies"]
    assert [(one["Name"], one["AwsManaged"]) for one in default] == [("FullAWSAccess", True)]
    targets = ["r-test", "ou-test-a", ONE, *(f"ou-test-{n:02d}" for n in range(20))]
    deny: dict[str, Any] = {"Version": "2012-10-17", "Statement": []}
    endpoint.update(
        {
            "accounts": [account(ONE, "one")],
            "policies": [policy("p-1", "mine", deny, targets)],
        }
    )
    assert json.loads(organizations.describe_policy(PolicyId="p-1")["Policy"]["Content"]) == deny
    pages = list(organizations.get_paginator("list_targets_for_policy").paginate(PolicyId="p-1"))
    listed = [(one["TargetId"], one["Type"]) for page in pages for one in page["Targets"]]
    assert listed[:3] == [
        ("r-test", "ROOT"),
        ("ou-test-a", "ORGANIZATIONAL_UNIT"),
        (ONE, "ACCOUNT"),
    ]
    assert ([len(page["Targets"]) for page in pages], len(listed)) == ([20, 3], 23)


def test_report_takes_its_time(endpoint: Endpoint) -> None:
    endpoint.update(
        {
            "accounts": [
                account(ONE, "never", report_delay=None),
                account(TWO, "soon", report_delay=0.3),
            ]
        }
    )
    never, soon = member(endpoint), member(endpoint, TWO)
    assert refused(never.get_credential_report) == ("ReportNotPresent", 410)
    states = [never.generate_credential_report()["State"] for _ in range(3)]
    assert states == ["STARTED", "INPROGRESS", "INPROGRESS"]
    assert refused(never.get_credential_report) == ("ReportInProgress", 404)
    began = time.monotonic()
    while soon.generate_credential_report()["State"] != "COMPLETE":
        time.sleep(0.05)
    assert time.monotonic() - began >= 0.3
    assert abs(
        soon.get_credential_report()["GeneratedTime"] - datetime.now(timezone.utc)
    ) < timedelta(minutes=1)


def report(endpoint: Endpoint, account_id: str = ONE) -> list[dict[str, str]]:
    """Rows of an account's credential report."""
    iam = member(endpoint, account_id)
    iam.generate_credential_report()
    return list(csv.DictReader(io.StringIO(iam.get_credential_report()["Content"].decode())))


def test_a_report_has_a_row_for_root_and_each_user(endpoint: Endpoint) -> None:
    rows = report(endpoint)
    assert [row["user"] for row in rows] == ["<root_account>", ALICE["name"], "bob", "gone"]
    nobody, alice, bob, _ = rows
    assert (
        nobody["password_enabled"],
        nobody["mfa_active"],
        nobody["access_key_1_last_rotated"],
    ) == (
        "false",
        "false",
        "N/A",
    )
    assert alice["arn"] == f"arn:aws:iam::{ONE}:user/staff/{ALICE['name']}"
    assert (alice["password_last_used"], alice["mfa_active"]) == ("2025-01-02T03:04:05Z", "true")
    # the second key comes first: a slot tells nothing of the order of ListAccessKeys
    assert (alice["access_key_1_active"], alice["access_key_1_last_used_date"]) == ("false", "N/A")
    assert (alice["access_key_2_active"], alice["access_key_2_last_used_service"]) == (
        "true",
        "ec2",
    )
    assert (bob["password_last_used"], bob["cert_2_last_rotated"]) == ("N/A", "N/A")
    of_root = report(endpoint, TWO)[0]
    assert (of_root["password_last_used"], of_root["access_key_1_active"], of_root["access_key_2_active"]) == (
        "no_information", "true", "false",
    )  # fmt: skip


def test_a_world_can_replace_the_report(endpoint: Endpoint) -> None:
    old_root = root(password="not_supported")
    odd = account(
        ONE,
        "one",
        report={"account": TWO, "extra_columns": ["additional_credentials_info"]},
        root=old_root,
    )
    raw = account(TWO, "two", report="no report", report_time="2024-05-06T07:08:09Z")
    endpoint.update({"accounts": [odd, raw], "report_dates": "+00:00"})
    row = report(endpoint)[0]
    assert (row["arn"], row["additional_credentials_info"]) == (f"arn:aws:iam::{TWO}:root", "N/A")
    assert (row["password_enabled"], row["user_creation_time"]) == (
        "not_supported",
        "2024-01-31T12:00:00+00:00",
    )
    iam = member(endpoint, TWO)
    iam.generate_credential_report()
    answer = iam.get_credential_report()
    assert (answer["Content"], iso(answer["GeneratedTime"])) == (
        b"no report",
        "2024-05-06T07:08:09Z",
    )


def test_iam_lists_what_the_world_holds(endpoint: Endpoint) -> None:
    iam = member(endpoint)
    listed = iam.list_users()["Users"]
    assert [one["UserName"] for one in listed] == [ALICE["name"], "bob", "new"]
    assert iso(listed[0]["PasswordLastUsed"]) == "2025-01-02T03:04:05Z"
    assert "PasswordLastUsed" not in listed[1]
    keys = iam.list_access_keys(UserName=ALICE["name"])["AccessKeyMetadata"]
    assert [(one["AccessKeyId"], one["Status"]) for one in keys] == [
        ("AKIA0000000000000001", "Active"),
        ("AKIA0000000000000002", "Inactive"),
    ]
    used, unused = (iam.get_access_key_last_used(AccessKeyId=one["AccessKeyId"]) for one in keys)
    assert used["UserName"] == ALICE["name"]
    assert used["AccessKeyLastUsed"]["ServiceName"] == "ec2"
    assert unused["AccessKeyLastUsed"] == {"ServiceName": "N/A", "Region": "N/A"}
    devices = iam.list_mfa_devices(UserName=ALICE["name"])["MFADevices"]
    assert [one["SerialNumber"] for one in devices] == ALICE["mfa"]
    virtual = iam.list_virtual_mfa_devices(AssignmentStatus="Assigned")["VirtualMFADevices"]
    assert [(one["SerialNumber"], one["User"]["UserName"]) for one in virtual] == [
        (ALICE["mfa"][0], ALICE["name"])
    ]
    of_root = member(endpoint, TWO).list_virtual_mfa_devices(AssignmentStatus="Assigned")[
        "VirtualMFADevices"
    ]
    assert [one["User"]["Arn"] for one in of_root] == [f"arn:aws:iam::{TWO}:root"]
    assert (
        iam.get_login_profile(UserName=ALICE["name"])["LoginProfile"]["UserName"] == ALICE["name"]
    )
    assert refused(iam.get_login_profile, UserName="bob") == ("NoSuchEntity", 404)
    assert refused(iam.list_access_keys, UserName="gone") == ("NoSuchEntity", 404)
    endpoint.update({"features": ["RootCredentialsManagement"]})
    assert client(endpoint, "iam").list_organizations_features()["EnabledFeatures"] == [
        "RootCredentialsManagement"
    ]


def test_users_are_listed_page_by_page(endpoint: Endpoint) -> None:
    endpoint.update(
        {"accounts": [account(ONE, "one", users=[user(f"user-{n}") for n in range(250)])]}
    )
    iam = member(endpoint)
    pages = list(iam.get_paginator("list_users").paginate())
    assert [len(page["Users"]) for page in pages] == [100, 100, 50]
    assert len({one["UserName"] for page in pages for one in page["Users"]}) == 250
    assert len(iam.list_users(MaxItems=1000)["Users"]) == 250


def test_an_account_is_throttled_and_others_are_not(endpoint: Endpoint) -> None:
    endpoint.update({"accounts": [account(ONE, "one", rate=0.001, burst=3), account(TWO, "two")]})
    one, two = member(endpoint), member(endpoint, TWO)
    for _ in range(3):
        one.list_users()
    assert refused(one.list_users) == ("Throttling", 400)
    two.list_users()
    stats = endpoint.stats()
    assert (stats["throttled"], stats["errors"]) == (1, {"Throttling": 1})
    assert stats["by_account"][ONE] == {"AssumeRole": 1, "ListUsers": 4}


def test_rules_decide_over_requests(endpoint: Endpoint) -> None:
    endpoint.update({"rules": [
        rule("ListAccessKeys", ONE, user="bob", drop=True, times=1),
        rule("ListUsers", ONE, error="ServiceFailure", status=500, skip=1, times=1),
        rule("ListMFADevices", hang=True),
        rule("GetLoginProfile", raw="<html>", status=503),
        rule("GetAccessKeyLastUsed", TWO, error="AccessDenied"),
        rule("ListAccounts", error="TooManyRequestsException", fields={"NextToken": "20"}),
    ]})  # fmt: skip
    iam = member(endpoint)
    with pytest.raises(ConnectionClosedError):
        iam.list_access_keys(UserName="bob")
    assert iam.list_access_keys(UserName="bob")["AccessKeyMetadata"] == []
    iam.list_users()
    assert refused(iam.list_users) == ("ServiceFailure", 500)
    iam.list_users()
    impatient = client(endpoint, "iam", 0.2, **session(endpoint, ONE))
    with pytest.raises(ReadTimeoutError):
        impatient.list_mfa_devices(UserName="bob")
    assert refused(iam.get_login_profile, UserName="bob")[1] == 503
    assert (
        iam.get_access_key_last_used(AccessKeyId="AKIA0000000000000001")["UserName"]
        == ALICE["name"]
    )
    organizations = client(endpoint, "organizations")
    organizations.list_accounts()
    assert refused(organizations.list_accounts, NextToken="20") == ("TooManyRequestsException", 400)
    stats = endpoint.stats()
    assert (stats["dropped"], stats["hung"], stats["throttled"]) == (1, 1, 1)
    assert stats["errors"] == {"ServiceFailure": 1, "TooManyRequestsException": 1}


def test_a_reply_is_held_until_it_is_released(endpoint: Endpoint) -> None:
    endpoint.update(
        {
            "rules": [
                rule("ListUsers", error="Late", hold=True),
                rule("ListAccessKeys", hold=True, times=1),
            ]
        }
    )
    iam = member(endpoint)
    with ThreadPoolExecutor(2) as pool:
        users = pool.submit(refused, iam.list_users)
        keys = pool.submit(iam.list_access_keys, UserName="bob")
        while endpoint.stats()["held"] < 2:
            time.sleep(0.02)
        assert not users.done()
        assert not keys.done()
        assert iam.list_access_keys(UserName="bob")["AccessKeyMetadata"] == []
        endpoint.release()
        assert users.result() == ("Late", 400)
        assert keys.result()["AccessKeyMetadata"] == []


def test_faults_come_by_chance_and_are_the_same_every_time(endpoint: Endpoint) -> None:
    def outcomes() -> list[str]:
        endpoint.update({"faults": {"drop": 0.2, "error500": 0.2, "seed": 7}})
        found = []
        for _ in range(40):
            try:
                iam.list_users()
            except (ClientError, ConnectionClosedError) as error:
                found.append(type(error).__name__)
            else:
                found.append("ok")
        return found

    iam = member(endpoint)
    first = outcomes()
    assert set(first) == {"ok", "ClientError", "ConnectionClosedError"}
    assert first == outcomes()


def test_events_are_looked_up_by_name_and_time(endpoint: Endpoint) -> None:
    recent = [
        event("CreateAccessKey", NOW - timedelta(minutes=n), user="bob", key=f"AKIA{n}")
        for n in range(120)
    ]
    others = [
        event("CreateAccessKey", NOW - timedelta(days=91), user="bob", key="AKIAOLD"),
        event(
            "DeleteAccessKey",
            NOW,
            actor=f"arn:aws:iam::{ONE}:user/bob",
            key="AKIA0000000000000001",
            error_code="AccessDenied",
        ),
    ]
    endpoint.update(
        {"accounts": [account(ONE, "one", events=recent + others)], "lookup_rate": None}
    )
    trail = member(endpoint, service="cloudtrail")

    def lookup(name: str, **parameters: Any) -> list[list[dict[str, Any]]]:
        attributes = [{"AttributeKey": "EventName", "AttributeValue": name}]
        pages = trail.get_paginator("lookup_events").paginate(
            LookupAttributes=attributes, **parameters
        )
        return [page["Events"] for page in pages]

    pages = lookup("CreateAccessKey")
    assert [len(page) for page in pages] == [50, 50, 20]
    times = [one["EventTime"] for page in pages for one in page]
    assert times == sorted(times, reverse=True)
    detail = json.loads(pages[0][0]["CloudTrailEvent"])
    assert detail["responseElements"]["accessKey"] == {
        "userName": "bob",
        "accessKeyId": "AKIA0",
        "status": "Active",
    }
    within = lookup(
        "CreateAccessKey",
        StartTime=NOW - timedelta(minutes=9.5),
        EndTime=NOW - timedelta(minutes=4.5),
    )
    assert len(within[0]) == 5
    failed = json.loads(lookup("DeleteAccessKey")[0][0]["CloudTrailEvent"])
    assert failed["requestParameters"] == {"accessKeyId": "AKIA0000000000000001"}
    assert failed["errorCode"] == "AccessDenied"
    assert failed["userIdentity"]["userName"] == "bob"
    endpoint.update({"lookup_rate": 0.001, "accounts": [account(ONE, "one")]})
    trail.lookup_events()
    assert refused(trail.lookup_events) == ("ThrottlingException", 400)


def test_statistics_tell_what_was_asked_since_the_last_reset(endpoint: Endpoint) -> None:
    endpoint.update({"record": True})
    iam = member(endpoint)
    iam.list_users()
    iam.list_access_keys(UserName="bob")
    stats = endpoint.stats()
    assert stats["requests"] == {"AssumeRole": 1, "ListUsers": 1, "ListAccessKeys": 1}
    assert stats["connections"] == stats["connections_peak"] == {"sts": 1, "iam": 1}
    assert [(one, action) for _, one, action in stats["recorded"]] == [
        (ONE, "AssumeRole"), (ONE, "ListUsers"), (ONE, "ListAccessKeys"),
    ]  # fmt: skip
    assert stats["in_flight"] == {ONE: 1}
    assert 0 < stats["in_flight_seconds"] < stats["seconds"]  # one at a time
    assert stats["scopes"] == {"sts/us-east-1": 1, "iam/us-east-1": 2}
    endpoint.reset()
    assert endpoint.stats()["requests"] == {}


def test_generated_accounts_are_the_same_seen_from_both_sides(endpoint: Endpoint) -> None:
    made = world(generate=[
        generate(3, 5, keys_per_user=[2, 0], missing_roles=0.5),
        generate(1, 1, first=1000, name="large", account={"rate": 5}),
    ])  # fmt: skip
    endpoint.update(made)
    listed = client(endpoint, "organizations").list_accounts()["Accounts"]
    assert [one["Name"] for one in listed] == [
        "management",
        "account-1",
        "account-2",
        "account-3",
        "large-1000",
    ]
    here = {one["id"]: one for one in World(made).accounts()}
    assert [one["role"] for one in here.values()] == ["denied", "ok", "denied", "ok", "ok"]
    iam = member(endpoint, "100000000003")
    for one in here["100000000003"]["users"]:
        found = iam.list_access_keys(UserName=one["name"])["AccessKeyMetadata"]
        assert [each["AccessKeyId"] for each in found] == [each["id"] for each in one["keys"]]
        for each in one["keys"]:
            assert iam.get_access_key_last_used(AccessKeyId=each["id"])["UserName"] == one["name"]


def test_slips_of_the_pen_are_refused(endpoint: Endpoint) -> None:
    with pytest.raises(TypeError, match="raet"):
        account(ONE, "one", raet=5)
    with pytest.raises(TypeError, match="accuonts"):
        endpoint.update({"accuonts": []})
    assert refused(client(endpoint, "iam").list_roles) == ("InvalidAction", 400)


def test_the_process_ends_with_its_stdin(tmp_path: Path) -> None:
    file = tmp_path / "world.json"
    file.write_text(json.dumps(world()), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).with_name("endpoint.py")), "--world", str(file)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(TIMEOUT) == 0

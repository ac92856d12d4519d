"""Every kind of credential, whose it is and what they may do: what an account's outcome says, read over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from builders import (
    CALLER,
    MANAGEMENT,
    ONE,
    ORGANIZATION,
    THREE,
    TODAY,
    TWO,
    Held,
    ago,
    credentials_of,
    held_cells,
    in_units,
    plan,
    reach,
)
from conftest import Program, Serve
from endpoint import (
    ACCOUNT_DEFAULTS,
    CREATED,
    Endpoint,
    Json,
    account,
    certificate,
    credential,
    credential_report,
    group,
    key,
    root,
    root_key,
    rule,
    user,
)
from test_failures import answer_of

import iam_audit
from iam_audit import (
    ROOT,
    Account,
    AuditedAccount,
    Enforcement,
    FailedAccount,
    Outcome,
    Run,
    Tracking,
)

MADE = iam_audit.parse_time(CREATED)
NEW_ACTIONS = ("ListServiceSpecificCredentials", "GetAccountAuthorizationDetails")
MANAGED = "arn:aws:iam::aws:policy/"
ADMINISTRATOR = f"{MANAGED}AdministratorAccess"


class Read(NamedTuple):
    """What an audit in this process gave."""

    run: Run
    outcomes: dict[str, Outcome]

    def audited(self, account_id: str = ONE) -> AuditedAccount:
        outcome = self.outcomes[account_id]
        assert isinstance(outcome, AuditedAccount), outcome
        return outcome

    def users(self, account_id: str = ONE) -> dict[str, iam_audit.User]:
        return {one.name: one for one in self.audited(account_id).users}

    def failure(self, account_id: str = ONE) -> tuple[str, str]:
        outcome = self.outcomes[account_id]
        assert isinstance(outcome, FailedAccount), outcome
        return outcome.step, outcome.code


def read(
    endpoint: Endpoint,
    monkeypatch: pytest.MonkeyPatch,
    *options: str,
    owner_tags: tuple[str, ...] = ("owner", "Owner", "team"),
) -> Read:
    """Audit the endpoint's organization, with short pauses."""
    reach(endpoint, monkeypatch)
    monkeypatch.setattr(iam_audit, "READ_AGAIN_AFTER", (0.01, 0.02, 0.03))
    planned = dataclasses.replace(plan(*options), owner_tags=owner_tags)
    run = Run(TODAY, Path(), planned, CALLER, ORGANIZATION, Tracking(), Enforcement())
    outcomes: dict[str, Outcome] = {}

    def finish(outcome: Outcome) -> None:
        assert outcome.account.id not in outcomes
        outcomes[outcome.account.id] = outcome

    async def audit() -> None:
        aws = iam_audit.connect(iam_audit.open_session(None), 8)
        await iam_audit.audit_accounts(aws, run, finish, lambda _: None)

    asyncio.run(audit())
    return Read(run, outcomes)


# --- credentials ------------------------------------------------------------------------------------------------------


def test_credentials_of_every_kind_belong_to_their_users(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By kind, creation and ID; a service that nobody knows has API keys."""
    ana = user(
        "ana",
        keys=[key("AKIA0000000000000ANA")],
        credentials=[
            credential("ACCA0000000000000004", "codecommit.amazonaws.com"),
            credential("ACCA0000000000000003", "new.amazonaws.com", status="Inactive"),
            credential("ACCA0000000000000002", created=ago(9), expires=ago(-30)),
            credential("ACCA0000000000000001", created=ago(9), status="Expired", expires=ago(1)),
            credential("ACCA0000000000000005", "cassandra.amazonaws.com"),
        ],
        certificates=[certificate(active=False), certificate(last_rotated=ago(3))],
    )
    endpoint = serve(account(ONE, "one", users=[ana, user("bea")]))
    users = read(endpoint, monkeypatch).users()
    found = [dataclasses.astuple(one) for one in users["ana"].others]
    password, bedrock = "service-password", "bedrock.amazonaws.com"
    assert found == [
        ("ACCA0000000000000003", "Inactive", MADE, None, "new.amazonaws.com", "api-key", None),
        ("ACCA0000000000000001", "Expired", ago(9), None, bedrock, "api-key", ago(1)),
        ("ACCA0000000000000002", "Active", ago(9), None, bedrock, "api-key", ago(-30)),
        ("ACCA0000000000000004", "Active", MADE, None, "codecommit.amazonaws.com", password, None),
        ("ACCA0000000000000005", "Active", MADE, None, "cassandra.amazonaws.com", password, None),
        ("<signing_certificate_1>", "Inactive", MADE, None, "", "signing-certificate", None),
        ("<signing_certificate_2>", "Active", ago(3), None, "", "signing-certificate", None),
    ]
    assert [one.id for one in users["ana"].keys] == ["AKIA0000000000000ANA"]
    assert users["bea"].others == users["<root_account>"].others == ()


def test_root_is_an_administrator_with_certificates(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    boss = root(password=True, certificates=[certificate(last_rotated=ago(3))])
    endpoint = serve(account(ONE, "one", root=boss, email="boss@example.com"))
    [found] = read(endpoint, monkeypatch).audited().users
    [signing] = found.others
    assert (signing.id, signing.status, signing.created) == (
        "<signing_certificate_1>",
        "Active",
        ago(3),
    )
    assert (found.administrator, found.owner) == ("true", "boss@example.com")
    assert found.password_changed == MADE


def test_when_a_password_was_changed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    users = [
        user("changed", password=True, password_changed=ago(7)),
        user("none"),
        user("young", password=True, in_report=False),
    ]
    old = account(TWO, "two", root=root(password="not_supported"))
    found = read(serve(account(ONE, "one", users=users), old), monkeypatch)
    changed = {name: one.password_changed for name, one in found.users().items()}
    assert changed == {"<root_account>": None, "changed": ago(7), "none": None, "young": None}
    assert found.users(TWO)["<root_account>"].password_changed is None


def test_new_lists_are_read_to_their_ends(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand entries a page."""
    many = [credential(f"ACCA{n:016}") for n in range(1001)]
    users = [user(f"user-{n:04}", tags=[("team", f"t{n}")]) for n in range(1000)]
    last = user("z", credentials=many, tags=[("team", "last")], groups=["admins"])
    admins = group("admins", attached=[ADMINISTRATOR])
    endpoint = serve(account(ONE, "one", users=[*users, last], groups=[admins]))
    found = read(endpoint, monkeypatch).users()
    assert len(found["z"].others) == 1001
    assert (found["z"].owner, found["z"].administrator) == ("last", "true")
    assert found["user-0999"].owner == "t999"
    counts = endpoint.stats()["by_account"][ONE]
    assert [counts[action] for action in NEW_ACTIONS] == [2, 2]
    assert endpoint.stats()["in_flight"][ONE] <= 8


@pytest.mark.parametrize(
    "column", ["cert_1_active", "cert_2_last_rotated", "password_last_changed"]
)
def test_a_report_without_the_columns_is_damaged(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    made = account(ONE, "one", root=root(password=True))
    text = credential_report({**ACCOUNT_DEFAULTS, **made}, "aws", "Z").replace(column, "other", 1)
    found = read(serve({**made, "report": text}), monkeypatch)
    assert found.failure() == ("GetCredentialReport", "DamagedReport")


# --- users who come, go and are renamed -------------------------------------------------------------------------------


def first_credentials(owner: str, *, times: int | None = 1) -> Json:
    """The first answer of ListServiceSpecificCredentials: the API key is this user's."""
    made = credential("ACCA0000000000000001")
    body = (
        f"<ServiceSpecificCredentials><member><UserName>{owner}</UserName><Status>Active</Status>"
        f"<CreateDate>{made['created']}</CreateDate><ServiceName>{made['service']}</ServiceName>"
        f"<ServiceSpecificCredentialId>{made['id']}</ServiceSpecificCredentialId></member>"
        "</ServiceSpecificCredentials><IsTruncated>false</IsTruncated>"
    )
    return rule(NEW_ACTIONS[0], ONE, raw=answer_of(NEW_ACTIONS[0], body), times=times)


def test_the_api_key_of_a_renamed_user_is_found_under_their_present_name(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    bea = user("bea", credentials=[credential("ACCA0000000000000001")], tags=[("owner", "me")])
    endpoint = serve(account(ONE, "one", users=[bea]), rules=[first_credentials("ana")])
    found = read(endpoint, monkeypatch).users()["bea"]
    assert ([one.id for one in found.others], found.owner) == (["ACCA0000000000000001"], "me")
    assert endpoint.stats()["by_account"][ONE][NEW_ACTIONS[0]] == 2


@pytest.mark.parametrize(
    ("gone", "found"),
    [
        ((), []),
        (("before",), ["<signing_certificate_2>"]),
        (("before", "deleted"), []),  # either may be theirs
    ],
)
def test_the_certificate_of_a_renamed_user_is_found_in_the_row_of_before(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, gone: tuple[str, ...], found: list[str]
) -> None:
    """The report still has the user's earlier name, which the list of users has no more."""
    held = [certificate(active=False), certificate(last_rotated=ago(3))]
    before = [
        user(name, created=ago(9), in_list=False, certificates=held, user_id=f"AIDA{name:0>16}")
        for name in gone
    ]
    after = user("after", created=ago(9), in_report=False)
    others = [user("other", created=ago(9), certificates=held), user("old", in_list=False)]
    endpoint = serve(account(ONE, "one", users=[*before, after, *others]))
    users = read(endpoint, monkeypatch).users()
    active = [one.id for one in users["after"].others if one.status == "Active"]
    assert active == found
    assert len(users["other"].others) == 2


def test_an_account_fails_rather_than_lose_an_api_key(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [first_credentials("nobody", times=None)]
    endpoint = serve(account(ONE, "one", users=[user("ana")]), rules=rules)
    found = read(endpoint, monkeypatch)
    assert found.failure() == (NEW_ACTIONS[1], "NoSuchEntity")
    outcome = found.outcomes[ONE]
    assert isinstance(outcome, FailedAccount)
    assert "nobody" in outcome.message
    assert endpoint.stats()["by_account"][ONE][NEW_ACTIONS[1]] == 4


def test_the_api_key_of_whoever_had_the_name_before(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is older than the user of that name, so the lists are of different moments."""
    bea = user("bea", credentials=[credential("ACCA0000000000000001")])
    ana = user("ana", created=ago(1))
    endpoint = serve(account(ONE, "one", users=[ana, bea]), rules=[first_credentials("ana")])
    users = read(endpoint, monkeypatch).users()
    assert users["ana"].others == ()
    assert [one.id for one in users["bea"].others] == ["ACCA0000000000000001"]


def test_only_list_users_says_when_a_young_users_password_was_last_used(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked once for all of them, to its end; a thousand entries a page."""
    users = [user(f"user-{n:04}") for n in range(999)]
    used, unused = (
        user(name, password=True, in_report=False, password_last_used=moment)
        for name, moment in (("z-used", ago(2)), ("young", None))
    )
    endpoint = serve(account(ONE, "one", users=[*users, unused, used]), account(TWO, "two"))
    found = read(endpoint, monkeypatch)
    assert found.users()["z-used"].password_last_used == ago(2)
    assert (found.users()["young"].password, found.users()["young"].password_last_used) == (
        True,
        None,
    )
    counts = endpoint.stats()["by_account"]
    assert (counts[ONE]["ListUsers"], "ListUsers" in counts[TWO]) == (2, False)


@pytest.mark.parametrize(("times", "asked"), [(1, 2), (None, 4)])
def test_a_young_user_whom_list_users_lacks_is_read_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, times: int | None, asked: int
) -> None:
    """When the password was last used is unknown then, not never."""
    young = user("young", password=True, in_report=False, password_last_used=ago(2))
    nobody = answer_of("ListUsers", "<Users></Users><IsTruncated>false</IsTruncated>")
    rules = [rule("ListUsers", ONE, raw=nobody, times=times)]
    endpoint = serve(account(ONE, "one", users=[young]), rules=rules)
    found = read(endpoint, monkeypatch)
    if times is None:
        assert found.failure() == ("ListUsers", "NoSuchEntity")
    else:
        assert found.users()["young"].password_last_used == ago(2)
    counts = endpoint.stats()["by_account"][ONE]
    assert (counts["ListUsers"], counts[NEW_ACTIONS[1]]) == (asked, asked)


def test_details_of_another_account_fail_the_account(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed_up = (
        "<UserDetailList><member><UserName>ana</UserName><UserId>AIDA1</UserId>"
        f"<Arn>arn:aws:iam::{TWO}:user/ana</Arn></member></UserDetailList>"
    )
    rules = [rule(NEW_ACTIONS[1], ONE, raw=answer_of(NEW_ACTIONS[1], mixed_up))]
    found = read(serve(account(ONE, "one"), rules=rules), monkeypatch)
    assert found.failure() == (NEW_ACTIONS[1], "WrongAccount")


# --- what is denied ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "denied", [NEW_ACTIONS[:1], NEW_ACTIONS[1:], NEW_ACTIONS], ids=["keys", "details", "both"]
)
def test_a_role_without_the_new_permissions_costs_that_part_alone(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, denied: tuple[str, ...]
) -> None:
    ana = user(
        "ana",
        password=True,
        keys=[key("AKIA0000000000000ANA")],
        credentials=[credential("ACCA0000000000000001")],
        certificates=[certificate()],
        tags=[("owner", "me")],
        attached=[ADMINISTRATOR, f"{MANAGED}AWSCompromisedKeyQuarantineV3"],
    )
    endpoint = serve(account(ONE, "one", users=[ana], deny=list(denied)))
    outcome = read(endpoint, monkeypatch).audited()
    assert outcome.not_checked == dict.fromkeys(denied, "AccessDenied")
    boss, found = outcome.users
    kinds = (
        ["signing-certificate"] if NEW_ACTIONS[0] in denied else ["api-key", "signing-certificate"]
    )
    assert [one.kind for one in found.others] == kinds
    known = (f"{ONE}@example.com", "unknown", False)
    if NEW_ACTIONS[1] not in denied:
        known = ("me", "true", True)
    assert (found.owner, found.administrator, found.exposed) == known
    assert (boss.administrator, found.password, len(found.keys)) == ("true", True, 1)
    asked = endpoint.stats()["by_account"][ONE]
    assert asked.get("ListUsers", 0) == (NEW_ACTIONS[1] in denied)


def test_a_damaged_list_of_users_is_named(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the details are denied, ListUsers is what failed."""
    body = "<Users><member><UserName>ana</UserName></member></Users>"
    rules = [rule("ListUsers", ONE, raw=answer_of("ListUsers", body))]
    endpoint = serve(account(ONE, "one", deny=[NEW_ACTIONS[1]]), rules=rules)
    assert read(endpoint, monkeypatch).failure() == ("ListUsers", "KeyError")


@pytest.mark.parametrize("action", NEW_ACTIONS)
def test_any_other_failure_fails_the_account(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    monkeypatch.setattr(iam_audit, "FIRST_PAUSE", (0.0, 0.1))  # an answer like that is asked again
    rules = [rule(action, ONE, error="ValidationError"), rule(action, TWO, raw="<a></a>")]
    found = read(serve(account(ONE, "one"), account(TWO, "two"), rules=rules), monkeypatch)
    assert found.failure(ONE) == (action, "ValidationError")
    if action == NEW_ACTIONS[0]:
        assert found.failure(TWO) == (action, "ResponseParserError")


# --- organizational units ---------------------------------------------------------------------------------------------

UNITS = {"ou-test-aaaaaaaa": "Workloads", "ou-test-bbbbbbbb": "Prod"}


def test_accounts_have_the_names_of_their_units_and_their_address(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each unit is asked about once; of accounts that are left out nothing is asked."""
    first, second = UNITS
    accounts = [
        *(in_units(str(100000000000 + n), "many", first, second) for n in range(20)),
        in_units(ONE, "one", first, email="one@example.com"),
        in_units(TWO, "two", second, state="SUSPENDED"),
        account(THREE, "three"),
        in_units("444444444444", "left out", "ou-test-cccccccc"),
    ]
    endpoint = serve(*accounts, ous=UNITS)
    found = read(endpoint, monkeypatch, "--exclude", "444444444444")
    places = {
        one: (outcome.account.ou, outcome.account.email) for one, outcome in found.outcomes.items()
    }
    assert places["100000000007"][0] == "Workloads/Prod"
    assert places[ONE] == ("Workloads", "one@example.com")
    assert places[TWO][0] == ""  # skipped: its place is of no use
    assert places[THREE] == ("", f"{THREE}@example.com")
    assert found.run.ous_why_not == ""
    assert endpoint.stats()["by_account"][MANAGEMENT]["DescribeOrganizationalUnit"] == 2


@pytest.mark.parametrize("code", ["AccessDenied", "OrganizationalUnitNotFoundException"])
def test_a_units_id_stands_in_for_its_name(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """After a failure nothing more is asked, but for what is asked already."""
    accounts = [in_units(str(100000000000 + n), "many", f"ou-test-{n:08}") for n in range(30)]
    denied = rule("DescribeOrganizationalUnit", error=code, status=403, skip=1)
    endpoint = serve(*accounts, rules=[denied])
    found = read(endpoint, monkeypatch)
    ous = [found.audited(one["id"]).account.ou for one in accounts]
    assert sum(not ou.startswith("ou-test-") for ou in ous) == 1
    assert found.run.ous_why_not.startswith("DescribeOrganizationalUnit: " + code)
    assert endpoint.stats()["requests"]["DescribeOrganizationalUnit"] <= 3


# --- administrators ---------------------------------------------------------------------------------------------------

OWN = f"arn:aws:iam::{ONE}:policy/"


def allow(action: Any = "*", resource: Any = "*", **more: Any) -> Json:
    return {"Effect": "Allow", "Action": action, "Resource": resource, **more}


def allow_but(action: Any, resource: Any = "*") -> Json:
    return {"Effect": "Allow", "NotAction": action, "Resource": resource}


STATEMENTS: dict[str, tuple[Any, str]] = {
    "everything": (allow(), "true"),
    "iam": (allow("iam:*"), "true"),
    "iam in capitals": (allow("IAM:*"), "true"),
    "a list with iam": (allow(["s3:Get*", "iam:*"], ["arn:aws:s3:::b", "*"]), "true"),
    "*:*": (allow("*:*"), "true"),
    "i*": (allow("i*"), "true"),
    "iam*": (allow("iam*"), "true"),
    "ia?:*": (allow("ia?:*"), "true"),
    "**": (allow("**"), "true"),
    "a part of iam": (allow("iam:Create*"), "false"),
    "the end of iam's actions": (allow("iam:*User"), "false"),
    "iam's actions of one letter": (allow("iam:?"), "false"),
    "another service": (allow("s3:*"), "false"),
    "one that begins alike": (allow("iamx:*"), "false"),
    "brackets are no wildcard": (allow("[i]am:*"), "false"),
    "with a condition": (allow(Condition={"Bool": {"aws:MultiFactorAuthPresent": "true"}}), "true"),
    "denied": ({"Effect": "Deny", "Action": "*", "Resource": "*"}, "false"),
    "two statements": ([allow("s3:*"), allow("iam:*")], "true"),
    "actions and resources of two statements": ([allow("s3:*"), allow("iam:*", "x")], "false"),
    "no statement": ([], "false"),
    "all of IAM in the account": (allow("iam:*", f"arn:aws:iam::{ONE}:*"), "true"),
    "all of IAM in any": (allow("*", "arn:aws:iam::*"), "true"),
    "users only": (allow("iam:*", f"arn:aws:iam::{ONE}:user/*"), "false"),
    "another account": (allow("iam:*", f"arn:aws:iam::{TWO}:*"), "false"),
    "oneself": (allow("iam:*", "arn:aws:iam::*:user/${aws:username}"), "false"),
    "all but IAM": (allow_but("iam:*"), "false"),
    "all but a part of IAM": (allow_but(["s3:*", "iam:Delete*"]), "false"),
    "all but everything": (allow_but("*"), "false"),
    "all but what begins like IAM": (allow_but("i*"), "false"),
    "all but one service": (allow_but("organizations:*"), "true"),
    "all but some services": (allow_but(["s3:*", "iot:*", "EC2:*"]), "true"),
    "all but one service, on a bucket": (allow_but("s3:*", "arn:aws:s3:::b"), "false"),
    "on all but a bucket": (
        {"Effect": "Allow", "Action": "*", "NotResource": "arn:aws:s3:::b"},
        "true",
    ),
    "on all but users": (
        {"Effect": "Allow", "Action": "*", "NotResource": ["arn:aws:iam::*:user/*"]},
        "false",
    ),
}


def administrator(policies: list[Any], attached: list[str], groups: dict[str, Json]) -> str:
    made = {
        "Arn": f"arn:aws:iam::{ONE}:user/a/b/ana",
        "UserPolicyList": [{"PolicyDocument": document} for document in policies],
        "AttachedManagedPolicies": [{"PolicyArn": arn} for arn in attached],
        "GroupList": list(groups),
    }
    known = {name: made for name, made in groups.items() if made}
    return iam_audit.administrator(made, known)


@pytest.mark.parametrize("name", STATEMENTS)
@pytest.mark.parametrize("through", ["user", "group"])
def test_what_an_inline_policy_makes_of_a_user(name: str, through: str) -> None:
    statement, expected = STATEMENTS[name]
    document = {"Version": "2012-10-17", "Statement": statement}
    if through == "user":
        assert administrator([document], [], {}) == expected
    else:
        policies = {"GroupPolicyList": [{"PolicyDocument": document}]}
        assert administrator([], [], {"g": policies}) == expected


FULL, READ_ONLY, CUSTOM = ADMINISTRATOR, f"{MANAGED}ReadOnlyAccess", f"{OWN}AdministratorAccess"
ADMIN_GROUP: Json = {"AttachedManagedPolicies": [{"PolicyArn": FULL}]}
CUSTOM_GROUP: Json = {"AttachedManagedPolicies": [{"PolicyArn": CUSTOM}]}
EVERYTHING: Json = {"Statement": allow()}
CASES: dict[str, tuple[list[Any], list[str], dict[str, Json], str]] = {
    "nothing": ([], [], {}, "false"),
    "AdministratorAccess": ([], [FULL], {}, "true"),
    "IAMFullAccess": ([], [f"{MANAGED}IAMFullAccess"], {}, "true"),
    "in China": ([], ["arn:aws-cn:iam::aws:policy/AdministratorAccess"], {}, "true"),
    "in GovCloud": ([], ["arn:aws-us-gov:iam::aws:policy/IAMFullAccess"], {}, "true"),
    "one that is called alike": ([], [f"{MANAGED}AdministratorAccess-Amplify"], {}, "false"),
    "another of AWS's": ([], [READ_ONLY], {}, "false"),
    "a customer's of that name": ([], [CUSTOM], {}, "unknown"),
    "a customer's and AWS's": ([], [CUSTOM, FULL], {}, "true"),
    "a customer's and an inline one": ([EVERYTHING], [CUSTOM], {}, "true"),
    "through a group": ([], [READ_ONLY], {"g": ADMIN_GROUP}, "true"),
    "through one of two groups": ([], [], {"f": CUSTOM_GROUP, "g": ADMIN_GROUP}, "true"),
    "a customer's through a group": ([], [READ_ONLY], {"g": CUSTOM_GROUP}, "unknown"),
    "a group that is not in the answer": ([], [], {"g": {}}, "unknown"),
    "text that is no policy": (["%7Bgarbled"], [], {}, "unknown"),
    "text that is no policy, and AWS's": (["%7Bgarbled"], [FULL], {}, "true"),
}


@pytest.mark.parametrize("name", CASES)
def test_who_is_an_administrator(name: str) -> None:
    policies, attached, groups, expected = CASES[name]
    assert administrator(policies, attached, groups) == expected


def test_owner_rights_and_exposure_come_over_the_wire(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policies are URL-encoded there, and botocore decodes them."""
    quarantine = f"{MANAGED}AWSCompromisedKeyQuarantine"
    users = [
        user("both-tags", tags=[("team", "t"), ("Owner", "o&<o>")]),
        user("empty-tag", tags=[("owner", ""), ("other", "x")]),
        user("exposed", attached=[quarantine]),
        user("exposed-v3", attached=[READ_ONLY, f"{quarantine}V3"]),
        user("in-group", groups=["readers", "admins"]),
        user("inline", policies=[{"Statement": allow("iam:*")}]),
        user("inline-small", policies=[{"Statement": [allow("s3:*", "arn:aws:s3:::a%20/+b")]}]),
        user("custom", attached=[CUSTOM], path="/a/"),
    ]
    groups = [group("readers", attached=[READ_ONLY]), group("admins", policies=[EVERYTHING])]
    made = account(ONE, "one", users=users, groups=groups, email="one@example.com")
    found = read(serve(made), monkeypatch)
    del (told := found.users())["<root_account>"]
    address = "one@example.com"
    assert {one.name: (one.owner, one.administrator, one.exposed) for one in told.values()} == {
        "both-tags": ("o&<o>", "false", False),
        "custom": (address, "unknown", False),
        "empty-tag": (address, "false", False),
        "exposed": (address, "false", True),
        "exposed-v3": (address, "false", True),
        "in-group": (address, "true", False),
        "inline": (address, "true", False),
        "inline-small": (address, "false", False),
    }
    assert found.audited().not_checked == {}


# --- credentials.csv --------------------------------------------------------------------------------------------------

SERIALS = {f"arn:aws:iam::{ONE}:mfa/ana": "Virtual", "GAHT12345678": "Hardware"}
SERVICES = {"codecommit.amazonaws.com": "service-password", "bedrock.amazonaws.com": "api-key"}
LATER, LAST = "2025-03-04T05:06:07Z", "2025-09-08T07:06:05Z"


def held_by_root(boss: Json) -> Iterator[Held]:
    if boss["password"]:
        yield Held("password", boss["created"], used=boss["password_last_used"])
    for slot, one in enumerate(boss["keys"], 1):
        status, dates = "Active" if one["active"] else "Inactive", (one["last_rotated"],)
        key_id = f"<root_access_key_{slot}>"
        yield Held("access-key", *dates, key_id, status, one["last_used"], one["service"])


def held_by_user(one: Json) -> Iterator[Held]:
    if one["password"]:
        yield Held("password", one["password_changed"], used=one["password_last_used"])
    for each in one["keys"]:
        dates = {"created": each["created"], "used": each["last_used"]}
        yield Held(
            "access-key", id=each["id"], status=each["status"], service=each["service"], **dates
        )


def held_by_anybody(one: Json, denied: list[str]) -> Iterator[Held]:
    for each in one.get("credentials", []) if NEW_ACTIONS[0] not in denied else []:
        kind, expires = SERVICES[each["service"]], each["expires"] or "never"
        told = (each["created"], each["id"], each["status"])
        yield Held(kind, *told, service=each["service"], expires=expires)
    for slot, each in enumerate(one["certificates"], 1):
        status = "Active" if each["active"] else "Inactive"
        told = (each["last_rotated"], f"<signing_certificate_{slot}>", status)
        yield Held("signing-certificate", *told)


def truth(made: Json, now: datetime, ou: str, whose: dict[str, tuple[str, str]]) -> list[list[str]]:
    """The rows of credentials.csv that this account of the endpoint must have; `whose` has owners and rights."""
    boss, where = made["root"], [made["id"], made["name"], made["email"], ou]
    where.append(str("Prod" in ou).lower())
    mfa = "Virtual" if boss["virtual"] else "Hardware" if boss["mfa"] else "None"
    everybody = [(ROOT, mfa, [*held_by_root(boss), *held_by_anybody(boss, made["deny"])])]
    for one in sorted(made["users"], key=lambda one: str(one["name"])):
        mfa = "+".join(sorted(map(SERIALS.__getitem__, one["mfa"]))) or "None"
        held = [*held_by_user(one), *held_by_anybody(one, made["deny"])]
        everybody.append((one["name"], mfa, held))
    rows = []
    for name, mfa, held in everybody:
        for cells in held_cells(held, now):
            rows.append([*where, name, *whose[name], *cells, mfa])
    return rows


def every_kind(letter: str, **more: Any) -> list[Json]:
    """Users with credentials of every kind, of several states and dates."""
    ana = user(
        "ana",
        password=True,
        password_last_used=LAST,
        password_changed=LATER,
        mfa=SERIALS,
        keys=[
            key(f"AKIA000000000000{letter}AN2", created=LATER, status="Inactive"),
            key(f"AKIA000000000000{letter}AN1", last_used=LAST, service="ec2"),
        ],
        credentials=[
            credential(f"ACCA000000000000{letter}003", "codecommit.amazonaws.com"),
            credential(
                f"ACCA000000000000{letter}002", created=LATER, expires=LAST, status="Expired"
            ),
            credential(f"ACCA000000000000{letter}001", status="Inactive"),
        ],
        certificates=[certificate(last_rotated=LATER), certificate(active=False)],
        tags=[("team", "payments"), ("other", "x")],
        attached=[ADMINISTRATOR],
    )
    bea = user(
        "bea",
        password=True,
        groups=["admins"],
        credentials=[
            credential(f"ACCA000000000000{letter}004", "codecommit.amazonaws.com", created=LATER)
        ],
    )
    machine = user("machine", keys=[key(f"AKIA000000000000{letter}MAC")], attached=[CUSTOM])
    return [machine, bea, ana, user("nothing")]


def test_credentials_csv_agrees_with_the_endpoint_cell_by_cell(
    serve: Serve, run_program: Program
) -> None:
    boss = root(
        password=True,
        password_last_used=LAST,
        virtual=True,
        keys=[root_key(last_rotated=LATER), root_key(active=False, last_used=LAST, service="ec2")],
        certificates=[certificate(last_rotated=LATER)],
    )
    admins = group("admins", policies=[EVERYTHING])
    unit, prod = "ou-test-aaaaaaaa", "ou-test-bbbbbbbb"
    one, two, three = (
        in_units(ONE, "one", unit, prod, users=every_kind("1"), groups=[admins], root=boss),
        in_units(TWO, "two", unit, users=every_kind("2"), groups=[admins], deny=[*NEW_ACTIONS]),
        account(THREE, "three", root=root(password=True, mfa=True)),
    )
    made = [
        {**ACCOUNT_DEFAULTS, "email": f"{each['id']}@example.com", **each}
        for each in (one, two, three)
    ]
    made[1]["root"] = root()
    result = run_program(serve(one, two, three, ous={unit: "Workloads", prod: "Prod"}).env())
    assert result.exit_code == 0, result
    assert result.summary is not None
    now = iam_audit.parse_time(result.summary["started"])
    known = {
        "ana": ("payments", "true"),
        "bea": (f"{ONE}@example.com", "true"),
        "machine": (f"{ONE}@example.com", "unknown"),
    }
    unread = dict.fromkeys(("ana", "bea", "machine"), (f"{TWO}@example.com", "unknown"))
    expected = []
    for each, ou, whose in zip(
        made, ("Workloads/Prod", "Workloads", ""), (known, unread, {}), strict=True
    ):
        whose[ROOT] = (each["email"], "true")
        expected += truth(each, now, ou, whose)
    rows = credentials_of(result)
    assert rows == expected
    assert {row[8] for row in rows if row[0] == TWO} == {
        "password",
        "access-key",
        "signing-certificate",
    }


# --- permissions ------------------------------------------------------------------------------------------------------


def test_the_session_policy_is_far_from_its_limit() -> None:
    """Of 2,048 characters, and of a packed size that AWS does not publish."""
    policy = iam_audit.session_policy([*iam_audit.ROLE_READS, *iam_audit.CLOUDTRAIL_READS])
    assert {f"iam:{action}" for action in NEW_ACTIONS} <= set(
        json.loads(policy)["Statement"][0]["Action"]
    )
    assert len(policy) < 2048 / 3


def test_an_account_keeps_what_list_accounts_says() -> None:
    entry = {
        "Id": ONE,
        "Name": "one",
        "State": "ACTIVE",
        "Email": "a@example.com",
        "Paths": ["o/r/"],
    }
    expected = Account(ONE, "one", "ACTIVE", "o/r/", "a@example.com")
    assert iam_audit.account_of(entry) == expected

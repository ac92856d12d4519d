"""What the judge promises, of 20,000 random policies, held against an evaluator written independently."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import pytest
from builders import ABSENT, ENFORCED, in_organization
from evaluator import ACCOUNT, ORGANIZATION, Request, gets_through, matches, request_of
from hypothesis import given, settings
from hypothesis import strategies as st

import iam_audit as audit

POLICIES, WORKERS = 20_000, 8
KEY = "iam:CreateAccessKey"
API_KEY = ("iam:CreateServiceSpecificCredential", "iam:ResetServiceSpecificCredential")
ALLOW_ALL = {"Effect": "Allow", "Action": "*", "Resource": "*"}
IAM, STS = "arn:aws:iam::*:", "arn:aws:sts::*:assumed-role/"
USERS = ["user/ci", "user/team/anna", "user/x"]
ROLES = [
    "role/Admin",
    "role/path/Other",
    "role/AWSAcceleratorX",
    "role/aws-reserved/AWSReservedSSO_A_1",
]
WITH_MFA = {"aws:MultiFactorAuthPresent": "true", "aws:MultiFactorAuthAge": "60"}

ACTIONS = [
    "*", "*:*", "iam:*", "s3:*", "iam:Create*", KEY, "iam:EnableMFADevice", "iam:Get*", "sts:*", "iam:*MFADevice",
    "?am:*", "sts:GetSessionToken", "i*", "iam:*Key", "IAM:createaccesskey", "ec2:*",
    *API_KEY, "iam:*SpecificCredential", "iam:Reset*",
]  # fmt: skip
RESOURCES = [
    "*", "*", "*", "arn:*:iam::*:user/*", IAM + "user/ci", IAM + "user/*", IAM + "role/*", "arn:aws:s3:::*", IAM + "*",
    IAM + "u*", "arn:?ws:iam::*:user/?i", IAM + "root", IAM + "user/${aws:username}", "arn:aws:iam::*",
    f"arn:aws:iam::{ACCOUNT}:user/*",
]  # fmt: skip
PRINCIPALS = [
    "*", "arn:*:iam::*:user/*", IAM + "user/*", IAM + "user/ci", IAM + "user/c*", IAM + "role/Admin", IAM + "role/*",
    IAM + "root", IAM + "*", IAM + "user/?i", "arn:aws-cn:iam::*:user/*", IAM + "role/AWSAccelerator*", STS + "Admin/*",
    IAM + "role/path/*", IAM + "role/A*", "arn:*:iam::*:role/Other", IAM + "user/${aws:username}", "arn:*:*::*:*",
    IAM + "role/*/Other", IAM + "role/aws-reserved/*", IAM + "role/AWSReserved*", f"arn:aws:iam::{ACCOUNT}:user/x",
]  # fmt: skip
LIKE = ["StringLike", "StringNotLike", "StringEquals", "StringNotEquals"]
ANY = [*["{}"] * 8, "{}IfExists", "ForAnyValue:{}", "ForAllValues:{}", "ForAnyValue:{}IfExists"]
KEYS: list[tuple[list[str], list[str], list[Any]]] = [
    # operators, keys, values
    (["Bool"], ["aws:MultiFactorAuthPresent"], ["false", False, "False", "true"]),
    (["Bool"], ["aws:ViaAWSService", "aws:PrincipalIsAWSService", "aws:SecureTransport"], ["false", "true"]),
    (["Null"], ["aws:MultiFactorAuthAge", "aws:MultiFactorAuthPresent"], ["true", False, "false"]),
    (["Null"], ["aws:username", "lambda:VpcIds", "aws:TagKeys"], ["true", "false"]),
    (["NumericLessThan", "NumericGreaterThan", "NumericGreaterThanEquals", "NumericNotEquals"],
     ["aws:MultiFactorAuthAge"], ["3600", 5]),
    ([*LIKE, "ArnLike", "ArnNotLike", "ArnEquals", "ArnNotEquals"], ["aws:PrincipalArn"], PRINCIPALS),
    (LIKE, ["aws:PrincipalType"], ["User", "AssumedRole", "Account", "Service", "user", "*"]),
    (LIKE, ["aws:username"], ["ci", "*", "x"]),
    (LIKE, ["aws:PrincipalOrgID"], [ORGANIZATION, "o-other00000", "o-*"]),
    (LIKE, ["aws:RequestedRegion"], ["us-east-1", "eu-west-1", "us-*", "*"]),
    (LIKE, ["lambda:FunctionArn", "aws:TagKeys", "aws:SourceArn", "aws:PrincipalTag/team"], ["a", "*"]),
    (["IpAddress", "NotIpAddress"], ["aws:SourceIp"], ["203.0.113.0/24", "198.51.100.0/24"]),
]  # fmt: skip


def one_or_two(values: list[Any]) -> list[Any]:
    return [*values, *map(list, itertools.combinations_with_replacement(values, 2))]


def some(values: list[Any]) -> st.SearchStrategy[Any]:
    """One draw is quicker than a list of draws."""
    return st.sampled_from(one_or_two(values))


def conditions_on(operators: list[str], keys: list[str], values: list[Any]) -> Any:
    forms = ANY if operators != ["Null"] else ["{}"]
    written = [form.format(operator) for operator in operators for form in forms]
    return st.sampled_from(list(itertools.product(written, keys, one_or_two(values))))


MFA_FALSE = st.just(("Bool", "aws:MultiFactorAuthPresent", "false"))
CONDITION = st.one_of(MFA_FALSE, *(conditions_on(*group) for group in KEYS))
STATEMENT = st.builds(
    lambda effect, action, actions, resource, resources, conditions: {
        "Effect": effect,
        action: actions,
        resource: resources,
        "Condition": {operator: {key: values} for operator, key, values in conditions},
    },
    st.sampled_from(["Deny"] * 5 + ["Allow"]),
    st.sampled_from(["Action", "Action", "NotAction"]),
    st.sampled_from(["*", KEY, "iam:*", [*API_KEY], *API_KEY]) | some(ACTIONS),
    st.sampled_from(["Resource"] * 4 + ["NotResource"]),
    st.just("*") | some(RESOURCES),
    st.lists(CONDITION, max_size=2),
)
# Mostly with FullAWSAccess at the same level, as AWS attaches it; two statements may be two policies of two levels
POLICY = st.tuples(
    st.lists(STATEMENT, min_size=1, max_size=2), st.booleans() | st.just(True), st.booleans()
)


@functools.cache
def request(principal: str, region: str, mfa: bool) -> Request:
    return request_of(principal, **{"aws:RequestedRegion": region}, **(WITH_MFA if mfa else {}))


@functools.cache
def is_exempt(principal: str, exemptions: tuple[str, ...]) -> bool:
    arn, name = f"arn:aws:iam::{ACCOUNT}:{principal}", principal.rpartition("/")[2]
    return any(matches(each, arn) or each == name for each in exemptions)


def check_new_keys(
    control: audit.Control, actions: tuple[str, ...], levels: list[list[dict[str, Any]]]
) -> None:
    """Enforced: nobody gets through to any of the actions but who is exempt. Absent: every user and role gets through
    to all of them. Root has no API keys of its own, and creates those of users."""
    if control.verdict not in (ENFORCED, ABSENT):
        return
    for principal, action in itertools.product((*USERS, *ROLES, "root"), actions):
        exempt = is_exempt(principal, control.exemptions)
        for mfa in (False, True):
            context = request(principal, "us-east-1", mfa)
            targets = [*USERS, "root"] if principal == "root" and action == KEY else USERS
            for target in targets:
                through = gets_through(levels, action, f"arn:aws:iam::{ACCOUNT}:{target}", context)
                if control.verdict == ENFORCED:
                    assert not through or exempt, (principal, action, mfa, target)
                elif principal != "root":
                    assert through, (principal, action, mfa, target)


def check_mfa(control: audit.Control, levels: list[list[dict[str, Any]]]) -> None:
    """Enforced: no user gets through without MFA but who is exempt. Absent: who gets through with MFA does without.

    Only Deny statements count.
    """
    if control.verdict not in (ENFORCED, ABSENT):
        return
    for principal in USERS:
        for action in ("s3:GetObject", KEY, "iam:DeactivateMFADevice", "sts:AssumeRole"):
            for resource in ("arn:aws:s3:::bucket/object", f"arn:aws:iam::{ACCOUNT}:user/ci"):
                through = gets_through(
                    levels, action, resource, request(principal, "us-west-2", False)
                )
                if control.verdict == ENFORCED:
                    assert not through or is_exempt(principal, control.exemptions), (
                        principal,
                        action,
                    )
                else:
                    with_mfa = request(principal, "us-west-2", True)
                    assert through >= gets_through(levels, action, resource, with_mfa), action


@pytest.mark.parametrize("worker", range(WORKERS))
def test_the_judge_keeps_its_promise(worker: int) -> None:
    """Split for the sake of pytest-xdist; Hypothesis takes other policies each time."""
    verdicts = set[tuple[str, str]]()

    @settings(max_examples=POLICIES // WORKERS, database=None)
    @given(POLICY)
    def judge(policy: tuple[list[dict[str, Any]], bool, bool]) -> None:
        statements, full_access, apart = policy
        above = [*statements[1:], ALLOW_ALL] if apart else [ALLOW_ALL]
        here = [*statements[: 1 if apart else 2], *([ALLOW_ALL] if full_access else [])]
        controls = in_organization(
            ("r-1", json.dumps({"Statement": above})),
            (ACCOUNT, json.dumps({"Statement": here})),
        )
        for name, actions in (("new-keys-prevented", (KEY,)), ("new-api-keys-prevented", API_KEY)):
            check_new_keys(controls[name], actions, [above, here])
        denials = [each for each in statements if each["Effect"] == "Deny"]
        check_mfa(controls["mfa-required"], [[ALLOW_ALL, *denials]])
        verdicts.update((name, control.verdict) for name, control in controls.items())

    judge()
    for control in audit.CONTROLS:
        assert {(control, ENFORCED), (control, ABSENT)} <= verdicts, "policies that try nothing"

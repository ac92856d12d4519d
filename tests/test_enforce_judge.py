"""What service control policies prevent, judged on their JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders import (
    ABSENT,
    ENFORCED,
    NOT_CHECKED,
    PARTIAL,
    attached,
    control_of,
    judged,
    judgements,
)
from hypothesis import example, given
from hypothesis import strategies as st

import iam_audit as audit

NO_MFA = {"Bool": {"aws:MultiFactorAuthPresent": "false"}}
NO_MFA_OR_KEY = {"BoolIfExists": {"aws:MultiFactorAuthPresent": "false"}}
ONLY_USERS = {"ArnLike": {"aws:PrincipalArn": "arn:*:iam::*:user/*"}}
SETUP = [
    "iam:CreateVirtualMFADevice",
    "iam:EnableMFADevice",
    "iam:ListMFADevices",
    "sts:GetSessionToken",
]


def deny(action: Any = "*", condition: Any = None, **elements: Any) -> dict[str, Any]:
    """A Deny statement on every resource; NotAction and NotResource take the place of Action and Resource."""
    statement = {"Effect": "Deny", "Action": action, "Resource": "*", **elements}
    if "NotAction" in elements:
        del statement["Action"]
    if "NotResource" in elements:
        del statement["Resource"]
    return {**statement, "Condition": condition} if condition is not None else statement


def policy(*statements: Any) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


MFA_CASES = [
    # The action
    ("everything", deny("*", NO_MFA), ENFORCED, ()),
    ("everything, as a list", deny(["ec2:*", "*"], NO_MFA), ENFORCED, ()),
    ("every action of every service", deny("*:*", NO_MFA), ENFORCED, ()),
    ("all but setting up MFA", deny(NotAction=SETUP, condition=NO_MFA), ENFORCED, ()),
    ("one basic, no list", deny(NotAction="sts:GetSessionToken", condition=NO_MFA), ENFORCED, ()),
    ("any case", deny(NotAction=["IAM:enablemfadevice"], condition=NO_MFA), ENFORCED, ()),
    (
        "reading IAM",
        deny(NotAction=[*SETUP, "iam:Get*", "iam:ListUsers"], condition=NO_MFA),
        ENFORCED,
        (),
    ),
    (
        "aws login",
        deny(NotAction=[*SETUP, "signin:CreateOAuth2Token"], condition=NO_MFA),
        ENFORCED,
        (),
    ),
    (
        "all of S3 left out",
        deny(NotAction=[*SETUP, "s3:*"], condition=NO_MFA),
        PARTIAL,
        ("NotAction s3:*",),
    ),
    (
        "all of IAM left out",
        deny(NotAction="iam:*", condition=NO_MFA),
        PARTIAL,
        ("NotAction iam:*",),
    ),
    ("roles left out", deny(NotAction=["sts:*"], condition=NO_MFA), PARTIAL, ("NotAction sts:*",)),
    (
        "keys left out",
        deny(NotAction=["iam:CreateAccessKey"], condition=NO_MFA),
        PARTIAL,
        ("NotAction iam:CreateAccessKey",),
    ),
    (
        "a wildcard before MFA",
        deny(NotAction="iam:*MFADevice", condition=NO_MFA),
        PARTIAL,
        ("NotAction iam:*MFADevice",),
    ),
    (
        "removing MFA left out",
        deny(NotAction="iam:DeactivateMFADevice", condition=NO_MFA),
        PARTIAL,
        ("NotAction iam:DeactivateMFADevice",),
    ),
    (
        "all of Get left out",
        deny(NotAction="*:Get*", condition=NO_MFA),
        PARTIAL,
        ("NotAction *:Get*",),
    ),
    ("one action", deny("s3:*", NO_MFA), PARTIAL, ("Action s3:*",)),
    ("two services", deny(["s3:*", "iam:*"], NO_MFA), PARTIAL, ("Action s3:*, iam:*",)),
    ("nothing at all", deny(NotAction=["*"], condition=NO_MFA), ABSENT, ()),
    # The resource
    (
        "one bucket",
        deny("*", NO_MFA, Resource=["arn:aws:s3:::x"]),
        PARTIAL,
        ("Resource arn:aws:s3:::x",),
    ),
    (
        "all but one bucket",
        deny("*", NO_MFA, NotResource="arn:aws:s3:::x"),
        PARTIAL,
        ("NotResource arn:aws:s3:::x",),
    ),
    ("no resource", deny("*", NO_MFA, NotResource="*"), ABSENT, ()),
    # MFA
    ("access keys too", deny("*", NO_MFA_OR_KEY), ENFORCED, ()),
    ("JSON false", deny("*", {"Bool": {"aws:MultiFactorAuthPresent": False}}), ENFORCED, ()),
    (
        "a list, any case",
        deny("*", {"bool": {"AWS:multifactorauthpresent": ["False"]}}),
        ENFORCED,
        (),
    ),
    (
        "a set operator",
        deny("*", {"ForAnyValue:Bool": {"aws:MultiFactorAuthPresent": "false"}}),
        ENFORCED,
        (),
    ),
    (
        "Null, which console sessions without MFA do not meet: they send the key, as false",
        deny("*", {"Null": {"aws:MultiFactorAuthPresent": "true"}}),
        PARTIAL,
        ("Null aws:MultiFactorAuthPresent true",),
    ),
    ("no age", deny("*", {"Null": {"aws:MultiFactorAuthAge": True}}), ENFORCED, ()),
    ("only with MFA", deny("*", {"Bool": {"aws:MultiFactorAuthPresent": "true"}}), ABSENT, ()),
    ("only with an age", deny("*", {"Null": {"aws:MultiFactorAuthAge": "false"}}), ABSENT, ()),
    ("no condition", deny("*"), ABSENT, ()),
    ("no condition on MFA", deny("*", {"Bool": {"aws:SecureTransport": "false"}}), ABSENT, ()),
    (
        "true or false",
        deny("*", {"Bool": {"aws:MultiFactorAuthPresent": ["true", "false"]}}),
        PARTIAL,
        ("Bool aws:MultiFactorAuthPresent true, false",),
    ),
    (
        "the key is there, whatever it says",
        deny("*", {"Null": {"aws:MultiFactorAuthPresent": "false"}}),
        ABSENT,
        (),
    ),
    (
        "old MFA",
        deny("*", {"NumericGreaterThan": {"aws:MultiFactorAuthAge": 3600}}),
        ABSENT,
        (),
    ),
    (
        "a set operator that an absent key satisfies never",
        deny("*", {"ForAnyValue:Null": {"aws:MultiFactorAuthPresent": "true"}}),
        PARTIAL,
        ("ForAnyValue:Null aws:MultiFactorAuthPresent true",),
    ),
    (
        "false and absent at once",
        deny("*", {**NO_MFA, "Null": {"aws:MultiFactorAuthPresent": "true"}}),
        PARTIAL,
        ("Null aws:MultiFactorAuthPresent true",),
    ),
    # Further conditions
    ("IAM users by ARN", deny("*", {**NO_MFA, **ONLY_USERS}), ENFORCED, ()),
    (
        "with their partition",
        deny("*", {**NO_MFA, "StringLike": {"aws:principalarn": ["arn:aws:iam::*:user/*"]}}),
        ENFORCED,
        (),
    ),
    (
        "users and root",
        deny(
            "*",
            {**NO_MFA, "ArnEquals": {"aws:PrincipalArn": ["arn:*:iam::*:root", "arn:*:iam::*:*"]}},
        ),
        ENFORCED,
        (),
    ),
    (
        "IAM users by type",
        deny("*", {**NO_MFA, "StringEquals": {"aws:PrincipalType": "User"}}),
        ENFORCED,
        (),
    ),
    (
        "all but IAM users",
        deny("*", {**NO_MFA, "StringNotEquals": {"aws:PrincipalType": "User"}}),
        ABSENT,
        (),
    ),
    (
        "type in the wrong case",
        deny("*", {**NO_MFA, "StringEquals": {"aws:PrincipalType": "user"}}),
        PARTIAL,
        ("StringEquals aws:PrincipalType user",),
    ),
    (
        "wildcards that StringEquals does not know",
        deny("*", {**NO_MFA, "StringEquals": {"aws:PrincipalArn": "arn:aws:iam::*:user/*"}}),
        ABSENT,
        (),
    ),
    (
        "users of another partition",
        deny("*", {**NO_MFA, "ArnLike": {"aws:PrincipalArn": "arn:aws-cn:iam::*:user/*"}}),
        PARTIAL,
        ("ArnLike aws:PrincipalArn arn:aws-cn:iam::*:user/*",),
    ),
    (
        "some users",
        deny("*", {**NO_MFA, "ArnLike": {"aws:PrincipalArn": "arn:aws:iam::*:user/admin-*"}}),
        PARTIAL,
        ("ArnLike aws:PrincipalArn arn:aws:iam::*:user/admin-*",),
    ),
    (
        "users of one letter",
        deny("*", {**NO_MFA, "ArnLike": {"aws:PrincipalArn": "arn:aws:iam::*:user/?"}}),
        PARTIAL,
        ("ArnLike aws:PrincipalArn arn:aws:iam::*:user/?",),
    ),
    (
        "all but requests of services",
        deny(
            "*",
            {"BoolIfExists": {"aws:MultiFactorAuthPresent": "false", "aws:ViaAWSService": "false"}},
        ),
        ENFORCED,
        (),
    ),
    (
        "only requests of services",
        deny("*", {"Bool": {"aws:MultiFactorAuthPresent": "false", "aws:ViaAWSService": "true"}}),
        PARTIAL,
        ("Bool aws:ViaAWSService true",),
    ),
    (
        "one network and one tag",
        deny(
            "s3:*",
            {**NO_MFA, "NotIpAddress": {"aws:SourceIp": ["192.0.2.0/24", "198.51.100.0/24"]}},
        ),
        PARTIAL,
        ("Action s3:* and NotIpAddress aws:SourceIp 192.0.2.0/24, 198.51.100.0/24",),
    ),
]


@pytest.mark.parametrize(
    ("statement", "verdict", "conditions"),
    [case[1:] for case in MFA_CASES],
    ids=[case[0] for case in MFA_CASES],
)
def test_which_statements_require_mfa(
    statement: dict[str, Any], verdict: str, conditions: tuple[str, ...]
) -> None:
    judgement = judged(policy(statement), "mfa-required")
    assert (judgement.verdict, judgement.conditions) == (verdict, conditions)


KEY = "iam:CreateAccessKey"
KEY_CASES = [
    ("the action", deny(KEY), ENFORCED, ()),
    ("in any case", deny("IAM:createaccesskey"), ENFORCED, ()),
    ("in a list", deny(["s3:*", KEY]), ENFORCED, ()),
    *[
        (f"{action} has it", deny(action), ENFORCED, ())
        for action in ("*", "iam:*", "iam:Create*", "*:*", "iam:*Key", "iam:CreateAccess?ey")
    ],
    *[
        (f"{action} has it not", deny(action), ABSENT, ())
        for action in ("s3:*", "iam:CreateAccessKeys", "iam:Create?", "iam:[C]reateAccessKey")
    ],
    ("all but S3", deny(NotAction="s3:*"), ENFORCED, ()),
    ("all but IAM", deny(NotAction=["s3:*", "IAM:*"]), ABSENT, ()),
    ("allowed", {"Effect": "Allow", "Action": "*", "Resource": "*"}, ABSENT, ()),
    # The resource: an IAM user
    ("all users", deny(KEY, Resource="arn:*:iam::*:user/*"), ENFORCED, ()),
    (
        "all users, in a list",
        deny(KEY, Resource=["arn:aws:s3:::x", "arn:aws:iam::*:user/*"]),
        ENFORCED,
        (),
    ),
    ("all of IAM", deny("*", Resource="arn:aws:iam::*:*"), ENFORCED, ()),
    (
        "one user",
        deny(KEY, Resource="arn:aws:iam::*:user/ci"),
        PARTIAL,
        ("Resource arn:aws:iam::*:user/ci",),
    ),
    (
        "users of one account",
        deny(KEY, Resource="arn:aws:iam::111122223333:user/*"),
        PARTIAL,
        ("Resource arn:aws:iam::111122223333:user/*",),
    ),
    (
        "oneself",
        deny(KEY, Resource="arn:aws:iam::*:user/${aws:username}"),
        PARTIAL,
        ("Resource arn:aws:iam::*:user/${aws:username}",),
    ),
    ("an odd ARN", deny(KEY, Resource="arn:aws:iam::*"), PARTIAL, ("Resource arn:aws:iam::*",)),
    ("a bucket", deny("*", Resource="arn:*:s3:::bucket/*"), ABSENT, ()),
    ("a bucket that looks like it", deny("*", Resource="arn:aws:s3:::user/*"), ABSENT, ()),
    (
        "a variable",
        deny(KEY, Resource="arn:aws:iam::*:${aws:x}"),
        PARTIAL,
        ("Resource arn:aws:iam::*:${aws:x}",),
    ),
    *(
        (
            f"a variable, {element} {resource}",
            deny(KEY, **{element: resource}),
            PARTIAL,
            (f"{element} {resource}",),
        )
        for element in ("Resource", "NotResource")
        for resource in (
            "arn:aws:iam::${aws:PrincipalAccount}:user/*",
            "arn:aws:iam::${aws:PrincipalTag/acct}:*",
            "arn:${aws:x}:iam::*:user/*",
        )
    ),
    ("roles", deny("*", Resource=["arn:aws:iam::*:role/*", "arn:aws:iam::*:u2f/*"]), ABSENT, ()),
    ("users of another partition", deny("*", Resource="arn:aws-cn:iam::*:user/*"), ABSENT, ()),
    ("all but roles", deny(KEY, NotResource="arn:aws:iam::*:role/*"), ENFORCED, ()),
    (
        "all but one user",
        deny(KEY, NotResource="arn:aws:iam::*:user/ci"),
        PARTIAL,
        ("NotResource arn:aws:iam::*:user/ci",),
    ),
    ("all but users", deny(KEY, NotResource="arn:aws:iam::*:user/*"), ABSENT, ()),
    ("nothing", deny(KEY, NotResource="*"), ABSENT, ()),
    # Conditions
    ("without MFA", deny(KEY, NO_MFA), PARTIAL, ("Bool aws:MultiFactorAuthPresent false",)),
    (
        "root",
        deny("*", {"ArnLike": {"aws:PrincipalArn": "arn:aws:iam::*:root"}}),
        ABSENT,
        (),
    ),
    (
        "two conditions, of two keys",
        deny(
            KEY,
            {
                "StringEquals": {
                    "aws:RequestedRegion": "us-east-1",
                    "aws:PrincipalTag/team": ["a", "b"],
                }
            },
        ),
        PARTIAL,
        ("StringEquals aws:RequestedRegion us-east-1 and StringEquals aws:PrincipalTag/team a, b",),
    ),
]


@pytest.mark.parametrize(
    ("statement", "verdict", "conditions"),
    [case[1:] for case in KEY_CASES],
    ids=[case[0] for case in KEY_CASES],
)
def test_which_statements_prevent_new_keys(
    statement: dict[str, Any], verdict: str, conditions: tuple[str, ...]
) -> None:
    judgement = judged(policy(statement), "new-keys-prevented")
    assert (judgement.verdict, judgement.conditions) == (verdict, conditions)


ROLE = "arn:aws:iam::*:role/"
USER = "arn:aws:iam::*:user/"
EXEMPTIONS = [
    # operator, key, values, verdict on MFA, verdict on new keys
    ("ArnNotLike", "aws:PrincipalArn", [ROLE + "Admin"], ENFORCED, ENFORCED),
    (
        "StringNotLike",
        "aws:PrincipalARN",
        [ROLE + "path/Admin", ROLE + "stacksets-exec-*"],
        ENFORCED,
        ENFORCED,
    ),
    (
        "ArnNotEquals",
        "aws:PrincipalArn",
        [ROLE + "aws-reserved/sso.amazonaws.com/*/AWSReservedSSO_Admin_*"],
        ENFORCED,
        ENFORCED,
    ),
    (
        "StringNotEquals",
        "aws:PrincipalArn",
        ["arn:aws:iam::111122223333:user/break-glass"],
        ENFORCED,
        ENFORCED,
    ),
    ("ArnNotLikeIfExists", "aws:PrincipalArn", ["arn:*:iam::*:root"], ENFORCED, ENFORCED),
    ("StringNotLike", "aws:username", ["break-glass", "ci"], ENFORCED, ENFORCED),
    # every role, or who can say which: no console user, but free to create keys
    ("ArnNotLike", "aws:PrincipalArn", [ROLE + "*"], ENFORCED, PARTIAL),
    (
        "ArnNotLike",
        "aws:PrincipalArn",
        [ROLE + "Admin", ROLE + "aws-reserved/sso.amazonaws.com/*"],
        ENFORCED,
        PARTIAL,
    ),
    (
        "ArnNotLike",
        "aws:PrincipalArn",
        [ROLE + "aws-reserved/sso.amazonaws.com/*/AWSReservedSSO_*"],
        ENFORCED,
        PARTIAL,
    ),
    *(
        ("ArnNotLike", "aws:PrincipalArn", [ROLE + end], ENFORCED, PARTIAL)
        for end in (
            "a*",
            "aws-*",
            "aws-reserved/sso.amazonaws.com/eu-*",
            "*/eu-*",
            "*-*",
            "AWSReservedSSO_*",
        )
    ),
    (
        "ArnNotLike",
        "aws:PrincipalArn",
        [ROLE + "*/AWSReservedSSO_Admin_*", ROLE + "team/x-*"],
        ENFORCED,
        ENFORCED,
    ),
    ("ArnNotLike", "aws:PrincipalArn", [ROLE + "${aws:PrincipalTag/path/role}"], ENFORCED, PARTIAL),
    # all users, or who can say which
    ("ArnNotLike", "aws:PrincipalArn", ["*"], PARTIAL, PARTIAL),
    ("StringNotLike", "aws:PrincipalArn", ["arn:aws:iam::*:*"], ABSENT, PARTIAL),
    ("ArnNotLike", "aws:PrincipalArn", [ROLE + "Admin", USER + "*"], ABSENT, PARTIAL),
    ("ArnNotLike", "aws:PrincipalArn", [USER + "${aws:username}"], PARTIAL, PARTIAL),
    ("ArnNotLike", "aws:PrincipalArn", [USER + "admin-*"], PARTIAL, PARTIAL),
    ("ArnNotLike", "aws:PrincipalArn", ["arn:aws:iam::*:?ser/ci"], PARTIAL, PARTIAL),
    ("StringNotLike", "aws:username", ["*"], PARTIAL, PARTIAL),
    ("StringNotEquals", "aws:username", ["${aws:username}"], PARTIAL, PARTIAL),
    # an absent key fails ForAnyValue, so that roles, which have no user name, would go free
    ("ForAnyValue:StringNotLike", "aws:username", ["ci"], PARTIAL, PARTIAL),
    ("ForAllValues:StringNotLike", "aws:PrincipalArn", [ROLE + "Admin"], PARTIAL, PARTIAL),
    # a tag that many may set
    ("StringNotLike", "aws:PrincipalTag/exempt", ["true"], PARTIAL, PARTIAL),
    ("StringNotEquals", "aws:PrincipalAccount", ["111122223333"], PARTIAL, PARTIAL),
]


@pytest.mark.parametrize(("operator", "key", "values", "on_mfa", "on_keys"), EXEMPTIONS)
def test_a_condition_on_the_principal_exempts_or_narrows(
    operator: str, key: str, values: list[str], on_mfa: str, on_keys: str
) -> None:
    exempt = {operator: {key: values}}
    mfa = judged(policy(deny("*", {**NO_MFA, **exempt})), "mfa-required")
    keys = judged(policy(deny(KEY, exempt)), "new-keys-prevented")
    shown = f"{operator} {key} {', '.join(values)}"
    for judgement, verdict in ((mfa, on_mfa), (keys, on_keys)):
        expected = {ENFORCED: (tuple(values), ()), PARTIAL: ((), (shown,)), ABSENT: ((), ())}
        assert (judgement.verdict, judgement.exemptions, judgement.conditions) == (
            verdict,
            *expected[verdict],
        )


MFA_PRESENT, MFA_AGE = "aws:MultiFactorAuthPresent", "aws:MultiFactorAuthAge"
# A condition, what it makes of a denial of everything without MFA, and of a denial of new keys
CONDITIONS = [
    # Only root, only roles, or only who is no IAM user
    ({"StringLike": {"aws:PrincipalArn": ["arn:aws:iam::*:root"]}}, ABSENT, ABSENT),
    ({"ArnEquals": {"aws:PrincipalArn": [ROLE + "Admin", ROLE + "*"]}}, ABSENT, PARTIAL),
    ({"ForAnyValue:ArnLike": {"aws:PrincipalArn": "arn:aws:iam::*:role/*"}}, ABSENT, PARTIAL),
    ({"StringLike": {"aws:PrincipalArn": "arn:aws:sts::*:assumed-role/Admin/*"}}, ABSENT, ABSENT),
    ({"StringEquals": {"aws:PrincipalArn": ROLE + "*"}}, ABSENT, ABSENT),
    ({"StringEquals": {"aws:PrincipalType": "AssumedRole"}}, ABSENT, PARTIAL),
    ({"StringEquals": {"aws:PrincipalType": ["Account", "FederatedUser"]}}, ABSENT, ABSENT),
    ({"StringNotEquals": {"aws:PrincipalType": "User"}}, ABSENT, PARTIAL),
    ({"ArnNotLike": {"aws:PrincipalArn": USER + "*"}}, ABSENT, PARTIAL),
    ({"Bool": {"aws:PrincipalIsAWSService": "true"}}, ABSENT, ABSENT),
    ({"StringNotEquals": {"aws:PrincipalOrgID": ["o-x", "o-test123456"]}}, ABSENT, ABSENT),
    # Only IAM users
    ({"StringEquals": {"aws:PrincipalType": "User"}}, ENFORCED, PARTIAL),
    ({"ArnLike": {"aws:PrincipalArn": "arn:*:iam::*:user/*"}}, ENFORCED, PARTIAL),
    # Everybody
    ({"StringLike": {"aws:PrincipalArn": "*"}}, ENFORCED, ENFORCED),
    ({"StringNotEquals": {"aws:PrincipalType": "Service"}}, ENFORCED, ENFORCED),
    ({"Bool": {"aws:PrincipalIsAWSService": "false"}}, ENFORCED, ENFORCED),
    ({"BoolIfExists": {"aws:PrincipalIsAWSService": False}}, ENFORCED, ENFORCED),
    ({"StringEquals": {"aws:PrincipalOrgID": "o-test123456"}}, ENFORCED, ENFORCED),
    ({"StringLike": {"aws:PrincipalOrgID": "o-*"}}, ENFORCED, ENFORCED),
    ({"StringEquals": {"aws:PrincipalOrgID": "o-*"}}, PARTIAL, PARTIAL),
    ({"StringEquals": {"aws:PrincipalOrgID": "o-somebodyelse"}}, PARTIAL, PARTIAL),
    # Regions, of which IAM's calls know one
    ({"StringNotEquals": {"aws:RequestedRegion": ["eu-west-1", "us-east-1"]}}, PARTIAL, ABSENT),
    ({"StringNotLike": {"aws:RequestedRegion": ["eu-*", "us-*"]}}, PARTIAL, ABSENT),
    ({"StringNotEqualsIfExists": {"aws:RequestedRegion": "us-east-1"}}, PARTIAL, ABSENT),
    ({"StringNotEquals": {"aws:RequestedRegion": ["eu-west-1", "us-*"]}}, PARTIAL, PARTIAL),
    ({"StringNotEquals": {"aws:RequestedRegion": "eu-west-1"}}, PARTIAL, PARTIAL),
    ({"StringEquals": {"aws:RequestedRegion": ["eu-west-1", "ap-south-1"]}}, PARTIAL, ABSENT),
    ({"StringLike": {"aws:RequestedRegion": ["cn-*", "us-gov-*"]}}, PARTIAL, ABSENT),
    ({"StringEquals": {"aws:RequestedRegion": ["eu-west-1", "us-east-1"]}}, PARTIAL, PARTIAL),
    # Keys that a call of CreateAccessKey never carries
    *(
        ({"StringEquals": {key: "x"}}, PARTIAL, ABSENT)
        for key in ("lambda:FunctionArn", "ec2:InstanceType", "aws:TagKeys", "aws:SourceArn")
    ),
    ({"ForAnyValue:StringLike": {"aws:RequestTag/team": "*"}}, PARTIAL, ABSENT),
    ({"Null": {"lambda:VpcIds": "false"}}, PARTIAL, ABSENT),
    ({"NumericGreaterThan": {"s3:max-keys": 10}}, PARTIAL, ABSENT),
    ({"Null": {"lambda:VpcIds": "true"}}, PARTIAL, PARTIAL),
    ({"StringNotEquals": {"lambda:VpcIds": "x"}}, PARTIAL, PARTIAL),
    ({"StringEqualsIfExists": {"lambda:VpcIds": "x"}}, PARTIAL, PARTIAL),
    ({"ForAllValues:StringEquals": {"aws:TagKeys": "x"}}, PARTIAL, PARTIAL),
    # Keys that it may carry: of a role's credentials, of the user
    *(
        ({"StringEquals": {key: "x"}}, PARTIAL, PARTIAL)
        for key in (
            "lambda:SourceFunctionArn",
            "ec2:SourceInstanceARN",
            "ec2:RoleDelivery",
            "saml:sub",
            "glue:RoleAssumedBy",
            "identitystore:UserId",
            "cognito-identity.amazonaws.com:aud",
            "aws:PrincipalTag/team",
            "aws:SourceVpc",
            "iam:ResourceTag/team",
        )
    ),
    # MFA: beside the test, by itself, and where it cannot hold
    ({"Null": {MFA_AGE: "true"}}, ENFORCED, PARTIAL),
    ({"Null": {MFA_PRESENT: "false"}}, ENFORCED, PARTIAL),
    ({"Null": {MFA_PRESENT: "true"}}, PARTIAL, PARTIAL),
    ({"NumericLessThan": {MFA_AGE: "3600"}}, ABSENT, PARTIAL),
    ({"NumericGreaterThanEquals": {MFA_AGE: "3600"}}, ABSENT, PARTIAL),
    ({"NumericGreaterThanIfExists": {MFA_AGE: "3600"}}, ENFORCED, PARTIAL),
    ({"ForAllValues:NumericLessThan": {MFA_AGE: "3600"}}, PARTIAL, PARTIAL),
    ({"ForAllValues:Bool": {MFA_PRESENT: "false"}}, ENFORCED, PARTIAL),
]


@pytest.mark.parametrize(("condition", "on_mfa", "on_keys"), CONDITIONS, ids=str)
def test_what_a_condition_makes_of_a_denial(
    condition: dict[str, Any], on_mfa: str, on_keys: str
) -> None:
    without_mfa = {"BoolIfExists": {MFA_PRESENT: "false"}}
    if "BoolIfExists" in condition:
        without_mfa = {"Bool": {MFA_PRESENT: "false"}}
    [(operator, keys)] = condition.items()
    text = [f"{operator} {key} {', '.join(audit.texts(value))}" for key, value in keys.items()]
    for control, statement, verdict in (
        ("mfa-required", deny("*", {**without_mfa, **condition}), on_mfa),
        ("new-keys-prevented", deny(KEY, condition), on_keys),
    ):
        found = judged(policy(statement), control)
        assert found == control_of(verdict, (), tuple(text) if verdict == PARTIAL else ())


@pytest.mark.parametrize(
    ("condition", "verdict"),
    [
        ({"NumericGreaterThanIfExists": {MFA_AGE: 3600}}, ENFORCED),
        ({"ForAllValues:Bool": {MFA_PRESENT: "false"}}, ENFORCED),
        ({"Null": {MFA_AGE: "true"}}, ENFORCED),
        ({"NumericLessThan": {MFA_AGE: 3600}}, ABSENT),
        ({"Null": {MFA_PRESENT: "true"}}, PARTIAL),
        ({"StringEquals": {MFA_PRESENT: "false"}}, PARTIAL),
    ],
    ids=str,
)
def test_mfa_is_tested_by_one_condition_alone(condition: dict[str, Any], verdict: str) -> None:
    assert judged(policy(deny("*", condition)), "mfa-required").verdict == verdict


@pytest.mark.parametrize(
    ("operator", "values", "exemptions"),
    [
        # a vendor's roles, whose common prefix has no hyphen
        ("ArnNotLike", [ROLE + "AWSAccelerator*"], [ROLE + "AWSAccelerator*"]),
        ("StringNotLike", [ROLE + "path/Cloudability*"], [ROLE + "path/Cloudability*"]),
        ("ArnNotLike", [ROLE + "Eight888*"], [ROLE + "Eight888*"]),
        ("ArnNotLike", [ROLE + "Seven77*"], None),
        ("ArnNotLike", [ROLE + "path/*"], None),
        ("ArnNotLike", [ROLE + "*Accelerator*"], None),
        ("ArnNotLike", [ROLE + "aws-service-role/*"], None),
        ("ArnNotLike", [ROLE + "aws-reserved/sso.amazonaws.com/AWSReserved*"], None),
        ("ArnNotLike", [ROLE + "AWSReservedSS*"], None),
        ("ArnNotLike", [ROLE + "${aws:PrincipalTag/team}*"], None),
        # a session's ARN is nobody's aws:PrincipalArn
        ("ArnNotLike", ["arn:aws:sts::*:assumed-role/Admin/*"], []),
        ("StringNotLike", ["arn:aws:sts::*:assumed-role/Admin/*", ROLE + "Ops"], [ROLE + "Ops"]),
        # without Like, * is a character, which no such name has
        ("StringNotEquals", [ROLE + "Pipeline*"], []),
        ("StringNotEqualsIfExists", [ROLE + "Ops", USER + "break?glass"], []),
        ("StringNotEquals", ["arn:aws:iam::111122223333:role/Ops", ROLE + "X"],
         ["arn:aws:iam::111122223333:role/Ops"]),
        ("StringNotEquals", [ROLE + "${aws:username}"], None),
        ("ArnNotEquals", [ROLE + "Pipeline-*"], [ROLE + "Pipeline-*"]),
        # with Like a crafted path could match; published policies do it everywhere
        ("StringNotLike", ["arn:aws:iam::*:role/Pipeline"], [ROLE + "Pipeline"]),
    ],
)  # fmt: skip
def test_whom_an_exemption_names(
    operator: str, values: list[str], exemptions: list[str] | None
) -> None:
    found = judged(
        policy(deny(KEY, {operator: {"aws:PrincipalArn": values}})), "new-keys-prevented"
    )
    named = control_of(ENFORCED, tuple(exemptions or ()))
    narrowed = (f"{operator} aws:PrincipalArn {', '.join(values)}",)
    assert found == (control_of(PARTIAL, (), narrowed) if exemptions is None else named)


def test_a_user_name_with_an_asterisk_is_nobodys() -> None:
    exempt = {"StringNotEquals": {"aws:username": ["ci", "*"]}}
    found = judged(policy(deny(KEY, exempt)), "new-keys-prevented")
    assert found == control_of(ENFORCED, ("ci",))


@pytest.mark.parametrize(
    ("elements", "exemptions"),
    [
        ({"Resource": "arn:aws:iam::*:user/*"}, ("root",)),
        ({"Resource": "arn:aws:iam::*:*"}, ()),
        ({"Resource": ["arn:aws:iam::*:user/*", "arn:*:iam::*:root"]}, ()),
        ({"NotResource": "arn:aws:iam::*:role/*"}, ()),
        ({"NotResource": "arn:aws:iam::111122223333:root"}, ("root",)),
        ({"NotResource": "arn:aws:iam::*:r*"}, ("root",)),
    ],
)
def test_roots_own_keys_are_exempt_where_the_resource_leaves_them_out(
    elements: dict[str, Any], exemptions: tuple[str, ...]
) -> None:
    found = judged(policy(deny(KEY, **elements)), "new-keys-prevented")
    assert found == control_of(ENFORCED, exemptions)


def test_a_denial_of_roots_own_keys_alone_prevents_nothing() -> None:
    assert (
        judged(policy(deny(KEY, Resource="arn:aws:iam::*:root")), "new-keys-prevented").verdict
        == ABSENT
    )


TOGETHER = [
    ([{"NotAction": "iam:*"}, {"action": "iam:*"}], True),
    ([{"NotAction": ["iam:*", *SETUP]}, {"NotAction": ["ec2:*", "STS:GetSessionToken"]}], True),
    ([{"NotAction": ["ec2:*", *SETUP]}, {"NotAction": ["iam:*"]}], True),
    ([{"NotAction": ["s3:*", "ec2:*"]}, {"action": "s3:*"}, {"action": ["EC2:*"]}], True),
    ([{"NotAction": "s3:*"}, {"action": "s3:Get*"}], False),
    ([{"NotAction": "iam:*Key"}, {"NotAction": "iam:Create*"}], False),
    ([{"NotAction": "iam:CreateAccessKey"}, {"NotAction": "i*:*"}], False),
    ([{"NotAction": "i*:*"}, {"NotAction": "*m:CreateUser"}], False),
    ([{"action": "s3:*"}, {"action": "iam:*"}], False),
]


@pytest.mark.parametrize(("parts", "whole"), TOGETHER)
def test_statements_that_deny_everything_only_together(parts: list[Any], whole: bool) -> None:
    admin, ci = ROLE + "Admin", USER + "ci"
    exempt = [{"ArnNotLike": {"aws:PrincipalArn": each}} for each in (admin, ROLE + "Ops", admin)]
    statements = [
        deny(condition={**NO_MFA, **named}, **part)
        for part, named in zip(parts, exempt, strict=False)
    ]
    for listed in (statements, statements[::-1]):
        found = judged(policy(*listed), "mfa-required")
        assert found.verdict == (ENFORCED if whole else PARTIAL)
        if whole:
            assert (set(found.exemptions), found.conditions) == ({admin, ROLE + "Ops"}, ())
    # one of them is no full denial of its part
    statements[0]["Condition"] = {**NO_MFA, "ArnLike": {"aws:PrincipalArn": ci}}
    assert judged(policy(*statements), "mfa-required").verdict == PARTIAL


@pytest.mark.parametrize("actions", [SETUP, "iam:EnableMFADevice", ["iam:List*", "IAM:GetUser"]])
def test_a_denial_of_the_set_up_alone_requires_nothing(actions: Any) -> None:
    assert judged(policy(deny(actions, NO_MFA)), "mfa-required").verdict == ABSENT
    assert judged(policy(deny([*SETUP, "s3:*"], NO_MFA)), "mfa-required").verdict == PARTIAL


@pytest.mark.parametrize(
    ("partition", "region"),
    [("aws", "us-east-1"), ("aws-us-gov", "us-gov-west-1"), ("aws-cn", "cn-north-1")],
)
def test_iam_is_in_one_region_of_the_partition(partition: str, region: str) -> None:
    for allowed, verdict in ((region, ABSENT), ("eu-west-1", PARTIAL)):
        region_denial = deny("*", {"StringNotEquals": {"aws:RequestedRegion": [allowed]}})
        found = judged(policy(region_denial), "new-keys-prevented", partition)
        assert found.verdict == verdict


def test_in_a_partition_whose_region_for_iam_is_not_known_a_region_denial_is_partial() -> None:
    region_denial = deny("*", {"StringEquals": {"aws:RequestedRegion": ["us-iso-east-1"]}})
    assert judged(policy(region_denial), "new-keys-prevented", "aws-iso").verdict == PARTIAL


# Service control policies that AWS documents, with the names of its pages and of its samples repository.
AWS_EXAMPLES = [
    ("FullAWSAccess", {"Effect": "Allow", "Action": "*", "Resource": "*"}, ABSENT, ABSENT),
    (
        "Require MFA to perform an API action",
        deny(
            ["ec2:StopInstances", "ec2:TerminateInstances"],
            {"BoolIfExists": {"aws:MultiFactorAuthPresent": False}},
        ),
        PARTIAL,
        ABSENT,
    ),
    (
        "Deny access to AWS based on the requested AWS Region",
        deny(
            NotAction=[
                "cloudfront:*",
                "iam:*",
                "organizations:*",
                "route53:*",
                "sts:*",
                "support:*",
            ],
            condition={
                "StringNotEquals": {"aws:RequestedRegion": ["eu-central-1", "eu-west-1"]},
                "ArnNotLike": {
                    "aws:PrincipalARN": [
                        ROLE + "Role1AllowedToBypassThisSCP",
                        ROLE + "Role2AllowedToBypassThisSCP",
                    ]
                },
            },
        ),
        ABSENT,
        ABSENT,
    ),
    (
        "Prevent IAM users and roles from making certain changes",
        deny(["iam:AttachRolePolicy", "iam:DeleteRole"], Resource=[ROLE + "name-of-role-to-deny"]),
        ABSENT,
        ABSENT,
    ),
    (
        "... with an exception for a specified admin role",
        deny(
            ["iam:PutRolePolicy"],
            {"StringNotLike": {"aws:PrincipalARN": ROLE + "name-of-admin-role-to-allow"}},
            Resource=[ROLE + "name-of-role-to-deny"],
        ),
        ABSENT,
        ABSENT,
    ),
    (
        "Block service access for the root user",
        deny(
            ["ec2:*"], {"StringLike": {"aws:PrincipalArn": ["arn:aws:iam::*:root"]}}, Resource=["*"]
        ),
        ABSENT,
        ABSENT,
    ),
    (
        "Prevent member accounts from leaving the organization",
        deny(["organizations:LeaveOrganization"]),
        ABSENT,
        ABSENT,
    ),
    ("Deny IAM, EC2 and RDS", deny(["iam:*", "ec2:*", "rds:*"]), ABSENT, ENFORCED),
    (
        "Deny critical IAM user actions",
        deny(
            ["iam:CreateAccessKey", "iam:CreateUser", "iam:CreateLoginProfile"],
            {
                "ArnNotLike": {"aws:PrincipalArn": ROLE + "[PRIVILEGED_ROLE]"},
                "StringNotLike": {"aws:PrincipalTag/IAMUserManagementException": "true"},
            },
        ),
        ABSENT,
        PARTIAL,
    ),
    (
        "Prevent root credentials management in member accounts",
        deny(
            "*",
            {
                "ArnLike": {"aws:PrincipalArn": ["arn:aws:iam::*:root"]},
                "Null": {"aws:AssumedRoot": "true"},
            },
        ),
        ABSENT,
        ABSENT,
    ),
    (
        "Deny use of IAM user credentials from unexpected networks",
        deny(
            NotAction=["es:ES*", "dax:GetItem", "neptune-db:*"],
            condition={
                "BoolIfExists": {"aws:ViaAWSService": "false"},
                "NotIpAddressIfExists": {"aws:SourceIp": ["192.0.2.0/24"]},
                "ArnLike": {"aws:PrincipalArn": ["arn:aws:iam::*:user/*"]},
            },
        ),
        ABSENT,
        PARTIAL,
    ),
    (
        "Control Tower: GRRESTRICTROOTUSER",
        deny("*", {"StringLike": {"aws:PrincipalArn": ["arn:aws:iam::*:root"]}}, Resource=["*"]),
        ABSENT,
        ABSENT,
    ),
    (
        "Control Tower: GRRESTRICTROOTUSERACCESSKEYS",
        deny(KEY, {"ArnLike": {"aws:PrincipalArn": ["arn:aws:iam::*:root"]}}, Resource=["*"]),
        ABSENT,
        ABSENT,
    ),
    (
        "Control Tower: GRREGIONDENY, with us-east-1",
        deny(
            NotAction=["a4b:*", "cloudfront:*", "sts:*"],
            condition={
                "StringNotEquals": {"aws:RequestedRegion": ["us-east-1", "eu-west-1"]},
                "ArnNotLike": {"aws:PrincipalARN": ["arn:*:iam::*:role/AWSControlTowerExecution"]},
            },
        ),
        ABSENT,
        ABSENT,
    ),
    (
        "Landing Zone Accelerator: IAM users and keys",
        deny(
            ["iam:CreateAccessKey", "iam:CreateUser"],
            {
                "ArnNotLike": {
                    "aws:PrincipalARN": [
                        "arn:aws:iam::*:role/AWSAccelerator*",
                        "arn:aws:iam::*:role/aws-controltower-CloudWatchLogsRole",
                        "arn:aws:iam::*:role/AWSControlTowerExecution",
                    ]
                }
            },
        ),
        ABSENT,
        ENFORCED,
    ),
    (
        "Allows MFA-authenticated IAM users to manage their own MFA device (its Deny)",
        deny(
            NotAction=[
                *SETUP,
                "iam:ChangePassword",
                "iam:GetUser",
                "iam:GetMFADevice",
                "iam:ListVirtualMFADevices",
                "iam:ResyncMFADevice",
            ],
            condition={"BoolIfExists": {"aws:MultiFactorAuthPresent": "false"}},
        ),
        ENFORCED,
        PARTIAL,
    ),
    (
        "Use an MFA token to authenticate access through the AWS CLI (its Deny)",
        deny(
            NotAction=[
                *SETUP,
                "iam:DeleteVirtualMFADevice",
                "iam:ListUsers",
                "iam:ListAccessKeys",
                "iam:GetAccountSummary",
            ],
            condition={
                "Bool": {"aws:MultiFactorAuthPresent": "false", "aws:ViaAWSService": "false"}
            },
        ),
        ENFORCED,
        PARTIAL,
    ),
]


@pytest.mark.parametrize(
    ("statement", "on_mfa", "on_keys"),
    [case[1:] for case in AWS_EXAMPLES],
    ids=[case[0] for case in AWS_EXAMPLES],
)
def test_examples_that_aws_documents_are_judged_by_what_they_do(
    statement: dict[str, Any], on_mfa: str, on_keys: str
) -> None:
    found = judgements(policy(statement))
    # those that name CreateAccessKey itself leave API keys alone
    on_api_keys = ABSENT if KEY in statement.get("Action", ()) else on_keys
    assert {control: judgement.verdict for control, judgement in found.items()} == {
        "mfa-required": on_mfa,
        "new-keys-prevented": on_keys,
        "new-api-keys-prevented": on_api_keys,
    }


CREATE, RESET = "iam:CreateServiceSpecificCredential", "iam:ResetServiceSpecificCredential"
API = "new-api-keys-prevented"
NOT_CREATE, NOT_RESET = f"NotAction {CREATE}", f"NotAction {RESET}"
BEDROCK = {"StringEquals": {"iam:ServiceSpecificCredentialServiceName": "bedrock.amazonaws.com"}}
ONLY_BEDROCK = "StringEquals iam:ServiceSpecificCredentialServiceName bedrock.amazonaws.com"
WITHOUT_MFA = "Bool aws:MultiFactorAuthPresent false"
BUT_ADMIN = {"ArnNotLike": {"aws:PrincipalArn": ROLE + "Admin"}}
BUT_OPS = {"ArnNotLike": {"aws:PrincipalArn": ROLE + "Ops"}}
API_KEY_CASES: list[tuple[str, list[Any], Any]] = [
    # the statements of one policy each, and what they come to
    ("both, by name", [deny([CREATE, RESET])], control_of(ENFORCED)),
    ("both, in any case", [deny(["IAM:createservicespecificcredential", RESET])], control_of(ENFORCED)),
    ("both, by a wildcard", [deny("iam:*ServiceSpecificCredential")], control_of(ENFORCED)),
    ("all of IAM", [deny("iam:*")], control_of(ENFORCED)),
    ("all but S3", [deny(NotAction="s3:*")], control_of(ENFORCED)),
    ("access keys", [deny(KEY)], control_of(ABSENT)),
    ("all but IAM", [deny(NotAction="iam:*")], control_of(ABSENT)),
    ("all but both", [deny(NotAction=[CREATE, RESET])], control_of(ABSENT)),
    ("allowed", [{"Effect": "Allow", "Action": "*", "Resource": "*"}], control_of(ABSENT)),
    # one of the two: the condition says which one is left
    ("create alone", [deny(CREATE)], control_of(PARTIAL, (), [NOT_RESET])),
    ("reset alone", [deny(RESET)], control_of(PARTIAL, (), [NOT_CREATE])),
    ("all that is created", [deny("iam:Create*")], control_of(PARTIAL, (), [NOT_RESET])),
    ("all but create", [deny(NotAction=CREATE)], control_of(PARTIAL, (), [NOT_CREATE])),
    (
        "create alone, of one service",
        [deny(CREATE, BEDROCK)],
        control_of(PARTIAL, (), [f"{NOT_RESET} and {ONLY_BEDROCK}"]),
    ),
    (
        "create alone, without an exempt role",
        [deny(CREATE, BUT_ADMIN)],
        control_of(PARTIAL, [ROLE + "Admin"], [NOT_RESET]),
    ),
    ("both, of one service", [deny([CREATE, RESET], BEDROCK)], control_of(PARTIAL, (), [ONLY_BEDROCK])),
    # they add up
    ("one each", [deny(CREATE), deny(RESET)], control_of(ENFORCED)),
    ("one each, by name and by NotAction", [deny(CREATE), deny(NotAction=CREATE)], control_of(ENFORCED)),
    ("one twice", [deny(CREATE), deny("iam:Create*")], control_of(PARTIAL, (), [NOT_RESET])),
    (
        "one in full, one narrowed",
        [deny(CREATE), deny(RESET, NO_MFA)],
        control_of(PARTIAL, (), [NOT_RESET, f"{NOT_CREATE} and {WITHOUT_MFA}"]),
    ),
    (
        "one in full, both narrowed",
        [deny(CREATE), deny([CREATE, RESET], NO_MFA)],
        control_of(PARTIAL, (), [NOT_RESET, WITHOUT_MFA]),
    ),
    (
        "both narrowed, in different ways",
        [deny(CREATE, NO_MFA), deny(RESET, BEDROCK)],
        control_of(PARTIAL, (), [f"{NOT_RESET} and {WITHOUT_MFA}", f"{NOT_CREATE} and {ONLY_BEDROCK}"]),
    ),
    (
        "one in full, one that hits root alone",
        [deny(CREATE), deny(RESET, {"ArnLike": {"aws:PrincipalArn": "arn:aws:iam::*:root"}})],
        control_of(PARTIAL, (), [NOT_RESET]),
    ),
    (
        "one in full, one for one user",
        [deny(CREATE), deny(RESET, Resource=USER + "ci")],
        control_of(PARTIAL, (), [NOT_RESET, f"{NOT_CREATE} and Resource {USER}ci"]),
    ),
    # whoever is exempt from one of them gets through to that one
    (
        "one each, with exemptions of their own",
        [deny(CREATE, BUT_ADMIN), deny(RESET, BUT_OPS)],
        control_of(ENFORCED, [ROLE + "Admin", ROLE + "Ops"]),
    ),
    (
        "one each, and both with fewer exemptions",
        [deny(CREATE, BUT_ADMIN), deny(RESET, BUT_OPS), deny([CREATE, RESET], BUT_OPS)],
        control_of(ENFORCED, [ROLE + "Ops"]),
    ),
    # root has no API keys of its own that a denial on user/* could leave out
    ("on users", [deny([CREATE, RESET], Resource="arn:*:iam::*:user/*")], control_of(ENFORCED)),
    ("on root", [deny([CREATE, RESET], Resource="arn:aws:iam::*:root")], control_of(ABSENT)),
    ("root is free to create them for users", [deny([CREATE, RESET], {"ArnNotLike": {"aws:PrincipalArn": [
        "arn:aws:iam::*:root"]}})], control_of(ENFORCED, ["arn:aws:iam::*:root"])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("statements", "expected"),
    [case[1:] for case in API_KEY_CASES],
    ids=[case[0] for case in API_KEY_CASES],
)
def test_which_statements_prevent_new_api_keys(statements: list[Any], expected: Any) -> None:
    assert judged(policy(*statements), API) == expected
    assert judged(policy(*statements[::-1]), API).verdict == expected.verdict


@pytest.mark.parametrize(
    "condition",
    [*(case[0] for case in CONDITIONS), *({case[0]: {case[1]: case[2]}} for case in EXEMPTIONS)],
    ids=str,
)
def test_conditions_on_new_api_keys_are_judged_as_those_on_new_access_keys(
    condition: dict[str, Any],
) -> None:
    found = judged(policy(deny([CREATE, RESET], condition)), API)
    assert found == judged(policy(deny(KEY, condition)), "new-keys-prevented")


@pytest.mark.parametrize("case", KEY_CASES, ids=[case[0] for case in KEY_CASES])
def test_resources_of_new_api_keys_are_judged_as_those_of_new_access_keys(case: Any) -> None:
    statement = {
        name: [CREATE, RESET] if value == KEY else value for name, value in case[1].items()
    }
    if statement.get("Action") == [CREATE, RESET]:
        found = judged(policy(statement), API)
        assert (found.verdict, found.conditions) == case[2:]


@pytest.mark.parametrize("partition", ["aws", "aws-cn", "aws-us-gov"])
def test_users_are_those_of_the_partition(partition: str) -> None:
    statement = deny(KEY, Resource=f"arn:{partition}:iam::*:user/*")
    assert judged(policy(statement), "new-keys-prevented", partition).verdict == ENFORCED
    assert judged(policy(statement), "new-keys-prevented", "aws-iso").verdict == ABSENT


def test_a_statement_may_stand_alone() -> None:
    assert judged(json.dumps({"Statement": deny(KEY)}), "new-keys-prevented").verdict == ENFORCED


def test_partial_statements_add_up_to_partial() -> None:
    judgement = judged(
        policy(deny("s3:*", NO_MFA), deny("ec2:*", NO_MFA), deny(KEY)), "mfa-required"
    )
    assert judgement == control_of(PARTIAL, (), ("Action s3:*", "Action ec2:*"))


def test_the_enforcing_statement_with_the_fewest_exemptions_counts() -> None:
    exempt = deny(KEY, {"ArnNotLike": {"aws:PrincipalArn": ROLE + "Admin"}})
    assert judged(policy(exempt, deny(KEY), deny(KEY, NO_MFA)), "new-keys-prevented") == control_of(
        ENFORCED
    )


def test_of_two_enforcing_statements_the_one_that_spares_named_principals_counts() -> None:
    only_users = deny(KEY, ONLY_USERS)
    two_roles = deny(KEY, {"ArnNotLike": {"aws:PrincipalArn": [ROLE + "Admin", ROLE + "Other"]}})
    for both in ((only_users, two_roles), (two_roles, only_users)):
        found = judged(policy(*both), "new-keys-prevented")
        assert found == control_of(ENFORCED, (ROLE + "Admin", ROLE + "Other"))


@pytest.mark.parametrize(("operator", "verdict"), [("StringLike", ENFORCED), ("ArnLike", PARTIAL)])
def test_a_bare_asterisk_is_no_arn(operator: str, verdict: str) -> None:
    condition = {**NO_MFA, operator: {"aws:PrincipalArn": "*"}}
    assert judged(policy(deny("*", condition)), "mfa-required").verdict == verdict


MALFORMED = [
    "",
    "Statement",
    "[]",
    "{}",
    '{"Statement": null}',
    '{"Statement": ["Deny"]}',
    '{"Statement": [[]]}',
    "[" * 100_000,
    '{"Statement": ' + "9" * 10_000 + "}",
    policy(deny(KEY), {}),
    policy(deny([])),
    policy(deny(None)),
    policy(deny({"iam": "CreateAccessKey"})),
    policy(deny([["*"]])),
    policy(deny(KEY, Effect="deny")),
    policy(deny(KEY, Effect=["Deny"])),
    policy(deny(KEY, Principal="*")),
    policy({"Effect": "Deny", "Action": KEY}),
    policy({"Effect": "Deny", "Action": KEY, "NotAction": "s3:*", "Resource": "*"}),
    policy(deny(KEY, [])),
    policy(deny(KEY, {"Bool": []})),
    policy(deny(KEY, {"Bool": "aws:MultiFactorAuthPresent"})),
    policy(deny(KEY, {"Bool": {"aws:MultiFactorAuthPresent": []}})),
    policy(deny(KEY, {"Bool": {"aws:MultiFactorAuthPresent": None}})),
    policy(deny(KEY, {"Bool": {"aws:MultiFactorAuthPresent": {"false": "false"}}})),
]


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_not_understood_is_not_checked(content: str) -> None:
    assert {judgement.verdict for judgement in judgements(content).values()} == {NOT_CHECKED}


def test_a_policy_without_statements_prevents_nothing() -> None:
    assert {judgement.verdict for judgement in judgements(policy()).values()} == {ABSENT}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
)


@given(JSON)
def test_no_json_raises(document: Any) -> None:
    for content in (
        json.dumps(document),
        json.dumps({"Statement": document}),
        policy(deny(document)),
        policy(deny("*", document)),
    ):
        for judgement in judgements(content).values():
            assert judgement.verdict in (ENFORCED, PARTIAL, ABSENT, NOT_CHECKED)


@given(st.text())
@example("\ud800")
def test_no_text_raises(content: str) -> None:
    judgements(content)
    found = judged(
        policy(deny(content, {content: {content: content}}, Resource=content)), "mfa-required"
    )
    assert found.verdict != ENFORCED


def test_hostile_wildcards_take_no_time() -> None:
    pattern = "iam:" + "*a" * 2_000 + "x"
    assert (
        judged(
            policy(deny([pattern] * 2), deny(KEY, Resource=f"arn:aws:iam::*:user/{pattern}")),
            "new-keys-prevented",
        ).verdict
        == PARTIAL
    )


def test_a_name_that_stands_twice_is_not_checked() -> None:
    narrowed = '{"Bool": {"aws:MultiFactorAuthPresent": "false"}}, "Condition": {"Bool": {"aws:ViaAWSService": "true"}}'
    content = f'{{"Statement": {{"Effect": "Deny", "Action": "*", "Resource": "*", "Condition": {narrowed}}}}}'
    assert {judgement.verdict for judgement in judgements(content).values()} == {NOT_CHECKED}


PATH = ("o-1", "r-1", "ou-1", "ou-2", "111122223333")
ALLOW_ALL = {"Effect": "Allow", "Action": "*", "Resource": "*"}
PREVENT, FULL = policy(deny(KEY)), policy(ALLOW_ALL)


def controls(
    *policies: tuple[str, str, str], management: bool = False, name: str = "new-keys-prevented"
) -> audit.Control:
    """The control of new keys of an account on PATH, under policies of a name, content and target each."""
    listed = [attached(content, target, name=each) for each, content, target in policies]
    return audit.controls_of_account(() if management else PATH, listed)[name]


@pytest.mark.parametrize("target", PATH[1:])
def test_a_policy_counts_at_the_root_an_ou_or_the_account(target: str) -> None:
    assert controls(("keys", PREVENT, target)) == audit.Control(ENFORCED, {"p-keys": "keys"})


def test_a_policy_elsewhere_does_not_count() -> None:
    assert controls(("keys", PREVENT, "ou-3")) == audit.Control(ABSENT, {})


def test_the_management_account_is_under_no_policy() -> None:
    assert controls(
        ("keys", PREVENT, "r-1"), ("bad", "{", "r-1"), management=True
    ) == audit.Control(ABSENT, {})


def test_enforced_beats_not_checked_beats_partial_beats_absent() -> None:
    full, partial, bad, enforced = (
        ("full", FULL, "r-1"),
        ("half", policy(ALLOW_ALL, deny(KEY, NO_MFA)), "ou-1"),
        ("bad", "{", "ou-2"),
        ("keys", PREVENT, PATH[-1]),
    )
    assert controls(full, partial) == audit.Control(
        PARTIAL, {"p-half": "half"}, (), ("Bool aws:MultiFactorAuthPresent false",)
    )
    assert controls(full, partial, bad) == audit.Control(NOT_CHECKED, {"p-bad": "bad"})
    assert controls(full, partial, bad, enforced) == audit.Control(ENFORCED, {"p-keys": "keys"})
    assert controls(full, ("bad", "{", "ou-3")) == audit.Control(ABSENT, {})


ALLOW_S3 = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
ALLOW_ALL_BUT_IAM = {"Effect": "Allow", "NotAction": "iam:*", "Resource": "*"}
ALLOW_WITH_MFA = {
    **ALLOW_ALL,
    "Condition": {"Bool": {"aws:MultiFactorAuthPresent": "true"}},
}


@pytest.mark.parametrize("target", PATH[1:])
@pytest.mark.parametrize(
    "allow",
    [ALLOW_S3, ALLOW_ALL_BUT_IAM, ALLOW_WITH_MFA, {**ALLOW_ALL, "Resource": "arn:aws:s3:::*"}],
)
def test_a_level_where_nothing_allows_new_keys_is_not_checked(
    target: str, allow: dict[str, Any]
) -> None:
    elsewhere = [(f"full{level}", FULL, level) for level in PATH[1:] if level != target]
    listed = ("listed", policy(allow), target)
    expected = audit.Control(
        NOT_CHECKED,
        {"p-listed": "listed"},
        why_not_checked="no Allow without a condition lets iam:CreateAccessKey through",
    )
    assert controls(listed, *elsewhere) == expected
    narrowed = ("half", policy(deny(KEY, NO_MFA)), target)  # neither partial nor absent
    assert controls(listed, narrowed, *elsewhere).verdict == NOT_CHECKED
    assert controls(listed, *elsewhere, ("keys", PREVENT, target)).verdict == ENFORCED
    assert controls(listed, *elsewhere, ("full", FULL, target)) == audit.Control(ABSENT, {})


@pytest.mark.parametrize(
    "allow",
    [
        ALLOW_ALL,
        {"Effect": "Allow", "Action": ["iam:Create*"], "Resource": "*"},
        {"Effect": "Allow", "NotAction": "s3:*", "Resource": "*"},
        {**ALLOW_ALL, "Resource": "arn:aws:iam::*:user/*"},
    ],
)
def test_an_allow_that_lets_new_keys_through_is_none_that_prevents_them(
    allow: dict[str, Any],
) -> None:
    assert controls(("listed", policy(allow), "ou-1")) == audit.Control(ABSENT, {})


CREATION, RESETS = policy(ALLOW_ALL, deny(CREATE)), policy(ALLOW_ALL, deny(RESET))


def test_two_policies_may_deny_one_action_each() -> None:
    """Wherever they are attached: to the same place, or above one another."""
    full = ("full", FULL, "r-1")
    for target in PATH[1:]:
        listed = (full, ("create", CREATION, "ou-1"), ("reset", RESETS, target))
        found = controls(*listed, name=API)
        assert found == audit.Control(ENFORCED, {"p-create": "create", "p-reset": "reset"})
        assert controls(full, listed[1], ("reset", RESETS, "ou-3"), name=API) == audit.Control(
            PARTIAL, {"p-create": "create"}, (), (NOT_RESET,)
        )


def test_policies_that_deny_both_are_named_and_not_those_that_add_nothing() -> None:
    both = ("both", policy(deny([CREATE, RESET])), "ou-1")
    found = controls(both, ("create", CREATION, "ou-2"), name=API)
    assert found == audit.Control(ENFORCED, {"p-both": "both"})
    narrow = ("narrow", policy(ALLOW_ALL, deny(RESET, NO_MFA)), "r-1")
    found = controls(("full", FULL, "ou-1"), ("create", policy(ALLOW_ALL, deny(CREATE)), "ou-2"), narrow,
                     ("account", FULL, PATH[-1]), name=API)  # fmt: skip
    names = {"p-create": "create", "p-narrow": "narrow"}
    conditions = (NOT_RESET, f"{NOT_CREATE} and {WITHOUT_MFA}")
    assert found == audit.Control(PARTIAL, names, (), conditions)


def test_mfa_denials_of_two_policies_add_up() -> None:
    but_iam = ("but IAM", policy(deny(NotAction=["iam:*", *SETUP], condition=NO_MFA)), "ou-1")
    iam = ("IAM", policy(deny(NotAction=SETUP, condition=NO_MFA, Resource="*")), "ou-2")
    part = ("part", policy(deny("iam:*", NO_MFA)), "ou-2")
    assert controls(but_iam, part, name="mfa-required") == audit.Control(
        ENFORCED, {"p-but IAM": "but IAM", "p-part": "part"}
    )
    assert controls(but_iam, iam, name="mfa-required") == audit.Control(ENFORCED, {"p-IAM": "IAM"})
    elsewhere = ("part", policy(deny("s3:*", NO_MFA)), "ou-2")
    assert controls(but_iam, elsewhere, name="mfa-required").verdict == PARTIAL


def test_a_policy_that_is_not_understood_leaves_one_action_open() -> None:
    full, bad, create = ("full", FULL, "r-1"), ("bad", "{", "r-1"), ("create", CREATION, "ou-1")
    assert controls(full, bad, create, name=API) == audit.Control(NOT_CHECKED, {"p-bad": "bad"})
    # nor is an Allow of its level missed, or the policies beside it named
    beside = ("s3", policy(ALLOW_S3), "r-1")
    assert controls(bad, beside, name=API) == audit.Control(NOT_CHECKED, {"p-bad": "bad"})
    both = (full, bad, create, ("reset", RESETS, "ou-2"))
    assert controls(*both, name=API).verdict == ENFORCED


@pytest.mark.parametrize(
    ("allowed", "closed"),
    [
        ("s3:*", f"{CREATE} or {RESET}"),
        (["iam:CreateAccessKey"], f"{CREATE} or {RESET}"),
        (["iam:Create*"], RESET),
        ([RESET], CREATE),
        ([CREATE, RESET], None),
        ("iam:*", None),
    ],
)
def test_a_level_has_to_allow_both_actions(allowed: Any, closed: str | None) -> None:
    full = [(f"full{level}", FULL, level) for level in PATH[1:] if level != "ou-1"]
    listed = ("listed", policy({**ALLOW_ALL, "Action": allowed}), "ou-1")
    found = controls(*full, listed, name=API)
    if closed is None:
        assert found == audit.Control(ABSENT)
        return
    why = f"no Allow without a condition lets {closed} through"
    assert found == audit.Control(NOT_CHECKED, {"p-listed": "listed"}, why_not_checked=why)
    # two policies of the level may allow one each
    rest = ("rest", policy({**ALLOW_ALL, "Action": [CREATE, RESET]}), "ou-1")
    assert controls(*full, listed, rest, name=API) == audit.Control(ABSENT)
    # partly denied is not checked either, and denied is denied
    assert controls(*full, listed, ("half", CREATION, "r-1"), name=API).verdict == NOT_CHECKED
    denied = (("half", CREATION, "r-1"), ("other", RESETS, "ou-2"))
    assert controls(*full, listed, *denied, name=API).verdict == ENFORCED


def test_an_allow_list_of_one_control_leaves_the_other_alone() -> None:
    full = [(f"full{level}", FULL, level) for level in PATH[1:] if level != "ou-1"]
    listed = ("listed", policy({**ALLOW_ALL, "Action": [KEY]}), "ou-1")
    assert controls(*full, listed) == audit.Control(ABSENT)
    assert controls(*full, listed, name=API).verdict == NOT_CHECKED

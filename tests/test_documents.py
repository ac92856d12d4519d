"""What --print prints: policies and templates that linters, the judge, an evaluator and moto accept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import boto3
import parliament
import pytest
from builders import ENFORCED, control_of, judged
from cfnlint import ManualArgs
from cfnlint.api import lint
from evaluator import denies, matches, request_of
from moto import mock_aws

import iam_audit as audit

README = Path(__file__).parent.parent / "README.md"


POLICIES = ["caller-policy", "role-policy", "role-trust", "scp-require-mfa", "scp-deny-access-keys"]
TEMPLATES = ["role-template", "alert-rule"]


def printed(name: str, **options: Any) -> Any:
    return json.loads(audit.print_document(name, **options))


def test_every_document_is_one_of_these() -> None:
    assert sorted(audit.DOCUMENTS) == sorted(POLICIES + TEMPLATES)
    assert all(audit.print_document(name).endswith("}\n") for name in audit.DOCUMENTS)


# What parliament says on purpose-built parts: it would have BoolIfExists, which would deny every access key in use; it
# does not know aws:ViaAWSService, which is younger than its list of global keys; and it would name the users, whom an
# audit does not know beforehand. (It knows no trust policies.)
KNOWN = {
    "scp-require-mfa": {"BAD_PATTERN_FOR_MFA", "UNKNOWN_CONDITION_FOR_ACTION aws:ViaAWSService"},
    "role-policy": {"RESOURCE_STAR"},
}


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "role-trust"])
def test_parliament_finds_nothing_else_in_the_policies(name: str) -> None:
    findings = parliament.analyze_policy_string(
        audit.print_document(name, exempt_roles=["Admin"])
    ).findings
    found = {
        f"{finding.issue} {finding.detail.split()[2]}"
        if finding.issue.startswith("UNKNOWN")
        else finding.issue
        for finding in findings
    }
    assert found == KNOWN.get(name, set())


@pytest.mark.parametrize("name", TEMPLATES)
def test_cfn_lint_finds_nothing_in_the_templates(name: str) -> None:
    assert [
        str(match)
        for match in lint(audit.print_document(name), config=ManualArgs(regions=["us-east-1"]))
    ] == []


def test_the_judge_calls_both_policies_enforced() -> None:
    assert judged(audit.print_document("scp-require-mfa"), "mfa-required") == control_of(ENFORCED)
    assert judged(audit.print_document("scp-deny-access-keys"), "new-keys-prevented") == control_of(
        ENFORCED
    )
    assert judged(
        audit.print_document("scp-deny-access-keys"), "new-api-keys-prevented"
    ) == control_of(ENFORCED)
    exempting = audit.print_document("scp-deny-access-keys", exempt_roles=["Admin", "path/Other"])
    names = ("arn:*:iam::*:role/Admin", "arn:*:iam::*:role/path/Other")
    for control in ("new-keys-prevented", "new-api-keys-prevented"):
        assert judged(exempting, control) == control_of(ENFORCED, names)


@pytest.mark.parametrize("name", ["scp-require-mfa", "scp-deny-access-keys"])
def test_service_control_policies_fit(name: str) -> None:
    assert len(audit.print_document(name, exempt_roles=["x" * 64] * 35)) <= 10_240


@pytest.mark.parametrize(
    ("who", "request_", "denied"),
    [
        ("a console user without MFA", request_of("user/anna"), True),
        (
            "a console user with MFA",
            request_of("user/anna", **{"aws:MultiFactorAuthPresent": "true"}),
            False,
        ),
        (
            "a role, as of Identity Center",
            request_of("role/aws-reserved/sso.amazonaws.com/AWSReservedSSO_Admin_1"),
            False,
        ),
        ("root", request_of("root"), False),
    ],
)
def test_who_is_denied_without_mfa(who: str, request_: dict[str, str], denied: bool) -> None:
    [statement] = printed("scp-require-mfa")["Statement"]
    assert denies(statement, "s3:GetObject", "arn:aws:s3:::bucket/object", request_) is denied, who
    assert not denies(
        statement, "iam:EnableMFADevice", "arn:aws:iam::111122223333:user/anna", request_
    ), who


KEYS = ("iam:CreateAccessKey", "iam:CreateServiceSpecificCredential")
OTHER_KEYS = (
    "iam:ResetServiceSpecificCredential",
    "iam:UploadSigningCertificate",
    "iam:UploadSSHPublicKey",
)
PASSWORDS = ("iam:CreateLoginProfile", "iam:UpdateLoginProfile")


@pytest.mark.parametrize("action", [*KEYS, *OTHER_KEYS, *PASSWORDS])
def test_new_credentials_are_denied_to_all_but_the_exempt_roles(action: str) -> None:
    statements = printed("scp-deny-access-keys", exempt_roles=["path/Vending"])["Statement"]
    for principal in ("user/anna", "role/Admin", "root", "role/path/Vending"):
        for target in ("user/ci", "user/team/anna"):
            arn = f"arn:aws:iam::111122223333:{target}"
            denied = any(denies(each, action, arn, request_of(principal)) for each in statements)
            assert denied == (principal != "role/path/Vending"), principal


@pytest.mark.parametrize(
    ("action", "denied"), [(KEYS[0], True), *((one, False) for one in PASSWORDS)]
)
def test_roots_password_can_be_recovered_and_root_gets_no_keys(action: str, denied: bool) -> None:
    """In a session of AssumeRoot the target is root itself."""
    arn, request = "arn:aws:iam::111122223333:root", request_of("root")
    statements = printed("scp-deny-access-keys")["Statement"]
    assert any(denies(each, action, arn, request) for each in statements) is denied


@pytest.mark.parametrize("name", ["scp-require-mfa", "scp-deny-access-keys"])
def test_our_own_policies_compare_principals_as_arns(name: str) -> None:
    """A string operator would take user/a:role/Vending for the role Vending."""
    for statement in printed(name, exempt_roles=["Vending"])["Statement"]:
        for operator, keys in statement["Condition"].items():
            assert ("aws:PrincipalArn" in keys) == operator.startswith("Arn")
    statement = printed("scp-deny-access-keys", exempt_roles=["Vending"])["Statement"][0]
    user = "arn:aws:iam::111122223333:user/ci"
    assert denies(statement, KEYS[0], user, request_of("user/a:role/Vending"))


def test_access_keys_are_not_denied_without_mfa() -> None:
    [statement] = printed("scp-require-mfa")["Statement"]
    request = request_of("user/ci")
    del request["aws:multifactorauthpresent"]  # long-term credentials do not carry it
    assert not denies(statement, "s3:GetObject", "arn:aws:s3:::bucket/object", request)


def test_the_policies_allow_what_the_program_calls_and_nothing_else() -> None:
    *reads, assume = printed("caller-policy", role="audit/IAMAuditRole")["Statement"]
    assert sorted(action for read in reads for action in read["Action"]) == sorted(
        audit.CALLER_READS
    )
    assert (assume["Action"], assume["Resource"]) == (
        ["sts:AssumeRole"],
        "arn:*:iam::*:role/audit/IAMAuditRole",
    )
    iam, cloudtrail = printed("role-policy")["Statement"]
    assert (iam["Action"], cloudtrail["Action"]) == (
        list(audit.ROLE_READS),
        list(audit.CLOUDTRAIL_READS),
    )


@pytest.mark.parametrize("owner_and_path", ["444455556666:policy/o-1", "aws:policy"])
def test_the_caller_may_read_the_organizations_and_the_managed_policies(
    owner_and_path: str,
) -> None:
    [resource] = [
        each["Resource"]
        for each in printed("caller-policy")["Statement"]
        if each["Sid"] == "ReadPolicies"
    ]
    assert matches(resource, f"arn:aws:organizations::{owner_and_path}/service_control_policy/p-1")
    assert not matches(resource, f"arn:aws:organizations::{owner_and_path}/tag_policy/p-1")


def test_the_caller_may_read_organizational_units_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """IAM's service authorization reference has organizationalunit as the action's required resource."""
    action = "organizations:DescribeOrganizationalUnit"
    monkeypatch.setattr(audit, "CALLER_READS", {**audit.CALLER_READS, action: "the names of OUs"})
    [read] = [each for each in printed("caller-policy")["Statement"] if action in each["Action"]]
    assert read["Action"] == [action]
    unit = "arn:aws:organizations::444455556666:ou/o-ab12cdef34/ou-ab12-cdefgh34"
    assert matches(read["Resource"], unit)
    for other in ("account/o-ab12cdef34/444455556666", "root/o-ab12cdef34/r-ab12"):
        assert not matches(read["Resource"], f"arn:aws:organizations::444455556666:{other}")


def test_moto_accepts_the_policies() -> None:
    with mock_aws():
        iam = boto3.client("iam", "us-east-1")
        for name in ("caller-policy", "role-policy"):
            iam.create_policy(PolicyName=name, PolicyDocument=audit.print_document(name))
        iam.create_role(
            RoleName="IAMAuditRole", AssumeRolePolicyDocument=audit.print_document("role-trust")
        )
        organizations = boto3.client("organizations", "us-east-1")
        organizations.create_organization(FeatureSet="ALL")
        root = organizations.list_roots()["Roots"][0]["Id"]
        organizations.enable_policy_type(RootId=root, PolicyType="SERVICE_CONTROL_POLICY")
        for name in ("scp-require-mfa", "scp-deny-access-keys"):
            content = audit.print_document(name)
            created = organizations.create_policy(
                Name=name, Description=name, Type="SERVICE_CONTROL_POLICY", Content=content
            )
            organizations.attach_policy(
                PolicyId=created["Policy"]["PolicySummary"]["Id"], TargetId=root
            )


def create_stack(name: str, parameters: dict[str, str], **options: Any) -> None:
    boto3.client("cloudformation", "us-east-1").create_stack(
        StackName=name,
        TemplateBody=audit.print_document(name, **options),
        Parameters=[
            {"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()
        ],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )


@pytest.mark.parametrize("external_id", ["", "ex:42"])
def test_the_role_template_makes_the_role(external_id: str) -> None:
    with mock_aws():
        parameters = {"AuditingAccountId": "444455556666", "ExternalId": external_id}
        create_stack("role-template", parameters, role="audit/Reader")
        iam: Any = boto3.client("iam", "us-east-1")
        role = iam.get_role(RoleName="Reader")["Role"]
        assert iam.list_role_policies(RoleName="Reader")["PolicyNames"] == ["iam-audit"]
    [trust] = role["AssumeRolePolicyDocument"]["Statement"]
    assert role["Arn"].endswith(":role/audit/Reader")
    assert trust["Principal"] == {"AWS": "arn:aws:iam::444455556666:root"}
    assert trust.get("Condition") == (
        {"StringEquals": {"sts:ExternalId": external_id}} if external_id else None
    )


def test_the_role_of_the_template_may_what_the_role_policy_says() -> None:
    [inline] = printed("role-template")["Resources"]["Role"]["Properties"]["Policies"]
    assert inline["PolicyDocument"] == printed("role-policy")


def test_the_alert_rule_sends_what_succeeded_to_the_topic() -> None:
    with mock_aws():
        create_stack("alert-rule", {"Email": "security@example.com"})
        events: Any = boto3.client("events", "us-east-1")
        sns: Any = boto3.client("sns", "us-east-1")
        sqs: Any = boto3.client("sqs", "us-east-1")
        [topic], [subscription] = (
            sns.list_topics()["Topics"],
            sns.list_subscriptions()["Subscriptions"],
        )
        [rule] = events.list_rules()["Rules"]
        [target] = events.list_targets_by_rule(Rule=rule["Name"])["Targets"]
        queue = sqs.create_queue(QueueName="seen")[
            "QueueUrl"
        ]  # moto hands on to queues, not to topics
        arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"][
            "QueueArn"
        ]
        events.remove_targets(Rule=rule["Name"], Ids=[target["Id"]])
        events.put_targets(Rule=rule["Name"], Targets=[{"Id": "seen", "Arn": arn}])
        for detail in (
            {"eventName": "CreateAccessKey", "eventID": "made"},
            {"eventName": "CreateServiceSpecificCredential", "eventID": "API key"},
            {"eventName": "ResetServiceSpecificCredential", "eventID": "reset"},
            {"eventName": "UploadSigningCertificate", "eventID": "certificate"},
            {"eventName": "UploadSSHPublicKey", "eventID": "SSH key"},
            {"eventName": "CreateLoginProfile", "eventID": "password"},
            {"eventName": "UpdateLoginProfile", "eventID": "new password"},
            {"eventName": "DeactivateMFADevice", "eventID": "no MFA"},
            {"eventName": "DeleteAccessKey", "eventID": "fewer keys"},
            {"eventName": "CreateAccessKey", "eventID": "denied", "errorCode": "AccessDenied"},
            {"eventName": "ListAccessKeys", "eventID": "read"},
        ):
            event = {"Source": "aws.iam", "DetailType": "AWS API Call via CloudTrail"}
            body = json.dumps({"eventSource": "iam.amazonaws.com", **detail})
            events.put_events(Entries=[{**event, "Detail": body}])
        seen = sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10)["Messages"]
    assert (subscription["Protocol"], subscription["Endpoint"]) == ("email", "security@example.com")
    assert (target["Arn"], subscription["TopicArn"]) == (topic["TopicArn"], topic["TopicArn"])
    ids = {json.loads(message["Body"])["detail"]["eventID"] for message in seen}
    assert ids == {
        *("made", "API key", "reset", "certificate", "SSH key"),
        *("password", "new password", "no MFA"),
    }


def test_only_eventbridge_may_publish_to_the_topic() -> None:
    [statement] = printed("alert-rule")["Resources"]["TopicPolicy"]["Properties"]["PolicyDocument"][
        "Statement"
    ]
    assert statement == {
        "Effect": "Allow",
        "Principal": {"Service": "events.amazonaws.com"},
        "Action": "sns:Publish",
        "Resource": {"Ref": "Topic"},
    }


@pytest.mark.parametrize("name", ["scp-require-mfa", "scp-deny-access-keys"])
def test_the_readme_shows_what_is_printed(name: str) -> None:
    shown = re.search(
        rf"--print {name}[^\n]*\n+```json\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert shown is not None
    assert shown[1] == audit.print_document(name)

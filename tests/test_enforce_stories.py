"""What the program makes of an organization's service control policies, read over the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any, NamedTuple

import pytest
from builders import (
    ABSENT,
    ENFORCED,
    NOT_CHECKED,
    ONE,
    PARTIAL,
    THREE,
    TWO,
    in_units,
    summary_of,
)
from conftest import Program, Result, Serve
from endpoint import Json, account, key, policy, rule, user
from organization import (
    DEFAULT_ROLE,
    VIRTUAL,
    AccountSpec,
    KeySpec,
    MadeOrganization,
    MotoServer,
    UserSpec,
    attach_scp,
    enable_scps,
    fill,
)

import iam_audit

pytestmark = pytest.mark.program

REQUIRE_MFA = iam_audit.print_document("scp-require-mfa")
DENY_KEYS = iam_audit.print_document("scp-deny-access-keys")
ONLY_AT_NIGHT = {
    "Version": "2012-10-17",
    "Statement": {
        "Effect": "Deny",
        "Action": "iam:CreateAccessKey",
        "Resource": "*",
        "Condition": {"DateGreaterThan": {"aws:CurrentTime": "2026-01-01T20:00:00Z"}},
    },
}
WITH_MFA = (UserSpec("ana", password=True, mfa=(VIRTUAL,)),)
WITHOUT_MFA = (UserSpec("bob", password=True),)
OLD_KEY = (UserSpec("svc", keys=(KeySpec(datetime(2020, 1, 1, tzinfo=timezone.utc)),)),)

# Organizational units three deep. MFA is required below Workloads, new keys are denied to one account three levels
# down, and partly from the root down.
MEMBERS = [
    AccountSpec("deep", "100000000001", ("Workloads", "Production", "Payments"), WITH_MFA),
    AccountSpec("deep too", "100000000002", ("Workloads", "Production", "Payments"), WITHOUT_MFA),
    AccountSpec("middle", "100000000003", ("Workloads", "Production"), ()),
    AccountSpec("beside", "100000000004", ("Sandbox",), WITH_MFA),
    AccountSpec("at the root", "100000000005", (), OLD_KEY),
]


class Enforced(NamedTuple):
    result: Result
    made: MadeOrganization
    counts: dict[str, int]


@pytest.fixture(scope="module")
def enforced(program: Program) -> Iterator[Enforced]:
    with MotoServer() as server:
        made = fill(server, MEMBERS)
        enable_scps(server)
        attach_scp(server, "RequireMFA", json.loads(REQUIRE_MFA), made.ous["Workloads",])
        attach_scp(server, "DenyKeys", json.loads(DENY_KEYS), "100000000001")
        attach_scp(server, "KeysAtNight", ONLY_AT_NIGHT, made.root_id)
        server.set_features("RootCredentialsManagement")
        server.clear_counts()
        result = program(server.env(), "--include-management", role=DEFAULT_ROLE)
        counts: dict[str, int] = {}
        for (_, action), number in server.counts().items():
            counts[action] = counts.get(action, 0) + number
        yield Enforced(result, made, counts)


def controls(result: Result, account_id: str) -> tuple[str, str]:
    found = result.accounts[account_id]["controls"]
    return found["mfa-required"]["verdict"], found["new-keys-prevented"]["verdict"]


def test_each_account_is_under_the_policies_above_it(enforced: Enforced) -> None:
    assert enforced.result.exit_code == 0
    assert {one: controls(enforced.result, one) for one in enforced.result.accounts} == {
        "100000000001": (ENFORCED, ENFORCED),
        "100000000002": (ENFORCED, PARTIAL),
        "100000000003": (ENFORCED, PARTIAL),
        "100000000004": (ABSENT, PARTIAL),
        "100000000005": (ABSENT, PARTIAL),
        enforced.made.management.id: (ABSENT, ABSENT),  # it is under no service control policy
    }


def test_phase_1_is_advanced_where_mfa_is_complete_and_enforced(enforced: Enforced) -> None:
    levels = {one: entry["maturity"]["phase1"] for one, entry in enforced.result.accounts.items()}
    assert levels == {
        "100000000001": "Advanced",
        "100000000002": "In Progress",  # enforced, and not complete
        "100000000003": "Advanced",  # no console users
        "100000000004": "Complete",  # complete, and not enforced
        "100000000005": "Complete",
        enforced.made.management.id: "Complete",
    }
    assert summary_of(enforced.result)["maturity"]["phase1"]["accounts"]["Advanced"] == 2


def test_the_summary_counts_and_names(enforced: Enforced) -> None:
    found = summary_of(enforced.result)["enforcement"]
    assert found["accounts"]["mfa-required"] == {ENFORCED: 3, NOT_CHECKED: 0, PARTIAL: 0, ABSENT: 3}
    assert found["accounts"]["new-keys-prevented"] == {
        ENFORCED: 1,
        NOT_CHECKED: 0,
        PARTIAL: 4,
        ABSENT: 1,
    }
    assert (found["why_not_checked"], found["root_credentials_managed_centrally"]) == (None, True)
    assert found["accounts"]["new-api-keys-prevented"] == {
        ENFORCED: 1,
        NOT_CHECKED: 0,
        PARTIAL: 2,
        ABSENT: 3,
    }
    control = enforced.result.accounts["100000000004"]["controls"]["new-keys-prevented"]
    assert [each["name"] for each in control["policies"]] == ["KeysAtNight"]
    assert control["conditions"] == ["DateGreaterThan aws:CurrentTime 2026-01-01T20:00:00Z"]
    text = " ".join(enforced.result.stdout.split())
    assert "3 enforced, 3 absent" in text
    assert "1 enforced, 4 partial, 1 absent" in text
    assert "applies only if DateGreaterThan aws:CurrentTime 2026-01-01T20:00:00Z" in text
    assert "root credentials managed centrally yes" in text


def test_the_extra_calls_are_two_a_policy_and_one_for_their_list(enforced: Enforced) -> None:
    policies = 4  # FullAWSAccess and three of ours
    extra = {
        name: number
        for name, number in enforced.counts.items()
        if "Polic" in name or "Parent" in name
    }
    assert extra == {
        "ListPolicies": 1,
        "DescribePolicy": policies,
        "ListTargetsForPolicy": policies,
    }
    assert enforced.counts["ListOrganizationsFeatures"] == 1


FULL = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}


def placed(account_id: str, *units: str, **options: Any) -> Json:
    return in_units(account_id, f"a{account_id[0]}", *units, **options)


def test_an_account_without_a_path_is_unchecked_alone(serve: Serve, run_program: Program) -> None:
    """Its place is unknown, and so is what is attached above it."""
    policies = [policy("p-requiremfa1", "RequireMFA", REQUIRE_MFA, ["r-test"])]
    lost = account(TWO, "lost", paths=[])
    endpoint = serve(placed(ONE), lost, policies=policies)
    result = run_program(endpoint.env())
    assert [controls(result, one)[0] for one in (ONE, TWO)] == [ENFORCED, NOT_CHECKED]
    assert "not checked: ListAccounts did not give its place (Paths)" in result.stdout
    of_lost = result.accounts[TWO]["controls"]["mfa-required"]
    assert of_lost["why_not_checked"] == "ListAccounts did not give its place (Paths)"


def test_accounts_that_could_not_be_audited_are_under_policies_too(
    serve: Serve, run_program: Program
) -> None:
    policies = [
        policy("p-requiremfa1", "RequireMFA", REQUIRE_MFA, ["r-test"]),
        policy("p-FullAWSAccess", "FullAWSAccess", FULL, ["r-test"]),
    ]
    result = run_program(serve(placed(ONE), placed(TWO, role="denied"), policies=policies).env())
    assert result.failures.keys() == {TWO}
    assert {controls(result, one) for one in (ONE, TWO)} == {(ENFORCED, PARTIAL)}
    assert summary_of(result)["enforcement"]["accounts"]["mfa-required"][ENFORCED] == 2
    assert result.accounts[TWO]["maturity"]["phase1"] == "Not Started"


@pytest.mark.parametrize("action", ["DescribePolicy", "ListTargetsForPolicy"])
def test_a_policy_that_is_deleted_meanwhile_is_left_out(
    serve: Serve, run_program: Program, action: str
) -> None:
    policies = [
        policy("p-gone000001", "Gone", REQUIRE_MFA, ["r-test"]),
        policy("p-denykeys01", "DenyKeys", DENY_KEYS, ["r-test"]),
    ]
    gone = rule(action, error="PolicyNotFoundException", fields={"PolicyId": "p-gone000001"})
    result = run_program(serve(placed(ONE), policies=policies, rules=[gone]).env())
    assert controls(result, ONE) == (ABSENT, ENFORCED)


def test_two_policies_prevent_new_api_keys_together(serve: Serve, run_program: Program) -> None:
    """One denies their creation to the whole organization, one their reset in an OU."""

    def denying(action: str) -> Json:
        denial = {"Effect": "Deny", "Action": f"iam:{action}", "Resource": "*"}
        return {"Version": "2012-10-17", "Statement": [denial, FULL["Statement"]]}

    create, reset = "CreateServiceSpecificCredential", "ResetServiceSpecificCredential"
    policies = [
        policy("p-create0001", "NoCreation", denying(create), ["r-test"]),
        policy("p-reset00001", "NoReset", denying(reset), ["ou-test-aaaaaaaa"]),
        policy("p-FullAWSAccess", "FullAWSAccess", FULL, [ONE, TWO]),
    ]
    accounts = [placed(ONE, "ou-test-aaaaaaaa"), placed(TWO)]
    result = run_program(serve(*accounts, policies=policies).env())
    found = [result.accounts[one]["controls"]["new-api-keys-prevented"] for one in (ONE, TWO)]
    assert [each["verdict"] for each in found] == [ENFORCED, PARTIAL]
    assert [each["name"] for each in found[0]["policies"]] == ["NoCreation", "NoReset"]
    assert [each["name"] for each in found[1]["policies"]] == ["NoCreation"]
    assert found[1]["conditions"] == [f"NotAction iam:{reset}"]
    text = " ".join(result.stdout.split())
    assert "no new API keys 1 enforced, 1 partial" in text
    assert f"partial: NoCreation does not cover iam:{reset}" in text


def test_few_of_many_policies_are_shown(serve: Serve, run_program: Program) -> None:
    hour = {"DateGreaterThan": {"aws:CurrentTime": "2026-01-01T20:00:00Z"}}
    narrow = {"Effect": "Deny", "Action": "iam:CreateAccessKey", "Resource": "*", "Condition": hour}
    accounts = [placed(f"1000000000{n:02}") for n in range(13)]
    policies = [
        policy(
            f"p-narrow{n:05}",
            f"Narrow{n}",
            {"Version": "2012-10-17", "Statement": [narrow, FULL["Statement"]]},
            [f"1000000000{n:02}"],
        )
        for n in range(13)
    ]
    shown = run_program(serve(*accounts, policies=policies).env()).stdout
    assert shown.count("partial: Narrow") == 10
    assert "and 3 more, in summary.json" in shown


@pytest.mark.parametrize("action", ["ListPolicies", "DescribePolicy", "ListTargetsForPolicy"])
def test_what_is_denied_is_not_checked_and_claims_nothing(
    serve: Serve, run_program: Program, action: str
) -> None:
    policies = [policy("p-requiremfa1", "RequireMFA", REQUIRE_MFA, ["r-test"])]
    denied = rule(action, error="AccessDeniedException", message="You don't have permissions")
    endpoint = serve(
        placed(ONE, users=[user("ana", password=True, mfa=["GAHT1"])]),
        policies=policies,
        rules=[denied],
    )
    result = run_program(endpoint.env())
    assert (result.exit_code, controls(result, ONE)) == (0, (NOT_CHECKED, NOT_CHECKED))
    assert result.accounts[ONE]["maturity"]["phase1"] == "Complete"
    assert "AccessDeniedException" in summary_of(result)["enforcement"]["why_not_checked"]
    assert f"not checked: {action}: AccessDeniedException" in result.stdout


def test_policies_that_are_off_are_not_checked(serve: Serve, run_program: Program) -> None:
    endpoint = serve(placed(ONE), policies=[policy("p-requiremfa1", "RequireMFA", REQUIRE_MFA, [])])
    result = run_program(endpoint.env())
    assert (result.exit_code, controls(result, ONE)) == (0, (NOT_CHECKED, NOT_CHECKED))
    assert "are off" in summary_of(result)["enforcement"]["why_not_checked"]


def test_a_policy_that_is_not_understood_is_named(serve: Serve, run_program: Program) -> None:
    policies = [policy("p-strange0001", "Strange one", "{not JSON", ["r-test"])]
    result = run_program(serve(placed(ONE), policies=policies).env())
    control = result.accounts[ONE]["controls"]["mfa-required"]
    assert (control["verdict"], control["policies"]) == (
        NOT_CHECKED,
        [{"id": "p-strange0001", "name": "Strange one"}],
    )
    assert "Strange one" in result.stdout


def test_an_allow_list_is_not_checked_and_says_why(serve: Serve, run_program: Program) -> None:
    """FullAWSAccess is at the root and was detached from the OU, where a list of services took its place."""
    s3 = {
        "Version": "2012-10-17",
        "Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"},
    }
    policies = [
        policy("p-FullAWSAccess", "FullAWSAccess", FULL, ["r-test", ONE, TWO]),
        policy("p-allowlist1", "OnlyS3", s3, ["ou-test-aaaaaaaa"]),
    ]
    accounts = [placed(ONE, "ou-test-aaaaaaaa"), placed(TWO)]
    result = run_program(serve(*accounts, policies=policies).env())
    assert [controls(result, one) for one in (ONE, TWO)] == [
        (ABSENT, NOT_CHECKED),
        (ABSENT, ABSENT),
    ]
    why = "no Allow without a condition lets iam:CreateAccessKey through"
    control = result.accounts[ONE]["controls"]["new-keys-prevented"]
    assert (control["policies"], control["why_not_checked"]) == (
        [{"id": "p-allowlist1", "name": "OnlyS3"}],
        why,
    )
    assert result.accounts[TWO]["controls"]["new-keys-prevented"]["why_not_checked"] is None
    assert f"not checked: OnlyS3: {why}" in " ".join(result.stdout.split())


def test_the_judge_knows_this_organization(serve: Serve, run_program: Program) -> None:
    deny = json.loads(DENY_KEYS)["Statement"][0]
    by_organization = {}
    for policy_id, operator in (
        ("p-equal00001", "StringEquals"),
        ("p-unequal001", "StringNotEquals"),
    ):
        condition = {operator: {"aws:PrincipalOrgID": "o-test123456"}}
        statements = [{**deny, "Condition": condition}, FULL["Statement"]]
        document = {"Version": "2012-10-17", "Statement": statements}
        policies = [policy(policy_id, policy_id, document, [ONE])]
        result = run_program(serve(placed(ONE), policies=policies).env())
        by_organization[operator] = controls(result, ONE)[1]
    assert by_organization == {"StringEquals": ENFORCED, "StringNotEquals": ABSENT}


def test_root_credentials_are_not_checked_where_that_is_denied(
    serve: Serve, run_program: Program
) -> None:
    denied = rule(
        "ListOrganizationsFeatures", error="AccessDenied", message="not authorized", status=403
    )
    policies = [policy("p-fullawsaccess", "FullAWSAccess", FULL, ["r-test"])]
    result = run_program(serve(placed(ONE), policies=policies, rules=[denied]).env())
    found = summary_of(result)["enforcement"]
    assert (result.exit_code, found["root_credentials_managed_centrally"]) == (0, None)
    assert "AccessDenied" in found["root_credentials_why_not_checked"]


def test_an_organization_that_never_gave_iam_trusted_access_manages_no_root_credentials(
    serve: Serve, run_program: Program
) -> None:
    """That is an answer, and not "not checked"."""
    code = "ServiceAccessNotEnabledException"
    never = rule("ListOrganizationsFeatures", error=code, message="not enabled", status=400)
    policies = [policy("p-fullawsaccess", "FullAWSAccess", FULL, ["r-test"])]
    result = run_program(serve(placed(ONE), policies=policies, rules=[never]).env())
    found = summary_of(result)["enforcement"]
    assert (result.exit_code, found["root_credentials_managed_centrally"]) == (0, False)
    assert found["root_credentials_why_not_checked"] is None


def test_the_accounts_with_neither_control_and_most_keys_come_first(
    serve: Serve, run_program: Program
) -> None:
    def with_keys(account_id: str, number: int, *units: str) -> Json:
        users = [user(f"u{n}", keys=[key(f"AKIA{account_id[0]}{n:015d}")]) for n in range(number)]
        return placed(account_id, *units, users=users)

    policies = [policy("p-denykeys001", "DenyKeys", DENY_KEYS, ["ou-test-aaaaaaaa"])]
    accounts = [with_keys(ONE, 1), with_keys(TWO, 3), with_keys(THREE, 5, "ou-test-aaaaaaaa")]
    stdout = run_program(serve(*accounts, policies=policies).env()).stdout
    table = stdout[
        stdout.index("Accounts with the most active keys and none of the controls") :
    ].split("\n\n")[0]
    assert [line.split()[0] for line in table.splitlines()[1:]] == [TWO, ONE]

"""What iam_audit.py promises: its columns and words, what it imports, which AWS actions it can call at all."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import botocore.session
import pytest
from botocore import xform_name
from builders import ONE
from conftest import Program, Serve
from endpoint import account, key, root, user

import iam_audit

SOURCE = Path(iam_audit.__file__).read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
README = Path(__file__).resolve().parent.parent / "README.md"
ACTION = re.compile(r"\b(?:sts|iam|organizations|cloudtrail):[A-Z][A-Za-z]+")
HEADER = (
    "account_id,account_name,username,password_status,password_last_used,access_key_id,status,created_date,"
    "last_used_date,service_name,mfa_status"
)
ROLE_ACTIONS = {
    "iam:GenerateCredentialReport",
    "iam:GetCredentialReport",
    "iam:ListUsers",
    "iam:ListAccessKeys",
    "iam:GetAccessKeyLastUsed",
    "iam:ListMFADevices",
    "iam:ListVirtualMFADevices",
    "iam:GetLoginProfile",
    "iam:ListServiceSpecificCredentials",
    "iam:GetAccountAuthorizationDetails",
}


def test_the_eleven_columns_stand_in_their_order() -> None:
    assert ",".join(iam_audit.CSV_COLUMNS) == HEADER


def test_exit_codes_are_the_ones_that_scripts_rely_on() -> None:
    codes = (
        iam_audit.EXIT_OK,
        iam_audit.EXIT_NOT_DONE,
        iam_audit.EXIT_USAGE,
        iam_audit.EXIT_ACCOUNTS_FAILED,
        iam_audit.EXIT_FAIL_ON,
        iam_audit.EXIT_SIGNAL,
    )
    assert codes == (0, 1, 2, 3, 4, 128)


def test_imports_nothing_but_the_standard_library_and_the_sdk() -> None:
    imported: set[str] = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            imported.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").partition(".")[0])
    assert imported <= sys.stdlib_module_names | {"boto3", "botocore"}
    assert "importlib" not in imported
    assert "__import__" not in SOURCE


# --- AWS actions ------------------------------------------------------------------------------------------------------


def allowed() -> set[str]:
    """The allow-list: the constants that name reads with their reasons, and AssumeRole."""
    reads = [
        value
        for name, value in vars(iam_audit).items()
        if name.endswith("_READS") and isinstance(value, dict)
    ]
    return {"sts:AssumeRole"}.union(*reads)


def services() -> set[str]:
    """The services that the program creates clients of; `signed_client` alone creates one."""
    created, plain = set(), 0
    for node in ast.walk(TREE):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "resource"
            plain += node.func.attr in ("client", "create_client")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "signed_client":
            created.add(ast.literal_eval(node.args[1]))  # it must be named in the call
    assert plain == 1, "a client is created that could sign with the profile's credentials"
    return created


def callable_actions() -> dict[str, set[str]]:
    """For each name in the program that is an operation's of a client: which actions it can be.

    An operation is an attribute of a client or named as text, for a paginator.
    """
    loader = botocore.session.Session()
    operations: dict[str, set[str]] = {}
    for service in services():
        for operation in loader.get_service_model(service).operation_names:
            operations.setdefault(xform_name(operation), set()).add(f"{service}:{operation}")
    used = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    used |= {
        node.value
        for node in ast.walk(TREE)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {name: operations[name] for name in used & set(operations)}


def test_every_action_that_can_be_called_is_allowed() -> None:
    found = callable_actions()
    assert {"assume_role", "list_accounts", "list_users"} <= set(
        found
    )  # the search finds something
    for name, actions in found.items():
        assert actions & allowed(), f"{name} is not among the constants"


def test_the_docstring_names_every_action_and_no_other() -> None:
    contract = iam_audit.__doc__ or ""
    for action in allowed():
        service, _, name = action.partition(":")
        assert f"{service}:" in contract
        assert re.search(rf"\b{name}\b", contract), f"{action} is not in the docstring"
    assert set(ACTION.findall(contract)) <= allowed()


def test_no_operation_is_hidden_from_that_search() -> None:
    """getattr on a client, botocore's own way to make a call and the like would hide one."""
    for node in ast.walk(TREE):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "getattr"
        ):
            owner = ast.unparse(node.args[0])
            assert not re.search(
                r"aws|iam|sts|organizations|cloudtrail|client|session|meta", owner
            ), owner
        if isinstance(node, ast.Attribute):
            assert node.attr not in (
                "_make_api_call",
                "make_api_call",
                "__getattribute__",
                "generate_presigned_url",
            )
    assert not re.search(r"\b(eval|exec)\(", SOURCE)


def test_every_action_is_a_read() -> None:
    for action in allowed() - {"sts:AssumeRole", "iam:GenerateCredentialReport"}:
        assert re.search(r":(Get|List|Describe|Lookup)", action), action


def test_the_role_needs_these_ten_actions_each_for_a_reason() -> None:
    assert set(iam_audit.ROLE_READS) == ROLE_ACTIONS
    assert all(iam_audit.ROLE_READS.values()), "an action without its reason"
    assert all(iam_audit.CALLER_READS.values())


@pytest.mark.program
def test_what_is_called_is_what_is_allowed(serve: Serve, run_program: Program) -> None:
    """And all of it is needed: an account that has everything makes the program call every action."""
    ana = user("ana", password=True, mfa=["GAHT12345678"], keys=[key("AKIA0000000000000ANA")])
    boss = root(password=True, virtual=True)
    new = user("new", in_report=False, password=True)
    endpoint = serve(account(ONE, "one", users=[ana, new], root=boss))
    result = run_program(endpoint.env(), role="path/Audit")
    assert result.exit_code == 0, result
    stats = endpoint.stats()
    assert set(stats["requests"]) <= {action.partition(":")[2] for action in allowed()}
    assert {f"iam:{name}" for name in stats["by_account"][ONE]} - {"iam:AssumeRole"} == ROLE_ACTIONS


@pytest.mark.program
def test_the_session_policy_allows_the_reads_and_nothing_else(
    serve: Serve, run_program: Program
) -> None:
    endpoint = serve(account(ONE, "one"))
    run_program(endpoint.env())
    policy = json.loads(endpoint.stats()["assumed"][ONE]["Policy"])
    [statement] = policy.pop("Statement")
    assert policy == {"Version": "2012-10-17"}
    assert statement.pop("Effect") == "Allow"
    assert set(statement.pop("Action")) == ROLE_ACTIONS
    assert statement == {"Resource": "*"}


# --- README -----------------------------------------------------------------------------------------------------------


def help_text(program: Program) -> str:
    command = [program.python, program.path, "--help"]
    env = {**os.environ, "COLUMNS": "60"}  # which must not matter
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


@pytest.mark.program
def test_help_shows_two_examples_and_the_exit_codes(program: Program) -> None:
    shown = help_text(program)
    assert shown.startswith("usage: iam_audit.py")
    assert shown.count("  iam_audit.py --") >= 2
    for code in ("0", "1", "2", "3", "4", "129", "130", "143"):
        assert re.search(rf"\b{code}\b.*[a-z]{{4}}", shown)


@pytest.mark.program
def test_help_fits_three_screens_and_shows_every_option_in_a_group(program: Program) -> None:
    shown = help_text(program)
    assert len(shown.splitlines()) <= 120
    groups = re.split(r"\n\n", shown)
    grouped = {"access", "accounts", "speed", "gaps and findings", "changes", "output", "documents"}
    assert grouped <= {group.partition(":\n")[0] for group in groups}
    usage = set(re.findall(r"--[a-z][a-z-]+", groups[0]))
    assert {"--retry-failed", "--exclude-ou", "--exceptions", "--owner-tag", "--max-unused"} < usage
    for option in usage:
        assert re.search(rf"^  (-\w, )?{option}\b", shown, re.MULTILINE), option


@pytest.mark.program
def test_readme_shows_the_help(program: Program, program_versions: dict[str, str]) -> None:
    if program_versions["python"] == "3.9":
        pytest.skip("argparse had other headings before 3.10")
    blocks = re.findall(
        r"^```[a-z]*\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    [block] = [block for block in blocks if "usage: iam_audit.py" in block]
    shown = block[block.index("usage: iam_audit.py") :]
    assert shown == help_text(program)


def test_the_top_level_is_the_designs() -> None:
    """Nothing else: no second module, no settings, nothing that somebody tried out."""
    root = Path(__file__).resolve().parent.parent
    passing = {"reports", "__pycache__"}  # of runs, and ignored by git
    found = {path.name for path in root.iterdir() if not path.name.startswith(".")} - passing
    assert found == {"iam_audit.py", "requirements.txt", "README.md", "tests"}

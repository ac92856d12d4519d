"""What an account's CSV says: every rule for rows by a table of cases, over HTTP; and which accounts are audited."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import pytest
from builders import (
    FIVE,
    FOUR,
    MANAGEMENT,
    ONE,
    THREE,
    TWO,
    again,
    changes,
    in_units,
    lines,
    summary_of,
)
from conftest import Program, Result, Serve
from endpoint import (
    ACCOUNT_DEFAULTS,
    Json,
    account,
    credential_report,
    event,
    key,
    root,
    root_key,
    rule,
    user,
)

pytestmark = pytest.mark.program

ARN = f"arn:aws:iam::{ONE}:"
OLDER, OLDER_CELL = "2023-05-06T07:08:09Z", "2023-05-06T07:08:09+00:00"
OLD, OLD_CELL = "2024-05-06T07:08:09Z", "2024-05-06T07:08:09+00:00"
USED, USED_CELL = "2025-06-07T08:09:10Z", "2025-06-07T08:09:10+00:00"

# --- users ------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A user as AWS has it, and its rows; cells are separated by `|`, account_id and account_name left out."""

    users: list[Json]
    rows: list[str]


def case(made: Json, *rows: str) -> Case:
    return Case([made], list(rows))


RECREATED = Case(
    [
        user(
            "recreated",
            created="2024-03-01T00:00:00Z",
            password=True,
            password_last_used="2024-04-01T00:00:00Z",
            in_list=False,
        ),
        user("recreated", created="2025-03-01T00:00:00Z", in_report=False, mfa=["GAHT00000009"]),
    ],
    ["recreated|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|Hardware"],
)
RECREATED_WITH_PASSWORD = Case(
    [
        user("again", created="2024-03-01T00:00:00Z", in_list=False),
        user("again", created="2025-03-01T00:00:00Z", in_report=False, password=True),
    ],
    ["again|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|None"],
)

USERS = {
    "password never used": case(
        user("login-never", password=True),
        "login-never|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|None",
    ),
    "password used": case(
        user("login", password=True, password_last_used="2025-03-04T05:06:07Z"),
        "login|Configurada|2025-03-04T05:06:07+00:00|N/A|N/A|N/A|N/A|N/A|None",
    ),
    "neither password nor keys": case(
        user("empty"),
        "empty|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None",
    ),
    "key used": case(
        user(
            "used",
            keys=[key("AKIA000000000000USED", created=OLD, last_used=USED, service="dynamodb")],
        ),
        f"used|No configurada|N/A|AKIA000000000000USED|Active|{OLD_CELL}|{USED_CELL}|dynamodb|None",
    ),
    "key never used": case(
        user("unused", keys=[key("AKIA0000000000UNUSED", created=OLD)]),
        f"unused|No configurada|N/A|AKIA0000000000UNUSED|Active|{OLD_CELL}|Nunca utilizada|N/A|None",
    ),
    "keys inactive and expired, oldest first": case(
        user(
            "two-keys",
            keys=[
                key("AKIA00000000000EXPIR", status="Expired", created=OLD),
                key(
                    "AKIA00000000000INACT",
                    status="Inactive",
                    created=OLDER,
                    last_used="2023-06-01T00:00:00Z",
                ),
            ],
        ),
        f"two-keys|No configurada|N/A|AKIA00000000000INACT|Inactive|{OLDER_CELL}|2023-06-01T00:00:00+00:00|s3|None",
        f"two-keys|No configurada|N/A|AKIA00000000000EXPIR|Expired|{OLD_CELL}|Nunca utilizada|N/A|None",
    ),
    "keys of the same second, by ID": case(
        user(
            "same-second",
            keys=[
                key("AKIA000000000000000B", created=OLD),
                key("AKIA000000000000000A", created=OLD),
            ],
        ),
        f"same-second|No configurada|N/A|AKIA000000000000000A|Active|{OLD_CELL}|Nunca utilizada|N/A|None",
        f"same-second|No configurada|N/A|AKIA000000000000000B|Active|{OLD_CELL}|Nunca utilizada|N/A|None",
    ),
    "everything at once": case(
        user(
            "everything",
            password=True,
            password_last_used="2025-01-01T00:00:00Z",
            mfa=[f"{ARN}mfa/everything"],
            keys=[key("AKIA0000000000000ALL", created=OLD, last_used=USED, service="sts")],
        ),
        f"everything|Configurada|2025-01-01T00:00:00+00:00|AKIA0000000000000ALL|Active|{OLD_CELL}|{USED_CELL}|sts|Virtual",
    ),
    "virtual MFA": case(
        user("virtual", password=True, mfa=[f"{ARN}mfa/virtual"]),
        "virtual|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Virtual",
    ),
    "virtual MFA with a path, named like another kind": case(
        user("virtual-path", password=True, mfa=[f"{ARN}mfa/u2f/user/sms-mfa"]),
        "virtual-path|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Virtual",
    ),
    "security key": case(
        user("security-key", password=True, mfa=[f"{ARN}u2f/user/security-key/mfa-ABCDEFG"]),
        "security-key|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Security key",
    ),
    "SMS": case(
        user("sms", password=True, mfa=[f"{ARN}sms-mfa/virtual/mfa"]),
        "sms|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|SMS",
    ),
    "hardware token": case(
        user("hardware", password=True, mfa=["GAHT12345678"]),
        "hardware|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Hardware",
    ),
    "several kinds, each once, sorted": case(
        user("kinds", password=True, mfa=[f"{ARN}mfa/b", f"{ARN}u2f/user/kinds/x", f"{ARN}mfa/a"]),
        "kinds|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Security key+Virtual",
    ),
    "all kinds": case(
        user(
            "all-kinds",
            password=True,
            mfa=[f"{ARN}mfa/a", f"{ARN}sms-mfa/a", "GAHT87654321", f"{ARN}u2f/user/all/x"],
        ),
        "all-kinds|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Hardware+SMS+Security key+Virtual",
    ),
    "MFA without a password": case(
        user("mfa-only", mfa=[f"{ARN}mfa/mfa-only"]),
        "mfa-only|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|Virtual",
    ),
    "younger than the report, with password and MFA": case(
        user(
            "young",
            in_report=False,
            password=True,
            password_last_used="2025-09-08T07:06:05Z",
            mfa=["GAHT11111111"],
        ),
        "young|Configurada|2025-09-08T07:06:05+00:00|N/A|N/A|N/A|N/A|N/A|Hardware",
    ),
    "younger than the report, password never used": case(
        user("young-never", in_report=False, password=True),
        "young-never|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|None",
    ),
    "younger than the report, without a password": case(
        user("young-machine", in_report=False, keys=[key("AKIA000000000000YNEW", created=USED)]),
        f"young-machine|No configurada|N/A|AKIA000000000000YNEW|Active|{USED_CELL}|Nunca utilizada|N/A|None",
    ),
    "younger than the report, MFA without a password": case(
        user("young-mfa", in_report=False, mfa=[f"{ARN}mfa/young-mfa"]),
        "young-mfa|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|Virtual",
    ),
    "deleted since the report": case(
        user("deleted", in_list=False, password=True, keys=[key("AKIA000000000000GONE")])
    ),
    "deleted and created again since the report": RECREATED,
    "deleted and created again with a password": RECREATED_WITH_PASSWORD,
    "name with a comma": case(
        user("comma,name"), "comma,name|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None"
    ),
    "name like a formula": case(user("=1+1"), "'=1+1|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None"),
    "name with a plus": case(user("+plus"), "'+plus|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None"),
    "name with a minus": case(
        user("-minus"), "'-minus|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None"
    ),
    "name with an at sign": case(
        user("@SUM(A1)"), "'@SUM(A1)|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None"
    ),
    "name of an address": case(
        user("a=b+c@d.e-f"), "a=b+c@d.e-f|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None"
    ),
    "name with a path": case(
        user("in-path", path="/a/b/"), "in-path|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None"
    ),
}
EVERYBODY = [made for one in USERS.values() for made in one.users]
# by name: what a spreadsheet would take for a formula is sorted by the name itself, without the apostrophe
IN_ORDER = [
    *(
        "<root_account>",
        "'+plus",
        "'-minus",
        "'=1+1",
        "'@SUM(A1)",
        "a=b+c@d.e-f",
        "again",
        "all-kinds",
        "comma,name",
    ),
    *(
        "empty",
        "everything",
        "hardware",
        "in-path",
        "kinds",
        "login",
        "login-never",
        "mfa-only",
        "recreated",
    ),
    *(
        "same-second",
        "same-second",
        "security-key",
        "sms",
        "two-keys",
        "two-keys",
        "unused",
        "used",
        "virtual",
    ),
    *("virtual-path", "young", "young-machine", "young-mfa", "young-never"),
]


@pytest.fixture(scope="module")
def users(serve: Serve, run_program: Program) -> Result:
    """One account with all the users of the table."""
    result = run_program(serve(account(ONE, '=the "first", one', users=EVERYBODY)).env())
    assert result.exit_code == 0, result
    return result


@pytest.mark.parametrize("name", USERS)
def test_rows_of_a_user(users: Result, name: str) -> None:
    names = {made["name"] for made in USERS[name].users}
    rows = [row for row in users.table(ONE) if row[2].removeprefix("'") in names]
    assert rows == [[ONE, '\'=the "first", one', *row.split("|")] for row in USERS[name].rows]


def test_root_comes_first_then_users_by_name(users: Result) -> None:
    assert [row["username"] for row in users.rows(ONE)] == IN_ORDER


def test_the_same_state_gives_the_same_bytes(
    users: Result, serve: Serve, run_program: Program
) -> None:
    """Whatever the order and the form of dates in which AWS gives it."""
    backwards = [
        {**made, "keys": made["keys"][::-1], "mfa": made["mfa"][::-1]}
        for made in reversed(EVERYBODY)
    ]
    endpoint = serve(account(ONE, '=the "first", one', users=backwards), report_dates="+00:00")
    again = run_program(endpoint.env(), "--workers", "3")
    assert again.csv(ONE).read_bytes() == users.csv(ONE).read_bytes()


# --- root -------------------------------------------------------------------------------------------------------------


def retold(made: Json, tell: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> Json:
    """The account with a report whose rows `tell` has changed."""
    rows = list(
        csv.DictReader(io.StringIO(credential_report({**ACCOUNT_DEFAULTS, **made}, "aws", "Z")))
    )
    told = tell(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(told[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(told)
    return {**made, "report": text.getvalue()}


def shouted(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Booleans as the guide prints them."""
    return [
        {name: cell.upper() if cell in ("true", "false") else cell for name, cell in row.items()}
        for row in rows
    ]


def rearranged(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Columns in another order, and one that is new."""
    return [{"additional_credentials_info": "[]", **dict(reversed(row.items()))} for row in rows]


USED_ROOT_KEY = root_key(last_rotated=OLDER, last_used=USED, service="ec2")
USED_INACTIVE_ROOT_KEY = root_key(active=False, last_rotated=OLD, last_used=USED, service="iam")
ROOTS: dict[str, tuple[Json, list[str]]] = {
    "without credentials": ({"root": root()}, ["No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None"]),
    "with a password": (
        {"root": root(password=True, password_last_used="2021-02-03T04:05:06Z")},
        ["Configurada|2021-02-03T04:05:06+00:00|N/A|N/A|N/A|N/A|N/A|None"],
    ),
    "with a password never used": (
        {"root": root(password=True)},
        ["Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|None"],
    ),
    "of an older report": (
        {"root": root(password="not_supported", password_last_used="2021-02-03T04:05:06Z")},
        ["Configurada|2021-02-03T04:05:06+00:00|N/A|N/A|N/A|N/A|N/A|None"],
    ),
    "with virtual MFA": (
        {"root": root(password=True, virtual=True), "users": [user("v", mfa=[f"{ARN}mfa/v"])]},
        ["Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Virtual"],
    ),
    "with hardware MFA, where a user has a virtual one": (
        {
            "root": root(password=True, mfa=True),
            "users": [user("v", mfa=[f"{ARN}mfa/root-account-mfa-device"])],
        },
        ["Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Hardware"],
    ),
    "with a key never used": (
        {"root": root(password=True, keys=[root_key(last_rotated="2019-01-01T00:00:00Z")])},
        [
            "Configurada|Nunca|<root_access_key_1>|Active|2019-01-01T00:00:00+00:00|Nunca utilizada|N/A|None"
        ],
    ),
    "with two keys, the oldest first": (
        {"root": root(keys=[USED_INACTIVE_ROOT_KEY, USED_ROOT_KEY])},
        [
            f"No configurada|N/A|<root_access_key_2>|Active|{OLDER_CELL}|{USED_CELL}|ec2|None",
            f"No configurada|N/A|<root_access_key_1>|Inactive|{OLD_CELL}|{USED_CELL}|iam|None",
        ],
    ),
    "in a report that shouts": (
        {"root": root(password=True, virtual=True, keys=[USED_ROOT_KEY]), "tell": shouted},
        [f"Configurada|Nunca|<root_access_key_1>|Active|{OLDER_CELL}|{USED_CELL}|ec2|Virtual"],
    ),
    "in a report with other columns": (
        {"root": root(keys=[USED_ROOT_KEY]), "tell": rearranged},
        [f"No configurada|N/A|<root_access_key_1>|Active|{OLDER_CELL}|{USED_CELL}|ec2|None"],
    ),
    "missing from the report": ({"tell": lambda rows: rows[1:], "users": [user("only")]}, []),
}
ROOT_ACCOUNTS = {name: f"10000000{number:04d}" for number, name in enumerate(ROOTS, 1)}


@pytest.fixture(scope="module")
def roots(serve: Serve, run_program: Program) -> Result:
    """An account for each root of the table."""
    accounts = []
    for name, (options, _) in ROOTS.items():
        given = dict(options)
        tell = given.pop("tell", None)
        made = account(ROOT_ACCOUNTS[name], name, **given)
        accounts.append(retold(made, tell) if tell else made)
    result = run_program(serve(*accounts).env())
    assert result.exit_code == 0, result
    return result


@pytest.mark.parametrize("name", ROOTS)
def test_rows_of_root(roots: Result, name: str) -> None:
    account_id = ROOT_ACCOUNTS[name]
    rows = [row for row in roots.table(account_id) if row[2] == "<root_account>"]
    assert rows == [[account_id, name, "<root_account>", *row.split("|")] for row in ROOTS[name][1]]


def test_a_report_without_root_is_told(roots: Result) -> None:
    """Its other users are there; what is not known of root must not look like a root without credentials."""
    assert [row["username"] for row in roots.rows(ROOT_ACCOUNTS["missing from the report"])] == [
        "only"
    ]
    said = "Root is missing from the credential report of 1 account and is not covered there\n"
    assert said in roots.stdout


def test_quiet_says_where_root_is_missing_from_the_report(
    serve: Serve, run_program: Program
) -> None:
    without = []
    for one in (ONE, TWO):
        without.append(retold(account(one, "one", users=[user("ana")]), lambda rows: rows[1:]))
    result = run_program(serve(*without, account(THREE, "three")).env(), "--quiet")
    said = "Root is missing from the credential report of 2 accounts and is not covered there\n"
    assert (result.exit_code, result.stdout.partition("\n")[2]) == (0, said)


# --- a status that AWS adds -------------------------------------------------------------------------------------------


def test_a_key_of_a_status_that_aws_added_counts_as_active(
    serve: Serve, program: Program, tmp_path: Path
) -> None:
    """Also where a later run reads it back: it is neither damage nor a change."""
    strange = key("AKIA0000000000000NEW", status="Restricted", created="2020-01-01T00:00:00Z")
    endpoint = serve(account(ONE, "one", users=[user("ana", keys=[strange])]))
    reports = tmp_path / "reports"
    reports.mkdir()
    for _ in range(2):
        result = again(program, endpoint.env(), reports)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.accounts[ONE]["maturity"]["phase2"] == "In Progress"
        gaps = summary_of(result)["gaps"]["organization"]
        assert (gaps["active_keys"], gaps["inactive_keys"], gaps["expired_keys"]) == (1, 0, 0)
        assert gaps["active_keys_older_than_1_year"] == 1
        [row] = [row for row in result.rows(ONE) if row["username"] == "ana"]
        assert row["status"] == "Restricted"
        [_, finding] = lines(result.folder / "findings.csv")
        assert "|key-older-than-1-year|" in finding
        assert "; status Restricted|" in finding
    assert changes(result) == []


# --- which accounts ---------------------------------------------------------------------------------------------------

UNIT, NESTED, OTHER = "ou-test-aaaaaaaa", "ou-test-bbbbbbbb", "ou-test-cccccccc"


ORGANIZATION = [
    in_units(ONE, "one", UNIT),
    in_units(TWO, "two", UNIT, NESTED),
    in_units(THREE, "three", OTHER),
    in_units(FOUR, "four"),
    in_units(FIVE, "five", UNIT, state="SUSPENDED"),
]
SCOPES: dict[str, tuple[list[str], set[str], set[str]]] = {  # options, audited, skipped
    "all": ([], {ONE, TWO, THREE, FOUR}, {FIVE}),
    "--accounts": (["--accounts", f"{ONE},{FIVE}"], {ONE}, {FIVE}),
    "--exclude": (["--exclude", f"{ONE},{FIVE}"], {TWO, THREE, FOUR}, set()),
    "--ou": (["--ou", UNIT], {ONE, TWO}, {FIVE}),
    "--ou, two": (["--ou", f"{NESTED},{OTHER}"], {TWO, THREE}, set()),
    "--ou and --exclude": (["--ou", UNIT, "--exclude", TWO], {ONE}, {FIVE}),
    "--include-management": (["--include-management"], {ONE, TWO, THREE, FOUR, MANAGEMENT}, {FIVE}),
}


@pytest.mark.parametrize("name", SCOPES)
def test_exactly_the_accounts_in_scope_are_entered(
    serve: Serve, run_program: Program, name: str
) -> None:
    options, audited, skipped = SCOPES[name]
    endpoint = serve(*ORGANIZATION)
    result = run_program(endpoint.env(), *options)
    assert (result.exit_code, result.csvs) == (0, audited)
    assert {
        one for one, entry in result.accounts.items() if entry["result"] == "skipped"
    } == skipped
    assert set(result.accounts) == audited | skipped
    assert set(endpoint.stats()["assumed"]) == audited - {MANAGEMENT}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--accounts", f"{ONE},123456789012"], "123456789012"),
        (["--ou", f"{UNIT},ou-test-dddddddd"], "ou-test-dddddddd"),
        (["--accounts", MANAGEMENT], "--include-management"),
        (["--accounts", f"{ONE},{THREE}", "--ou", UNIT], THREE),
    ],
)
def test_what_is_not_there_is_refused_before_any_account(
    serve: Serve, run_program: Program, options: list[str], said: str
) -> None:
    endpoint = serve(*ORGANIZATION, page=2)
    result = run_program(endpoint.env(), *options)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stdout == ""
    assert endpoint.stats()["assumed"] == {}


def test_ou_is_refused_where_accounts_have_no_paths(
    serve: Serve, run_program: Program, program_versions: dict[str, str]
) -> None:
    result = run_program(serve(*ORGANIZATION, omit=["Paths"]).env(), "--ou", UNIT)
    assert result.exit_code == 1
    assert "Paths" in result.stderr
    assert program_versions["botocore"] in result.stderr


def test_accounts_that_are_not_active_are_listed_with_their_state(
    serve: Serve, run_program: Program
) -> None:
    states = {
        TWO: "PENDING_ACTIVATION",
        THREE: "SUSPENDED",
        FOUR: "PENDING_CLOSURE",
        FIVE: "CLOSED",
    }
    others = [account(one, f"not-{state}", state=state) for one, state in states.items()]
    endpoint = serve(account(ONE, "one"), *others)
    result = run_program(endpoint.env())
    assert (result.exit_code, result.csvs) == (0, {ONE})
    skipped = {one: entry for one, entry in result.accounts.items() if entry["result"] == "skipped"}
    assert {one: entry["state"] for one, entry in skipped.items()} == states
    for one, state in states.items():
        assert re.search(f"{one}.*not-{state}.*{state}", result.stdout)
    assert not set(states).intersection(endpoint.stats()["by_account"])


@pytest.mark.parametrize(
    "bad",
    ["../../etc/cron", "11111111111", "1111111111111", "1" * 11 + "\N{ARABIC-INDIC DIGIT ONE}"],
)
def test_what_is_no_account_id_stops_the_run(serve: Serve, run_program: Program, bad: str) -> None:
    """It would become the name of a file."""
    entry = {"Id": bad, "Name": "odd", "State": "ACTIVE"}
    listed = rule("ListAccounts", raw=json.dumps({"Accounts": [entry]}))
    result = run_program(serve(rules=[listed]).env())
    assert (result.exit_code, result.csvs) == (1, set())
    assert result.stderr == (
        f"iam_audit.py: ListAccounts gave {bad!r}, not an account ID of 12 digits.\n"
    )


def test_quiet_says_that_an_account_that_was_asked_for_is_not_active(
    serve: Serve, run_program: Program
) -> None:
    """Whoever names it expects it to be audited; of all others nothing is said."""
    endpoint = serve(*ORGANIZATION)
    result = run_program(endpoint.env(), "--quiet", "--accounts", f"{ONE},{FIVE}")
    assert result.exit_code == 0
    header, _, said = result.stdout.partition("\n")
    assert header.startswith("Organization ")
    assert said == f"Skipped (not ACTIVE): 1 account\n  {FIVE} five: SUSPENDED\n"
    assert run_program(endpoint.env(), "--quiet").stdout == ""


def test_status_is_read_where_there_is_no_state(serve: Serve, run_program: Program) -> None:
    endpoint = serve(account(ONE, "one"), account(TWO, "two", state="SUSPENDED"), omit=["State"])
    result = run_program(endpoint.env())
    assert (result.exit_code, result.csvs) == (0, {ONE})
    assert result.accounts[TWO]["state"] == "SUSPENDED"


def test_the_management_account_left_out_is_named(serve: Serve, run_program: Program) -> None:
    result = run_program(serve(account(ONE, "one")).env())
    assert MANAGEMENT in json.dumps(summary_of(result)["out_of_scope"])
    assert MANAGEMENT in result.stdout


def test_the_management_account_is_read_with_the_profiles_own_credentials(
    serve: Serve, run_program: Program
) -> None:
    boss = account(
        MANAGEMENT, "management", role="denied", users=[user("org-admin", password=True)]
    )
    endpoint = serve(boss, account(ONE, "one"))
    result = run_program(endpoint.env(), "--include-management", "--accounts", MANAGEMENT)
    assert (result.exit_code, result.csvs) == (0, {MANAGEMENT})
    assert [row["username"] for row in result.rows(MANAGEMENT)] == ["<root_account>", "org-admin"]
    assert endpoint.stats()["assumed"] == {}


def test_a_delegated_administrator_reads_all_accounts_through_the_role(
    serve: Serve, run_program: Program
) -> None:
    """The management account too, and its own."""
    boss = account(MANAGEMENT, "management", users=[user("org-admin")])
    endpoint = serve(boss, account(ONE, "one"), account(TWO, "security"), caller={"account": TWO})
    result = run_program(endpoint.env(), "--include-management")
    assert (result.exit_code, result.csvs) == (0, {MANAGEMENT, ONE, TWO})
    assert result.rows(MANAGEMENT)[1]["username"] == "org-admin"
    assert set(endpoint.stats()["assumed"]) == {MANAGEMENT, ONE, TWO}


def test_an_account_on_two_pages_is_audited_once(serve: Serve, run_program: Program) -> None:
    """One that joins while pages are read pushes another onto the next page."""
    listed = [{"Id": one, "Name": one, "State": "ACTIVE"} for one in (ONE, TWO)]
    again = rule("ListAccounts", fields={"NextToken": "2"}, raw=json.dumps({"Accounts": listed}))
    endpoint = serve(account(ONE, "one"), account(TWO, "two"), page=2, rules=[again])
    result = run_program(endpoint.env())
    assert (result.exit_code, result.csvs) == (0, {ONE, TWO})
    assert endpoint.stats()["requests"]["AssumeRole"] == 2


def test_an_empty_page_is_not_the_last_one(serve: Serve, run_program: Program) -> None:
    result = run_program(serve(*ORGANIZATION, page=2, empty_page=1).env())
    assert result.csvs == {ONE, TWO, THREE, FOUR}


# --- lists of several pages -------------------------------------------------------------------------------------------

LIST = "GetAccountAuthorizationDetails"  # of all users


def first_page(action: str, member: str, fields: Json) -> Json:
    """A rule: whoever asks with these fields gets this entry, and a marker that leads to all but the first."""
    members = {
        LIST: "UserDetailList",
        "ListAccessKeys": "AccessKeyMetadata",
        "ListMFADevices": "MFADevices",
        "ListVirtualMFADevices": "VirtualMFADevices",
    }[action]
    entries = f"<{members}><member>{member}</member></{members}>"
    rest = "<IsTruncated>true</IsTruncated><Marker>1</Marker>"
    raw = f"<{action}Response><{action}Result>{entries}{rest}</{action}Result></{action}Response>"
    return rule(action, fields=fields, raw=raw, times=1)


def test_every_list_is_read_to_its_end(serve: Serve, run_program: Program) -> None:
    """A thousand users a page."""
    date = "2024-01-31T12:00:00Z</"
    ana, bea = (
        user(
            name,
            password=True,
            mfa=[f"{ARN}mfa/{name}", "GAHT12345678"],
            keys=[key(f"AKIA000000000000{name}1"), key(f"AKIA000000000000{name}2")],
        )
        for name in ("ana", "bea")
    )
    of_bea = {"UserName": "bea"}
    user_name, arn = "<UserName>ana</UserName>", f"<Arn>{ARN}user/ana</Arn>"
    user_id = f"<UserId>{ana['user_id']}</UserId>"
    key_id, active = "<AccessKeyId>AKIA000000000000bea1</AccessKeyId>", "<Status>Active</Status>"
    endpoint = serve(
        account(ONE, "one", users=[ana, bea], root=root(password=True, virtual=True)),
        rules=[
            first_page(
                LIST,
                f"{user_name}{user_id}{arn}<CreateDate>{date}CreateDate>",
                {"MaxItems": "1000"},
            ),
            first_page("ListAccessKeys", f"{key_id}{active}<CreateDate>{date}CreateDate>", of_bea),
            first_page("ListMFADevices", f"<SerialNumber>{ARN}mfa/bea</SerialNumber>", of_bea),
            first_page(
                "ListVirtualMFADevices", f"<SerialNumber>x</SerialNumber><User>{arn}</User>", {}
            ),
        ],
    )
    result = run_program(endpoint.env())
    cells = [(row["username"], row["access_key_id"], row["mfa_status"]) for row in result.rows(ONE)]
    assert cells == [
        ("<root_account>", "N/A", "Virtual"),
        ("ana", "AKIA000000000000ana1", "Hardware+Virtual"),
        ("ana", "AKIA000000000000ana2", "Hardware+Virtual"),
        ("bea", "AKIA000000000000bea1", "Hardware+Virtual"),
        ("bea", "AKIA000000000000bea2", "Hardware+Virtual"),
    ]
    requests = {
        action: number
        for action, number in endpoint.stats()["by_account"][ONE].items()
        if "List" in action or action == LIST
    }
    assert requests == {
        LIST: 2,
        "ListServiceSpecificCredentials": 1,
        "ListAccessKeys": 3,
        "ListMFADevices": 3,
        "ListVirtualMFADevices": 2,
    }


def test_root_in_govcloud_is_no_console_user_and_its_keys_are_reported(
    serve: Serve, run_program: Program
) -> None:
    """There root can neither sign in to the console nor have MFA, whatever the report says."""
    boss = root(password="not_supported", keys=[root_key(last_rotated="2019-01-01T00:00:00Z")])
    endpoint = serve(account(ONE, "one", root=boss), partition="aws-us-gov")
    result = run_program(endpoint.env())
    assert result.exit_code == 0
    [row] = result.rows(ONE)
    assert (row["password_status"], row["access_key_id"]) == (
        "No configurada",
        "<root_access_key_1>",
    )
    entry = result.accounts[ONE]
    assert (entry["gaps"]["console_users"], entry["maturity"]["phase1"]) == (0, "Complete")
    findings = (result.folder / "findings.csv").read_text(encoding="utf-8")
    assert "root-access-key" in findings
    assert "console-without-mfa" not in findings


def test_an_event_of_another_account_is_no_witness(serve: Serve, run_program: Program) -> None:
    """All accounts share one client: nothing of another account may pass unnoticed."""
    now = datetime.now(timezone.utc)
    strange = event("CreateUser", now, user="ana", recipientAccountId=TWO)
    own = event("CreateUser", now, user="ana", recipientAccountId=TWO)
    accounts = [account(ONE, "one", events=[strange]), account(TWO, "two", events=[own])]
    result = run_program(serve(*accounts).env(), "--cloudtrail")
    assert result.summary is not None
    assert (result.exit_code, result.summary["cloudtrail"]["events"]) == (0, 1)
    unavailable = result.summary["cloudtrail"]["unavailable"]
    assert unavailable == {ONE: "LookupEvents: WrongAccount: an event is of another account"}

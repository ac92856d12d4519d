"""The whole program against moto's server, where an organization is made through AWS's own API: cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import NamedTuple

import pytest
from builders import Held, credentials_of, held_cells
from conftest import Program, Result
from organization import (
    DEFAULT_ROLE,
    HARDWARE,
    LONG_AGO,
    MANAGEMENT_ID,
    SECURITY_KEY,
    SMS,
    VIRTUAL,
    AccountSpec,
    CredentialSpec,
    KeySpec,
    MadeAccount,
    MadeOrganization,
    MadeUser,
    MotoServer,
    RootSpec,
    UserSpec,
    credential_id,
    fill,
    iam_client,
)

import iam_audit

pytestmark = pytest.mark.program


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


class Expected(NamedTuple):
    """An account, and its rows: cells from `username` on, separated by `|`; `{ana 1}` is the ID of ana's first key."""

    spec: AccountSpec
    rows: list[str]


NO_ROOT = "<root_account>|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None"
OLD, NEW, USED = at("2021-05-06T07:08:09"), at("2025-09-10T11:12:13"), at("2026-01-02T03:04:05")
OLD_CELL, NEW_CELL, USED_CELL = (
    "2021-05-06T07:08:09+00:00",
    "2025-09-10T11:12:13+00:00",
    "2026-01-02T03:04:05+00:00",
)

MEMBERS = [
    Expected(AccountSpec("empty", "100000000001"), [NO_ROOT]),
    Expected(
        AccountSpec(
            "consoles",
            "100000000002",
            users=(
                UserSpec("never", password=True),
                UserSpec("used", password=True, password_last_used=USED),
                UserSpec("none"),
            ),
        ),
        [
            NO_ROOT,
            "never|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|None",
            "none|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None",
            f"used|Configurada|{USED_CELL}|N/A|N/A|N/A|N/A|N/A|None",
        ],
    ),
    Expected(
        AccountSpec(
            "keys",
            "100000000003",
            users=(
                UserSpec("two", keys=(KeySpec(NEW), KeySpec(OLD, USED, "dynamodb"))),
                UserSpec("inactive", keys=(KeySpec(OLD, OLD, "ec2", "Inactive"),)),
            ),
        ),
        [
            NO_ROOT,
            f"inactive|No configurada|N/A|{{inactive 1}}|Inactive|{OLD_CELL}|{OLD_CELL}|ec2|None",
            f"two|No configurada|N/A|{{two 2}}|Active|{OLD_CELL}|{USED_CELL}|dynamodb|None",
            f"two|No configurada|N/A|{{two 1}}|Active|{NEW_CELL}|Nunca utilizada|N/A|None",
        ],
    ),
    Expected(
        AccountSpec(
            "mfa",
            "100000000004",
            users=(
                UserSpec("app", password=True, mfa=(VIRTUAL,)),
                UserSpec("app-in-path", password=True, mfa=(VIRTUAL,), path="/u2f/"),
                UserSpec("passkey", password=True, mfa=(SECURITY_KEY,)),
                UserSpec("phone", password=True, mfa=(SMS,)),
                UserSpec("token", password=True, mfa=(HARDWARE,)),
                UserSpec("all", password=True, mfa=(VIRTUAL, SMS, SECURITY_KEY, HARDWARE, VIRTUAL)),
                UserSpec("no-password", mfa=(VIRTUAL,)),
            ),
        ),
        [
            NO_ROOT,
            "all|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Hardware+SMS+Security key+Virtual",
            "app|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Virtual",
            "app-in-path|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Virtual",
            "no-password|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|Virtual",
            "passkey|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Security key",
            "phone|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|SMS",
            "token|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Hardware",
        ],
    ),
    Expected(
        AccountSpec(
            "=names, \"and\" 'formulas'",
            "100000000005",
            users=(
                UserSpec("=cmd"),
                UserSpec("+one"),
                UserSpec("-two"),
                UserSpec("@three"),
                UserSpec("a,b"),
                UserSpec("x=y@z"),
            ),
        ),
        [
            NO_ROOT,
            *(
                f"{name}|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None"
                for name in ("'+one", "'-two", "'=cmd", "'@three", "a,b", "x=y@z")
            ),
        ],
    ),
    Expected(
        AccountSpec(
            "root-virtual",
            "100000000006",
            root=RootSpec(password=True, password_last_used=USED, mfa=VIRTUAL),
        ),
        [f"<root_account>|Configurada|{USED_CELL}|N/A|N/A|N/A|N/A|N/A|Virtual"],
    ),
    Expected(
        AccountSpec(
            "root-hardware",
            "100000000007",
            root=RootSpec(password=True, mfa=HARDWARE),
            users=(UserSpec("v", mfa=(VIRTUAL,)),),
        ),
        [
            "<root_account>|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Hardware",
            "v|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|Virtual",
        ],
    ),
    Expected(
        AccountSpec(
            "root-keys",
            "100000000008",
            root=RootSpec(
                password=True, keys=(KeySpec(NEW), KeySpec(OLD, USED, "ec2", "Inactive"))
            ),
        ),
        [
            f"<root_account>|Configurada|Nunca|<root_access_key_2>|Inactive|{OLD_CELL}|{USED_CELL}|ec2|None",
            f"<root_account>|Configurada|Nunca|<root_access_key_1>|Active|{NEW_CELL}|Nunca utilizada|N/A|None",
        ],
    ),
    Expected(
        AccountSpec(
            "in-a-unit", "100000000009", ("Workloads",), (UserSpec("ana", keys=(KeySpec(OLD),)),)
        ),
        [NO_ROOT, f"ana|No configurada|N/A|{{ana 1}}|Active|{OLD_CELL}|Nunca utilizada|N/A|None"],
    ),
    Expected(
        AccountSpec(
            "three-deep",
            "100000000010",
            ("Workloads", "Prod", "PCI"),
            (
                UserSpec(
                    "bea",
                    OLD,
                    password=True,
                    password_last_used=NEW,
                    mfa=(HARDWARE, VIRTUAL),
                    keys=(KeySpec(OLD, NEW, "s3"), KeySpec(NEW, None)),
                    credentials=(
                        CredentialSpec(created=NEW, expires=USED, status="Expired"),
                        CredentialSpec("codecommit.amazonaws.com", OLD),
                        CredentialSpec(created=OLD),
                    ),
                    certificates=(NEW, OLD),
                    tags={"team": "payments"},
                    attached=("AdministratorAccess",),
                ),
                UserSpec("cai", groups=("IAMFullAccess",), credentials=(CredentialSpec(),)),
                UserSpec("dan", groups=("ReadOnlyAccess",), certificates=(OLD,)),
            ),
        ),
        [
            NO_ROOT,
            f"bea|Configurada|{NEW_CELL}|{{bea 1}}|Active|{OLD_CELL}|{NEW_CELL}|s3|Hardware+Virtual",
            f"bea|Configurada|{NEW_CELL}|{{bea 2}}|Active|{NEW_CELL}|Nunca utilizada|N/A|Hardware+Virtual",
            "cai|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None",
            "dan|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None",
        ],
    ),
    Expected(
        AccountSpec(
            "many", "100000000011", users=tuple(UserSpec(f"user-{n:03d}") for n in range(25))
        ),
        [
            NO_ROOT,
            *(f"user-{n:03d}|No configurada|N/A|N/A|N/A|N/A|N/A|N/A|None" for n in range(25)),
        ],
    ),
]
BOSS = AccountSpec(
    "management",
    MANAGEMENT_ID,
    users=(
        UserSpec(
            "org-admin", password=True, mfa=(VIRTUAL,), keys=(KeySpec(OLD, USED, "organizations"),)
        ),
    ),
    root=RootSpec(password=True, mfa=HARDWARE),
)
BOSS_ROWS = [
    "<root_account>|Configurada|Nunca|N/A|N/A|N/A|N/A|N/A|Hardware",
    f"org-admin|Configurada|Nunca|{{org-admin 1}}|Active|{OLD_CELL}|{USED_CELL}|organizations|Virtual",
]
IDS = {expected.spec.id for expected in MEMBERS}


NEW_ACTIONS = ("ListServiceSpecificCredentials", "GetAccountAuthorizationDetails")


@pytest.fixture(scope="module")
def server() -> Iterator[MotoServer]:
    with MotoServer() as started:
        yield started


@pytest.fixture(scope="module")
def organization(server: MotoServer) -> MadeOrganization:
    return fill(server, [expected.spec for expected in MEMBERS], BOSS)


@pytest.fixture(autouse=True)
def healthy(server: MotoServer, organization: MadeOrganization) -> None:
    """Every test finds the reports ready, and the server in order."""
    server.heal()
    server.prepare_reports([*organization.accounts, MANAGEMENT_ID])
    server.clear_counts()


def table(made: MadeAccount, rows: list[str]) -> list[list[str]]:
    """What the account's CSV must hold."""
    keys = {
        f"{name} {n}": key.id
        for name, user in made.users.items()
        for n, key in enumerate(user.keys, 1)
    }
    name = "'" + made.name if made.name.startswith("=") else made.name
    return [
        list(iam_audit.CSV_COLUMNS),
        *([made.id, name, *row.format_map(keys).split("|")] for row in rows),
    ]


@pytest.fixture(scope="module")
def audited(
    server: MotoServer, organization: MadeOrganization, run_program: Program
) -> tuple[Result, Mapping[tuple[str, str], int]]:
    """A run over the whole organization, and the requests that it took."""
    server.heal()  # this is made before `healthy` comes, and after any other test
    server.prepare_reports(organization.accounts)
    server.clear_counts()
    result = run_program(server.env(), role=DEFAULT_ROLE)
    return result, server.counts()


def test_twelve_accounts_give_eleven_csvs(
    audited: tuple[Result, Mapping[tuple[str, str], int]], organization: MadeOrganization
) -> None:
    result, _ = audited
    assert (result.exit_code, result.csvs) == (0, IDS), result.stderr
    assert len(result.csvs) == 11
    for expected in MEMBERS:
        made = organization.accounts[expected.spec.id]
        assert result.table(made.id) == table(made, expected.rows), made.name


def test_the_management_account_is_read_without_a_role(
    server: MotoServer, organization: MadeOrganization, run_program: Program
) -> None:
    result = run_program(server.env(), "--include-management", role=DEFAULT_ROLE)
    assert (result.exit_code, result.csvs) == (0, IDS | {MANAGEMENT_ID}), result.stderr
    assert result.table(MANAGEMENT_ID) == table(organization.management, BOSS_ROWS)
    assert (MANAGEMENT_ID, "AssumeRole") not in server.counts()


def test_ou_takes_the_accounts_below_it(
    server: MotoServer, organization: MadeOrganization, run_program: Program
) -> None:
    result = run_program(server.env(), "--ou", organization.ous["Workloads",], role=DEFAULT_ROLE)
    assert (result.exit_code, result.csvs) == (0, {"100000000009", "100000000010"})


def test_a_role_that_does_not_exist_fails_every_account(
    server: MotoServer, organization: MadeOrganization, run_program: Program
) -> None:
    result = run_program(server.env(), role="NoSuchRole")
    assert (result.exit_code, result.csvs) == (3, set())
    assert result.failures == dict.fromkeys(IDS, ("AssumeRole", "AccessDenied"))


def held_by(made: MadeAccount, user: MadeUser) -> Iterator[Held]:
    """What a user of moto's has."""
    spec, passwords = user.spec, "codecommit.amazonaws.com"
    if spec.password:
        yield Held("password", cell(spec.created), used=cell(spec.password_last_used))
    for key in user.keys:
        used = cell(key.spec.last_used)
        key_told = (cell(key.spec.created), key.id, key.spec.status, used)
        yield Held("access-key", *key_told, key.spec.service if used else "N/A")
    for number, one in enumerate(spec.credentials, 1):
        kind = "service-password" if one.service == passwords else "api-key"
        told = (cell(one.created), credential_id(made.id, user.name, number), one.status)
        expires = cell(one.expires) or "never"
        yield Held(kind, *told, service=one.service, expires=expires)
    for slot, moment in enumerate(spec.certificates, 1):
        told = (cell(moment), f"<signing_certificate_{slot}>", "Active")
        yield Held("signing-certificate", *told)


def cell(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%S+00:00}" if moment else ""


def held_by_root(boss: RootSpec) -> Iterator[Held]:
    if boss.password:
        yield Held("password", cell(LONG_AGO), used=cell(boss.password_last_used))
    for slot, key in enumerate(boss.keys, 1):
        used = cell(key.last_used)
        told = (cell(key.created), f"<root_access_key_{slot}>", key.status, used)
        yield Held("access-key", *told, key.service if used else "N/A")


def credential_truth(made: MadeAccount, now: datetime, *, denied: bool) -> Iterator[list[str]]:
    """What credentials.csv must hold of the account; `denied`: without the two lists that a role may lack."""
    email, ou = f"aws+{made.id}@example.com", "/".join(made.spec.ou)
    where = [made.id, guarded(made.name), email, ou, str("Prod" in ou).lower()]
    root = made.spec.root
    for cells in held_cells(held_by_root(root), now):
        yield [*where, "<root_account>", email, "true", *cells, root.mfa or "None"]
    for name, user in sorted(made.users.items()):
        powers = {"AdministratorAccess", "IAMFullAccess"} & {*user.spec.attached, *user.spec.groups}
        owner = [user.spec.tags.get("team", email), str(bool(powers)).lower()]
        if denied:
            owner = [email, "unknown"]
        held, lists = held_by(made, user), ("api-key", "service-password")
        held = (one for one in held if not denied or one.kind not in lists)
        mfa = "+".join(sorted(set(user.spec.mfa))) or "None"
        for cells in held_cells(held, now):
            yield [*where, guarded(name), *owner, *cells, mfa]


def guarded(name: str) -> str:
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name


@pytest.mark.parametrize("denied", [False, True], ids=["read", "denied"])
def test_credentials_csv_agrees_with_moto_cell_by_cell(
    server: MotoServer, organization: MadeOrganization, run_program: Program, *, denied: bool
) -> None:
    """All kinds, root, users with tags and groups; also where the role may call neither of the new actions."""
    for action in NEW_ACTIONS if denied else ():
        server.fail(action, "AccessDenied", 403)
    result = run_program(server.env(), role=DEFAULT_ROLE)
    assert (result.exit_code, result.csvs) == (0, IDS), result.stderr
    assert result.summary is not None
    now, expected = iam_audit.parse_time(result.summary["started"]), list[list[str]]()
    for _, made in sorted(organization.accounts.items()):
        expected += credential_truth(made, now, denied=denied)
    assert credentials_of(result) == expected


def requests(made: MadeAccount) -> dict[str, int]:
    """What DESIGN.md allows for an account whose report is ready."""
    users = [user.spec for user in made.users.values()]
    return {
        "AssumeRole": 1,
        "GenerateCredentialReport": 1,
        "GetCredentialReport": 1,
        "ListServiceSpecificCredentials": 1,
        "GetAccountAuthorizationDetails": 1,
        "ListAccessKeys": len(users),
        "GetAccessKeyLastUsed": sum(len(user.keys) for user in users),
        "ListMFADevices": sum(bool(user.password or user.mfa) for user in users),
        "ListVirtualMFADevices": int(made.spec.root.mfa is not None),
    }


def test_an_account_costs_the_requests_it_must_and_no_other(
    audited: tuple[Result, Mapping[tuple[str, str], int]], organization: MadeOrganization
) -> None:
    _, counted = audited
    for made in organization.accounts.values():
        of_account = {action: number for (one, action), number in counted.items() if one == made.id}
        assert of_account == {
            action: number for action, number in requests(made).items() if number
        }, made.name


def test_each_organizational_unit_is_asked_about_once(
    audited: tuple[Result, Mapping[tuple[str, str], int]], organization: MadeOrganization
) -> None:
    """Workloads, of two accounts, and the two units below it."""
    _, counted = audited
    assert counted[MANAGEMENT_ID, "DescribeOrganizationalUnit"] == len(organization.ous) == 3


def test_users_are_those_of_now_and_not_of_the_report(
    server: MotoServer, organization: MadeOrganization, run_program: Program
) -> None:
    """And one deleted: the list is live, the report is not."""
    account_id = "100000000009"
    iam = iam_client(server, account_id)
    iam.create_user(UserName="newcomer")
    iam.create_login_profile(UserName="newcomer", Password="correct horse battery staple")
    try:
        created = run_program(server.env(), "--accounts", account_id, role=DEFAULT_ROLE)
        server.prepare_reports([account_id])
    finally:
        iam.delete_login_profile(UserName="newcomer")
        iam.delete_user(UserName="newcomer")
    deleted = run_program(server.env(), "--accounts", account_id, role=DEFAULT_ROLE)
    assert created.table(account_id)[-1][2:5] == ["newcomer", "Configurada", "Nunca"]
    assert [row["username"] for row in deleted.rows(account_id)] == ["<root_account>", "ana"]


def test_a_report_that_is_not_there_yet_is_waited_for(
    server: MotoServer, organization: MadeOrganization, run_program: Program
) -> None:
    server.expire_reports()
    result = run_program(server.env(), "--accounts", "100000000009", role=DEFAULT_ROLE)
    assert (result.exit_code, len(result.rows("100000000009"))) == (0, 2)
    assert server.counts()["100000000009", "GenerateCredentialReport"] == 2


def test_throttling_is_waited_out_and_a_denied_call_fails_its_account(
    server: MotoServer, organization: MadeOrganization, run_program: Program
) -> None:
    server.fail("ListAccessKeys", "Throttling", account="100000000009", times=3)
    server.fail(
        "GetAccountAuthorizationDetails", "ServiceFailure", 500, account="100000000002", times=1
    )
    server.fail("GetAccessKeyLastUsed", "AccessDenied", 403, account="100000000003")
    result = run_program(server.env(), role=DEFAULT_ROLE)
    assert (result.exit_code, result.csvs) == (3, IDS - {"100000000003"})
    assert result.failures == {"100000000003": ("GetAccessKeyLastUsed", "AccessDenied")}

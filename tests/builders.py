"""What several test files build: accounts, users and keys as values, earlier runs, environments.

Two families have short names. Here `key` and `user` are values of the program, for tests that run nothing; those of
endpoint.py are JSON, for a run over HTTP. A file imports the family that it needs.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import endpoint as aws
import pytest
from conftest import Program, Result, check_what_always_holds
from endpoint import TIMEOUT, Endpoint, Json
from hypothesis import strategies as st

import iam_audit
from iam_audit import (
    ROOT,
    Account,
    AuditedAccount,
    Caller,
    Control,
    Credential,
    Enforcement,
    FailedAccount,
    Organization,
    Outcome,
    Plan,
    Policy,
    Run,
    SkippedAccount,
    Tracking,
    User,
)

ONE, TWO, THREE, FOUR, FIVE, SIX = (digit * 12 for digit in "123456")
MANAGEMENT = "999999999999"
ENFORCED, PARTIAL, ABSENT, NOT_CHECKED = "enforced", "partial", "absent", "not checked"


def numbered(number: int) -> str:
    """An account ID for each of many accounts."""
    return f"1000000{number:05d}"


def key_id(text: str) -> str:
    return f"AKIA{text:0>16}"


# --- moments ----------------------------------------------------------------------------------------------------------

NOW = datetime(2026, 11, 23, 20, 50, tzinfo=timezone.utc)  # the clock of tests that run nothing
FINISHED = NOW + timedelta(minutes=2)
DAY, SECOND = timedelta(days=1), timedelta(seconds=1)
TODAY = datetime.now(timezone.utc).replace(microsecond=0)  # the clock of whatever runs


def ago(days: float) -> datetime:
    return TODAY - timedelta(days=days)


# --- values -----------------------------------------------------------------------------------------------------------

CALLER = Caller(MANAGEMENT, f"arn:aws:iam::{MANAGEMENT}:user/auditor", "aws", "us-east-1")
ORGANIZATION = Organization("o-test123456", MANAGEMENT, "ALL")
SANDBOX = Account(ONE, "sandbox", "ACTIVE", f"o-test123456/r-ab12/ou-ab12-sandboxes/{ONE}/")
PAYMENTS = Account(TWO, "payments-prod", "ACTIVE", f"o-test123456/r-ab12/ou-ab12-workloads/{TWO}/")


@functools.cache
def plan(*arguments: str, caller: Caller = CALLER) -> Plan:
    """The plan that these arguments make, so that defaults are the program's own."""
    options = iam_audit.parse_arguments(["--role", "Audit", *arguments])
    return iam_audit.plan_of(options, caller, ORGANIZATION, Tracking(), NOW)


def key(
    old: timedelta,
    unused: timedelta | None = None,
    *,
    status: str = "Active",
    key_id: str = "AKIA0000000000000001",
) -> Credential:
    """A key created that long ago and last used that long ago (None: never)."""
    if unused is None:
        return Credential(key_id, status, NOW - old, None, "N/A")
    return Credential(key_id, status, NOW - old, NOW - unused, "s3")


def user(name: str, *keys: Credential, password: bool = False, mfa: Iterable[str] = ()) -> User:
    return User(name, password, None, tuple(mfa), keys)


def audited(*users: User, account: Account = SANDBOX) -> AuditedAccount:
    return AuditedAccount(account, NOW - timedelta(hours=1), users)


def failed(account_id: str = FOUR, name: str = "locked") -> FailedAccount:
    return FailedAccount(
        Account(account_id, name, "ACTIVE"), "AssumeRole", "AccessDenied", "not authorized"
    )


def run_of(outcomes: Iterable[Outcome], *arguments: str, caller: Caller = CALLER) -> Run:
    """What a run has found once these are its accounts' outcomes, where no policy prevents anything."""
    folder = Path("reports/20261123T205000Z")
    found = Run(
        NOW,
        folder,
        plan(*arguments, caller=caller),
        caller,
        ORGANIZATION,
        Tracking(),
        Enforcement(),
    )
    nowhere: Any = SimpleNamespace(add=lambda *_: None)  # these runs write no files
    found.credentials = nowhere
    for outcome in outcomes:
        iam_audit.keep(found, outcome)
    prevented = iam_audit.controls_of_account([], [])
    ids = [*(one.account.id for one in found.audited), *(one.account.id for one in found.failed)]
    found.controls = dict.fromkeys(ids, prevented)
    found.findings.sort(key=iam_audit.most_urgent_first)
    return found


ALLOW_ALL = json.dumps({"Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}})


def attached(content: str, *targets: str, name: str = "", partition: str = "aws") -> Policy:
    """A policy of the ID p-NAME, judged for the organization o-test123456."""
    judged = iam_audit.judge_policy(content, partition, "o-test123456")
    return Policy({f"p-{name}": name}, frozenset(targets), *judged)


def judgements(content: str, partition: str = "aws") -> Mapping[str, Control]:
    """What a policy does for each control beside FullAWSAccess, without the policy's name."""
    policies = [attached(content, "r-1", partition=partition), attached(ALLOW_ALL, "r-1")]
    found = iam_audit.controls_of_account(["r-1"], policies)
    return {name: dataclasses.replace(control, policies={}) for name, control in found.items()}


def judged(content: str, control: str, partition: str = "aws") -> Control:
    """What a policy does for a control."""
    return judgements(content, partition)[control]


def control_of(
    verdict: str, exemptions: Iterable[str] = (), conditions: Iterable[str] = ()
) -> Control:
    """What `judged` gives."""
    return Control(verdict, {}, tuple(exemptions), tuple(conditions))


def in_organization(*attached_: tuple[str, str]) -> Mapping[str, Control]:
    """The controls of the account 111122223333 at r-1/ou-1/ou-2, under these policies: target and content of each."""
    policies = []
    for number, (target, content) in enumerate(attached_):
        policies.append(attached(content, target, name=str(number)))
    path = ("o-test123456", "r-1", "ou-1", "ou-2", "111122223333", "")
    return iam_audit.controls_of_account(path, policies)


BOUNDARIES = [timedelta(days=days) for days in (0, 1, 30, 45, 90, 91, 365, 366, 2000)]
SPANS = st.builds(
    lambda span, seconds: max(span + seconds * SECOND, timedelta(0)),
    st.sampled_from(BOUNDARIES),
    st.integers(-1, 1),
)
NAMES = st.sampled_from(["web", "payments-prod", "Production EU", "nonprod", "data"])
USER_NAMES = st.sampled_from(["ann", "bob", "eve"])


@st.composite
def organizations(
    draw: st.DrawFn,
    names: st.SearchStrategy[str] = NAMES,
    user_names: st.SearchStrategy[str] = USER_NAMES,
) -> list[Outcome]:
    """Accounts of all outcomes; IDs of accounts and keys, and an account's user names, are unique as AWS's are."""
    numbers = itertools.count(1)

    def a_key() -> Credential:
        old = draw(SPANS)
        unused = draw(st.none() | SPANS)
        status = draw(st.sampled_from(["Active", "Active", "Inactive", "Expired"]))
        return key(old, unused, status=status, key_id=f"AKIA{next(numbers):016}")

    def a_user(name: str) -> User:
        mfa = draw(st.sampled_from([(), (), ("Virtual",), ("Security key", "Virtual")]))
        return user(
            name,
            *(a_key() for _ in range(draw(st.integers(0, 2)))),
            password=draw(st.booleans()),
            mfa=mfa,
        )

    outcomes: list[Outcome] = []
    for index in range(draw(st.integers(0, 4))):
        account = Account(f"{100_000_000_000 + index}", draw(names), "ACTIVE")
        kind = draw(st.sampled_from(["audited", "audited", "audited", "failed", "skipped"]))
        if kind == "failed":
            outcomes.append(FailedAccount(account, "ListUsers", "AccessDenied", draw(names)))
        elif kind == "skipped":
            outcomes.append(SkippedAccount(dataclasses.replace(account, state="SUSPENDED")))
        else:
            known = draw(st.lists(user_names, unique=True, max_size=3))
            roots = [ROOT] if draw(st.booleans()) else []
            outcomes.append(
                audited(*(a_user(name) for name in roots + known if name), account=account)
            )
    return outcomes


# --- accounts over HTTP -----------------------------------------------------------------------------------------------


def in_units(account_id: str, name: str, *units: str, **options: Any) -> Json:
    """An account below these organizational units, from the root down."""
    path = "/".join(["o-test123456", "r-test", *units, account_id, ""])
    return aws.account(account_id, name, paths=[path], **options)


# --- environments and processes ---------------------------------------------------------------------------------------


def reach(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """Let the program find the endpoint where it runs in this process."""
    for name, value in endpoint.env().items():
        monkeypatch.setenv(name, value)
    return endpoint


def profile_env(endpoint: Endpoint, folder: Path, config: str) -> dict[str, str]:
    """An environment in which profiles alone give credentials; the profile `base` has the caller's."""
    env = endpoint.env()
    base = [
        f"{name.lower()} = {env.pop(name)}"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    ]
    (folder / "credentials").write_text("\n".join(["[base]", *base, ""]), encoding="utf-8")
    (folder / "config").write_text(config, encoding="utf-8")
    files = {
        "AWS_CONFIG_FILE": str(folder / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
    }
    return {**env, **files, "HOME": str(folder)}


def with_constants(
    program: Program, folder: Path, **constants: float | tuple[float, ...]
) -> Program:
    """The program with other values of its constants: what would take minutes takes a moment."""
    lines = [
        "import os, sys",
        f"sys.path.insert(0, {str(Path(program.path).parent)!r})",
        f"import {Path(program.path).stem} as program",
        *(f"program.{name} = {value!r}" for name, value in constants.items()),
        "raise SystemExit(program.main())",
    ]
    (folder / "changed.py").write_text("\n".join(lines), encoding="utf-8")
    return Program(str(folder / "changed.py"), program.python, lambda: folder)


def until(condition: Callable[[], Any]) -> None:
    """Wait for what must happen."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


@contextlib.contextmanager
def released(endpoint: Endpoint, once: Callable[[], Any]) -> Iterator[None]:
    """Have the endpoint send the replies that it holds `once` that is so, which must be before the block ends."""
    ended = threading.Event()

    def release() -> bool:
        while not once():
            if ended.wait(0.02):
                return False
        endpoint.release()
        return True

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(release)
        try:
            yield
        finally:
            ended.set()
    assert done.result(), "it does not happen"


# --- what a run wrote -------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[str]:
    """A CSV as it is, its cells joined by `|`."""
    with path.open(encoding="utf-8", newline="") as file:
        return ["|".join(row) for row in csv.reader(file, strict=True)]


def credentials_of(result: Result) -> list[list[str]]:
    """The rows of credentials.csv."""
    header, *rows = (line.split("|") for line in lines(result.folder / "credentials.csv"))
    assert ",".join(header) == (
        "account_id,account_name,account_email,ou,production,username,owner,administrator,kind,credential_id,status,"
        "created_date,age_days,last_used_date,unused_days,service_name,expires,mfa_status"
    )
    return rows


class Held(NamedTuple):
    """A credential as the test knows it, which says the same as credentials.csv in other words."""

    kind: str
    created: str
    id: str = ""
    status: str = "Configurada"
    used: str | None = None
    service: str = ""
    expires: str = ""


def held_cells(held: Iterable[Held], now: datetime) -> Iterator[list[str]]:
    """One user's cells of credentials.csv, from `kind` to `expires`, in the file's order."""
    kinds = ["password", "access-key", "api-key", "service-password", "signing-certificate"]
    for one in sorted(held, key=lambda one: (kinds.index(one.kind), one.created, one.id)):
        never = {"password": "Nunca", "access-key": "Nunca utilizada"}.get(one.kind, "")
        created, used, expires = (
            text.replace("Z", "+00:00") for text in (one.created, one.used or never, one.expires)
        )
        since = datetime.fromisoformat(one.used.replace("Z", "+00:00") if one.used else created)
        age = str((now - datetime.fromisoformat(created)).days)
        unused = str((now - since).days) if never else ""
        yield [one.kind, one.id, one.status, created, age, used, unused, one.service, expires]


def changes(result: Result) -> list[str]:
    """changes.csv without its header and its last column, `since`."""
    header, *rows = lines(result.folder / "changes.csv")
    named = "account_id|account_name|username|access_key_id|change|before|after"
    assert header == f"{named}|witness|event_name|event_time|actor|source_ip|since"
    return [row.rpartition("|")[0] for row in rows]


def changes_of(result: Result, account_id: str) -> list[str]:
    """An account's lines of changes.csv, from the user name on."""
    return [row.split("|", 2)[2] for row in changes(result) if row.startswith(account_id)]


def written(folder: Path, account_id: str) -> bool:
    """Whether an account's CSV is anywhere below."""
    return any(folder.rglob(f"accounts/{account_id}.csv"))


def summary_of(result: Result) -> Json:
    assert result.summary is not None, result
    return result.summary


# --- earlier runs -----------------------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def write_run(reports: Path, outcomes: Iterable[Outcome]) -> Path:
    """Write the folder of a run that began at NOW: its accounts' CSVs and summary.json."""
    found = run_of(outcomes := list(outcomes))
    found.folder = reports / found.folder.name
    (found.folder / "accounts").mkdir(parents=True)
    for one in outcomes:
        assert isinstance(one, AuditedAccount)
        path = found.folder / "accounts" / f"{one.account.id}.csv"
        iam_audit.write_csv(path, iam_audit.CSV_COLUMNS, iam_audit.rows_of(one))
    summary = iam_audit.summary_document(found, FINISHED)
    iam_audit.write_file(found.folder / "summary.json", [json.dumps(summary)])
    return found.folder


def write_large_run(reports: Path) -> Path:
    """Write the folder of a run that began at NOW: 1,000 accounts, root and 50 users in each, up to two keys a user."""
    users = [user(ROOT)]
    for n in range(50):
        keys = [key(DAY, key_id=f"AKIA{n:010}{k}00000") for k in range(n % 3)]
        mfa = ["Virtual"] * (n % 4 // 2)
        users.append(user(f"person-number-{n:03}", *keys, password=n % 2 == 0, mfa=mfa))
    first = "100000000000"
    folder = write_run(reports, [audited(*users, account=Account(first, "some name", "ACTIVE"))])
    [entry] = json.loads((folder / "summary.json").read_text("utf-8"))["accounts"]
    text = (folder / "accounts" / f"{first}.csv").read_text("utf-8")
    ids = [str(int(first) + number) for number in range(1000)]
    for one in ids:
        (folder / "accounts" / f"{one}.csv").write_text(text.replace(first, one), "utf-8")
    edit_summary(folder, accounts=[{**entry, "id": one} for one in ids])
    return folder


def cost_of_comparison(python: str, program: Path, reports: Path) -> Json:
    """What comparison.py prints of the run that write_large_run has written."""
    command = [python, str(Path(__file__).with_name("comparison.py")), str(reports)]
    env = {**os.environ, "PYTHONPATH": str(program.parent)}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=env, cwd=reports, timeout=TIMEOUT
    )
    cost: Json = json.loads(done.stdout)
    return cost


def edit_summary(folder: Path, **changed: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changed}), "utf-8")


def backdate(folder: Path, started: datetime) -> None:
    """Make a run that old; what it found stays."""
    edit_summary(folder, started=started.isoformat())


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Damage to that file of a run's folder."""

    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def in_its_place(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else where that file was."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new, 1)

    return change


def spoiled(base: Path, reports: Path, damage: Damage) -> Path:
    """A damaged copy of the run."""
    folder = reports / base.name
    shutil.copytree(base, folder)
    damage(folder)
    return folder


def again(program: Program, env: Mapping[str, str], reports: Path, *options: str) -> Result:
    """Run into a folder that holds earlier runs. The result shows the new run alone."""
    known = set(reports.iterdir())
    with program.start(env, *options, output_dir=reports) as (process, _):
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    view = reports.with_name(f"{reports.name}-{len(list(reports.parent.iterdir()))}")
    view.mkdir()
    for folder in set(reports.iterdir()) - known - {reports / "latest"}:
        shutil.copytree(folder, view / folder.name)
    result = Result(process.returncode, stdout, stderr, view)
    check_what_always_holds(result, env, verbose=False)
    return result


def without_root(made: Json) -> Json:
    """The account, with a credential report that lacks root."""
    header, _, *rows = aws.credential_report({**aws.ACCOUNT_DEFAULTS, **made}, "aws", "Z").split(
        "\n"
    )
    return {**made, "report": "\n".join([header, *rows])}

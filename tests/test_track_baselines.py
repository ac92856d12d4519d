"""Each account's own baseline, over HTTP: nights in one folder, whatever happened in the runs between."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import (
    CALLER,
    DAY,
    FIVE,
    FOUR,
    NOW,
    ONE,
    ORGANIZATION,
    THREE,
    TWO,
    Damage,
    again,
    ago,
    audited,
    backdate,
    changes,
    edit_summary,
    in_its_place,
    in_units,
    key_id,
    lines,
    released,
    replaced,
    rewritten,
    summary_of,
    without_root,
    write_run,
    written,
)
from builders import user as user_value
from conftest import Program, Result, Serve
from endpoint import Json, account, credential, event, key, root, root_key, rule, user

import iam_audit
from iam_audit import Account, Scope, Tracking

pytestmark = pytest.mark.program

QUIET = ("--quiet", "--fail-on", "new-keys")
NEW_KEYS = "New keys since the last audit of their account"
# Created before each run here began, so that its date alone tells nothing.
OLD_KEY, NEW_KEY = key(key_id("OLD"), created=ago(100)), key(key_id("NEW"), created=ago(90))
CSV, SUMMARY = f"accounts/{ONE}.csv", "summary.json"


def machine(account_id: str, *keys: Json, **options: Any) -> Json:
    """An account whose only user has these keys."""
    return account(account_id, f"team-{account_id[0]}", users=[user("svc", keys=keys)], **options)


def new_keys(result: Result) -> list[str]:
    return [one["access_key_id"] for one in summary_of(result)["changes"]["new_access_keys"]]


def baselines(result: Result) -> dict[str, str | None]:
    """When the run began that each audited account is compared with."""
    found = result.accounts.items()
    return {one: entry["since"] for one, entry in found if entry["result"] == "audited"}


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    folder = tmp_path / "reports"
    folder.mkdir(mode=0o700)
    return folder


class Nights:
    """Runs into one folder, night after night."""

    def __init__(self, serve: Serve, program: Program, reports: Path) -> None:
        self.serve, self.program, self.reports = serve, program, reports

    def run(self, accounts: list[Json], *options: str, days: float = 0, **world: Any) -> Result:
        """A run over these accounts, which then is made to have begun so many days ago."""
        env = self.serve(*accounts, **world).env()
        result = again(self.program, env, self.reports, *options)
        if days:
            folder = self.reports / result.folder.name
            backdate(folder, ago(days))
            folder.rename(self.reports / f"{ago(days):%Y%m%dT%H%M%SZ}")
        return result

    def folder(self, days: float) -> Path:
        return self.reports / f"{ago(days):%Y%m%dT%H%M%SZ}"


@pytest.fixture
def nights(serve: Serve, program: Program, reports: Path) -> Nights:
    return Nights(serve, program, reports)


# --- whatever happened in between -------------------------------------------------------------------------------------


def test_a_key_created_while_the_role_was_denied_is_found(nights: Nights) -> None:
    """Sunday all is well; a key is created; on Monday the role is denied; on Tuesday the account is audited again."""
    sunday = nights.run([machine(ONE, OLD_KEY), machine(TWO)], *QUIET, days=2)
    assert (sunday.exit_code, sunday.stdout) == (0, "")
    monday = nights.run(
        [machine(ONE, OLD_KEY, NEW_KEY, role="denied"), machine(TWO)], *QUIET, days=1
    )
    assert monday.exit_code == 3
    tuesday = nights.run([machine(ONE, OLD_KEY, NEW_KEY), machine(TWO)], *QUIET)
    assert tuesday.exit_code == 4
    started, folder = summary_of(tuesday)["started"], nights.reports / tuesday.folder.name
    assert tuesday.stdout.splitlines() == [
        f"Organization o-test123456, {started}: {folder}",
        NEW_KEYS,
        f"  {ONE} team-1 svc {key_id('NEW')}",
    ]
    [row] = lines(tuesday.folder / "changes.csv")[1:]
    assert row == (
        f"{ONE}|team-1|svc|{key_id('NEW')}|access-key-created||Active||||||{ago(2).isoformat()}"
    )
    assert baselines(tuesday) == {ONE: ago(2).isoformat(), TWO: ago(1).isoformat()}
    found = summary_of(tuesday)["changes"]
    assert (found["accounts_compared"], found["accounts_not_compared"]) == (2, 0)
    assert found["new_access_keys"][0]["since"] == ago(2).isoformat()
    wednesday = nights.run([machine(ONE, OLD_KEY, NEW_KEY), machine(TWO)], *QUIET)
    assert (wednesday.exit_code, wednesday.stdout) == (0, "")


IN_BETWEEN: dict[str, tuple[list[str], Json]] = {
    "--accounts": (["--accounts", TWO], {}),
    "--exclude": (["--exclude", ONE], {}),
    "--ou": (["--ou", "ou-ab12-other111"], {}),
    "a run that audited nothing": ([], {"rules": [rule("AssumeRole", error="AccessDenied")]}),
}


@pytest.mark.parametrize("name", IN_BETWEEN)
def test_a_run_in_between_hides_nothing(nights: Nights, name: str) -> None:
    def accounts(*keys: Json) -> list[Json]:
        users = [user("svc", keys=keys)]
        return [
            in_units(ONE, "one", "ou-ab12-first111", users=users),
            in_units(TWO, "two", "ou-ab12-other111", users=[user("ana", password=True)]),
        ]

    options, world = IN_BETWEEN[name]
    nights.run(accounts(OLD_KEY), days=2)
    between = nights.run(accounts(OLD_KEY, NEW_KEY), *options, days=1, **world)
    assert ONE not in between.csvs
    result = nights.run(accounts(OLD_KEY, NEW_KEY), *QUIET)
    assert (result.exit_code, new_keys(result)) == (4, [key_id("NEW")])
    assert baselines(result)[ONE] == ago(2).isoformat()
    assert baselines(result)[TWO] == (ago(1) if TWO in between.csvs else ago(2)).isoformat()


def test_an_account_that_left_and_came_back_has_its_baseline(nights: Nights) -> None:
    nights.run([machine(ONE, OLD_KEY), machine(TWO)], days=3)
    nights.run([machine(TWO)], days=2)
    nights.run([machine(TWO)], days=1)
    result = nights.run([machine(ONE, OLD_KEY, NEW_KEY), machine(TWO)], *QUIET)
    assert (result.exit_code, new_keys(result)) == (4, [key_id("NEW")])
    assert f"{ONE}|team-1|||account-joined||||||||{ago(1).isoformat()}" in lines(
        result.folder / "changes.csv"
    )


def test_dates_tell_the_new_keys_of_an_account_that_was_never_audited(nights: Nights) -> None:
    """Those since it first failed while in scope; in one that joined, those since the newest run."""

    def keys(digit: str) -> list[Json]:
        return [key(key_id(f"{digit}K{days}"), created=ago(days)) for days in (2, 4, 6, 8)]

    def accounts(**options: Any) -> list[Json]:
        first = [machine(ONE, **options), machine(FOUR, *keys("4"))]
        return [*first, machine(TWO)]

    excluded = ["--exclude", FOUR]
    nights.run(accounts(), *excluded, "--accounts", TWO, days=9)
    nights.run(accounts(role="denied"), *excluded, days=7)
    nights.run(accounts(), *excluded, "--accounts", TWO, days=5)
    nights.run(accounts(role="denied"), *excluded, days=3)
    joined = machine(THREE, *keys("3"))
    now = [machine(ONE, *keys("1")), machine(TWO), joined, machine(FOUR, *keys("4"))]
    result = nights.run(now, *QUIET)
    assert result.exit_code == 4
    expected = [key_id(name) for name in ("1K2", "1K4", "1K6", "3K2", "4K2")]
    assert new_keys(result) == expected
    for name in expected:
        assert f"{name} (account not compared)" in result.stdout
    assert baselines(result) == {ONE: None, TWO: ago(3).isoformat(), THREE: None, FOUR: None}
    assert summary_of(result)["changes"]["accounts_not_compared"] == 2  # THREE has joined


def test_previous_names_one_run_for_all_accounts(nights: Nights) -> None:
    nights.run([machine(ONE), machine(TWO)], days=3)
    nights.run([machine(ONE, OLD_KEY), machine(TWO, OLD_KEY)], "--accounts", ONE, days=2)
    nights.run([machine(ONE, OLD_KEY), machine(TWO, OLD_KEY)], days=1)
    now = [machine(ONE, OLD_KEY, NEW_KEY), machine(TWO, OLD_KEY, NEW_KEY)]
    result = nights.run(now, "--previous", str(nights.folder(2)))
    assert baselines(result) == {ONE: ago(2).isoformat(), TWO: None}
    assert new_keys(result) == [key_id("NEW")]
    result = nights.run(now, "--previous", str(nights.folder(3)))
    assert baselines(result) == {ONE: ago(3).isoformat(), TWO: ago(3).isoformat()}
    assert len(new_keys(result)) == 4


def test_cloudtrail_is_asked_from_each_accounts_own_baseline_on(nights: Nights) -> None:
    def events() -> list[Json]:
        return [event("CreateUser", ago(day), user=f"user-{day}") for day in (95, 25, 15, 5)]

    def accounts(*denied: str) -> list[Json]:
        denial = {one: {"role": "denied"} for one in denied}
        return [
            machine(one, events=events(), **denial.get(one, {})) for one in (ONE, TWO, THREE, FOUR)
        ]

    nights.run(accounts(TWO, THREE, FOUR)[:1], days=100)  # ONE alone
    nights.run(accounts(ONE, THREE)[:3], days=20)
    nights.run(accounts(ONE, TWO)[:3], days=10)
    result = nights.run(accounts(), "--cloudtrail")
    seen = Counter(tuple(row.split("|")[:5:4]) for row in lines(result.folder / "events.csv")[1:])
    assert sorted(seen) == [
        (ONE, "user-15"),
        (ONE, "user-25"),
        (ONE, "user-5"),
        (TWO, "user-15"),
        (TWO, "user-5"),
        (THREE, "user-5"),
        (FOUR, "user-5"),
    ]
    trail = summary_of(result)["cloudtrail"]
    assert trail["out_of_reach"] is True  # the baseline of ONE is of 100 days ago
    started = datetime.fromisoformat(summary_of(result)["started"])
    asked = started - datetime.fromisoformat(trail["since"])
    assert 0 <= asked.total_seconds() - 90 * 86400 < 2
    assert "CloudTrail keeps events for 90 days" in result.stdout


def test_levels_and_mfa_follow_from_the_baselines(nights: Nights) -> None:
    """The newest run knows of TWO alone."""
    bad, good = user("ana", password=True), user("ana")
    one = account(ONE, "one", users=[bad])
    nights.run([one, account(TWO, "two")], days=2)
    nights.run([one, account(TWO, "two")], "--accounts", TWO, days=1)
    found = summary_of(nights.run([account(ONE, "one", users=[good]), account(TWO, "two")]))
    phase1 = {"then": "In Progress", "now": "Complete", "compared_now": "Complete"}
    assert found["changes"]["maturity"]["phase1"] == phase1
    assert found["changes"]["console_users_without_mfa"] == {"fixed": 1, "new": 0}


def test_a_key_that_moved_with_its_user_is_not_new(nights: Nights) -> None:
    """The user is renamed, and another one is created under the old name."""
    ana = user("ana", keys=[OLD_KEY], user_id="AIDA1")
    nights.run([account(ONE, "one", users=[ana])], days=1)
    users = [user("ana", user_id="AIDA2"), user("ana.old", keys=[OLD_KEY], user_id="AIDA1")]
    result = nights.run([account(ONE, "one", users=users)], *QUIET)
    assert (result.exit_code, result.stdout) == (0, "")
    assert [row.split("|")[2:5] for row in changes(result)] == [
        ["ana", "", "user-created"],
        ["ana.old", "", "user-renamed"],
    ]


def test_a_key_of_root_is_new_though_the_last_report_lacked_roots_row(nights: Nights) -> None:
    nights.run([account(ONE, "one", root=root())], days=2)
    nights.run([without_root(account(ONE, "one"))], days=1)
    fresh = root_key(active=False, last_rotated=ago(0.5))
    result = nights.run([account(ONE, "one", root=root(keys=[fresh]))], "--fail-on", "new-keys")
    assert (result.exit_code, new_keys(result)) == (4, ["<root_access_key_1>"])


def test_a_key_that_came_and_went_while_an_account_failed_is_new(nights: Nights) -> None:
    nights.run([account(ONE, "one", role="denied")], days=2)
    made = {"user": "ana", "key": key_id("GONE")}
    events = [event("CreateAccessKey", ago(1.5), **made), event("DeleteAccessKey", ago(1), **made)]
    world = [account(ONE, "one", users=[user("ana")], events=events)]
    result = nights.run(world, "--cloudtrail", "--fail-on", "new-keys")
    assert (result.exit_code, new_keys(result)) == (4, [key_id("GONE")])


def test_quiet_says_where_cloudtrail_could_not_be_asked(nights: Nights) -> None:
    """Keys that came and went are not seen there."""
    nights.run([account(ONE, "one")], days=1)
    denied = rule("LookupEvents", ONE, error="AccessDeniedException", status=400)
    result = nights.run([account(ONE, "one")], *QUIET, "--cloudtrail", rules=[denied])
    assert "CloudTrail could not be asked in 1 account" in result.stdout
    assert nights.run([account(ONE, "one")], *QUIET, "--cloudtrail").stdout == ""


# --- API keys, and who became an administrator ------------------------------------------------------------------------


OLD_API_KEY, NEW_API_KEY = (
    credential(name, created=ago(days)) for name, days in (("ACCAOLD", 100), ("ACCANEW", 90))
)
OF_SERVICE = "ServiceSpecificCredential"
ADMINISTRATOR: Json = {"attached": ["arn:aws:iam::aws:policy/AdministratorAccess"]}


def holder(*credentials: Json, name: str = "bot", **options: Any) -> list[Json]:
    """An account whose only user has these API keys; `options` are the user's."""
    return [account(ONE, "one", users=[user(name, credentials=credentials, **options)])]


def api_key_event(what: str, name: str, days: float, status: str = "") -> Json:
    """What somebody did to an API key of user bot, as CloudTrail tells it."""
    told: Json = {"userName": "bot"}
    parameters = {"serviceSpecificCredentialId": name, "status": status}
    response = None
    if what == "Create":
        made = {"serviceSpecificCredentialId": name, "serviceName": "bedrock.amazonaws.com"}
        told, response, parameters = {**told, **made}, {"serviceSpecificCredential": made}, {}
    return event(
        f"{what}{OF_SERVICE}",
        ago(days),
        user="bot",
        key=name,
        requestParameters={**told, **parameters},
        responseElements=response,
    )


def test_api_keys_are_tracked_as_access_keys_are(nights: Nights) -> None:
    """Created, deleted, deactivated; and one that came and went, which only CloudTrail shows."""
    off = credential("ACCAOFF", created=ago(99), status="Inactive")
    nights.run(holder(OLD_API_KEY, {**off, "status": "Active"}), days=3)
    happened = [
        api_key_event("Create", "ACCANEW", 2.5),
        api_key_event("Delete", "ACCAOLD", 2.4),
        api_key_event("Update", "ACCAOFF", 2.3, "Inactive"),
        api_key_event("Create", "ACCAWENT", 2.2),
        api_key_event("Delete", "ACCAWENT", 2.1),
    ]
    now = [{**holder(NEW_API_KEY, off)[0], "events": happened}]
    result = nights.run(now, *QUIET, "--cloudtrail", days=2)
    assert result.exit_code == 4
    by_alice = "by assumed-role/Admin/alice"
    assert result.stdout.splitlines()[2:] == [
        f"  {ONE} one bot ACCANEW (API key) {by_alice}",
        f"  {ONE} one bot ACCAWENT (API key) deleted again {by_alice}",
    ]
    assert [row.split("|")[3:9] for row in changes(result)] == [
        ["ACCANEW", "api-key-created", "", "Active", "confirmed", f"Create{OF_SERVICE}"],
        [
            "ACCAOFF",
            "api-key-deactivated",
            "Active",
            "Inactive",
            "confirmed",
            f"Update{OF_SERVICE}",
        ],
        ["ACCAOLD", "api-key-deleted", "Active", "", "confirmed", f"Delete{OF_SERVICE}"],
        ["ACCAWENT", "api-key-came-and-went", "", "", "confirmed", f"Delete{OF_SERVICE}"],
    ]
    assert nights.run(now, *QUIET, "--cloudtrail").exit_code == 0


@pytest.mark.parametrize("why", ["denied", "an older version"])
def test_what_was_not_read_before_is_no_flood_of_new_keys(nights: Nights, why: str) -> None:
    """Only the dates of API keys tell which are new. From the next night on all is compared."""
    young = credential("ACCAYOUNG", created=ago(1))
    before = holder(OLD_API_KEY, keys=[OLD_KEY])
    promoted: Json = {"keys": [OLD_KEY], **ADMINISTRATOR}
    denied: Json = {"deny": ["ListServiceSpecificCredentials"]} if why == "denied" else {}
    nights.run([{**before[0], **denied}], days=3)
    if why != "denied":
        (nights.folder(3) / "credentials.csv").unlink()
    first = nights.run(holder(OLD_API_KEY, NEW_API_KEY, young, **promoted), *QUIET, days=0.5)
    assert (first.exit_code, new_keys(first)) == (4, ["ACCAYOUNG"])
    expected = [["ACCAYOUNG", "api-key-created"]]
    if why == "denied":  # who was an administrator was known
        expected = [["", "administrator-added"], *expected]
    assert [row.split("|")[3:5] for row in changes(first)] == expected
    second = nights.run(holder(OLD_API_KEY, young, **promoted), *QUIET)
    assert (second.exit_code, second.stdout) == (0, "")
    assert [row.split("|")[3:5] for row in changes(second)] == [["ACCANEW", "api-key-deleted"]]


def test_an_api_key_created_before_a_night_that_read_none_is_new(nights: Nights) -> None:
    """It was created after the last run that read API keys; the run that is the baseline missed it."""
    missed = credential("ACCAMISSED", created=ago(3.5))
    denied: Json = {"deny": ["ListServiceSpecificCredentials"]}
    nights.run(holder(OLD_API_KEY, keys=[OLD_KEY]), days=4)
    for days in (3, 2):
        night = holder(OLD_API_KEY, missed, keys=[OLD_KEY])[0]
        assert nights.run([{**night, **denied}], *QUIET, days=days).exit_code == 0
    now = holder(OLD_API_KEY, NEW_API_KEY, missed, keys=[OLD_KEY])
    third = nights.run(now, *QUIET, days=1)
    assert (third.exit_code, new_keys(third)) == (4, ["ACCAMISSED"])
    assert [row.split("|")[3:5] for row in changes(third)] == [["ACCAMISSED", "api-key-created"]]
    [row] = summary_of(third)["changes"]["new_access_keys"]
    assert row["since"] == ago(4).isoformat()
    assert nights.run(now, *QUIET).exit_code == 0


def test_without_a_run_of_that_age_nothing_is_compared(nights: Nights) -> None:
    nights.run(holder(keys=[OLD_KEY]), days=3)
    monthly = nights.run(holder(keys=[OLD_KEY]), "--previous", "30d")
    assert (
        "No earlier run is as old as --previous requires: nothing was compared.\n" in monthly.stdout
    )
    assert "this run is the baseline" not in monthly.stdout


def test_an_administrator_since_some_days_ago(nights: Nights) -> None:
    """With --previous 30d, although the runs of the nights between know it."""
    plain: Json = {"keys": [OLD_KEY]}
    nights.run(holder(OLD_API_KEY, **plain), days=40)
    nights.run(holder(OLD_API_KEY, **plain), days=31)
    nights.run(holder(OLD_API_KEY, NEW_API_KEY, **plain, **ADMINISTRATOR), days=1)
    now = holder(OLD_API_KEY, NEW_API_KEY, **plain, **ADMINISTRATOR)
    monthly = nights.run(now, "--previous", "30d", "--fail-on", "new-keys")
    assert (monthly.exit_code, new_keys(monthly)) == (4, ["ACCANEW"])
    assert baselines(monthly) == {ONE: ago(31).isoformat()}
    assert [row.split("|")[2:7] for row in changes(monthly)] == [
        ["bot", "", "administrator-added", "false", "true"],
        ["bot", "ACCANEW", "api-key-created", "", "Active"],
    ]
    nightly = nights.run(now, *QUIET)
    assert (nightly.exit_code, changes(nightly)) == (0, [])


# --- scopes, formats, and how far back --------------------------------------------------------------------------------


def test_the_table_shows_the_runs_of_the_same_scope(nights: Nights) -> None:
    world = [machine(ONE, OLD_KEY), machine(TWO), machine(THREE)]
    limited = ["--accounts", f"{TWO},{ONE}", "--exclude", THREE, "--include-management"]
    nights.run(world, days=4)
    nights.run(world, "--accounts", ONE, days=3)
    nights.run(world, *limited, days=2)
    whole = summary_of(nights.run(world, days=1))
    assert whole["format"] == 2
    assert whole["scope"] == {
        "accounts": [],
        "exclude": [],
        "ous": [],
        "include_management": False,
    }
    started = [one["started"] for one in whole["runs"]]
    assert started == [ago(4).isoformat(), whole["started"]]
    partial = summary_of(nights.run(world, *limited))
    assert partial["scope"] == {
        "accounts": [ONE, TWO],
        "exclude": [THREE],
        "ous": [],
        "include_management": True,
    }
    assert [one["started"] for one in partial["runs"]] == [ago(2).isoformat(), partial["started"]]


def with_format_1(nights: Nights, days: float) -> Path:
    """A run that version 1.0.0 made, before there were baselines and scopes."""
    folder = nights.folder(days)
    shutil.copytree(Path(__file__).parent / "run_of_format_1", folder)
    backdate(folder, ago(days))
    edit_summary(folder, runs=[])
    where = f"{ONE},one-prod,true,ana"
    rows = [
        ",".join(iam_audit.FINDINGS_COLUMNS[:12]),
        f"1,console-without-mfa,{where},N/A,,Nunca,N/A,console user without MFA; production,",
        f"2,key-older-than-1-year,{where},AKIA00000000000000A1,1000,Nunca utilizada,N/A,old,",
        f"7,inactive-key,{where},AKIA00000000000000A2,1000,Nunca utilizada,N/A,inactive,",
    ]
    (folder / "findings.csv").write_text("\n".join([*rows, ""]), "utf-8")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return folder


def test_runs_of_format_1_are_still_read(nights: Nights) -> None:
    with_format_1(nights, 5)
    users = [
        user("ana", password=True, keys=[key("AKIA00000000000000A1"), NEW_KEY]),
        user("bob", password=True),
    ]
    result = nights.run([account(ONE, "one-prod", users=users), account(TWO, "two")], *QUIET)
    assert result.exit_code == 4
    found = [row.split("|")[2:5] for row in changes(result)]
    assert found == [
        ["ana", "AKIA00000000000000A2", "access-key-deleted"],
        ["ana", key_id("NEW"), "access-key-created"],
        ["bob", "", "mfa-removed"],
    ]
    assert [one["started"] for one in summary_of(result)["runs"]][:-1] == [ago(5).isoformat()]
    # That ana has no MFA in a production account stood before.
    assert result.stdout.splitlines()[1:4] == [
        "New findings of priority 1",
        f"  1  console-without-mfa      {ONE} one-prod             bob",
        "     console user without MFA; production; not used for 90 days",
    ]
    assert result.stdout.splitlines()[-1] == "and 1 finding of priority 1, unchanged"


def test_a_partial_run_of_format_1_is_not_in_the_table_of_the_whole(nights: Nights) -> None:
    folder = with_format_1(nights, 5)
    manager = {"id": "999999999999", "name": "m"}
    edit_summary(folder, out_of_scope=[manager, {"id": THREE, "name": "three"}])
    result = nights.run([account(ONE, "one"), account(TWO, "two"), account(THREE, "three")])
    assert len(summary_of(result)["runs"]) == 1
    assert baselines(result)[ONE] == ago(5).isoformat()


def test_looking_back_ends_after_400_days(nights: Nights) -> None:
    nights.run([machine(ONE, OLD_KEY)], days=401)
    result = nights.run([machine(ONE, OLD_KEY, NEW_KEY)], "--fail-on", "new-keys")
    assert (result.exit_code, summary_of(result)["changes"]) == (0, None)
    shutil.rmtree(nights.reports / result.folder.name)
    nights.folder(401).rename(nights.folder(399))
    result = nights.run([machine(ONE, OLD_KEY, NEW_KEY)], "--fail-on", "new-keys")
    assert (result.exit_code, new_keys(result)) == (4, [key_id("NEW")])


def test_each_file_of_an_earlier_run_is_read_once_and_few_before_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 earlier runs, in all of which THREE failed; the newest two do not have ONE."""
    accounts = [Account(one, "name", "ACTIVE") for one in (ONE, TWO, THREE)]
    base = write_run(tmp_path, [audited(user_value("ana"), account=one) for one in accounts])
    summary = json.loads((base / SUMMARY).read_text("utf-8"))
    failed = {"id": THREE, "name": "name", "result": "failed"}
    entries = [*summary["accounts"][:2], failed]
    edit_summary(base, accounts=entries, runs=[figures(60)])
    for number in range(1, 50):
        started = NOW - number * DAY
        folder = tmp_path / f"{started:%Y%m%dT%H%M%SZ}"
        shutil.copytree(base, folder)
        backdate(folder, started)
    for folder in (base, tmp_path / f"{NOW - DAY:%Y%m%dT%H%M%SZ}"):
        edit_summary(folder, accounts=[{**entries[0], "result": "failed"}, *entries[1:]])
    opened = Counter[str]()
    read_bytes = Path.read_bytes

    def reading(path: Path) -> bytes:
        opened[path.name] += 1
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", reading)
    history = iam_audit.History(iam_audit.finished_runs(tmp_path, NOW + DAY), "o-test123456")
    tracking = iam_audit.open_tracking(history, None, Scope(), NOW)
    assert opened == {SUMMARY: 1}  # it has the figures of the runs before it
    found = {one: iam_audit.baseline_of(tracking, one) for one in (TWO, ONE, FIVE)}
    started_runs = [each.run.started if each.run else None for each in found.values()]
    assert started_runs == [NOW, NOW - 2 * DAY, None]
    assert opened == {SUMMARY: 3, f"{ONE}.csv": 1, f"{TWO}.csv": 1}
    assert iam_audit.baseline_of(tracking, THREE).since == NOW - 49 * DAY
    assert opened == {SUMMARY: 50, f"{ONE}.csv": 1, f"{TWO}.csv": 1}
    opened.clear()
    other = iam_audit.History(iam_audit.finished_runs(tmp_path, NOW + DAY), "o-test123456")
    iam_audit.open_tracking(other, None, Scope(accounts=frozenset([ONE])), NOW)
    assert opened == {SUMMARY: 30}
    opened.clear()
    named = iam_audit.open_tracking(iam_audit.History((), "o-test123456"), base, Scope(), NOW)
    iam_audit.baseline_of(named, TWO)
    assert opened == {SUMMARY: 1, f"{TWO}.csv": 2}  # at once, so that damage ends the run


def test_with_cloudtrail_a_csv_is_read_once_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account's baseline says from when on CloudTrail is asked, and later what has changed."""
    found = audited(user_value("ana"), account=Account(ONE, "name", "ACTIVE"))
    write_run(tmp_path, [found])
    history = iam_audit.History(iam_audit.finished_runs(tmp_path, NOW + DAY), "o-test123456")
    tracking = iam_audit.open_tracking(history, None, Scope(), NOW)
    options = iam_audit.parse_arguments(["--role", "Audit", "--cloudtrail"])
    plan = iam_audit.plan_of(options, CALLER, ORGANIZATION, tracking, NOW + DAY)
    assert plan.events_since is not None
    assert plan.events_since(ONE) == NOW
    monkeypatch.setattr(iam_audit, "read_states", None)
    iam_audit.track_account(tracking, found, [])
    assert set(tracking.compared) == {ONE}
    assert tracking.baselines == {}  # its users are kept no longer


# --- the runs that the page and the terminal show, and runs of some age ----------------------------------------------


def figures(days: float, audited: int = 1) -> Json:
    """The line of a run in the table of runs."""
    gaps = dict.fromkeys(iam_audit.RUN_GAPS, 0)
    return {"started": (NOW - days * DAY).isoformat(), "audited": audited, **gaps}


class Reports:
    """Earlier runs as files: one account, and what else their summaries say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        account = Account(ONE, "name", "ACTIVE")
        self.base = write_run(folder / "base", [audited(user_value("ana"), account=account)])

    def add(self, days: float, **changed: Any) -> Path:
        started = NOW - days * DAY
        folder = self.folder / f"{started:%Y%m%dT%H%M%SZ}"
        shutil.copytree(self.base, folder)
        edit_summary(folder, started=started.isoformat(), **changed)
        return folder

    def opened(self, previous: Path | timedelta | None = None, **scope: Any) -> Tracking:
        history = iam_audit.History(iam_audit.finished_runs(self.folder, NOW), "o-test123456")
        return iam_audit.open_tracking(history, previous, Scope(**scope), NOW)


@pytest.fixture
def written_runs(tmp_path: Path) -> Reports:
    return Reports(tmp_path)


def days_shown(tracking: Tracking) -> list[float]:
    return [(NOW - datetime.fromisoformat(one["started"])) / DAY for one in tracking.runs]


def test_the_newest_run_of_the_scope_tells_of_the_runs_before_it(written_runs: Reports) -> None:
    """Also of those that are gone. Its own figures are those of its summary."""
    written_runs.add(5)  # is not asked, and not shown twice
    written_runs.add(4, runs=[figures(50), figures(40), figures(5), figures(4)])
    written_runs.add(3, scope={**iam_audit.scope_document(Scope()), "ous": ["ou-1"]})
    tracking = written_runs.opened()
    assert days_shown(tracking) == [50, 40, 5, 4]
    assert tracking.runs[0] == figures(50)
    assert days_shown(written_runs.opened(ous=frozenset(["ou-1"]))) == [3]


def test_where_summaries_do_not_tell_of_others_the_last_runs_are_read(
    written_runs: Reports,
) -> None:
    """Until one of them does."""
    for days in (2, 3, 4):
        written_runs.add(days, runs=None)
    written_runs.add(5, runs=[figures(7), figures(6), figures(5)])
    written_runs.add(8, runs=None)
    assert days_shown(written_runs.opened()) == [7, 6, 5, 4, 3, 2]


def test_at_most_60_runs_are_kept(written_runs: Reports) -> None:
    written_runs.add(1, runs=[figures(days) for days in range(80, 0, -1)])
    assert days_shown(written_runs.opened()) == [*range(59, 0, -1)]  # and the one that runs


@pytest.mark.parametrize(
    "runs",
    [
        [{**figures(2), "audited": "1"}],
        [{**figures(2), "active_keys": True}],
        [{**figures(2), "started": "yesterday"}],
        [{"started": figures(2)["started"]}],
        ["text"],
        7,
    ],
)
def test_a_run_whose_table_of_runs_is_damaged_is_passed_over(
    written_runs: Reports, runs: Any
) -> None:
    folder = written_runs.add(1, runs=runs)
    tracking = written_runs.opened()
    assert (tracking.runs, tracking.earlier) == ([], None)
    [message] = tracking.unreadable
    assert str(folder / SUMMARY) in message


def test_a_scope_of_before_there_was_exclude_ou_is_the_same(written_runs: Reports) -> None:
    scope = iam_audit.scope_document(Scope())
    assert "exclude_ous" not in scope
    written_runs.add(2, scope=scope)
    written_runs.add(1, scope={**scope, "exclude_ous": ["ou-1"]})
    assert days_shown(written_runs.opened()) == [2]


def test_previous_may_be_an_age(written_runs: Reports) -> None:
    """Each account has its newest run that began at least so long ago; all runs are shown."""
    failed = {"accounts": [{"id": ONE, "name": "name", "result": "failed"}]}
    for days in (40, 31, 7, 1):
        written_runs.add(days, runs=None, **(failed if days == 31 else {}))
    found: dict[float, list[float | None]] = {}
    for age in (0.0, 1, 2, 7, 7.01, 30, 40, 41):
        tracking = written_runs.opened(age * DAY)
        baseline = iam_audit.baseline_of(tracking, ONE)
        earlier = tracking.earlier.started if tracking.earlier else None
        found[age] = [
            (NOW - moment) / DAY if moment else None
            for moment in (earlier, baseline.run.started if baseline.run else None)
        ]
        assert days_shown(tracking) == [40, 31, 7, 1]
    assert found == {
        0: [1, 1],
        1: [1, 1],
        2: [7, 7],
        7: [7, 7],
        7.01: [31, 40],
        30: [31, 40],
        40: [40, 40],
        41: [None, None],
    }


def test_a_newer_run_that_cannot_be_read_does_not_matter_where_an_age_is_asked_for(
    written_runs: Reports,
) -> None:
    (written_runs.add(1) / SUMMARY).write_text("{", "utf-8")
    written_runs.add(8)
    tracking = written_runs.opened(7 * DAY)
    assert iam_audit.baseline_of(tracking, ONE).passed_over == []
    assert len(tracking.unreadable) == 1


# --- earlier runs that cannot be read ---------------------------------------------------------------------------------


def text_for_a_number(content: bytes) -> bytes:
    summary = json.loads(content)
    summary["gaps"]["organization"]["active_keys"] = "1"
    return json.dumps(summary).encode()


def unfolded(stdout: str) -> str:
    """The output in one line."""
    return " ".join(stdout.split())


DAMAGES: dict[str, tuple[str, Damage]] = {
    "CSV cut short": (CSV, rewritten(CSV, lambda text: text[:-10])),
    "CSV gone": (CSV, lambda folder: (folder / CSV).unlink()),
    "FIFO for a CSV": (CSV, in_its_place(CSV, os.mkfifo)),
    "summary cut short": (SUMMARY, rewritten(SUMMARY, lambda text: text[:-10])),
    "null for a number": (SUMMARY, lambda folder: edit_summary(folder, max_key_age_days=None)),
    "text for a number": (SUMMARY, rewritten(SUMMARY, text_for_a_number)),
    "ID of 11 digits": (
        SUMMARY,
        rewritten(SUMMARY, replaced(f'"id": "{TWO}"'.encode(), f'"id": "{TWO[1:]}"'.encode())),
    ),
    "FIFO for the summary": (SUMMARY, in_its_place(SUMMARY, os.mkfifo)),
    "summary links to itself": (
        SUMMARY,
        in_its_place(SUMMARY, lambda path: path.symlink_to(path.name)),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_passed_over_for_the_next_older_one(nights: Nights, name: str) -> None:
    """It does not end the run; and with nothing older, new keys cannot be ruled out."""
    damaged, damage = DAMAGES[name]
    nights.run([machine(ONE, OLD_KEY), machine(TWO)], days=2)
    nights.run([machine(ONE, OLD_KEY, NEW_KEY), machine(TWO)], days=1)
    damage(nights.folder(1))
    now = [machine(ONE, OLD_KEY, NEW_KEY), machine(TWO)]
    result = nights.run(now, *QUIET)
    assert (result.exit_code, new_keys(result)) == (4, [key_id("NEW")])
    assert baselines(result)[ONE] == ago(2).isoformat()
    shown = f"Cannot read the earlier run's {nights.folder(1).name}/{damaged}: "
    assert shown in unfolded(result.stdout)
    assert "cannot be ruled out" not in result.stdout
    [message] = summary_of(result)["earlier_files_passed_over"]
    assert message.startswith(f"Cannot read the earlier run's {nights.folder(1) / damaged}: ")
    # The next night nobody is bothered with it any more.
    assert nights.run(now, *QUIET).stdout == ""


@pytest.mark.parametrize("name", ["CSV gone", "summary cut short"])
def test_without_a_run_to_compare_with_new_keys_cannot_be_ruled_out(
    nights: Nights, name: str
) -> None:
    damaged, damage = DAMAGES[name]
    nights.run([machine(ONE, OLD_KEY), machine(TWO)], days=1)
    damage(nights.folder(1))
    result = nights.run([machine(ONE, OLD_KEY), machine(TWO)], *QUIET)
    assert result.exit_code == 4
    blind = [ONE] if damaged == CSV else [ONE, TWO]
    assert summary_of(result)["new_keys_not_ruled_out"] == blind
    said = f"New keys cannot be ruled out in {len(blind)} account{'s' * (len(blind) - 1)}: "
    assert said in result.stdout
    assert (
        "Next: let the user who runs the audit read the earlier runs, or restore the"
        in result.stdout
    )
    loud = nights.run([machine(ONE, OLD_KEY), machine(TWO)])
    assert loud.exit_code == 0


def test_failed_accounts_and_keys_that_cannot_be_ruled_out_are_code_5(nights: Nights) -> None:
    nights.run([machine(ONE, OLD_KEY), machine(TWO)], days=1)
    (nights.folder(1) / SUMMARY).write_text("{", encoding="utf-8")
    result = nights.run([machine(ONE, OLD_KEY), machine(TWO, role="denied")], *QUIET)
    assert result.exit_code == 5


def unprivileged() -> None:
    """Give up root's right to read all files: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    if os.geteuid() == 0:
        for capability in (1, 2):
            if ctypes.CDLL(None).prctl(24, capability, 0, 0, 0):
                raise OSError("PR_CAPBSET_DROP")


@pytest.mark.parametrize("what", ["", SUMMARY, CSV])
def test_a_run_that_may_not_be_read_is_not_no_run(nights: Nights, what: str) -> None:
    """A first run as root, and then cron as another user, who may not read its folder."""
    nights.run([machine(ONE, OLD_KEY)], days=1)
    env = nights.serve(machine(ONE, OLD_KEY, NEW_KEY)).env()
    (nights.folder(1) / what).chmod(0)
    output = nights.program.start(env, *QUIET, output_dir=nights.reports, preexec_fn=unprivileged)
    with output as (process, _):
        stdout, stderr = process.communicate(timeout=60)
    (nights.folder(1) / what).chmod(0o700)
    assert (process.returncode, stderr) == (4, "")
    assert f"{nights.folder(1).name}/{what or SUMMARY}: Permission denied " in unfolded(stdout)
    assert "New keys cannot be ruled out in 1 account: " in stdout
    assert (
        "Next: let the user who runs the audit read the earlier runs, or restore the"
        in unfolded(stdout)
    )


def test_a_run_without_a_summary_is_not_finished_and_nobody_is_told(nights: Nights) -> None:
    nights.run([machine(ONE, OLD_KEY)], days=2)
    nights.run([machine(ONE, OLD_KEY, NEW_KEY)], days=1)
    (nights.folder(1) / SUMMARY).unlink()
    result = nights.run([machine(ONE, OLD_KEY, NEW_KEY)], *QUIET)
    assert (result.exit_code, new_keys(result)) == (4, [key_id("NEW")])
    assert "Cannot read" not in result.stdout


@pytest.mark.parametrize("damaged", [CSV, SUMMARY])
def test_an_older_run_does_not_matter_where_a_newer_one_can_be_read(
    nights: Nights, damaged: str
) -> None:
    nights.run([machine(ONE, OLD_KEY)], days=2)
    nights.run([machine(ONE, OLD_KEY)], days=1)
    (nights.folder(2) / damaged).write_text("{", encoding="utf-8")
    result = nights.run([machine(ONE, OLD_KEY)], *QUIET)
    assert (result.exit_code, result.stdout) == (0, "")


@pytest.mark.parametrize("older", [False, True])
def test_a_csv_that_disappears_during_the_run_costs_one_comparison(
    nights: Nights, serve: Serve, program: Program, older: bool
) -> None:
    """A retention job deletes the runs while the account's users are listed."""
    before = [machine(ONE, OLD_KEY), machine(TWO, OLD_KEY)]
    if older:
        nights.run(before, days=2)
    nights.run(before, days=1)
    now = [machine(ONE, OLD_KEY, NEW_KEY), machine(TWO, OLD_KEY)]
    endpoint = serve(*now, rules=[rule("ListAccessKeys", ONE, hold=True)])
    path = nights.folder(1) / CSV

    def deleted() -> bool:
        if endpoint.stats()["held"]:
            path.unlink()
            return True
        return False

    with released(endpoint, deleted):
        result = again(program, endpoint.env(), nights.reports, *QUIET)
    assert result.exit_code == 4
    gone = f"{nights.folder(1).name}/{CSV}: No such file or directory "
    assert gone in unfolded(result.stdout) + " "
    assert baselines(result) == {
        ONE: ago(2).isoformat() if older else None,
        TWO: ago(1).isoformat(),
    }
    assert new_keys(result) == ([key_id("NEW")] if older else [])
    assert summary_of(result)["new_keys_not_ruled_out"] == ([] if older else [ONE])
    assert written(result.folder, ONE)


# --- mail and exit codes ----------------------------------------------------------------------------------------------


def people(name: str, *users: Json, **options: Any) -> Json:
    return account(ONE, name, users=users, **options)


def test_mail_says_what_is_new_and_counts_the_rest(nights: Nights) -> None:
    bare = [user("ana", password=True), user("bob", password=True)]
    serial = [f"arn:aws:iam::{ONE}:mfa/eve"]
    safe, eve = user("eve", password=True, mfa=serial), user("eve", password=True)
    owned = root(keys=[root_key()])
    both = root(keys=[root_key(), root_key(last_rotated=ago(90))])

    def urgent(result: Result) -> list[list[str]]:
        rows = [line.split() for line in result.stdout.splitlines() if line.startswith("  1  ")]
        return [[row[1], row[-1]] for row in rows]

    first = nights.run([people("prod", *bare, safe, root=owned)], *QUIET, days=4)
    assert first.exit_code == 0
    console, of_root = "console-without-mfa", ["root-access-key", "<root_account>"]
    assert urgent(first) == [of_root, [console, "ana"], [console, "bob"]]
    assert "unchanged" not in first.stdout
    again_the_same = nights.run([people("prod", *bare, safe, root=owned)], *QUIET, days=3)
    assert again_the_same.stdout == ""
    third = nights.run([people("prod", *bare, eve, root=both)], *QUIET, days=2)
    assert urgent(third) == [of_root, [console, "eve"]]
    assert f"MFA removed\n  {ONE} prod eve\n" in third.stdout
    assert f"New console users without MFA\n  {ONE} prod eve\n" in third.stdout
    assert third.stdout.endswith("\nand 3 findings of priority 1, unchanged\n")
    denied = nights.run([people("prod", *bare, eve, root=both, role="denied")], *QUIET, days=1)
    heading, *rest = denied.stdout.splitlines()
    assert heading.startswith("Organization o-test123456, 20")
    assert rest[0].startswith("1 account could not be audited")
    assert "unchanged" not in denied.stdout  # nothing is known of it
    last = nights.run([people("prod", *bare, eve, root=both)], *QUIET)
    assert (last.exit_code, last.stdout) == (0, "")


def test_an_account_that_becomes_production_is_new_in_the_mail(nights: Nights) -> None:
    bare = user("ana", password=True)
    assert nights.run([people("web", bare)], *QUIET, days=1).stdout == ""
    result = nights.run([people("web-prod", bare)], *QUIET)
    assert "New findings of priority 1\n  1  console-without-mfa" in result.stdout
    assert "unchanged" not in result.stdout


def test_an_account_without_a_baseline_has_all_its_findings_in_the_mail(nights: Nights) -> None:
    """While those of the other one stand unchanged."""
    bare = user("ana", password=True)
    nights.run([people("prod", bare)], days=1)
    other = account(TWO, "live", users=[user("zoe", password=True)])
    result = nights.run([people("prod", bare), other], *QUIET)
    assert [line.split()[-1] for line in result.stdout.splitlines()[2:3]] == ["zoe"]
    assert result.stdout.endswith("\nand 1 finding of priority 1, unchanged\n")


def test_a_denied_account_does_not_silence_fail_on(nights: Nights) -> None:
    """3 stays what it is, and 4; 5 is both."""
    denied = machine(TWO, role="denied")
    nights.run([machine(ONE, OLD_KEY), machine(TWO)], days=1)
    assert nights.run([machine(ONE, OLD_KEY), denied], *QUIET).exit_code == 3
    assert nights.run([machine(ONE, OLD_KEY, NEW_KEY), denied], *QUIET).exit_code == 5
    third = key(key_id("THIRD"), created=ago(80))
    assert nights.run([machine(ONE, OLD_KEY, third), machine(TWO)], *QUIET).exit_code == 4
    shown = nights.run([machine(ONE, OLD_KEY), denied], "--fail-on", "findings:7")
    assert shown.exit_code == 5

"""Users and keys that seem to be gone while their account is read: nobody is lost over one NoSuchEntity.

IAM is eventually consistent, and users are renamed. First answers that are no longer true are rules of the
endpoint (`times=1`); what the account really holds is its world.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from builders import with_constants
from conftest import Program, Result, Serve
from endpoint import Json, account, key, rule, user
from test_failures import answer_of

pytestmark = pytest.mark.program

ONE = "111111111111"
CREATED = "2024-01-31T12:00:00Z"
KEY, OTHER_KEY = "AKIA0000000000000ONE", "AKIA0000000000000TWO"
LIST = "GetAccountAuthorizationDetails"  # of all users
GONE: Json = {"error": "NoSuchEntity", "status": 404}


@pytest.fixture
def quick(program: Program, tmp_path: Path) -> Program:
    """The program, with shorter pauses before it reads again."""
    return with_constants(program, tmp_path, READ_AGAIN_AFTER=(0.01, 0.02, 0.03))


def list_of_users(*users: tuple[str, str], created: str = CREATED) -> Json:
    """The first list of users: these names and user IDs."""
    members = "".join(
        f"<member><Path>/</Path><UserName>{name}</UserName><UserId>{user_id}</UserId>"
        f"<Arn>arn:aws:iam::{ONE}:user/{name}</Arn><CreateDate>{created}</CreateDate></member>"
        for name, user_id in users
    )
    body = f"<UserDetailList>{members}</UserDetailList><IsTruncated>false</IsTruncated>"
    return rule(LIST, ONE, raw=answer_of(LIST, body), times=1)


def list_of_keys(*key_ids: str, skip: int = 0) -> Json:
    """An answer of ListAccessKeys, after `skip` true ones."""
    members = "".join(
        f"<member><UserName>ana</UserName><AccessKeyId>{key_id}</AccessKeyId><Status>Active</Status>"
        f"<CreateDate>{CREATED}</CreateDate></member>"
        for key_id in key_ids
    )
    body = f"<AccessKeyMetadata>{members}</AccessKeyMetadata><IsTruncated>false</IsTruncated>"
    return rule("ListAccessKeys", ONE, raw=answer_of("ListAccessKeys", body), skip=skip)


def cells(result: Result, *columns: str) -> list[tuple[str, ...]]:
    """These columns of all IAM users' rows."""
    rows = [row for row in result.rows(ONE) if row["username"] != "<root_account>"]
    return [tuple(row[column] for column in columns) for row in rows]


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 3])
def test_a_key_that_is_still_listed_is_read_again(serve: Serve, quick: Program, times: int) -> None:
    used = key(KEY, last_used="2026-01-31T12:00:00Z", service="ec2")
    hidden = rule("GetAccessKeyLastUsed", ONE, times=times, **GONE)
    endpoint = serve(account(ONE, "one", users=[user("ana", keys=[used])]), rules=[hidden])
    result = quick(endpoint.env())
    assert result.exit_code == 0
    assert cells(result, "access_key_id", "status", "service_name") == [(KEY, "Active", "ec2")]
    assert endpoint.stats()["by_account"][ONE]["GetAccessKeyLastUsed"] == times + 1


def test_the_pauses_are_some_seconds_long(serve: Serve, program: Program) -> None:
    hidden = rule("GetAccessKeyLastUsed", ONE, times=1, **GONE)
    world = account(ONE, "one", users=[user("ana", keys=[key(KEY)])])
    endpoint = serve(world, rules=[hidden], record=True)
    assert program(endpoint.env()).exit_code == 0
    recorded = endpoint.stats()["recorded"]
    first, second = [at for at, _, action in recorded if action == "GetAccessKeyLastUsed"]
    assert second - first > 1.9


@pytest.mark.parametrize(("code", "requests"), [("NoSuchEntity", 4), ("AccessDenied", 2)])
def test_an_account_fails_rather_than_lose_a_key(
    serve: Serve, quick: Program, code: str, requests: int
) -> None:
    """AccessDenied for a key that is still listed after a pause is what it says."""
    hidden = rule("GetAccessKeyLastUsed", ONE, error=code, status=403)
    endpoint = serve(account(ONE, "one", users=[user("ana", keys=[key(KEY)])]), rules=[hidden])
    result = quick(endpoint.env())
    assert (result.exit_code, result.csvs) == (3, set())
    assert result.failures == {ONE: ("GetAccessKeyLastUsed", code)}
    assert endpoint.stats()["by_account"][ONE]["GetAccessKeyLastUsed"] == requests


@pytest.mark.parametrize("code", ["NoSuchEntity", "AccessDenied"])
def test_a_key_that_a_later_list_lacks_is_left_out(serve: Serve, quick: Program, code: str) -> None:
    hidden = rule("GetAccessKeyLastUsed", ONE, error=code, status=403, fields={"AccessKeyId": KEY})
    keys = [key(KEY), key(OTHER_KEY)]
    rules = [hidden, list_of_keys(OTHER_KEY, skip=1)]
    endpoint = serve(account(ONE, "one", users=[user("ana", keys=keys)]), rules=rules)
    result = quick(endpoint.env())
    assert result.exit_code == 0
    assert cells(result, "username", "access_key_id") == [("ana", OTHER_KEY)]


# --- users ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("action", ["ListAccessKeys", "ListMFADevices"])
def test_a_user_who_is_still_listed_is_read_again(
    serve: Serve, quick: Program, action: str, times: int
) -> None:
    """A console user without MFA: without them, the account would look Complete."""
    ana = user("ana", password=True, keys=[key(KEY)])
    endpoint = serve(
        account(ONE, "one", users=[ana]), rules=[rule(action, ONE, times=times, **GONE)]
    )
    result = quick(endpoint.env())
    assert result.exit_code == 0
    expected = [("ana", "Configurada", KEY, "None")]
    assert cells(result, "username", "password_status", "access_key_id", "mfa_status") == expected
    assert result.accounts[ONE]["maturity"]["phase1"] == "In Progress"
    assert endpoint.stats()["by_account"][ONE][LIST] == times + 1


@pytest.mark.parametrize("action", ["ListAccessKeys", "ListMFADevices"])
def test_an_account_fails_rather_than_lose_a_user(
    serve: Serve, quick: Program, action: str
) -> None:
    ana = user("ana", password=True, keys=[key(KEY)])
    endpoint = serve(account(ONE, "one", users=[ana]), rules=[rule(action, ONE, **GONE)])
    result = quick(endpoint.env())
    assert (result.exit_code, result.csvs) == (3, set())
    assert result.failures == {ONE: (action, "NoSuchEntity")}
    assert endpoint.stats()["by_account"][ONE][action] == 4


def test_a_renamed_user_is_read_under_their_present_name(serve: Serve, quick: Program) -> None:
    bea = user("bea", password=True, keys=[key(KEY)], user_id="AIDA1")
    endpoint = serve(account(ONE, "one", users=[bea]), rules=[list_of_users(("ana", "AIDA1"))])
    result = quick(endpoint.env())
    assert result.exit_code == 0
    expected = [("bea", "Configurada", KEY, "None")]
    assert cells(result, "username", "password_status", "access_key_id", "mfa_status") == expected


def test_a_user_renamed_while_somebody_else_takes_the_name(serve: Serve, quick: Program) -> None:
    """No call says so, but the report of this minute has a user whom the list lacks."""
    now = datetime.now(timezone.utc)
    users = [
        user(
            "ana",
            created=now - timedelta(minutes=1),
            password=True,
            keys=[key(OTHER_KEY)],
            user_id="AIDA2",
        ),
        user("bea", password=True, keys=[key(KEY)], user_id="AIDA1"),
    ]
    endpoint = serve(account(ONE, "one", users=users), rules=[list_of_users(("ana", "AIDA1"))])
    result = quick(endpoint.env())
    assert result.exit_code == 0
    expected = [("ana", "Configurada", OTHER_KEY), ("bea", "Configurada", KEY)]
    assert cells(result, "username", "password_status", "access_key_id") == expected
    assert endpoint.stats()["by_account"][ONE][LIST] == 2


def test_a_user_deleted_and_created_again_is_read(serve: Serve, quick: Program) -> None:
    """NoSuchEntity, and then somebody else has the name."""
    ana = user(
        "ana", created=datetime.now(timezone.utc), password=True, in_report=False, user_id="AIDA2"
    )
    rules = [list_of_users(("ana", "AIDA1")), rule("ListAccessKeys", ONE, times=1, **GONE)]
    endpoint = serve(account(ONE, "one", users=[ana]), rules=rules)
    result = quick(endpoint.env())
    assert cells(result, "username", "password_status") == [("ana", "Configurada")]


@pytest.mark.parametrize("action", ["ListAccessKeys", "GetAccessKeyLastUsed", "ListMFADevices"])
def test_a_user_whom_a_later_list_lacks_is_left_out(
    serve: Serve, quick: Program, action: str
) -> None:
    """Whenever they went."""
    ana = user("ana", password=True, keys=[key(KEY)], user_id="AIDA1")
    rules = [rule(action, ONE, user="ana", **GONE)]
    if action == "GetAccessKeyLastUsed":
        rules = [rule(action, ONE, **GONE), rule("ListAccessKeys", ONE, user="ana", skip=1, **GONE)]
    rules.append({**list_of_users(("bea", "AIDA2")), "skip": 1, "times": None})
    users = [ana, user("bea", user_id="AIDA2")]
    endpoint = serve(account(ONE, "one", users=users), rules=rules)
    result = quick(endpoint.env())
    assert result.exit_code == 0
    assert cells(result, "username") == [("bea",)]

"""Track: changes between two states, their witnesses, earlier runs as they are read. Nothing here runs the program."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from builders import (
    DAY,
    FIVE,
    FOUR,
    NOW,
    ONE,
    SIX,
    THREE,
    TWO,
    Damage,
    audited,
    edit_summary,
    in_its_place,
    key,
    key_id,
    plan,
    replaced,
    rewritten,
    run_of,
    spoiled,
    user,
    write_run,
)
from endpoint import Json, event
from hypothesis import given, settings
from hypothesis import strategies as st

import iam_audit
from iam_audit import (
    ROOT,
    Account,
    AuditedAccount,
    Change,
    Credential,
    Event,
    Finding,
    KeyState,
    Scope,
    Tracking,
    Trail,
    User,
    UserState,
)

ELEVEN = "110000000000"
ALICE = "arn:aws:sts::999999999999:assumed-role/Admin/alice"


# --- changes between two states ---------------------------------------------------------------------------------------


ACCOUNT = Account(ONE, "one", "ACTIVE")


ON, OFF = "Configurada", "No configurada"


def state(password_status: str = OFF, mfa_status: str = "None", **keys: str) -> UserState:
    """`keys` are their status and, after a slash, the day of creation."""
    parts = {name: text.partition("/") for name, text in keys.items()}
    made = {
        name: KeyState(status, f"2024-01-{day or '01'}") for name, (status, _, day) in parts.items()
    }
    return UserState(password_status, mfa_status, made)


ROOT_KEYS = ("<root_access_key_1>", "<root_access_key_2>")


def root_state(*keys: str) -> UserState:
    return state(**dict(zip(ROOT_KEYS, keys)))


API_KEY, CERTIFICATE = iam_audit.API_KEY, iam_audit.SIGNING_CERTIFICATE
FIRST_CERTIFICATE, SECOND_CERTIFICATE = iam_audit.CERTIFICATES


def holder(kind: str, **keys: str) -> UserState:
    """A user with credentials of that kind."""
    made = {name: each._replace(kind=kind) for name, each in state(**keys).keys.items()}
    return state()._replace(keys=made)


def certified(*certificates: str) -> UserState:
    """A user with certificates in these slots; \"\" leaves one empty."""
    slots = zip(iam_audit.CERTIFICATES, certificates)
    return holder(CERTIFICATE, **{slot: text for slot, text in slots if text})


TRANSITIONS: dict[str, tuple[dict[str, UserState], dict[str, UserState], list[str]]] = {
    "nothing": ({}, {}, []),
    "the same": (
        {"ana": state(ON, "Virtual", K="Active")},
        {"ana": state(ON, "Virtual", K="Active")},
        [],
    ),
    "key created": (
        {"ana": state()},
        {"ana": state(K="Active")},
        ["ana|K|access-key-created||Active"],
    ),
    "inactive key created": (
        {"ana": state()},
        {"ana": state(K="Inactive")},
        ["ana|K|access-key-created||Inactive"],
    ),
    "key deleted": (
        {"ana": state(K="Expired")},
        {"ana": state()},
        ["ana|K|access-key-deleted|Expired|"],
    ),
    "key rotated": (
        {"ana": state(A="Active")},
        {"ana": state(B="Active")},
        ["ana|A|access-key-deleted|Active|", "ana|B|access-key-created||Active"],
    ),
    "activated": (
        {"ana": state(K="Inactive")},
        {"ana": state(K="Active")},
        ["ana|K|access-key-activated|Inactive|Active"],
    ),
    "activated after it expired": (
        {"ana": state(K="Expired")},
        {"ana": state(K="Active")},
        ["ana|K|access-key-activated|Expired|Active"],
    ),
    "deactivated": (
        {"ana": state(K="Active")},
        {"ana": state(K="Inactive")},
        ["ana|K|access-key-deactivated|Active|Inactive"],
    ),
    "expired": (
        {"ana": state(K="Active")},
        {"ana": state(K="Expired")},
        ["ana|K|access-key-deactivated|Active|Expired"],
    ),
    "activated to a status that AWS added": (
        {"ana": state(K="Inactive")},
        {"ana": state(K="New")},
        ["ana|K|access-key-activated|Inactive|New"],
    ),
    "deactivated from a status that AWS added": (
        {"ana": state(K="New")},
        {"ana": state(K="Expired")},
        ["ana|K|access-key-deactivated|New|Expired"],
    ),
    "active in another way": ({"ana": state(K="Active")}, {"ana": state(K="New")}, []),
    "inactive key expired": ({"ana": state(K="Inactive")}, {"ana": state(K="Expired")}, []),
    "MFA added": ({"ana": state()}, {"ana": state(mfa_status="SMS")}, ["ana||mfa-added|None|SMS"]),
    "MFA removed": (
        {"ana": state(mfa_status="Security key+Virtual")},
        {"ana": state()},
        ["ana||mfa-removed|Security key+Virtual|None"],
    ),
    "MFA changed": (
        {"ana": state(mfa_status="Virtual")},
        {"ana": state(mfa_status="Security key+Virtual")},
        ["ana||mfa-changed|Virtual|Security key+Virtual"],
    ),
    "console enabled": (
        {"ana": state(OFF)},
        {"ana": state(ON)},
        [f"ana||console-enabled|{OFF}|{ON}"],
    ),
    "console disabled": (
        {"ana": state(ON)},
        {"ana": state(OFF)},
        [f"ana||console-disabled|{ON}|{OFF}"],
    ),
    "console and MFA at once": (
        {"ana": state(OFF)},
        {"ana": state(ON, "Hardware")},
        [f"ana||console-enabled|{OFF}|{ON}", "ana||mfa-added|None|Hardware"],
    ),
    "user created, with password and keys": (
        {},
        {"ana": state(ON, "Virtual", K="Active", L="Inactive")},
        [
            "ana||user-created||",
            "ana|K|access-key-created||Active",
            "ana|L|access-key-created||Inactive",
        ],
    ),
    "user deleted, with password and key": (
        {"ana": state(ON, "Virtual", K="Active")},
        {},
        ["ana||user-deleted||", "ana|K|access-key-deleted|Active|"],
    ),
    "user renamed, whose keys stay": (
        {"ana": state(K="Active", L="Active")},
        {"ana.b": state(K="Active", M="Active")},
        [
            "ana.b||user-renamed|ana|ana.b",
            "ana.b|L|access-key-deleted|Active|",
            "ana.b|M|access-key-created||Active",
        ],
    ),
    "user renamed, whose key is activated": (
        {"ana": state(K="Inactive")},
        {"ana.b": state(K="Active")},
        [
            "ana.b||user-renamed|ana|ana.b",
            "ana.b|K|access-key-activated|Inactive|Active",
        ],
    ),
    "root's keys in other slots": (
        {ROOT: root_state("Active/01", "Inactive/02")},
        {ROOT: root_state("Inactive/02", "Inactive/01")},
        [f"{ROOT}|{ROOT_KEYS[1]}|access-key-deactivated|Active|Inactive"],
    ),
    "root's second key moves up when the first is deleted": (
        {ROOT: root_state("Active/01", "Active/02")},
        {ROOT: root_state("Active/02")},
        [f"{ROOT}|{ROOT_KEYS[0]}|access-key-deleted|Active|"],
    ),
    "root's key replaced by an active one": (
        {ROOT: root_state("Inactive/01")},
        {ROOT: root_state("Active/02")},
        [
            f"{ROOT}|{ROOT_KEYS[0]}|access-key-deleted|Inactive|",
            f"{ROOT}|{ROOT_KEYS[0]}|access-key-created||Active",
        ],
    ),
    "one of root's two keys of the same second deleted": (
        {ROOT: root_state("Active/01", "Active/01")},
        {ROOT: root_state("Active/01")},
        [f"{ROOT}|{ROOT_KEYS[1]}|access-key-deleted|Active|"],
    ),
    "API key created": (
        {"ana": state()},
        {"ana": holder(API_KEY, A="Active")},
        ["ana|A|api-key-created||Active"],
    ),
    "API key expired": (
        {"ana": holder(API_KEY, A="Active")},
        {"ana": holder(API_KEY, A="Expired")},
        ["ana|A|api-key-deactivated|Active|Expired"],
    ),
    "password for a service deleted with its user": (
        {"ana": holder(iam_audit.SERVICE_PASSWORD, A="Inactive")},
        {},
        ["ana||user-deleted||", "ana|A|service-password-deleted|Inactive|"],
    ),
    "an API key stays with its renamed user": (
        {"ana": holder(API_KEY, A="Inactive")},
        {"bea": holder(API_KEY, A="Active")},
        ["bea||user-renamed|ana|bea", "bea|A|api-key-activated|Inactive|Active"],
    ),
    "certificates in other slots": (
        {"ana": certified("Active/01", "Active/02")},
        {"ana": certified("Active/02", "Active/01")},
        [],
    ),
    "certificate replaced": (
        {"ana": certified("Active/01")},
        {"ana": certified("Inactive/02")},
        [
            f"ana|{FIRST_CERTIFICATE}|signing-certificate-deleted|Active|",
            f"ana|{FIRST_CERTIFICATE}|signing-certificate-created||Inactive",
        ],
    ),
    "certificate deactivated, in the other slot": (
        {"ana": certified("Active/01")},
        {"ana": certified("", "Inactive/01")},
        [f"ana|{SECOND_CERTIFICATE}|signing-certificate-deactivated|Active|Inactive"],
    ),
    "users with certificates are not one user": (
        {"ana": certified("Active/01")},
        {"bea": certified("Active/01")},
        [
            "ana||user-deleted||",
            f"ana|{FIRST_CERTIFICATE}|signing-certificate-deleted|Active|",
            "bea||user-created||",
            f"bea|{FIRST_CERTIFICATE}|signing-certificate-created||Active",
        ],
    ),
    "user renamed, and another created under the old name": (
        {"ana": state(ON, "Virtual", K="Active")},
        {"ana": state(ON, L="Active"), "ana.b": state(ON, "Virtual", K="Active")},
        [
            "ana||user-created||",
            "ana|L|access-key-created||Active",
            "ana.b||user-renamed|ana|ana.b",
        ],
    ),
    "user renamed to the name of one who left": (
        {"ana": state(K="Active"), "bob": state(L="Active")},
        {"bob": state(K="Active")},
        [
            "bob||user-renamed|ana|bob",
            "bob||user-deleted||",
            "bob|L|access-key-deleted|Active|",
        ],
    ),
    "two users who exchanged their names": (
        {"ana": state(K="Active"), "bob": state(L="Active")},
        {"ana": state(L="Active"), "bob": state(K="Active")},
        [
            "ana||user-renamed|bob|ana",
            "bob||user-renamed|ana|bob",
        ],
    ),
    "user renamed, and without MFA since": (
        {"ana": state(ON, "Virtual", K="Active")},
        {"ana.b": state(ON, K="Active")},
        ["ana.b||user-renamed|ana|ana.b", "ana.b||mfa-removed|Virtual|None"],
    ),
    "users by name": ({"b": state(), "a": state()}, {}, ["a||user-deleted||", "b||user-deleted||"]),
    "names in upper and lower case": (
        {"Ana": state()},
        {"ana": state()},
        ["Ana||user-deleted||", "ana||user-created||"],
    ),
    "root missing now": ({ROOT: state(ON, "None", K="Active")}, {}, []),
    "root missing then": ({}, {ROOT: state(ON, "None", K="Active")}, []),
    "root's password": (
        {ROOT: state(ON)},
        {ROOT: state(OFF)},
        [f"{ROOT}||console-disabled|{ON}|{OFF}"],
    ),
    "root's key created": (
        {ROOT: state()},
        {ROOT: state(K="Active")},
        [f"{ROOT}|K|access-key-created||Active"],
    ),
    "root's key replaced": (
        {ROOT: root_state("Active/01")},
        {ROOT: root_state("Active/02")},
        [
            f"{ROOT}|{ROOT_KEYS[0]}|access-key-deleted|Active|",
            f"{ROOT}|{ROOT_KEYS[0]}|access-key-created||Active",
        ],
    ),
    "root's key deactivated": (
        {ROOT: state(K="Active/01")},
        {ROOT: state(K="Inactive/01")},
        [f"{ROOT}|K|access-key-deactivated|Active|Inactive"],
    ),
}


@pytest.mark.parametrize("name", TRANSITIONS)
def test_what_counts_as_a_change_between_two_states(name: str) -> None:
    before, after, expected = TRANSITIONS[name]
    persons = iam_audit.persons_of(before, after)
    found = list(iam_audit.changes_between(ACCOUNT, persons))
    assert ["|".join(change[2:7]) for change in found] == expected
    assert all(change[:2] == (ONE, "one") and change[7:] == ("", None, None) for change in found)


names = st.text(st.sampled_from("='+-@,.\"\\\t abC"), min_size=1, max_size=6).filter(
    lambda name: name != ROOT
)
moments = st.datetimes(datetime(2015, 1, 1), datetime(2030, 1, 1), timezones=st.just(timezone.utc))
keys = st.builds(
    iam_audit.Credential,
    st.text("ABC1", min_size=16, max_size=20),
    st.sampled_from(["Active", "Inactive", "Expired"]),
    moments,
    st.none(),
    st.just("N/A"),
)
kinds = st.lists(st.sampled_from(["Hardware", "SMS", "Security key", "Virtual"]), unique=True)
people = st.builds(
    iam_audit.User,
    names,
    st.booleans(),
    st.none(),
    kinds.map(lambda each: tuple(sorted(each))),
    st.lists(keys, max_size=2, unique_by=lambda each: each.id).map(tuple),
)


@given(st.lists(people, max_size=4, unique_by=lambda one: one.name))
@settings(max_examples=50)
def test_what_is_written_compares_as_unchanged(tmp_path: Path, users: list[iam_audit.User]) -> None:
    path, found = tmp_path / "account.csv", audited(*users, account=ACCOUNT)
    iam_audit.write_csv(path, iam_audit.CSV_COLUMNS, iam_audit.rows_of(found))
    read = iam_audit.read_states(path, ONE)
    after = iam_audit.states_of(iam_audit.rows_of(found))
    persons = iam_audit.persons_of(read, after)
    assert list(iam_audit.changes_between(ACCOUNT, persons)) == []
    assert set(read) == {one.name for one in users}


# --- witnesses --------------------------------------------------------------------------------------------------------


def happened(name: str, day: int, user: str = "ana", key_id: str = "", status: str = "") -> Event:
    moment = datetime(2024, 1, day, tzinfo=timezone.utc)
    return Event(moment, name, user, key_id, status, ALICE, "192.0.2.1", "agent", f"{name}-{day}")


EXPLANATIONS = {
    "access-key-created": ("CreateAccessKey", "", "DeleteAccessKey", ""),
    "access-key-deleted": ("DeleteAccessKey", "", "CreateAccessKey", ""),
    "access-key-activated": ("UpdateAccessKey", "Active", "UpdateAccessKey", "Inactive"),
    "access-key-deactivated": ("UpdateAccessKey", "Inactive", "UpdateAccessKey", "Active"),
    "mfa-added": ("EnableMFADevice", "", "DeactivateMFADevice", ""),
    "mfa-removed": ("DeactivateMFADevice", "", "EnableMFADevice", ""),
    "console-enabled": ("CreateLoginProfile", "", "DeleteLoginProfile", ""),
    "console-disabled": ("DeleteLoginProfile", "", "CreateLoginProfile", ""),
    "user-created": ("CreateUser", "", "DeleteUser", ""),
    "user-deleted": ("DeleteUser", "", "CreateUser", ""),
}
SERVICE = "ServiceSpecificCredential"
for _kind, _create, _what in (
    ("api-key", f"Create{SERVICE}", SERVICE),
    ("service-password", f"Create{SERVICE}", SERVICE),
    ("signing-certificate", "UploadSigningCertificate", "SigningCertificate"),
):
    EXPLANATIONS[f"{_kind}-created"] = (_create, "", f"Delete{_what}", "")
    EXPLANATIONS[f"{_kind}-deleted"] = (f"Delete{_what}", "", _create, "")
    EXPLANATIONS[f"{_kind}-activated"] = (f"Update{_what}", "Active", f"Update{_what}", "Inactive")
    EXPLANATIONS[f"{_kind}-deactivated"] = (
        *(f"Update{_what}", "Inactive"),
        *(f"Update{_what}", "Active"),
    )


@pytest.mark.parametrize("kind", EXPLANATIONS)
def test_a_change_is_confirmed_by_the_last_event_that_explains_it(kind: str) -> None:
    """What explains it, whatever else happened; only without that, what contradicts it; never what is about another."""
    explains, set_to, contradicts, set_back = EXPLANATIONS[kind]
    key = "K" if kind.startswith(("access-key", "api-key", "service-password")) else ""
    change = Change(ONE, "one", "ana", key, kind)
    about_others = [
        happened(explains, 9, "bob", "K2", set_to),
        *([happened(explains, 9, "ana", "K2", set_to)] if key else []),
        *(
            happened(name, 9, "ana", "K", "Expired")
            for name in iam_audit.EVENT_NAMES
            if name.startswith("Update") and name != "UpdateUser"
        ),
    ]
    others = {name for name in iam_audit.EVENT_NAMES if not name.startswith("Update")}
    others -= {explains, contradicts}
    about_others += [happened(name, 9, "ana", key) for name in others]

    def witness(*events: Event) -> tuple[str, Event | None]:
        found = iam_audit.with_witness(change, Trail(tuple(sorted([*events, *about_others]))))
        assert found[:7] == change[:7]
        return found.witness, found.event

    first, last = (happened(explains, day, "ana", key, set_to) for day in (2, 4))
    against = [happened(contradicts, day, "ana", key, set_back) for day in (1, 3, 5)]
    assert witness() == ("not found", None)
    assert witness(first, last) == ("confirmed", last)
    assert witness(first, last, *against) == ("confirmed", last)
    assert witness(*against) == ("contradicted", against[-1])


@pytest.mark.parametrize("name", ["EnableMFADevice", "DeactivateMFADevice"])
def test_the_witness_of_changed_mfa_is_either_event(name: str) -> None:
    change = Change(ONE, "one", "ana", "", "mfa-changed")
    seen = happened(name, 3)
    assert iam_audit.with_witness(change, Trail((seen,))) == change._replace(
        witness="confirmed", event=seen
    )
    others = Trail((happened("CreateUser", 3), happened(name, 4, "bob")))
    assert iam_audit.with_witness(change, others) == change._replace(witness="not found")


@pytest.mark.parametrize("kind", ["access-key-created", "mfa-changed", "user-deleted"])
def test_without_a_trail_there_is_no_witness(kind: str) -> None:
    change = Change(ONE, "one", "ana", "K", kind)
    assert iam_audit.with_witness(change, None) == change
    assert iam_audit.with_witness(change, Trail(error="denied")) == change._replace(
        witness="unavailable"
    )


def test_nobody_is_asked_who_made_a_user_an_administrator() -> None:
    """Many events can do that; none of them is looked up."""
    change = Change(ONE, "one", "ana", change="administrator-added", before="false", after="true")
    assert iam_audit.with_witness(change, Trail((happened("CreateUser", 3),))) == change
    assert iam_audit.with_witness(change, Trail(error="denied")) == change


def test_a_certificate_is_known_by_its_owner() -> None:
    change = Change(ONE, "one", "ana", FIRST_CERTIFICATE, "signing-certificate-deleted")
    seen = happened("DeleteSigningCertificate", 3, "Ana", "TA7SMP42TDN5Z26OBPJE7EXAMPLE")
    other = happened("DeleteSigningCertificate", 4, "bob", "OFHPLP4ZULTHYPMSYEX7O4BEXAMPLE")
    assert iam_audit.with_witness(change, Trail((seen, other))).event == seen
    assert iam_audit.with_witness(change, Trail((other,))).witness == "not found"


def test_cloudtrail_is_asked_for_every_kind_of_credential() -> None:
    assert set(iam_audit.EVENT_NAMES) == {
        *("CreateAccessKey", "DeleteAccessKey", "UpdateAccessKey"),
        *(f"Create{SERVICE}", f"Delete{SERVICE}", f"Update{SERVICE}"),
        *("UploadSigningCertificate", "DeleteSigningCertificate", "UpdateSigningCertificate"),
        *("CreateLoginProfile", "DeleteLoginProfile", "EnableMFADevice", "DeactivateMFADevice"),
        *("CreateUser", "DeleteUser", "UpdateUser"),
    }


def test_roots_keys_are_known_by_their_owner() -> None:
    """Its ID in the snapshot is none that CloudTrail has."""
    change = Change(ONE, "one", ROOT, "<root_access_key_1>", "access-key-deleted")
    seen = happened("DeleteAccessKey", 3, ROOT, "AKIA0000000000000001")
    other = happened("DeleteAccessKey", 4, "ana", "AKIA0000000000000002")
    assert iam_audit.with_witness(change, Trail((seen, other))).event == seen
    assert iam_audit.with_witness(change, Trail((other,))).witness == "not found"


CREATED, DELETED = (
    happened("CreateAccessKey", 1, key_id="K"),
    happened("DeleteAccessKey", 2, key_id="K"),
)


@pytest.mark.parametrize(
    ("before", "after", "trail", "expected"),
    [
        ({}, {}, Trail((CREATED, DELETED)), [DELETED]),
        (
            {"ana": state(L="Active")},
            {"ana": state(L="Active")},
            Trail((CREATED, DELETED)),
            [DELETED],
        ),
        ({}, {}, Trail((CREATED,)), []),
        ({}, {}, Trail((DELETED,)), []),
        (
            {"ana": state(K="Active")},
            {},
            Trail((CREATED, DELETED)),
            [],
        ),  # deleted, as the comparison says itself
        (
            {},
            {"ana": state(K="Active")},
            Trail((CREATED, DELETED)),
            [],
        ),  # created, and seen before it was deleted
        ({}, {}, None, []),
        ({}, {}, Trail(error="denied"), []),
        ({}, {}, Trail((CREATED, happened("DeleteAccessKey", 2, key_id="L"))), []),
        (
            {},
            {},
            Trail((happened("CreateAccessKey", 1), happened("DeleteAccessKey", 2))),
            [],
        ),  # without any key's ID
        (
            {},
            {},
            Trail((CREATED, happened("UpdateAccessKey", 2, key_id="K", status="Inactive"))),
            [],
        ),
    ],
)
def test_a_key_that_came_and_went_shows_in_the_events_alone(
    before: dict[str, UserState],
    after: dict[str, UserState],
    trail: Trail | None,
    expected: list[Event],
) -> None:
    events = trail.events if trail else ()
    found = list(iam_audit.came_and_went(ACCOUNT, before, after, events))
    assert found == [
        Change(ONE, "one", "ana", "K", "access-key-came-and-went", event=each) for each in expected
    ]
    assert [iam_audit.with_witness(change, trail).witness for change in found] == [
        "confirmed"
    ] * len(expected)


BEDROCK, CODECOMMIT = "bedrock.amazonaws.com", "codecommit.amazonaws.com"


@pytest.mark.parametrize(
    ("service", "after", "names", "expected"),
    [
        (BEDROCK, {}, ["Create", "Delete"], ["api-key-came-and-went"]),
        ("a service that AWS adds", {}, ["Create", "Delete"], ["api-key-came-and-went"]),
        (CODECOMMIT, {}, ["Create", "Delete"], []),  # a password; only keys count as new
        (BEDROCK, {}, ["Create", "Update"], []),
        (BEDROCK, {}, ["Delete"], []),
        (BEDROCK, {"ana": holder(API_KEY, A="Active")}, ["Create", "Delete"], []),
    ],
)
def test_an_api_key_that_came_and_went(
    service: str, after: dict[str, UserState], names: list[str], expected: list[str]
) -> None:
    events = [happened(f"{name}{SERVICE}", day, key_id="A") for day, name in enumerate(names, 1)]
    if names[0] == "Create":
        events[0] = events[0]._replace(service_name=service)
    found = list(iam_audit.came_and_went(ACCOUNT, {}, after, events))
    assert [change.change for change in found] == expected
    assert all((each.user, each.key_id, each.event) == ("ana", "A", events[1]) for each in found)
    assert all(iam_audit.with_witness(each, Trail()).witness == "confirmed" for each in found)
    assert set(expected) <= set(iam_audit.NEW_KEY_CHANGES)


EVENT = Event(
    NOW, "DeleteAccessKey", "ana", "K", "", "arn:aws:iam::111111111111:user/eve", "", "", ""
)


@pytest.mark.parametrize(
    ("what", "witness", "event", "line"),
    [
        ("access-key-created", "", None, "ana K"),
        ("access-key-created", "not found", None, "ana K"),
        ("access-key-created", "confirmed", EVENT, "ana K by user/eve"),
        ("access-key-created", "contradicted", EVENT, "ana K (contradicted by CloudTrail)"),
        (iam_audit.CAME_AND_WENT, "confirmed", EVENT, "ana K deleted again by user/eve"),
    ],
)
def test_nobody_is_named_who_did_something_else(
    what: str, witness: str, event: Event | None, line: str
) -> None:
    change = Change(ONE, "one", "ana", "K", what, witness=witness, event=event)
    assert iam_audit.change_line(change) == f"{ONE} one {line}"


# --- events of CloudTrail ---------------------------------------------------------------------------------------------


RECORD: Json = event("DeleteUser", "2024-05-06T07:08:09Z", user="ana")["CloudTrailEvent"]
# AWS's own word for root where it is the user that an MFA device is for:
# https://docs.aws.amazon.com/awscloudtrail/latest/userguide/cloudtrail-event-reference-aws-console-sign-in-events.html
ROOT_ARN = f"arn:aws:iam::{ELEVEN}:root"
OF_ROOT = {"type": "Root", "arn": ROOT_ARN, "accountId": ELEVEN}
OF_ROLE = {
    "type": "AssumedRole",
    "arn": ALICE,
    "sessionContext": {"sessionIssuer": {"userName": "Admin"}},
}
RECORDS: dict[str, tuple[Json, dict[str, str]]] = {
    "named user": ({}, {"user": "ana", "actor": ALICE, "key_id": "", "status": ""}),
    "caller on itself": (
        {
            "requestParameters": None,
            "userIdentity": {"type": "IAMUser", "userName": "bob", "arn": "arn:bob"},
        },
        {"user": "bob", "actor": "arn:bob"},
    ),
    "a caller's name is not the target's": (
        {"userIdentity": {"type": "IAMUser", "userName": "bob", "arn": "arn:bob"}},
        {"user": "ana", "actor": "arn:bob"},
    ),
    "a role's session is no user": (
        {"requestParameters": {"accessKeyId": "K"}, "userIdentity": OF_ROLE},
        {"user": "", "key_id": "K"},
    ),
    "root on itself": (
        {"requestParameters": {"accessKeyId": "K"}, "userIdentity": OF_ROOT},
        {"user": ROOT, "key_id": "K"},
    ),
    "root on a user": ({"userIdentity": OF_ROOT}, {"user": "ana"}),
    "root's session by AssumeRoot": (
        {
            "requestParameters": None,
            "userIdentity": {**OF_ROOT, "sessionContext": {"assumedRoot": "true"}},
        },
        {"user": ROOT, "actor": "root session (AssumeRoot)"},
    ),
    "root's session by AssumeRoot, as a boolean": (
        {
            "requestParameters": None,
            "userIdentity": {**OF_ROOT, "sessionContext": {"assumedRoot": True}},
        },
        {"user": ROOT, "actor": "root session (AssumeRoot)"},
    ),
    "AWS's name for root": (
        {
            "requestParameters": {"userName": "AWS ROOT USER", "serialNumber": "x"},
            "userIdentity": OF_ROOT,
        },
        {"user": ROOT},
    ),
    "key of the response": (
        {
            "responseElements": {
                "accessKey": {"accessKeyId": "K", "userName": "ana", "status": "Active"}
            }
        },
        {"user": "ana", "key_id": "K"},
    ),
    "user of the response": (
        {
            "requestParameters": None,
            "userIdentity": OF_ROLE,
            "responseElements": {"accessKey": {"accessKeyId": "K", "userName": "ana"}},
        },
        {"user": "ana", "key_id": "K"},
    ),
    "key and status of the request": (
        {"requestParameters": {"userName": "ana", "accessKeyId": "K", "status": "Inactive"}},
        {"user": "ana", "key_id": "K", "status": "Inactive"},
    ),
    "API key of the response": (
        {
            "requestParameters": {"userName": "ana", "serviceName": BEDROCK},
            "responseElements": {
                "serviceSpecificCredential": {
                    "serviceSpecificCredentialId": "ACCA1",
                    "serviceName": BEDROCK,
                    "userName": "ana",
                    "status": "Active",
                }
            },
        },
        {"user": "ana", "key_id": "ACCA1", "status": "", "service_name": BEDROCK},
    ),
    "API key of the request": (
        {
            "requestParameters": {"serviceSpecificCredentialId": "ACCA1", "status": "Inactive"},
            "userIdentity": {"type": "IAMUser", "userName": "bob", "arn": "arn:bob"},
        },
        {"user": "bob", "key_id": "ACCA1", "status": "Inactive", "service_name": ""},
    ),
    "certificate of the response": (
        {
            "requestParameters": {"certificateBody": "..."},
            "userIdentity": OF_ROLE,
            "responseElements": {"certificate": {"certificateId": "C", "userName": "ana"}},
        },
        {"user": "ana", "key_id": "C"},
    ),
    "certificate of the request": (
        {"requestParameters": {"userName": "ana", "certificateId": "C", "status": "Active"}},
        {"user": "ana", "key_id": "C", "status": "Active"},
    ),
    "an AWS service as the caller": (
        {"userIdentity": {"type": "AWSService", "invokedBy": "sso.amazonaws.com"}},
        {"actor": "sso.amazonaws.com"},
    ),
    "nothing known of the caller": (
        {"userIdentity": None, "sourceIPAddress": None},
        {"actor": "", "source_ip": ""},
    ),
    "IAM in China": ({"eventSource": "iam.cn-north-1.amazonaws.com.cn"}, {"user": "ana"}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_an_event_is_read_from_its_record(name: str) -> None:
    changed, expected = RECORDS[name]
    found = iam_audit.event_of({**RECORD, **changed})
    assert found is not None
    assert found.time == datetime(2024, 5, 6, 7, 8, 9, tzinfo=timezone.utc)
    assert found.name == "DeleteUser"
    assert found.id == RECORD["eventID"]
    assert {field: getattr(found, field) for field in expected} == expected


@pytest.mark.parametrize(
    "changed",
    [{"errorCode": "AccessDenied"}, {"errorCode": "NoSuchEntityException", "errorMessage": "gone"}]
    + [
        {"eventSource": source}
        for source in ("transfer.amazonaws.com", "identitystore.amazonaws.com", "iamx.example")
    ],
)
def test_failed_calls_and_other_services_are_no_events(changed: Json) -> None:
    assert iam_audit.event_of({**RECORD, **changed}) is None


# --- earlier runs, whole and damaged ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an earlier run, to be copied and spoiled: keys of root and of users, root with and without MFA."""
    nobody, bob = user(ROOT), user("bob", key(DAY, key_id=key_id("BOB")), password=True)
    ana = user("ana", key(DAY, key_id=key_id("ANA")))
    root_with_key = user(ROOT, key(DAY, key_id=ROOT_KEYS[0]), password=True, mfa=["Virtual"])
    accounts = {
        ONE: ("payments", [nobody, ana, bob]),
        TWO: ("root", [user(ROOT, password=True), bob]),
        THREE: ("rootless", [bob]),
        FOUR: ("root-key", [root_with_key]),
        FIVE: ("empty", [nobody]),  # root has a row there, and nobody has anything
    }
    outcomes = [
        audited(*users, account=Account(one, name, "ACTIVE"))
        for one, (name, users) in accounts.items()
    ]
    return write_run(tmp_path_factory.mktemp("base"), outcomes)


def without_accounts(folder: Path) -> None:
    path = folder / "summary.json"
    summary = json.loads(path.read_text("utf-8"))
    del summary["accounts"]
    path.write_text(json.dumps(summary), "utf-8")


CSV, SUMMARY = f"accounts/{ONE}.csv", "summary.json"
DAMAGES: dict[str, tuple[str, Damage]] = {
    "header": (CSV, rewritten(CSV, replaced(b"username", b"user"))),
    "row of another account": (
        CSV,
        rewritten(CSV, replaced(f"\n{ONE}".encode(), f"\n{TWO}".encode())),
    ),
    "row missing in the middle": (
        CSV,
        rewritten(CSV, lambda text: re.sub(rb"\n.*,ana,.*", b"", text)),
    ),
    "row missing at the end": (
        CSV,
        rewritten(CSV, lambda text: text[: text[:-1].rindex(b"\n") + 1]),
    ),
    "truncated in a row": (CSV, rewritten(CSV, lambda text: text[:-40])),
    "truncated in the last word": (CSV, rewritten(CSV, lambda text: text[:-2])),
    "empty": (CSV, rewritten(CSV, lambda _: b"")),
    "zeros": (CSV, rewritten(CSV, lambda text: b"\0" * len(text))),
    "a cell more": (CSV, rewritten(CSV, replaced(b",Active,", b",Active,x,"))),
    "no status": (CSV, rewritten(CSV, replaced(b",Active,", b",,"))),
    "unknown word": (CSV, rewritten(CSV, replaced(b",Configurada,", b",Configured,"))),
    "not UTF-8": (CSV, rewritten(CSV, replaced(b"payments", b"pa\xffyments"))),
    "missing": (CSV, lambda folder: (folder / CSV).unlink()),
    "no JSON": (SUMMARY, rewritten(SUMMARY, lambda text: text[:-20])),
    "summary not UTF-8": (SUMMARY, rewritten(SUMMARY, replaced(b"payments", b"pa\xffyments"))),
    "summary is a list": (SUMMARY, rewritten(SUMMARY, lambda text: b"[" + text + b"]")),
    "summary without accounts": (SUMMARY, without_accounts),
    "another format": (SUMMARY, lambda folder: edit_summary(folder, format=999)),
    "of another tool": (SUMMARY, lambda folder: edit_summary(folder, tool="other")),
    "no date": (SUMMARY, lambda folder: edit_summary(folder, started="yesterday")),
    "an account's unknown level": (
        SUMMARY,
        rewritten(SUMMARY, replaced(b'"phase2": "Advanced"', b'"phase2": "Foo"')),
    ),
    "text for a number": (SUMMARY, lambda folder: edit_summary(folder, max_key_age_days="90")),
    "null for a number": (SUMMARY, rewritten(SUMMARY, replaced(b'"users": 2', b'"users": null'))),
    "true for a number": (SUMMARY, lambda folder: edit_summary(folder, max_key_age_days=True)),
    "a number for true": (SUMMARY, rewritten(SUMMARY, replaced(b'"root": true', b'"root": 1'))),
    "text for a figure": (
        SUMMARY,
        rewritten(SUMMARY, replaced(b'"active_keys": 5', b'"active_keys": "5"')),
    ),
    "null for a key count": (
        SUMMARY,
        rewritten(SUMMARY, replaced(b'"access_keys": 2', b'"access_keys": null')),
    ),
    "null for a name": (
        SUMMARY,
        rewritten(SUMMARY, replaced(b'"name": "payments"', b'"name": null')),
    ),
    "an ID of 11 digits": (
        SUMMARY,
        rewritten(SUMMARY, replaced(f'"id": "{FIVE}"'.encode(), f'"id": "{FIVE[1:]}"'.encode())),
    ),
    "a path for an ID": (
        SUMMARY,
        rewritten(SUMMARY, replaced(f'"id": "{FIVE}"'.encode(), b'"id": "../../11111"')),
    ),
    "an ID out of scope": (
        SUMMARY,
        lambda folder: edit_summary(folder, out_of_scope=[{"id": "1", "name": "x"}]),
    ),
    "nested too deep": (SUMMARY, rewritten(SUMMARY, lambda _: b"[" * 100_000)),
    "a folder in its place": (SUMMARY, in_its_place(SUMMARY, Path.mkdir)),
    "a FIFO for the summary": (SUMMARY, in_its_place(SUMMARY, os.mkfifo)),
    "a FIFO for a CSV": (CSV, in_its_place(CSV, os.mkfifo)),
    "a date before the first": (
        SUMMARY,
        lambda folder: edit_summary(folder, started="0001-01-01T00:00:00+14:00"),
    ),
}


def opened(output_dir: Path) -> Tracking:
    history = iam_audit.History(iam_audit.finished_runs(output_dir, NOW + DAY), "o-test123456")
    return iam_audit.open_tracking(history, None, Scope(), NOW)


def passed_over(output_dir: Path, account_id: str = ONE) -> str:
    """What is said of the only run where it can be compared with in vain."""
    found = iam_audit.baseline_of(opened(output_dir), account_id)
    assert found.run is None
    [message] = found.passed_over
    return str(message)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed_and_the_file_named(base: Path, tmp_path: Path, name: str) -> None:
    damaged, damage = DAMAGES[name]
    folder = spoiled(base, tmp_path, damage)
    assert passed_over(tmp_path).startswith(f"Cannot read the earlier run's {folder / damaged}: ")
    with pytest.raises(iam_audit.AuditError, match=re.escape(str(folder / damaged))):
        iam_audit.open_tracking(iam_audit.History((), "o-test123456"), folder, Scope(), NOW)


@pytest.mark.parametrize("name", [name for name, (file, _) in DAMAGES.items() if file == SUMMARY])
def test_a_damaged_summary_is_known_when_the_run_starts(
    base: Path, tmp_path: Path, name: str
) -> None:
    spoiled(base, tmp_path, DAMAGES[name][1])
    tracking = opened(tmp_path)
    assert (tracking.earlier, tracking.runs) == (None, [])
    assert len(tracking.unreadable) == 1


def test_without_damage_all_is_well(base: Path, tmp_path: Path) -> None:
    """Else the tests around this one would say nothing."""
    folder = spoiled(base, tmp_path, lambda _: None)
    tracking = opened(tmp_path)
    assert tracking.earlier is not None
    assert tracking.earlier.folder == folder
    assert set(tracking.earlier.accounts) >= {ONE, TWO, THREE, FOUR, FIVE}
    for account_id in (ONE, TWO, THREE, FOUR, FIVE):
        assert iam_audit.baseline_of(tracking, account_id).run == tracking.earlier
    named = iam_audit.open_tracking(iam_audit.History((), "o-test123456"), folder, Scope(), NOW)
    assert named.earlier == tracking.earlier


@pytest.mark.parametrize("account_id", [ONE, FIVE])
def test_a_csv_cut_anywhere_is_noticed(base: Path, tmp_path: Path, account_id: str) -> None:
    """A change would be made of it. Where only the last line feed is gone all cells are there still."""
    path = spoiled(base, tmp_path, lambda _: None) / "accounts" / f"{account_id}.csv"
    whole = path.read_bytes()
    for size in range(len(whole) - 1):
        path.write_bytes(whole[:size])
        assert str(path) in passed_over(tmp_path, account_id)


@pytest.mark.parametrize("account_id", [TWO, THREE])
def test_a_missing_root_row_is_neither_fixed_nor_new(base: Path, account_id: str) -> None:
    """Root has a password and no MFA in the one report (TWO's earlier, THREE's new one), and no row in the other."""
    bob = user("bob", key(DAY, key_id=key_id("BOB")), password=True)
    users = [bob] if account_id == TWO else [user(ROOT, password=True), bob]
    tracking = opened(base.parent)
    iam_audit.track_account(
        tracking, audited(*users, account=Account(account_id, "one", "ACTIVE")), []
    )
    assert set(tracking.compared) == {account_id}
    assert (tracking.mfa_fixed, tracking.mfa_new) == (0, [])


@pytest.mark.parametrize(("name", "figures"), [("robert", (0, 0)), ("someone", (1, 1))])
def test_a_renamed_user_without_mfa_is_neither_fixed_nor_new(
    base: Path, name: str, figures: tuple[int, int]
) -> None:
    """The key tells that it is the same user; whoever has another key is somebody else."""
    made = key(DAY, key_id=key_id("BOB" if name == "robert" else "NEW"))
    tracking = opened(base.parent)
    account = Account(THREE, "one", "ACTIVE")
    iam_audit.track_account(tracking, audited(user(name, made, password=True), account=account), [])
    assert (tracking.mfa_fixed, len(tracking.mfa_new)) == figures


# --- the tables of earlier runs: other kinds of credentials, administrators, new findings -----------------------------


CREDENTIALS = (
    "account_id,account_name,account_email,ou,production,username,owner,administrator,kind,credential_id,status,"
    "created_date,age_days,last_used_date,unused_days,service_name,expires,mfa_status"
)
CREDENTIALS_CSV, FINDINGS_CSV = "credentials.csv", "findings.csv"
LISTING = "ListServiceSpecificCredentials"


def api_key(name: str, old: timedelta = 9 * DAY, status: str = "Active") -> Credential:
    return Credential(name, status, NOW - old, None, BEDROCK, API_KEY)


def certificate(slot: int, old: timedelta = 9 * DAY, status: str = "Active") -> Credential:
    slot_name = iam_audit.CERTIFICATES[slot]
    return Credential(slot_name, status, NOW - old, None, "", CERTIFICATE)


def person(
    name: str, *credentials: Credential, password: bool = False, administrator: str = "false"
) -> User:
    access_keys = [each for each in credentials if each.kind == iam_audit.ACCESS_KEY]
    others = tuple(each for each in credentials if each.kind != iam_audit.ACCESS_KEY)
    made = user(name, *access_keys, password=password)
    return dataclasses.replace(made, others=others, administrator=administrator)


def credential_rows(found: AuditedAccount) -> Iterator[list[str]]:
    """The account's rows of credentials.csv, as far as they are read back."""
    for one in found.users:
        credentials = [*one.keys, *one.others]
        if one.password:
            credentials.insert(0, Credential("", "Active", NOW, None, "", "password"))
        for each in credentials:
            whose = [found.account.id, "one", "", "", "false", one.name, "", one.administrator]
            what = [each.kind, each.id, each.status, iam_audit.iso(each.created)]
            yield [*whose, *what, *[""] * 6]


def write_tables(folder: Path, *outcomes: AuditedAccount) -> None:
    rows = itertools.chain.from_iterable(map(credential_rows, outcomes))
    iam_audit.write_csv(folder / CREDENTIALS_CSV, CREDENTIALS.split(","), rows)
    found = run_of(outcomes)
    findings = (iam_audit.finding_row(each, found) for each in found.findings)
    iam_audit.write_csv(folder / FINDINGS_CSV, iam_audit.FINDINGS_COLUMNS, findings)


def denied_then(folder: Path) -> None:
    summary = json.loads((folder / SUMMARY).read_text("utf-8"))
    for entry in summary["accounts"]:
        entry["not_checked"] = {LISTING: "AccessDenied"}
    edit_summary(folder, accounts=summary["accounts"])


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


class Compared(NamedTuple):
    tracking: Tracking
    findings: list[Finding]

    @property
    def changes(self) -> list[str]:
        return ["|".join(change[2:7]) for change in self.tracking.changes]

    @property
    def new(self) -> dict[str, bool | None]:
        """What is new about each finding, by its user or key."""
        return {each.key.id if each.key else each.user: each.new for each in self.findings}


def compared(
    reports: Path,
    then: Sequence[User],
    now: Sequence[User],
    damage: Damage | None = None,
    denied_now: bool = False,
) -> Compared:
    """An account compared with a run that began at NOW; then that run's files are damaged."""
    before = audited(*then, account=ACCOUNT)
    folder = write_run(reports, [before])
    write_tables(folder, before)
    if damage:
        damage(folder)
    tracking = opened(reports)
    not_checked = {LISTING: "AccessDenied"} if denied_now else {}
    found = dataclasses.replace(audited(*now, account=ACCOUNT), not_checked=not_checked)
    findings = list(iam_audit.findings_of(found, plan(), NOW))
    return Compared(tracking, [*iam_audit.track_account(tracking, found, findings)])


OLD, NEW = api_key("OLD"), api_key("NEW", old=-DAY)
OTHERS: dict[str, tuple[list[Credential], list[Credential], list[str]]] = {
    "nothing": ([OLD, certificate(0)], [OLD, certificate(0)], []),
    # Created before the baseline began, and not there then: dates do not tell, the table does.
    "API key": ([], [OLD], ["ana|OLD|api-key-created||Active"]),
    "API key deleted": ([OLD], [], ["ana|OLD|api-key-deleted|Active|"]),
    "API key deactivated": (
        [OLD],
        [api_key("OLD", status="Inactive")],
        ["ana|OLD|api-key-deactivated|Active|Inactive"],
    ),
    "password for a service": (
        [],
        [dataclasses.replace(OLD, kind=iam_audit.SERVICE_PASSWORD)],
        ["ana|OLD|service-password-created||Active"],
    ),
    "certificate": (
        [certificate(0)],
        [certificate(0, 8 * DAY), certificate(1)],
        [f"ana|{FIRST_CERTIFICATE}|signing-certificate-created||Active"],
    ),
    "access key and API key": (
        [key(DAY, key_id="K"), OLD],
        [NEW],
        [
            "ana|K|access-key-deleted|Active|",
            "ana|NEW|api-key-created||Active",
            "ana|OLD|api-key-deleted|Active|",
        ],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_credentials_are_compared_with_those_of_the_earlier_table(
    tmp_path: Path, name: str
) -> None:
    then, now, expected = OTHERS[name]
    found = compared(
        tmp_path, [user(ROOT), person("ana", *then)], [user(ROOT), person("ana", *now)]
    )
    assert found.changes == expected
    assert found.tracking.passed_over == {}


# Why the earlier API keys (and, without the table, the certificates) are unknown; the file that is then named.
UNKNOWN_THEN: dict[str, tuple[Damage, bool, str]] = {
    "a run of before": (without(CREDENTIALS_CSV), True, ""),
    "denied then": (denied_then, False, ""),
    "cut short": (rewritten(CREDENTIALS_CSV, lambda text: text[:-30]), True, CREDENTIALS_CSV),
    "another header": (
        rewritten(CREDENTIALS_CSV, replaced(b"credential_id", b"credential")),
        True,
        CREDENTIALS_CSV,
    ),
    "not UTF-8": (rewritten(CREDENTIALS_CSV, replaced(b"Active", b"\xff")), True, CREDENTIALS_CSV),
    "empty": (rewritten(CREDENTIALS_CSV, lambda _: b""), True, CREDENTIALS_CSV),
    "a FIFO": (
        in_its_place(CREDENTIALS_CSV, os.mkfifo),
        True,
        CREDENTIALS_CSV,
    ),
}


@pytest.mark.parametrize("name", UNKNOWN_THEN)
def test_where_it_is_unknown_what_there_was_dates_alone_tell(tmp_path: Path, name: str) -> None:
    damage, certificates_too, named = UNKNOWN_THEN[name]
    then = [person("ana", key(DAY, key_id="K"), api_key("GONE"), certificate(0))]
    now = [person("ana", key(DAY, key_id="K"), OLD, NEW, certificate(0, -DAY))]
    found = compared(tmp_path, then, now, damage)
    created = f"ana|{FIRST_CERTIFICATE}|signing-certificate-created||Active"
    replaced_ = [created.replace("created||Active", "deleted|Active|"), created]
    certificates = [created] if certificates_too else replaced_
    assert sorted(found.changes) == sorted(["ana|NEW|api-key-created||Active", *certificates])
    assert [named in message for message in found.tracking.passed_over] == [True] * bool(named)


def test_where_api_keys_cannot_be_read_now_none_is_gone(tmp_path: Path) -> None:
    then, now = [person("ana", OLD, certificate(0))], [person("ana")]
    found = compared(tmp_path, then, now, denied_now=True)
    assert found.changes == [f"ana|{FIRST_CERTIFICATE}|signing-certificate-deleted|Active|"]


def test_dates_tell_the_new_api_keys_of_an_account_without_a_baseline(base: Path) -> None:
    """As they do for access keys. Passwords for services and certificates do not count as new keys."""
    password = dataclasses.replace(NEW, id="PASSWORD", kind=iam_audit.SERVICE_PASSWORD)
    ana = person("ana", key(-DAY, key_id="K"), OLD, NEW, password, certificate(0, -DAY))
    other = Account(SIX, "six", "ACTIVE")
    events = (
        happened(f"Create{SERVICE}", 1, key_id="WENT")._replace(time=NOW, service_name=BEDROCK),
        happened(f"Delete{SERVICE}", 1, key_id="WENT")._replace(time=NOW + DAY),
    )
    found = dataclasses.replace(audited(ana, account=other), trail=Trail(events))
    tracking = opened(base.parent)
    assert iam_audit.track_account(tracking, found, []) == []
    assert [(each.key_id, each.change) for each in tracking.new_keys_elsewhere] == [
        ("K", "access-key-created"),
        ("NEW", "api-key-created"),
        ("WENT", "api-key-came-and-went"),
    ]
    assert (tracking.changes, tracking.compared) == ([], {})


ADMINISTRATORS: dict[str, tuple[list[User], list[User], list[str]]] = {
    "became one": (
        [person("ana", OLD)],
        [person("ana", OLD, administrator="true")],
        ["ana||administrator-added|false|true"],
    ),
    "with another name": (
        [person("ana", OLD)],
        [person("bea", OLD, administrator="true")],
        ["bea||user-renamed|ana|bea", "bea||administrator-added|false|true"],
    ),
    "new": (
        [],
        [person("ana", administrator="true")],
        ["ana||user-created||", "ana||administrator-added||true"],
    ),
    "was one": ([person("ana", OLD, administrator="true")],) * 2 + ([],),
    "unknown before": (
        [person("ana", OLD, administrator="unknown")],
        [person("ana", OLD, administrator="true")],
        [],
    ),
    "without a row before": ([person("ana")], [person("ana", administrator="true")], []),
    "unknown now": ([person("ana", OLD)], [person("ana", OLD, administrator="unknown")], []),
    "no more": ([person("ana", OLD, administrator="true")], [person("ana", OLD)], []),
    "root, whose row the report lacked": ([], [person(ROOT, administrator="true")], []),
}


@pytest.mark.parametrize("name", ADMINISTRATORS)
def test_who_became_an_administrator(tmp_path: Path, name: str) -> None:
    then, now, expected = ADMINISTRATORS[name]
    assert compared(tmp_path, then, now).changes == expected


def test_only_of_new_users_is_it_certain_without_the_table(tmp_path: Path) -> None:
    then = [person("ana", OLD)]
    now = [person(name, administrator="true") for name in ("ana", "zoe")]
    found = compared(tmp_path, then, now, without(CREDENTIALS_CSV))
    assert found.changes == ["zoe||user-created||", "zoe||administrator-added||true"]


# --- which findings are new


def test_a_finding_is_new_if_the_earlier_table_lacks_it(tmp_path: Path) -> None:
    """By its name, the user and the key; that ana has no MFA any more does not hide that bob had none before."""
    aged = key(100 * DAY, key_id="AGED")
    then = [user("ana", aged, mfa=["Virtual"], password=True), user("bob", password=True)]
    now = [
        user("ana", aged, key(400 * DAY, key_id="SECOND"), password=True),
        user("bob", password=True),
        user("new", password=True),
    ]
    found = compared(tmp_path, then, now)
    expected = {"ana": True, "AGED": False, "SECOND": True, "bob": False, "new": True}
    assert found.new == expected
    assert found.tracking.urgent_new == []  # none is of priority 1


def test_another_finding_of_the_same_key_is_new(tmp_path: Path) -> None:
    then = user("ana", key(100 * DAY, key_id="K"))
    now = user("ana", key(100 * DAY, DAY, key_id="K"))
    assert compared(tmp_path, [then], [now]).new == {"K": True}  # key-in-use, before it unused-key


def test_a_renamed_user_has_their_old_findings(tmp_path: Path) -> None:
    aged = key(100 * DAY, key_id="AGED")
    then = [user("ana", aged, password=True)]
    now = [user("ana", password=True), user("bea", aged, password=True)]
    found = compared(tmp_path, then, now)
    assert found.new == {"ana": True, "bea": False, "AGED": False}


def test_roots_keys_are_told_apart_by_their_dates(tmp_path: Path) -> None:
    """Their order means nothing."""
    first, second = iam_audit.ROOT_ACCESS_KEYS
    then = [user(ROOT, key(DAY, key_id=first))]
    now = [user(ROOT, key(2 * DAY, key_id=first), key(DAY, key_id=second))]
    found = compared(tmp_path, then, now)
    assert found.new == {first: True, second: False}
    assert [each.key.id for each in found.tracking.urgent_new if each.key] == [first]


def test_of_a_root_that_the_report_lacked_all_is_new(tmp_path: Path) -> None:
    now = [user(ROOT, key(DAY, key_id=ROOT_KEYS[0]))]
    assert compared(tmp_path, [], now).new == {ROOT_KEYS[0]: True}


@pytest.mark.parametrize(
    "damage", [without(FINDINGS_CSV), rewritten(FINDINGS_CSV, lambda text: text[:-50])]
)
def test_without_the_earlier_table_nobody_knows_what_is_new(tmp_path: Path, damage: Damage) -> None:
    """Then what is urgent is told once more."""
    then = [user(ROOT, key(DAY, key_id=ROOT_KEYS[0]))]
    found = compared(tmp_path, then, then, damage)
    assert found.new == {ROOT_KEYS[0]: None}
    assert found.tracking.urgent_new == found.findings
    assert all(FINDINGS_CSV in message for message in found.tracking.passed_over)
    assert len(found.tracking.passed_over) == 1


def finding_about(one: User, credential: Credential) -> Finding:
    """A finding about another credential than an access key."""
    rule = iam_audit.Rule("api-key", 3, "", lambda _: True, "")
    return Finding(3, "api-key", ACCOUNT, False, one.name, credential, (rule,))


@pytest.mark.parametrize(("damage", "known"), [(None, True), (without(CREDENTIALS_CSV), False)])
def test_where_api_keys_were_unknown_their_dates_tell_what_is_new(
    tmp_path: Path, damage: Damage | None, known: bool
) -> None:
    ana = person("ana", OLD, NEW, certificate(0))
    found = compared(tmp_path, [person("ana", OLD, certificate(0))], [ana], damage)
    about = [finding_about(ana, each) for each in (NEW, OLD)]
    judged = iam_audit.track_account(opened(tmp_path), audited(ana, account=ACCOUNT), about)
    assert [each.new for each in judged] == [True, True if known else None]
    assert found.changes == ["ana|NEW|api-key-created||Active"]


def test_what_an_exception_covers_is_not_urgent(tmp_path: Path) -> None:
    found = compared(tmp_path, [], [user(ROOT, key(DAY, key_id=ROOT_KEYS[0]))])
    [finding] = found.findings
    covered: Any = object()
    tracking = opened(tmp_path)
    iam_audit.track_account(
        tracking, audited(user(ROOT), account=ACCOUNT), [finding._replace(exception=covered)]
    )
    assert tracking.urgent_new == []
    iam_audit.track_account(tracking, audited(user(ROOT), account=ACCOUNT), [finding])
    assert len(tracking.urgent_new) == 1


def test_the_tables_of_a_run_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = [Account(one, "one", "ACTIVE") for one in (ONE, TWO)]
    outcomes = [audited(person("ana", OLD), account=one) for one in accounts]
    write_tables(write_run(tmp_path, outcomes), *outcomes)
    opened_files, table_rows = list[str](), iam_audit.table_rows

    def reading(path: Path, *columns: str) -> Iterator[tuple[str, ...]]:
        opened_files.append(path.name)
        return table_rows(path, *columns)

    monkeypatch.setattr(iam_audit, "table_rows", reading)
    tracking = opened(tmp_path)
    assert opened_files == []
    for one in outcomes:
        iam_audit.track_account(tracking, one, [])
    assert opened_files == [FINDINGS_CSV, CREDENTIALS_CSV]
    assert tracking.changes == []


# --- users who were renamed, or came and went, as CloudTrail tells ----------------------------------------------------


def renamed(old: str, new: str, day: int = 2) -> Event:
    return happened("UpdateUser", day, old)._replace(new_name=new)


CONSOLE = UserState(ON, "None", {})
RENAMES: dict[str, tuple[dict[str, UserState], dict[str, UserState], list[Event], list[str]]] = {
    "without any key": (
        {"ana": CONSOLE},
        {"bea": CONSOLE},
        [renamed("ana", "bea")],
        ["bea||user-renamed|ana|bea"],
    ),
    "in two steps, typed in other letter case": (
        {"ana": CONSOLE},
        {"Cleo": CONSOLE},
        [renamed("ANA", "bea", 2), renamed("Bea", "cleo", 3)],
        ["Cleo||user-renamed|ana|Cleo"],
    ),
    "and another took the name": (
        {"ana": CONSOLE},
        {"ana": state(), "bea": CONSOLE},
        [renamed("ana", "bea")],
        ["ana||user-created||", "bea||user-renamed|ana|bea"],
    ),
    "and deleted": (
        {"ana": CONSOLE},
        {},
        [renamed("ana", "bea"), happened("DeleteUser", 3, "bea")],
        ["ana||user-deleted||"],
    ),
    "and deleted, and another takes the new name": (
        {"ana": CONSOLE},
        {"bea": CONSOLE},
        [renamed("ana", "bea"), happened("DeleteUser", 3, "bea"), happened("CreateUser", 4, "bea")],
        ["ana||user-deleted||", "bea||user-created||"],
    ),
    "in letter case alone": (
        {"Ana": CONSOLE},
        {"ana": CONSOLE},
        [renamed("Ana", "ana")],
        ["ana||user-renamed|Ana|ana"],
    ),
    "by a change of the path alone": (
        {"ana": CONSOLE},
        {"bea": CONSOLE},
        [happened("UpdateUser", 2, "ana")],
        ["ana||user-deleted||", "bea||user-created||"],
    ),
    "and the key tells": (
        {"ana": state(K="Active")},
        {"bea": state(K="Active")},
        [],
        ["bea||user-renamed|ana|bea"],
    ),
}


@pytest.mark.parametrize("name", RENAMES)
def test_a_renamed_user_is_the_same_user(name: str) -> None:
    before, after, events, expected = RENAMES[name]
    persons = list(iam_audit.persons_of(before, after, events))
    found = list(iam_audit.changes_between(ACCOUNT, persons))
    assert ["|".join(change[2:7]) for change in found] == expected


def test_a_rename_confirms_itself_in_any_letter_case() -> None:
    change = Change(ONE, "one", "bea", change="user-renamed", before="ana", after="bea")
    event = renamed("Ana", "BEA")
    seen = iam_audit.with_witness(change, Trail((event, happened("UpdateUser", 3, "bea"))))
    assert (seen.witness, seen.event) == ("confirmed", event)
    assert iam_audit.with_witness(change, Trail(())).witness == "not found"


def test_events_tell_of_users_in_any_letter_case() -> None:
    change = Change(ONE, "one", "Ana", change="mfa-removed")
    event = happened("DeactivateMFADevice", 2, "ANA")
    assert iam_audit.with_witness(change, Trail((event,))).witness == "confirmed"


@pytest.mark.parametrize(
    ("names", "before", "expected"),
    [
        (["CreateUser", "CreateLoginProfile", "DeleteUser"], {}, 1),
        (["CreateUser", "DeleteUser"], {}, 0),
        (["CreateLoginProfile", "DeleteUser"], {}, 0),
        (["CreateUser", "CreateLoginProfile"], {}, 0),
        (["CreateUser", "CreateLoginProfile", "DeleteUser"], {"EVE": state()}, 0),
    ],
)
def test_a_console_user_who_came_and_went(
    names: list[str], before: dict[str, UserState], expected: int
) -> None:
    events = [happened(name, day, "eve") for day, name in enumerate(names, 1)]
    found = list(iam_audit.came_and_went(ACCOUNT, before, before, events))
    assert [(change.user, change.change) for change in found] == [
        ("eve", "user-came-and-went")
    ] * expected
    assert all(iam_audit.with_witness(each, Trail()).witness == "confirmed" for each in found)


def test_an_earlier_account_has_one_of_four_results() -> None:
    entry = {"id": ONE, "name": "one", "result": "auditedd"}
    with pytest.raises(ValueError, match="auditedd"):
        iam_audit.earlier_account(entry)

"""A small AWS for tests and measurements: STS, Organizations, IAM and CloudTrail behind one URL, over HTTP or TLS.

It speaks the real wire protocols (query/XML and JSON 1.1) and does what moto cannot: a root row in credential reports,
reports that take their time, roles that are denied, session policies that bind, SigV4 signatures that are verified,
throttling for each account, dropped connections, servers that never answer, LookupEvents. A request costs it a
fraction of what it costs botocore, so that a program can be measured against it.

As a process:   python tests/endpoint.py --world world.json [--port 0] [--cert cert.pem --key key.pem]
                prints its URL on the first line of stdout; ends on SIGTERM, and when its stdin is closed, so that no
                orphan is left.
In a test:      with Endpoint(world(account("111111111111", "payments", users=[user("alice")]))) as endpoint:
                    subprocess.run([...], env=endpoint.env())
                    endpoint.stats()["requests"]["ListUsers"]

The world is a JSON object; the builders below (`world`, `account`, `root`, `user`, `key`, `event`, `rule`, ...) make it
and are its documentation. GET /_stats gives the statistics, DELETE /_stats starts them anew, POST /_world replaces
top-level keys of the world, POST /_release sends the replies that are held.

Whom a request is for is read from its access key ID, which holds the account's ID; for AssumeRole it is the account of
the role.

Order of the file: builders, the world, statistics, requests and signatures, services, HTTP, process, helper for tests.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import csv
import dataclasses
import fnmatch
import functools
import hashlib
import hmac
import html
import http.client
import io
import json
import math
import os
import random
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

Json = dict[str, Any]
Moment = str | datetime
TIMEOUT = 600  # seconds; ends what hangs. Nothing else takes that long, even on a machine ten times as slow.

# --- builders ---------------------------------------------------------------------------------------------------------

CREATED = "2024-01-31T12:00:00Z"
HOME_REGIONS = {"aws": "us-east-1", "aws-cn": "cn-north-1", "aws-us-gov": "us-gov-west-1"}

WORLD_DEFAULTS: Json = {
    "partition": "aws",
    "management": "999999999999",
    "organization": "o-test123456",  # null: AWSOrganizationsNotInUseException
    "caller": None,  # {"account": ..., "arn": ...}; the default is user auditor of the management account
    "accounts": [],  # the management account is added in front if it is not among them, without the role
    "generate": [],  # one object or several, see GENERATE_DEFAULTS
    "page": 20,  # accounts a page of ListAccounts
    "empty_page": None,  # number of the page of ListAccounts (from 0) that comes empty, with a NextToken
    "omit": [],  # members of Account that ListAccounts leaves out: State, Status, Paths
    "policies": None,  # service control policies, see `policy`; default: FullAWSAccess at the root
    "ous": {},  # names of organizational units by ID; the others are called what their ID ends in
    "features": [],  # of ListOrganizationsFeatures: RootCredentialsManagement, RootSessions
    "latency": 0.0,  # seconds that every answer takes
    "verify_signatures": True,
    "session_seconds": 3600,  # after that a session is answered ExpiredToken
    "report_dates": "Z",  # or "+00:00": how dates in credential reports end
    "lookup_rate": 2.0,  # LookupEvents a second and account; null: no limit
    "rules": [],
    "faults": {},  # {"drop": share, "error500": share, "seed": 1}
    "record": False,  # keep time, account and action of every request
}
ACCOUNT_DEFAULTS: Json = {
    "id": None,
    "name": None,
    "state": "ACTIVE",
    "status": None,  # default: what AWS gave for that state
    "paths": None,  # default: directly below the root of the organization
    "role": "ok",  # or "denied"
    "external_id": None,  # AssumeRole without it is denied
    "report_delay": 0.0,  # seconds from the first GenerateCredentialReport to COMPLETE; null: never
    "report_time": None,  # GeneratedTime; default: when it was complete
    "report": None,  # text in place of the report, or {"account": whose ID the arns carry, "extra_columns": [...]}
    "rate": None,  # IAM calls a second, else Throttling
    "burst": None,  # calls that may come at once; default: rate
    "deny": [],  # actions that are denied, as by an SCP
    "root": None,  # default: root without credentials
    "email": None,  # default: the ID at example.com
    "users": [],
    "groups": [],  # see `group`
    "events": [],
}
GENERATE_DEFAULTS: Json = {
    "accounts": 0,
    "users": 0,
    "first": 1,  # IDs are 100000000000 + first, and so on: keep several generators apart
    "name": "account",  # names are this, a dash and a number
    "keys_per_user": 1,  # or a list: user n has the (n mod its length)th number of keys
    "missing_roles": 0.0,  # share of accounts without the role, spread evenly
    "account": {},  # what every account has besides: report_delay, rate, ...
}
RULE_DEFAULTS: Json = {
    "action": "*",
    "account": None,
    "user": None,
    "fields": {},
    "skip": 0,
    "times": None,
    "error": None,
    "drop": False,
    "hang": False,
    "hold": False,
    "raw": None,
    "status": 200,
    "delay": 0.0,
}


def iso(moment: Moment) -> str:
    """`moment` as the ISO 8601 text the world holds; seconds and UTC, as AWS gives it."""
    if isinstance(moment, str):
        return moment
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def key(
    key_id: str,
    *,
    status: str = "Active",
    created: Moment = CREATED,
    last_used: Moment | None = None,
    service: str | None = None,
    region: str | None = None,
) -> Json:
    """An access key; `service` and `region` are of its last use (default s3 in us-east-1)."""
    if not 16 <= len(key_id) <= 128:
        raise ValueError(
            f"{key_id}: botocore sends no such access key ID, it takes 16 to 128 characters"
        )
    used = last_used is not None
    return {
        "id": key_id,
        "status": status,
        "created": iso(created),
        "last_used": iso(last_used) if last_used is not None else None,
        "service": service or ("s3" if used else "N/A"),
        "region": region or ("us-east-1" if used else "N/A"),
    }


def certificate(*, active: bool = True, last_rotated: Moment = CREATED) -> Json:
    """An X.509 signing certificate, of a user or of root; here only the report shows it."""
    return {"active": active, "last_rotated": iso(last_rotated)}


def credential(
    credential_id: str,
    service: str = "bedrock.amazonaws.com",
    *,
    status: str = "Active",
    created: Moment = CREATED,
    expires: Moment | None = None,
) -> Json:
    """A service-specific credential: an API key, or a password of CodeCommit or Keyspaces."""
    return {
        "id": credential_id,
        "service": service,
        "status": status,
        "created": iso(created),
        "expires": iso(expires) if expires is not None else None,
    }


def group(name: str, *, attached: Iterable[str] = (), policies: Iterable[Json] = ()) -> Json:
    """A group; `attached` are ARNs of managed policies, `policies` the documents of inline ones."""
    return {"name": name, "attached": list(attached), "policies": list(policies)}


def user(
    name: str,
    *,
    path: str = "/",
    created: Moment = CREATED,
    password: bool = False,
    password_last_used: Moment | None = None,
    mfa: Iterable[str] = (),
    keys: Iterable[Json] = (),
    in_report: bool = True,
    in_list: bool = True,
    user_id: str | None = None,
    password_changed: Moment | None = None,
    credentials: Iterable[Json] = (),
    certificates: Iterable[Json] = (),
    tags: Iterable[tuple[str, str]] = (),
    groups: Iterable[str] = (),
    attached: Iterable[str] = (),
    policies: Iterable[Json] = (),
) -> Json:
    """An IAM user; `mfa` are serial numbers, `attached` and `policies` as of a `group`.

    With `in_report` False they are younger than the report, with `in_list` False deleted since. A renamed user
    keeps their `user_id`.
    """
    return {
        "name": name,
        "user_id": user_id or f"AIDA{zlib.crc32((name + iso(created)).encode()):016}",
        "path": path,
        "created": iso(created),
        "password": password,
        "password_last_used": iso(password_last_used) if password_last_used is not None else None,
        "mfa": list(mfa),
        "keys": list(keys),
        "in_report": in_report,
        "in_list": in_list,
        "password_changed": iso(password_changed or created),
        "credentials": list(credentials),
        "certificates": list(certificates),
        "tags": [list(tag) for tag in tags],
        "groups": list(groups),
        "attached": list(attached),
        "policies": list(policies),
    }


def root_key(
    *,
    active: bool = True,
    last_rotated: Moment = CREATED,
    last_used: Moment | None = None,
    service: str | None = None,
) -> Json:
    """An access key of root, which only the report shows."""
    return {
        "active": active,
        "last_rotated": iso(last_rotated),
        "last_used": iso(last_used) if last_used is not None else None,
        "service": service or ("s3" if last_used is not None else "N/A"),
    }


def root(
    *,
    password: bool | str = False,
    password_last_used: Moment | None = None,
    mfa: bool = False,
    virtual: bool = False,
    keys: Iterable[Json] = (),
    certificates: Iterable[Json] = (),
    created: Moment = CREATED,
) -> Json:
    """Root of an account; `password` may be "not_supported" as in older reports.

    `virtual` means that ListVirtualMFADevices shows its MFA device.
    """
    return {
        "password": password,
        "password_last_used": iso(password_last_used) if password_last_used is not None else None,
        "mfa": mfa or virtual,
        "virtual": virtual,
        "keys": list(keys),
        "certificates": list(certificates),
        "created": iso(created),
    }


def account(account_id: str, name: str, *, users: Iterable[Json] = (), **options: Any) -> Json:
    """An account; `options` are the other keys of ACCOUNT_DEFAULTS."""
    return checked(
        {"id": account_id, "name": name, "users": list(users), **options}, ACCOUNT_DEFAULTS
    )


def world(*accounts: Json, **options: Any) -> Json:
    """A world of these accounts; `options` are the other keys of WORLD_DEFAULTS."""
    return checked({"accounts": list(accounts), **options}, WORLD_DEFAULTS)


def generate(accounts: int, users: int, **options: Any) -> Json:
    """Accounts by formula, for `world(generate=...)`; `options` are the other keys of GENERATE_DEFAULTS."""
    return checked({"accounts": accounts, "users": users, **options}, GENERATE_DEFAULTS)


def policy(policy_id: str, name: str, content: Json | str, targets: Iterable[str]) -> Json:
    """A service control policy; `content` is the policy or any text, `targets` are IDs of the root, OUs or accounts."""
    return {
        "id": policy_id,
        "name": name,
        "content": content if isinstance(content, str) else json.dumps(content),
        "targets": list(targets),
    }


def rule(
    action: str,
    account_id: str | None = None,
    *,
    error: str | None = None,
    message: str = "made to fail",
    status: int | None = None,
    **options: Any,
) -> Json:
    """What happens to requests of `action` ("*": any), `account_id`, `user=` (UserName), `fields={name: value}`.

    One of `error=` (code, with `message` and `status`, default 400), `raw=` (body, with `status`, default 200),
    `drop=True` (closed without an answer), `hang=True` (never answered); or nothing but `delay=` (seconds more) or
    `hold=True` (answered at the next `Endpoint.release`), which go with an error or a body too. `skip=` lets that many
    pass first, `times=` ends it after so many. The first rule that matches counts.
    """
    made: Json = {"action": action, "account": account_id, **options}
    if error is not None:
        made["error"] = {"code": error, "message": message, "status": status or 400}
    elif status is not None:
        made["status"] = status
    return checked(made, RULE_DEFAULTS)


def event(
    name: str,
    when: Moment,
    *,
    actor: str = "arn:aws:sts::999999999999:assumed-role/Admin/alice",
    user: str | None = None,
    key: str | None = None,
    status: str | None = None,
    serial: str | None = None,
    source_ip: str = "198.51.100.7",
    user_agent: str = "aws-cli/2.31.0",
    error_code: str | None = None,
    event_id: str | None = None,
    **more: Any,
) -> Json:
    """A CloudTrail event, as IAM writes it, of `actor` acting on `user` (None: on itself, so that userName is absent).

    `more` overrides members of the CloudTrailEvent JSON, requestParameters and responseElements for example.
    """
    time_text = iso(when)
    caller = actor.rsplit("/", 1)[-1]
    parameters = {"userName": user, "accessKeyId": key, "status": status, "serialNumber": serial}
    response: Json | None = None
    if name == "CreateAccessKey":
        del parameters["accessKeyId"]  # nobody knows it before the answer
        response = {
            "accessKey": {"userName": user or caller, "accessKeyId": key, "status": "Active"}
        }
    event_id = (
        event_id
        or hashlib.sha256(f"{name}{time_text}{actor}{user}{key}{serial}".encode()).hexdigest()[:36]
    )
    detail: Json = {
        "eventVersion": "1.11",
        "userIdentity": _user_identity(actor),
        "eventTime": time_text,
        "eventSource": "iam.amazonaws.com",
        "eventName": name,
        "awsRegion": "us-east-1",
        "sourceIPAddress": source_ip,
        "userAgent": user_agent,
        "requestParameters": {k: v for k, v in parameters.items() if v is not None} or None,
        "responseElements": None if error_code else response,
        "eventID": event_id,
        "readOnly": False,
    }
    if error_code:
        detail["errorCode"] = error_code
    return {
        "EventId": event_id,
        "EventName": name,
        "ReadOnly": "false",
        "EventTime": time_text,
        "EventSource": "iam.amazonaws.com",
        "Username": caller,
        "Resources": [],
        "CloudTrailEvent": {**detail, **more},
    }


def _user_identity(actor: str) -> Json:
    account_id, resource = actor.split(":", 5)[4:]
    identity: Json = {"arn": actor, "accountId": account_id}
    if resource.startswith("user/"):
        return {"type": "IAMUser", "userName": resource.rsplit("/", 1)[-1], **identity}
    return {"type": "Root" if resource == "root" else "AssumedRole", **identity}


def checked(given: Json, defaults: Json) -> Json:
    """`given`, unless it holds an unknown key: a slip of the pen must not pass for a world in which all is well."""
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise TypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(defaults))}")
    return given


def access_key_id(account_id: str, *, caller: bool = False) -> str:
    """ID of the caller's access key, or of the session's in an account."""
    return f"AKIA{account_id}CALL" if caller else f"ASIA{account_id}ROLE"


@functools.lru_cache(maxsize=1024)
def secret_of(key_id: str) -> str:
    """Secret access key of any access key of this endpoint: 40 characters, derived from its ID."""
    return base64.b64encode(hashlib.sha256(f"secret of {key_id}".encode()).digest()).decode()[:40]


# --- the world --------------------------------------------------------------------------------------------------------

FIRST_ID = 100_000_000_000
STATUS_OF_STATE = {"CLOSED": "SUSPENDED", "PENDING_ACTIVATION": "ACTIVE"}
NO_ROOT_CREDENTIALS = root()
ALLOW_ALL: Json = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
}
FULL_ACCESS = policy(
    "p-FullAWSAccess", "FullAWSAccess", ALLOW_ALL, ["r-test"]
)  # as AWS attaches it


class Directory:
    """What IAM finds in an account by name: its users, their keys."""

    def __init__(self, made: Json) -> None:
        self.account = made
        self.users: list[Json] = [one for one in made["users"] if one["in_list"]]
        self.by_name: dict[str, Json] = {one["name"]: one for one in self.users}
        self.by_key: dict[str, tuple[Json, Json]] = {
            each["id"]: (one, each) for one in self.users for each in one["keys"]
        }


class World:
    """The accounts and settings; generated accounts are made when asked for, and only the latest are kept."""

    KEPT = 512

    def __init__(self, described: Json) -> None:
        self.described: Json = {}
        self.change({**WORLD_DEFAULTS, **described})

    def change(self, part: Json) -> bool:
        """Replace top-level keys; tells whether the accounts are new ones, whose state is to be forgotten."""
        self.described.update(checked(part, WORLD_DEFAULTS))
        described = self.described
        self.partition: str = described["partition"]
        self.management: str = described["management"]
        self.organization: str | None = described["organization"]
        caller = described["caller"] or {}
        self.caller_account: str = caller.get("account") or self.management
        self.caller_arn: str = (
            caller.get("arn") or f"arn:{self.partition}:iam::{self.caller_account}:user/auditor"
        )
        self.latency: float = described["latency"]
        self.verify: bool = described["verify_signatures"]
        self.record: bool = described["record"]
        self.faults: Json = described["faults"]
        if "rules" in part:
            self.rules = [Rule(one) for one in described["rules"]]
        if "faults" in part:
            self.random = random.Random(self.faults.get("seed", 1))
        renewed = bool({"accounts", "generate", "management", "organization"} & set(part))
        if renewed:
            self._settle()
        return renewed

    def _settle(self) -> None:
        explicit = [
            {**ACCOUNT_DEFAULTS, **checked(one, ACCOUNT_DEFAULTS)}
            for one in self.described["accounts"]
        ]
        if all(one["id"] != self.management for one in explicit):
            # the roles that audits assume do not exist in the management account
            explicit.insert(
                0,
                {**ACCOUNT_DEFAULTS, "id": self.management, "name": "management", "role": "denied"},
            )
        self.explicit: dict[str, Json] = {one["id"]: one for one in explicit}
        self.order: list[str] = list(self.explicit)
        plans = self.described["generate"]
        self.plans = [
            {**GENERATE_DEFAULTS, **checked(one, GENERATE_DEFAULTS)}
            for one in ([plans] if isinstance(plans, dict) else plans)
        ]
        self.total = len(self.order) + sum(plan["accounts"] for plan in self.plans)
        self._directories: collections.OrderedDict[str, Directory] = collections.OrderedDict()

    def at(self, index: int) -> Json:
        """The account at that place of ListAccounts; without its users where it is a generated one."""
        if index < len(self.order):
            return self.explicit[self.order[index]]
        index -= len(self.order)
        for plan in self.plans:
            if index < plan["accounts"]:
                return _generated_account(plan, index)
            index -= plan["accounts"]
        raise IndexError(index)

    def find(self, account_id: str) -> Json | None:
        """The account with that ID; without its users where it is a generated one."""
        if account_id in self.explicit:
            return self.explicit[account_id]
        number = int(account_id) - FIRST_ID if account_id.isdecimal() else -1
        for plan in self.plans:
            if plan["first"] <= number < plan["first"] + plan["accounts"]:
                return _generated_account(plan, number - plan["first"])
        return None

    def directory(self, account_id: str) -> Directory:
        """The users of an account."""
        found = self._directories.get(account_id)
        if found is not None:
            return found
        made = self.find(account_id)
        if made is None:
            raise AwsError(
                "InvalidClientTokenId",
                "The security token included in the request is invalid.",
                403,
            )
        if account_id not in self.explicit:
            number = int(account_id) - FIRST_ID
            plan = next(
                one for one in self.plans if one["first"] <= number < one["first"] + one["accounts"]
            )
            made = {
                **made,
                "users": [_generated_user(plan, number, n) for n in range(plan["users"])],
            }
        while len(self._directories) >= self.KEPT:
            self._directories.popitem(last=False)
        found = self._directories[account_id] = Directory(made)
        return found

    def accounts(self) -> Iterator[Json]:
        """Every account with its users, in the order of ListAccounts."""
        for index in range(self.total):
            yield self.directory(self.at(index)["id"]).account

    def paths(self, one: Json) -> list[str]:
        """Account.Paths."""
        return (
            one["paths"]
            if one["paths"] is not None
            else [f"{self.organization}/r-test/{one['id']}/"]
        )


def _generated_account(plan: Json, index: int) -> Json:
    number = plan["first"] + index
    missing = int((index + 1) * plan["missing_roles"]) > int(index * plan["missing_roles"])
    return {
        **ACCOUNT_DEFAULTS,
        "id": str(FIRST_ID + number),
        "name": f"{plan['name']}-{number}",
        "role": "denied" if missing else "ok",
        "root": root(password=True, password_last_used=CREATED, virtual=True)
        if number % 2
        else None,
        **plan["account"],
    }


def _generated_user(plan: Json, number: int, index: int) -> Json:
    """Every second user has a password, every fourth MFA too; keys are of all kinds."""
    pattern = plan["keys_per_user"]
    count = pattern[index % len(pattern)] if isinstance(pattern, list) else pattern
    name = f"user-{index:04d}"
    day = f"{1 + (number + index) % 28:02d}"
    keys = [
        key(
            f"AKIA{number:07d}{index:05d}{n}GEN",
            status="Inactive" if (index + n) % 5 == 4 else "Active",
            created=f"2024-{1 + index % 12:02d}-{day}T0{n}:00:00Z",
            last_used=f"2025-06-{day}T10:20:30Z" if (index + n) % 3 else None,
        )
        for n in range(count)
    ]
    password = index % 2 == 0
    return user(
        name,
        created=f"2023-{1 + index % 12:02d}-{day}T00:00:00Z",
        password=password,
        password_last_used=f"2025-05-{day}T08:00:00Z" if password and index % 3 else None,
        mfa=[f"arn:aws:iam::{FIRST_ID + number}:mfa/{name}"] if index % 4 == 0 else [],
        keys=keys,
    )


class Rule:
    """A rule of the world, and how often it has been met."""

    def __init__(self, described: Json) -> None:
        self.described: Json = {**RULE_DEFAULTS, **checked(described, RULE_DEFAULTS)}
        self.skip: int = self.described["skip"]
        self.left: float = (
            float("inf") if self.described["times"] is None else self.described["times"]
        )
        fields = dict(self.described["fields"])
        if self.described["user"] is not None:
            fields["UserName"] = self.described["user"]
        self.fields: Json = fields

    def applies(self, request: Request) -> bool:
        """Whether it decides over this request; counts it if so."""
        if self.described["action"] not in ("*", request.action):
            return False
        if self.described["account"] not in (None, request.account):
            return False
        if any(request.fields.get(name) != value for name, value in self.fields.items()):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.left -= 1
        return self.left >= 0


# --- statistics -------------------------------------------------------------------------------------------------------


class Bucket:
    """A token bucket, full at first; a refused request takes nothing."""

    __slots__ = ("burst", "rate", "refilled", "tokens")

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = max(1.0, burst)
        self.tokens = self.burst
        self.refilled = time.monotonic()

    def take(self) -> bool:
        """Whether a request may pass now."""
        now = time.monotonic()
        self.tokens = min(self.burst, self.tokens + (now - self.refilled) * self.rate)
        self.refilled = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


@dataclasses.dataclass(slots=True)
class AccountState:
    """What the endpoint remembers of an account besides its figures."""

    deny: list[str]
    bucket: Bucket | None  # None: no limit
    generated: float | None = None  # time of the first GenerateCredentialReport
    lookups: Bucket | None = None


class Statistics:
    """What was asked, by whom, and what came of it."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.cpu = time.process_time()
        self.requests: collections.Counter[str] = collections.Counter()
        self.by_account: dict[str, dict[str, int]] = {}
        self.connections: collections.Counter[str] = collections.Counter()
        self.connections_open: collections.Counter[str] = collections.Counter()
        self.connections_peak: dict[str, int] = {}
        self.errors: collections.Counter[str] = collections.Counter()
        self.throttled = self.dropped = self.errored = self.hung = self.held = 0
        self.in_flight: collections.Counter[str] = collections.Counter()
        self.in_flight_peak: dict[str, int] = {}
        self.in_flight_total = self.in_flight_total_peak = 0
        self.in_flight_seconds = (
            0.0  # of the requests done; of each other one, less the time it came
        )
        self.assumed: dict[str, Json] = {}
        self.scopes: collections.Counter[str] = collections.Counter()
        self.user_agents: dict[str, str] = {}
        self.recorded: list[tuple[float, str, str]] = []

    def arrived(self, request: Request, record: bool) -> None:
        """Count a request that has just been read."""
        self.requests[request.action] += 1
        of_account = self.by_account.setdefault(request.account, {})
        of_account[request.action] = of_account.get(request.action, 0) + 1
        self.scopes[request.service + "/" + request.region] += 1
        self.user_agents[request.service] = request.headers.get("user-agent", "")
        if record:
            self.recorded.append(
                (round(time.monotonic() - self.started, 4), request.account, request.action)
            )
        self.in_flight_total += 1
        self.in_flight_seconds -= time.monotonic()
        self.in_flight_total_peak = max(self.in_flight_total_peak, self.in_flight_total)
        if request.service == "iam":
            now = self.in_flight[request.account] = self.in_flight[request.account] + 1
            if now > self.in_flight_peak.get(request.account, 0):
                self.in_flight_peak[request.account] = now

    def finished(self, request: Request) -> None:
        """Count a request as no longer in flight."""
        self.in_flight_total -= 1
        self.in_flight_seconds += time.monotonic()
        if request.service == "iam":
            self.in_flight[request.account] -= 1

    def connected(self, service: str) -> None:
        """Count a connection, at its first request."""
        self.connections[service] += 1
        self.connections_open[service] += 1
        self.connections_peak[service] = max(
            self.connections_peak.get(service, 0), self.connections_open[service]
        )

    def failed(self, code: str, status: int) -> None:
        """Count an error answer."""
        self.errors[code] += 1
        if (
            code in ("Throttling", "ThrottlingException", "TooManyRequestsException")
            or status == 429
        ):
            self.throttled += 1
        else:
            self.errored += 1

    def as_json(self) -> Json:
        """What GET /_stats answers; the names are those of `Endpoint.stats`."""
        return {
            "requests": self.requests,
            "by_account": self.by_account,
            "connections": self.connections,
            "connections_peak": self.connections_peak,
            "throttled": self.throttled,
            "dropped": self.dropped,
            "errored": self.errored,
            "hung": self.hung,
            "held": self.held,
            "errors": self.errors,
            "in_flight": self.in_flight_peak,
            "in_flight_total": self.in_flight_total_peak,
            "in_flight_seconds": self.in_flight_seconds + self.in_flight_total * time.monotonic(),
            "assumed": self.assumed,
            "scopes": self.scopes,
            "user_agents": self.user_agents,
            "recorded": self.recorded,
            "seconds": time.monotonic() - self.started,
            "cpu": time.process_time() - self.cpu,
        }


# --- requests and signatures ------------------------------------------------------------------------------------------


class AwsError(Exception):
    """An error answer."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status = code, message, status


AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/([^/]+)/aws4_request, "
    r"SignedHeaders=([^,]+), Signature=([0-9a-f]{64})"
)
KEY_ID = re.compile(r"(?:AKIA(\d{12})CALL|ASIA(\d{12})ROLE)")
JSON_SERVICES = frozenset({"organizations", "cloudtrail"})
# the query protocol's code for what went wrong with credentials, and the JSON protocol's
JSON_CODES = {
    "InvalidClientTokenId": "UnrecognizedClientException",
    "SignatureDoesNotMatch": "InvalidSignatureException",
    "ExpiredToken": "ExpiredTokenException",
    "AccessDenied": "AccessDeniedException",
    "Throttling": "ThrottlingException",
    "InvalidAction": "UnknownOperationException",
}


@dataclasses.dataclass(slots=True)
class Request:
    """One request for an AWS operation."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    service: str
    region: str
    date: str
    key_id: str
    signed: str
    signature: str
    action: str
    signer: str  # account of the credentials
    account: str  # account it is about
    fields: Json
    session: Session | None = None


class Session(NamedTuple):
    """What AssumeRole hands out, as its token says."""

    account: str
    expires: int
    policy: str  # key of Endpoint's session policies; empty: none

    def token(self) -> str:
        """The session token: recognisable, so that a test can look for it where it must not be."""
        return f"IQoJTOKEN.{self.account}.{self.expires}.{self.policy}"

    @classmethod
    def parse(cls, token: str) -> Session | None:
        """The session of a token; None if it is not one of ours."""
        parts = token.split(".")
        if len(parts) != 4 or parts[0] != "IQoJTOKEN" or not parts[2].isdecimal():
            return None
        return cls(parts[1], int(parts[2]), parts[3])


def parse_request(method: str, target: str, headers: dict[str, str], body: bytes) -> Request:
    """Read a signed request; raises AwsError where it bears no signature."""
    found = AUTHORIZATION.match(headers.get("authorization", ""))
    if found is None:
        raise AwsError("MissingAuthenticationToken", "Request is missing Authentication Token", 403)
    key_id, date, region, service, signed, signature = found.groups()
    operation = headers.get("x-amz-target")
    fields: Json = json.loads(body) if operation else _form(body.decode())
    owner = KEY_ID.fullmatch(key_id)
    signer = (owner[1] or owner[2]) if owner else ""
    action = operation.rpartition(".")[2] if operation else fields.get("Action", "")
    about = signer
    if action == "AssumeRole":
        about = (fields.get("RoleArn", "").split(":") + [""] * 5)[4]
    return Request(
        method,
        target,
        headers,
        body,
        service,
        region,
        date,
        key_id,
        signed,
        signature,
        action,
        signer,
        about,
        fields,
    )


def _form(body: str) -> Json:
    fields: Json = {}
    for pair in body.split("&"):
        name, _, value = pair.partition("=")
        fields[name] = urllib.parse.unquote_plus(value) if "%" in value or "+" in value else value
    return fields


@functools.lru_cache(maxsize=4096)
def _signing_key(key_id: str, date: str, region: str, service: str) -> bytes:
    made = b"AWS4" + secret_of(key_id).encode()
    for part in (date, region, service, "aws4_request"):
        made = hmac.new(made, part.encode(), hashlib.sha256).digest()
    return made


def signature_of(request: Request) -> str:
    """The SigV4 signature that the request must bear."""
    path, _, query = request.target.partition("?")
    names = request.signed.split(";")
    canonical = "\n".join(
        [
            request.method,
            path,
            query,
            *(f"{name}:{' '.join(request.headers.get(name, '').split())}" for name in names),
            "",
            request.signed,
            hashlib.sha256(request.body).hexdigest(),
        ]
    )
    scope = f"{request.date}/{request.region}/{request.service}/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{request.headers.get('x-amz-date', '')}\n{scope}\n{digest}"
    secret = _signing_key(request.key_id, request.date, request.region, request.service)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def policy_allows(policy: Json, action: str) -> bool:
    """Whether a session policy allows an action; only Effect and Action are looked at."""

    def names(statement: Json) -> bool:
        patterns = statement.get("Action", [])
        patterns = [patterns] if isinstance(patterns, str) else patterns
        return any(fnmatch.fnmatchcase(action.lower(), pattern.lower()) for pattern in patterns)

    statements = policy.get("Statement", [])
    statements = [statements] if isinstance(statements, dict) else statements
    effects = {statement["Effect"] for statement in statements if names(statement)}
    return effects == {"Allow"}


# --- services ---------------------------------------------------------------------------------------------------------

REPORT_HEADER = (
    "user,arn,user_creation_time,password_enabled,password_last_used,password_last_changed,password_next_rotation,mfa_active,"
    "access_key_1_active,access_key_1_last_rotated,access_key_1_last_used_date,access_key_1_last_used_region,"
    "access_key_1_last_used_service,access_key_2_active,access_key_2_last_rotated,access_key_2_last_used_date,"
    "access_key_2_last_used_region,access_key_2_last_used_service,cert_1_active,cert_1_last_rotated,cert_2_active,"
    "cert_2_last_rotated"
)
NAMESPACES = {
    "iam": "https://iam.amazonaws.com/doc/2010-05-08/",
    "sts": "https://sts.amazonaws.com/doc/2011-06-15/",
}
escape = html.escape


def credential_report(made: Json, partition: str, dates: str) -> str:
    """The credential report of an account as CSV; root first, its two key slots in the order AWS does not promise."""
    override = made["report"] if made["report"] is not None else {}
    if isinstance(override, str):
        return override
    owner = override.get("account", made["id"])
    extra = override.get("extra_columns", [])
    arn = f"arn:{partition}:iam::{owner}:"
    text = io.StringIO()
    text.write(",".join([REPORT_HEADER, *extra]) + "\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [*_root_row(made["root"] or NO_ROOT_CREDENTIALS, arn, dates), *("N/A" for _ in extra)]
    )
    for one in made["users"]:
        if one["in_report"]:
            writer.writerow([*_user_row(one, arn, dates), *("N/A" for _ in extra)])
    return text.getvalue().rstrip("\n")


def _root_row(one: Json, arn: str, dates: str) -> list[str]:
    slots = [
        [
            _word(each["active"]),
            *_use(each["last_rotated"], each["last_used"], each["service"], dates),
        ]
        for each in one["keys"]
    ]
    password = one["password"]
    old = password == "not_supported"
    return [
        "<root_account>",
        arn + "root",
        _date(one["created"], dates),
        "not_supported" if old else _word(password),
        _password_use(bool(password), one["password_last_used"], dates),
        "not_supported" if old else (_date(one["created"], dates) if password else "N/A"),
        "not_supported" if password else "N/A",
        _word(one["mfa"]),
        *_slots(slots, one["certificates"], dates),
    ]


def _user_row(one: Json, arn: str, dates: str) -> list[str]:
    slots = [
        [
            _word(each["status"] == "Active"),
            *_use(each["created"], each["last_used"], each["service"], dates),
        ]
        for each in reversed(one["keys"][:2])
    ]
    return [
        one["name"],
        f"{arn}user{one['path']}{one['name']}",
        _date(one["created"], dates),
        _word(one["password"]),
        _password_use(one["password"], one["password_last_used"], dates),
        _date(one["password_changed"], dates) if one["password"] else "N/A",
        "N/A",
        _word(bool(one["mfa"])),
        *_slots(slots, one["certificates"], dates),
    ]


def _slots(slots: list[list[str]], certificates: list[Json], dates: str) -> list[str]:
    """Cells of both key slots and both certificate slots."""
    empty = ["false", "N/A", "N/A", "N/A", "N/A"]
    first, second = [*slots, empty, empty][:2]
    cells = [[_word(each["active"]), _date(each["last_rotated"], dates)] for each in certificates]
    third, fourth = [*cells, empty[:2], empty[:2]][:2]
    return [*first, *second, *third, *fourth]


def _use(rotated: str, last_used: str | None, service: str, dates: str) -> list[str]:
    if last_used is None:
        return [_date(rotated, dates), "N/A", "N/A", "N/A"]
    return [_date(rotated, dates), _date(last_used, dates), "us-east-1", service]


def _password_use(has_password: bool, last_used: str | None, dates: str) -> str:
    if not has_password:
        return "N/A"
    return "no_information" if last_used is None else _date(last_used, dates)


def _word(value: object) -> str:
    return "true" if value else "false"


def _date(moment: str, ending: str = "Z") -> str:
    """The same moment with the ending asked for; every moment of the world is in UTC."""
    return moment[:19] + ending


def _epoch(moment: str) -> float:
    return datetime.fromisoformat(_date(moment, "+00:00")).timestamp()


def _page(items: list[Any], request: Request) -> tuple[list[Any], str]:
    """A page of an IAM list by MaxItems and Marker, and the XML that tells of the next."""
    try:
        size, start = int(request.fields.get("MaxItems", 100)), int(request.fields.get("Marker", 0))
    except ValueError:
        raise AwsError("ValidationError", "Invalid Marker.") from None
    if not 1 <= size <= 1000:
        raise AwsError(
            "ValidationError",
            f"Value '{size}' at 'maxItems' failed to satisfy constraint: 1 to 1000",
        )
    if start + size < len(items):
        return items[
            start : start + size
        ], f"<IsTruncated>true</IsTruncated><Marker>{start + size}</Marker>"
    return items[start:], "<IsTruncated>false</IsTruncated>"


def _organizations_page(name: str, items: list[Json], request: Request) -> Json:
    """A page of an Organizations list, at most 20 long; the token is the index of the next item."""
    first, size = (
        int(request.fields.get("NextToken", "0")),
        min(20, request.fields.get("MaxResults", 20)),
    )
    more = {"NextToken": str(first + size)} if first + size < len(items) else {}
    return {name: items[first : first + size], **more}


class Services:
    """The operations: a method named after each, from a request to what goes into the answer; AwsError for errors."""

    def __init__(self, described: Json) -> None:
        self.world = World(described)
        self.statistics = Statistics()
        self.states: dict[str, AccountState] = {}
        self.policies: dict[str, Json] = {}
        self.allowed: dict[tuple[str, str], bool] = {}

    # What holds for every operation

    def authenticate(self, request: Request) -> None:
        """Raise AwsError unless key, token and signature belong together."""
        token = request.headers.get("x-amz-security-token")
        session = Session.parse(token) if token else None
        is_caller = request.key_id == access_key_id(self.world.caller_account, caller=True)
        fits = (
            token is None
            if is_caller
            else session is not None and session.account == request.signer
        )
        if not request.signer or not fits:
            raise AwsError(
                "InvalidClientTokenId",
                "The security token included in the request is invalid.",
                403,
            )
        if self.world.verify and not hmac.compare_digest(signature_of(request), request.signature):
            raise AwsError(
                "SignatureDoesNotMatch",
                "The request signature we calculated does not match the signature you provided. Check your AWS Secret "
                "Access Key and signing method. Consult the service documentation for details.",
                403,
            )
        if session is not None and session.expires < time.time():
            raise AwsError(
                "ExpiredToken", "The security token included in the request is expired", 403
            )
        request.session = session

    def authorize(self, request: Request) -> None:
        """Raise AwsError if an SCP or the session's policy denies the operation, or the rate limit is reached."""
        state = self.states.get(request.account) or self._new_state(request.account)
        if request.session is not None:
            if request.action in state.deny:
                raise self._denied(request, "with an explicit deny in a service control policy")
            if not self._session_allows(
                request.session.policy, f"{request.service}:{request.action}"
            ):
                raise self._denied(request, "because no session policy allows the action")
        if request.service == "iam" and state.bucket is not None and not state.bucket.take():
            raise AwsError("Throttling", "Rate exceeded")

    def _new_state(self, account_id: str) -> AccountState:
        made = self.world.find(account_id) or ACCOUNT_DEFAULTS
        rate, burst = made["rate"], made["burst"]
        bucket = Bucket(rate, rate if burst is None else burst) if rate is not None else None
        state = self.states[account_id] = AccountState(made["deny"], bucket)
        return state

    def _denied(self, request: Request, why: str) -> AwsError:
        name = f"{request.service}:{request.action}"
        return AwsError(
            "AccessDenied",
            f"User: {self._signer_arn(request)} is not authorized to perform: {name} on resource: * {why}",
            403,
        )

    def _session_allows(self, policy_id: str, action: str) -> bool:
        if not policy_id:
            return True
        answer = self.allowed.get((policy_id, action))
        if answer is None:
            answer = self.allowed[policy_id, action] = policy_allows(
                self.policies[policy_id], action
            )
        return answer

    def _signer_arn(self, request: Request) -> str:
        if request.session is None:
            return self.world.caller_arn
        assumed = self.statistics.assumed.get(
            request.signer, {"RoleArn": "role/unknown", "RoleSessionName": "unknown"}
        )
        role = assumed["RoleArn"].rsplit("/", 1)[-1]
        return f"arn:{self.world.partition}:sts::{request.signer}:assumed-role/{role}/{assumed['RoleSessionName']}"

    def answer(self, request: Request) -> bytes:
        """The whole HTTP answer to a request that may be answered."""
        operation = OPERATIONS.get((request.service, request.action))
        if operation is None:
            raise AwsError(
                "InvalidAction", f"Could not find operation {request.action} of {request.service}."
            )
        made = operation(self, request)
        if isinstance(made, dict):
            return http_answer(200, json.dumps(made), "application/x-amz-json-1.1")
        action = request.action
        return http_answer(
            200,
            f'<{action}Response xmlns="{NAMESPACES[request.service]}"><{action}Result>{made}</{action}Result>'
            f"<ResponseMetadata><RequestId>{REQUEST_ID}</RequestId></ResponseMetadata></{action}Response>",
            "text/xml",
        )

    # STS

    def get_caller_identity(self, request: Request) -> str:
        """By the credentials alone."""
        arn = self._signer_arn(request)
        return (
            f"<Arn>{escape(arn)}</Arn><UserId>AIDATEST</UserId><Account>{request.signer}</Account>"
        )

    def assume_role(self, request: Request) -> str:
        """Credentials for an account; AccessDenied looks the same whatever the reason."""
        fields = request.fields
        made = (
            self.world.find(request.account) if re.fullmatch(r"\d{12}", request.account) else None
        )
        self.statistics.assumed[request.account] = {
            name: fields.get(name)
            for name in ("RoleArn", "RoleSessionName", "Policy", "ExternalId", "DurationSeconds")
        }
        fits = (
            made is not None
            and made["role"] == "ok"
            and made["external_id"] in (None, fields.get("ExternalId"))
        )
        if not fits or not fields["RoleArn"].startswith(f"arn:{self.world.partition}:iam::"):
            raise AwsError(
                "AccessDenied",
                f"User: {self._signer_arn(request)} is not authorized to perform: sts:AssumeRole on resource: "
                + fields["RoleArn"],
                403,
            )
        expires = int(
            time.time()
            + min(self.world.described["session_seconds"], int(fields.get("DurationSeconds", 3600)))
        )
        session = Session(request.account, expires, self._remember(fields.get("Policy", "")))
        key_id = access_key_id(request.account)
        role, name = fields["RoleArn"].rsplit("/", 1)[-1], fields["RoleSessionName"]
        arn = f"arn:{self.world.partition}:sts::{request.account}:assumed-role/{role}/{name}"
        expiration = datetime.fromtimestamp(expires, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return (
            f"<Credentials><AccessKeyId>{key_id}</AccessKeyId><SecretAccessKey>{secret_of(key_id)}</SecretAccessKey>"
            f"<SessionToken>{session.token()}</SessionToken><Expiration>{expiration}</Expiration></Credentials>"
            f"<AssumedRoleUser><Arn>{escape(arn)}</Arn><AssumedRoleId>AROATEST:{escape(name)}</AssumedRoleId></AssumedRoleUser>"
        )

    def _remember(self, policy: str) -> str:
        """Keep a session policy under a short name, which the token then carries."""
        if not policy:
            return ""
        name = hashlib.sha256(policy.encode()).hexdigest()[:16]
        if name not in self.policies:
            try:
                self.policies[name] = json.loads(policy)
            except ValueError:
                raise AwsError(
                    "MalformedPolicyDocument", "This policy contains invalid Json"
                ) from None
        return name

    # Organizations

    def describe_organization(self, request: Request) -> Json:
        """Tells the management account."""
        self._organization_in_use()
        management, organization = self.world.management, self.world.organization
        arn = f"arn:{self.world.partition}:organizations::{management}:"
        return {
            "Organization": {
                "Id": organization,
                "Arn": f"{arn}organization/{organization}",
                "FeatureSet": "ALL",
                "MasterAccountArn": f"{arn}account/{organization}/{management}",
                "MasterAccountId": management,
                "MasterAccountEmail": "management@example.com",
                "AvailablePolicyTypes": [{"Type": "SERVICE_CONTROL_POLICY", "Status": "ENABLED"}],
            }
        }

    def _organization_in_use(self) -> None:
        if self.world.organization is None:
            raise AwsError(
                "AWSOrganizationsNotInUseException",
                "Your account is not a member of an organization.",
            )

    def list_accounts(self, request: Request) -> Json:
        """A page of accounts; the token is the index of the next one, marked once the empty page was handed out."""
        self._organization_in_use()
        size = min(self.world.described["page"], request.fields.get("MaxResults", 20))
        start, shown, _ = request.fields.get("NextToken", "0").partition("+")
        first = int(start)
        if self.world.described["empty_page"] == first // size and not shown:
            return {"Accounts": [], "NextToken": f"{first}+"}
        last = min(first + size, self.world.total)
        page: Json = {
            "Accounts": [self._listed(self.world.at(index)) for index in range(first, last)]
        }
        if last < self.world.total:
            page["NextToken"] = str(last)
        return page

    def _listed(self, made: Json) -> Json:
        state = made["state"]
        owner = f"arn:{self.world.partition}:organizations::{self.world.management}"
        listed = {
            "Id": made["id"],
            "Arn": f"{owner}:account/{self.world.organization}/{made['id']}",
            "Email": made["email"] or f"{made['id']}@example.com",
            "Name": made["name"],
            "Status": made["status"] or STATUS_OF_STATE.get(state, state),
            "State": state,
            "Paths": self.world.paths(made),
            "JoinedMethod": "CREATED",
            "JoinedTimestamp": 1700000000.5,
        }
        return {
            name: value
            for name, value in listed.items()
            if name not in self.world.described["omit"]
        }

    def _policies(self) -> list[Json]:
        self._organization_in_use()
        policies: list[Json] | None = self.world.described["policies"]
        return [FULL_ACCESS] if policies is None else policies

    def _policy(self, request: Request) -> Json:
        for one in self._policies():
            if one["id"] == request.fields["PolicyId"]:
                return one
        raise AwsError(
            "PolicyNotFoundException",
            "We can't find a policy with the PolicyId that you specified.",
        )

    def _policy_summary(self, one: Json) -> Json:
        by_aws = one["id"] == FULL_ACCESS["id"]
        owner = "aws" if by_aws else self.world.management
        return {
            "Id": one["id"],
            "Arn": f"arn:{self.world.partition}:organizations::{owner}:policy/service_control_policy/{one['id']}",
            "Name": one["name"],
            "Type": "SERVICE_CONTROL_POLICY",
            "AwsManaged": by_aws,
        }

    def list_policies(self, request: Request) -> Json:
        """Service control policies; there are no others."""
        if request.fields["Filter"] != "SERVICE_CONTROL_POLICY":
            return {"Policies": []}
        return _organizations_page(
            "Policies", [self._policy_summary(one) for one in self._policies()], request
        )

    def describe_policy(self, request: Request) -> Json:
        """A policy with its text."""
        one = self._policy(request)
        return {"Policy": {"PolicySummary": self._policy_summary(one), "Content": one["content"]}}

    def list_targets_for_policy(self, request: Request) -> Json:
        """The root, organizational units and accounts that a policy is attached to."""
        kinds = {"r-": "ROOT", "ou": "ORGANIZATIONAL_UNIT"}
        arn = f"arn:{self.world.partition}:organizations::{self.world.management}:"
        targets = [
            {"TargetId": one, "Name": one, "Arn": arn + one, "Type": kinds.get(one[:2], "ACCOUNT")}
            for one in self._policy(request)["targets"]
        ]
        return _organizations_page("Targets", targets, request)

    def describe_organizational_unit(self, request: Request) -> Json:
        """The name of an organizational unit that is in an account's path."""
        self._organization_in_use()
        ou_id = request.fields["OrganizationalUnitId"]
        known = any(
            ou_id in path.split("/")
            for index in range(self.world.total)
            for path in self.world.paths(self.world.at(index))
        )
        if not known:
            raise AwsError(
                "OrganizationalUnitNotFoundException",
                "You specified an organizational unit that doesn't exist.",
            )
        arn = f"arn:{self.world.partition}:organizations::{self.world.management}:ou/"
        name = self.world.described["ous"].get(ou_id, ou_id.rpartition("-")[2])
        unit = {"Id": ou_id, "Arn": f"{arn}{self.world.organization}/{ou_id}", "Name": name}
        return {"OrganizationalUnit": unit}

    # IAM

    def generate_credential_report(self, request: Request) -> str:
        """STARTED, INPROGRESS while the account's delay lasts, then COMPLETE."""
        state = self.states[request.account]
        first = state.generated is None
        if state.generated is None:
            state.generated = time.time()
        if self._report_time(request) is not None:
            return "<State>COMPLETE</State>"
        if first:
            return "<State>STARTED</State><Description>No report exists. Starting a new one</Description>"
        return "<State>INPROGRESS</State>"

    def _report_time(self, request: Request) -> float | None:
        """When the report was complete; None while it is not."""
        delay = self.world.directory(request.account).account["report_delay"]
        generated = self.states[request.account].generated
        if generated is None or delay is None or time.time() < generated + delay:
            return None
        return generated + float(delay)

    def get_credential_report(self, request: Request) -> str:
        """The report, in base64."""
        made = self.world.directory(request.account).account
        complete = self._report_time(request)
        if self.states[request.account].generated is None:
            raise AwsError("ReportNotPresent", "No report exists for account", 410)
        if complete is None:
            raise AwsError("ReportInProgress", "Report for account is in progress", 404)
        text = credential_report(made, self.world.partition, self.world.described["report_dates"])
        content = base64.b64encode(text.encode()).decode()
        moment = made["report_time"] or iso(datetime.fromtimestamp(complete, timezone.utc))
        return (
            f"<Content>{content}</Content><ReportFormat>text/csv</ReportFormat>"
            f"<GeneratedTime>{_date(moment)}</GeneratedTime>"
        )

    def list_users(self, request: Request) -> str:
        """Live: without users deleted since the report."""
        users, more = _page(self.world.directory(request.account).users, request)
        members = "".join([self._user(one, request.account) for one in users])
        return f"<Users>{members}</Users>{more}"

    def _user(self, one: Json, account_id: str) -> str:
        name = escape(one["name"])
        last_used = one["password_last_used"] if one["password"] else None
        used = f"<PasswordLastUsed>{_date(last_used)}</PasswordLastUsed>" if last_used else ""
        return (
            f"<member><Path>{one['path']}</Path><UserName>{name}</UserName><UserId>{one['user_id']}</UserId>"
            f"<Arn>arn:{self.world.partition}:iam::{account_id}:user{one['path']}{name}</Arn>"
            f"<CreateDate>{_date(one['created'])}</CreateDate>{used}</member>"
        )

    def _named_user(self, request: Request) -> Json:
        name = request.fields.get("UserName")
        if name is None:
            raise AwsError(
                "ValidationError", "Must specify userName when calling with non-User credentials"
            )
        found = self.world.directory(request.account).by_name.get(name)
        if found is None:
            raise AwsError("NoSuchEntity", f"The user with name {name} cannot be found.", 404)
        return found

    def list_access_keys(self, request: Request) -> str:
        """Keys of a user."""
        one = self._named_user(request)
        name = escape(one["name"])
        keys, more = _page(one["keys"], request)
        members = "".join(
            [
                f"<member><UserName>{name}</UserName><AccessKeyId>{each['id']}</AccessKeyId><Status>{each['status']}</Status>"
                f"<CreateDate>{_date(each['created'])}</CreateDate></member>"
                for each in keys
            ]
        )
        return f"<UserName>{name}</UserName><AccessKeyMetadata>{members}</AccessKeyMetadata>{more}"

    def get_access_key_last_used(self, request: Request) -> str:
        """Last use of a key; no date and N/A for a key never used."""
        key_id = request.fields.get("AccessKeyId", "")
        found = self.world.directory(request.account).by_key.get(key_id)
        if found is None:
            raise AwsError("NoSuchEntity", f"The Access Key with id {key_id} cannot be found.", 404)
        one, each = found
        used = (
            f"<LastUsedDate>{_date(each['last_used'])}</LastUsedDate>" if each["last_used"] else ""
        )
        return (
            f"<UserName>{escape(one['name'])}</UserName><AccessKeyLastUsed>{used}<ServiceName>{escape(each['service'])}"
            f"</ServiceName><Region>{each['region']}</Region></AccessKeyLastUsed>"
        )

    def list_mfa_devices(self, request: Request) -> str:
        """MFA devices of a user."""
        one = self._named_user(request)
        devices, more = _page(one["mfa"], request)
        members = "".join(
            [
                f"<member><UserName>{escape(one['name'])}</UserName><SerialNumber>{escape(serial)}</SerialNumber>"
                f"<EnableDate>{_date(one['created'])}</EnableDate></member>"
                for serial in devices
            ]
        )
        return f"<MFADevices>{members}</MFADevices>{more}"

    def list_virtual_mfa_devices(self, request: Request) -> str:
        """Virtual MFA devices of users and root, those that are assigned (there are no others here)."""
        directory = self.world.directory(request.account)
        arn = f"arn:{self.world.partition}:iam::{request.account}:"
        devices = [
            (
                serial,
                f"<Arn>{arn}user{one['path']}{escape(one['name'])}</Arn><UserName>{escape(one['name'])}</UserName>",
            )
            for one in directory.users
            for serial in one["mfa"]
            if ":mfa/" in serial
        ]
        if (directory.account["root"] or NO_ROOT_CREDENTIALS)["virtual"]:
            devices.append((f"{arn}mfa/root-account-mfa-device", f"<Arn>{arn}root</Arn>"))
        if request.fields.get("AssignmentStatus") == "Unassigned":
            devices = []
        page, more = _page(devices, request)
        members = "".join(
            [
                f"<member><SerialNumber>{escape(serial)}</SerialNumber><User><Path>/</Path>{owner}<UserId>{request.account}</UserId>"
                f"<CreateDate>{CREATED}</CreateDate></User><EnableDate>{CREATED}</EnableDate></member>"
                for serial, owner in page
            ]
        )
        return f"<VirtualMFADevices>{members}</VirtualMFADevices>{more}"

    def list_service_specific_credentials(self, request: Request) -> str:
        """Those of all users; here nobody asks for one user's."""
        if request.fields.get("AllUsers") != "true":
            raise AwsError(
                "ValidationError", "Must specify userName when calling with non-User credentials"
            )
        owned = [
            (one["name"], each)
            for one in self.world.directory(request.account).users
            for each in one["credentials"]
        ]
        page, more = _page(owned, request)
        members = "".join([self._credential(name, each) for name, each in page])
        return f"<ServiceSpecificCredentials>{members}</ServiceSpecificCredentials>{more}"

    def _credential(self, owner: str, each: Json) -> str:
        expires = each["expires"] and f"<ExpirationDate>{_date(each['expires'])}</ExpirationDate>"
        return (
            f"<member><UserName>{escape(owner)}</UserName><Status>{each['status']}</Status>"
            f"<ServiceCredentialAlias>{escape(owner)}-at-{self.world.management}</ServiceCredentialAlias>"
            f"<CreateDate>{_date(each['created'])}</CreateDate>{expires or ''}"
            f"<ServiceSpecificCredentialId>{each['id']}</ServiceSpecificCredentialId>"
            f"<ServiceName>{each['service']}</ServiceName></member>"
        )

    def get_account_authorization_details(self, request: Request) -> str:
        """Users and groups; here nobody asks for roles and policies. Documents are URL-encoded."""
        asked = {value for name, value in request.fields.items() if name.startswith("Filter.")}
        if asked != {"User", "Group"}:
            raise AwsError("ValidationError", f"no test needs these: {sorted(asked)}")
        directory = self.world.directory(request.account)
        page, more = _page([*directory.users, *directory.account["groups"]], request)
        users = "".join([self._details(one, "User", request) for one in page if "keys" in one])
        groups = "".join(
            [self._details(one, "Group", request) for one in page if "keys" not in one]
        )
        return (
            f"<UserDetailList>{users}</UserDetailList><GroupDetailList>{groups}</GroupDetailList>"
            f"<RoleDetailList/><Policies/>{more}"
        )

    def _details(self, one: Json, kind: str, request: Request) -> str:
        name, path = escape(one["name"]), one.get("path", "/")
        arn = f"arn:{self.world.partition}:iam::{request.account}:{kind.lower()}{path}{name}"
        id_of = one.get("user_id") or f"AGPA{zlib.crc32(one['name'].encode()):016}"
        attached = "".join(
            f"<member><PolicyName>{escape(each.rpartition('/')[2])}</PolicyName>"
            f"<PolicyArn>{escape(each)}</PolicyArn></member>"
            for each in one["attached"]
        )
        inline = "".join(
            f"<member><PolicyName>inline-{number}</PolicyName>"
            f"<PolicyDocument>{urllib.parse.quote(json.dumps(each))}</PolicyDocument></member>"
            for number, each in enumerate(one["policies"])
        )
        tags = "".join(
            f"<member><Key>{escape(key)}</Key><Value>{escape(value)}</Value></member>"
            for key, value in one.get("tags", ())
        )
        in_groups = "".join(f"<member>{escape(each)}</member>" for each in one.get("groups", ()))
        # AWS leaves out the list of inline policies and the tags where there are none.
        return (
            f"<member><Path>{path}</Path><{kind}Name>{name}</{kind}Name><{kind}Id>{id_of}</{kind}Id>"
            f"<Arn>{arn}</Arn><CreateDate>{_date(one.get('created', CREATED))}</CreateDate>"
            + (f"<{kind}PolicyList>{inline}</{kind}PolicyList>" if inline else "")
            + (f"<GroupList>{in_groups}</GroupList>" if kind == "User" else "")
            + f"<AttachedManagedPolicies>{attached}</AttachedManagedPolicies>"
            + (f"<Tags>{tags}</Tags>" if tags else "")
            + "</member>"
        )

    def get_login_profile(self, request: Request) -> str:
        """Tells whether a user has a password."""
        one = self._named_user(request)
        if not one["password"]:
            raise AwsError(
                "NoSuchEntity", f"Login Profile for User {one['name']} cannot be found.", 404
            )
        return (
            f"<LoginProfile><UserName>{escape(one['name'])}</UserName><CreateDate>{_date(one['created'])}</CreateDate>"
            "<PasswordResetRequired>false</PasswordResetRequired></LoginProfile>"
        )

    def list_organizations_features(self, request: Request) -> str:
        """Features of central root access."""
        self._organization_in_use()
        features = "".join(
            [f"<member>{escape(feature)}</member>" for feature in self.world.described["features"]]
        )
        organization = self.world.organization
        return f"<OrganizationId>{organization}</OrganizationId><EnabledFeatures>{features}</EnabledFeatures>"

    # CloudTrail

    def lookup_events(self, request: Request) -> Json:
        """Events by at most one attribute, newest first, of 90 days; IAM's only in the partition's home Region."""
        state = self.states[request.account]
        rate = self.world.described["lookup_rate"]
        if rate is not None:
            state.lookups = state.lookups or Bucket(rate, rate)
            if not state.lookups.take():
                raise AwsError("ThrottlingException", "Rate exceeded")
        fields = dict(request.fields)
        start, _, asked = fields.pop("NextToken", "0").partition(":")
        question = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
        if asked not in ("", question):
            raise AwsError(
                "InvalidNextTokenException", "NextToken goes with the same parameters only."
            )
        events = self._events(request)
        first, size = int(start), min(50, fields.get("MaxResults", 50))
        page: Json = {"Events": events[first : first + size]}
        if first + size < len(events):
            page["NextToken"] = f"{first + size}:{question}"
        return page

    def _events(self, request: Request) -> list[Json]:
        attributes = request.fields.get("LookupAttributes", [])
        if len(attributes) > 1:
            raise AwsError(
                "InvalidLookupAttributesException", "You can specify one lookup attribute only."
            )
        since = max(request.fields.get("StartTime", 0), time.time() - 90 * 86400)
        until = request.fields.get("EndTime", float("inf"))
        if request.fields.get("StartTime", 0) > until:
            raise AwsError("InvalidTimeRangeException", "StartTime is after EndTime.")
        if request.region != HOME_REGIONS[self.world.partition]:
            return []
        found = []
        for one in (self.world.find(request.account) or ACCOUNT_DEFAULTS)["events"]:
            when = _epoch(one["EventTime"])
            if since <= when <= until and all(
                one.get(a["AttributeKey"]) == a["AttributeValue"] for a in attributes
            ):
                detail = one["CloudTrailEvent"]
                detail = detail if isinstance(detail, str) else json.dumps(detail)
                found.append({**one, "EventTime": when, "CloudTrailEvent": detail})
        return sorted(found, key=lambda one: -one["EventTime"])


OPERATIONS: dict[tuple[str, str], Callable[[Services, Request], str | Json]] = {
    ("sts", "GetCallerIdentity"): Services.get_caller_identity,
    ("sts", "AssumeRole"): Services.assume_role,
    ("organizations", "DescribeOrganization"): Services.describe_organization,
    ("organizations", "ListAccounts"): Services.list_accounts,
    ("organizations", "ListPolicies"): Services.list_policies,
    ("organizations", "DescribePolicy"): Services.describe_policy,
    ("organizations", "ListTargetsForPolicy"): Services.list_targets_for_policy,
    ("organizations", "DescribeOrganizationalUnit"): Services.describe_organizational_unit,
    ("iam", "GenerateCredentialReport"): Services.generate_credential_report,
    ("iam", "GetCredentialReport"): Services.get_credential_report,
    ("iam", "ListUsers"): Services.list_users,
    ("iam", "ListAccessKeys"): Services.list_access_keys,
    ("iam", "GetAccessKeyLastUsed"): Services.get_access_key_last_used,
    ("iam", "ListMFADevices"): Services.list_mfa_devices,
    ("iam", "ListVirtualMFADevices"): Services.list_virtual_mfa_devices,
    ("iam", "GetLoginProfile"): Services.get_login_profile,
    ("iam", "ListServiceSpecificCredentials"): Services.list_service_specific_credentials,
    ("iam", "GetAccountAuthorizationDetails"): Services.get_account_authorization_details,
    ("iam", "ListOrganizationsFeatures"): Services.list_organizations_features,
    ("cloudtrail", "LookupEvents"): Services.lookup_events,
}


# --- HTTP -------------------------------------------------------------------------------------------------------------

REQUEST_ID = "01234567-89ab-cdef-0123-456789abcdef"


def http_answer(status: int, body: str, content_type: str) -> bytes:
    """Status line, headers and body."""
    data = body.encode()
    reason = http.client.responses.get(status, "Unknown")
    head = (
        f"HTTP/1.1 {status} {reason}\r\nx-amzn-RequestId: {REQUEST_ID}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def error_answer(error: AwsError, service: str) -> bytes:
    """An error in the words of the service's protocol."""
    if service in JSON_SERVICES:
        code = JSON_CODES.get(error.code, error.code)
        status = 400 if error.status < 500 else error.status
        body = json.dumps({"__type": code, "message": error.message})
        return http_answer(status, body, "application/x-amz-json-1.1")
    side = "Sender" if error.status < 500 else "Receiver"
    namespace = NAMESPACES.get(service, NAMESPACES["iam"])
    body = (
        f'<ErrorResponse xmlns="{namespace}"><Error><Type>{side}</Type><Code>{escape(error.code)}</Code>'
        f"<Message>{escape(error.message)}</Message></Error><RequestId>{REQUEST_ID}</RequestId></ErrorResponse>"
    )
    return http_answer(error.status, body, "text/xml")


class Reply(NamedTuple):
    """What becomes of a request: an answer after a delay, a closed connection, or (with neither) silence."""

    answer: bytes | None
    delay: float  # math.inf: until it is released
    drop: bool = False


class Server(Services):
    """From HTTP requests to replies."""

    def __init__(self, described: Json) -> None:
        super().__init__(described)
        self.held: list[Callable[[], None]] = []  # what sends each reply that is held

    def reply(self, request: Request) -> Reply:
        """Decide over a request: credentials first, then rules, faults, limits, and at last the operation."""
        world = self.world
        delay = world.latency
        try:
            self.authenticate(request)
            found = next((one.described for one in world.rules if one.applies(request)), None)
            if found is not None:
                delay = math.inf if found["hold"] else delay + found["delay"]
                reply = self._ruled(found, request, delay)
                if reply is not None:
                    return reply
            if world.faults:
                chance = world.random.random()
                if chance < world.faults.get("drop", 0.0):
                    return Reply(None, delay, drop=True)
                if chance < world.faults.get("drop", 0.0) + world.faults.get("error500", 0.0):
                    raise AwsError(
                        "InternalFailure",
                        "The request processing has failed because of an unknown error.",
                        500,
                    )
            self.authorize(request)
            return Reply(self.answer(request), delay)
        except AwsError as error:
            code = (
                JSON_CODES.get(error.code, error.code)
                if request.service in JSON_SERVICES
                else error.code
            )
            self.statistics.failed(code, error.status)
            return Reply(error_answer(error, request.service), delay)

    def _ruled(self, found: Json, request: Request, delay: float) -> Reply | None:
        """What a rule makes of a request; None if it only delays it."""
        if found["drop"]:
            return Reply(None, delay, drop=True)
        if found["hang"]:
            return Reply(None, delay)
        if found["error"] is not None:
            error = found["error"]
            raise AwsError(
                error["code"], error.get("message", "made to fail"), error.get("status", 400)
            )
        if found["raw"] is not None:
            content_type = (
                "application/x-amz-json-1.1" if request.service in JSON_SERVICES else "text/xml"
            )
            return Reply(http_answer(found["status"], found["raw"], content_type), delay)
        return None

    def control(self, method: str, target: str, body: bytes) -> bytes:
        """GET and DELETE /_stats, POST /_world, POST /_release."""
        if (method, target) == ("GET", "/_stats"):
            return http_answer(200, json.dumps(self.statistics.as_json()), "application/json")
        if (method, target) == ("DELETE", "/_stats"):
            # open connections stay open, and are counted as such
            connections_open, self.statistics = self.statistics.connections_open, Statistics()
            self.statistics.connections_open = connections_open
            return http_answer(200, "{}", "application/json")
        if (method, target) == ("POST", "/_world"):
            try:
                if self.world.change(json.loads(body)):
                    self.states.clear()
            except (TypeError, ValueError, KeyError) as error:
                return http_answer(400, json.dumps({"error": str(error)}), "application/json")
            return http_answer(200, "{}", "application/json")
        if (method, target) == ("POST", "/_release"):
            held, self.held = self.held, []
            for send in held:
                send()
            return http_answer(200, "{}", "application/json")
        return http_answer(404, "{}", "application/json")


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, one request at a time; only what SDKs send."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.buffer = b""
        self.service: str | None = None
        self.request: Request | None = None
        self.statistics = server.statistics
        self.busy = False
        self.timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self._finish()
        if self.service is not None:
            self.server.statistics.connections_open[self.service] -= 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.busy:
            self._next()

    def _next(self) -> None:
        """Serve the next request of the buffer, if it is there as a whole."""
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        lines = self.buffer[:end].decode("latin-1").split("\r\n")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        stop = end + 4 + int(headers.get("content-length", 0))
        if len(self.buffer) < stop:
            return
        body, self.buffer = self.buffer[end + 4 : stop], self.buffer[stop:]
        method, target, _ = lines[0].split(" ", 2)
        self.busy = True
        if target.startswith("/_"):
            self._send(self.server.control(method, target, body))
        else:
            self._serve(method, target, headers, body)

    def _serve(self, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        try:
            self.request = request = parse_request(method, target, headers, body)
        except AwsError as error:
            self._send(error_answer(error, ""))
            return
        self.statistics = self.server.statistics
        if self.service is None:
            self.service = request.service
            self.statistics.connected(request.service)
        self.statistics.arrived(request, self.server.world.record)
        reply = self.server.reply(request)
        if reply.answer is None and not reply.drop:
            self.statistics.hung += 1
        elif reply.delay == math.inf:
            self.statistics.held += 1
            self.server.held.append(functools.partial(self._end, reply))
        elif reply.delay > 0:
            self.timer = asyncio.get_running_loop().call_later(reply.delay, self._end, reply)
        else:
            self._end(reply)

    def _end(self, reply: Reply) -> None:
        if self.transport.is_closing():
            return
        if reply.answer is not None:
            self._send(reply.answer)
        else:
            self.statistics.dropped += 1
            self._finish()
            self.transport.close()

    def _send(self, answer: bytes) -> None:
        self._finish()
        self.transport.write(answer)
        self.busy = False
        if self.buffer:
            self._next()

    def _finish(self) -> None:
        """The request is no longer in flight; the figures are those it was counted in."""
        self.timer = None
        if self.request is not None:
            self.statistics.finished(self.request)
            self.request = None


# --- process ----------------------------------------------------------------------------------------------------------


async def serve(
    described: Json, port: int, certificate: str | None, private_key: str | None
) -> None:
    """Answer until SIGTERM, SIGINT or the end of stdin."""
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, private_key)
    loop = asyncio.get_running_loop()
    server = Server(described)
    listening = await loop.create_server(
        lambda: Connection(server), "127.0.0.1", port, ssl=context, backlog=1024
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with contextlib.suppress(
        PermissionError
    ):  # a file or /dev/null cannot be watched: only a signal ends it then
        loop.add_reader(0, lambda: None if os.read(0, 4096) else stop.set())
    address = listening.sockets[0].getsockname()
    print(f"{'https' if context else 'http'}://{address[0]}:{address[1]}", flush=True)
    await stop.wait()
    listening.close()


def main(argv: list[str] | None = None) -> int:
    """Run the endpoint as a process."""
    parser = argparse.ArgumentParser(
        description="A small AWS for tests: STS, Organizations, IAM and CloudTrail."
    )
    parser.add_argument("--world", required=True, help="JSON file that describes the world")
    parser.add_argument(
        "--port", type=int, default=0, help="port on the loopback interface, default: a free one"
    )
    parser.add_argument("--cert", help="certificate chain (PEM); TLS then")
    parser.add_argument("--key", help="private key of the certificate (PEM)")
    options = parser.parse_args(argv)
    described = json.loads(Path(options.world).read_text(encoding="utf-8"))
    asyncio.run(serve(described, options.port, options.cert, options.key))
    return 0


# --- the helper for tests ---------------------------------------------------------------------------------------------


class Endpoint:
    """The endpoint as a process of its own, for the length of a `with` block.

    `certificate` and `private_key` (PEM files) make it speak TLS; `ca_bundle` is then what its clients trust.
    """

    url: str

    def __init__(
        self,
        described: Json,
        *,
        certificate: str | None = None,
        private_key: str | None = None,
        ca_bundle: str | None = None,
    ) -> None:
        self.world = World(described)  # refuses a wrong world here, where the test shows it
        self._certificate, self._private_key, self._ca_bundle = certificate, private_key, ca_bundle

    def __enter__(self) -> Endpoint:
        self._folder = tempfile.TemporaryDirectory(prefix="endpoint-")
        file = Path(self._folder.name, "world.json")
        file.write_text(json.dumps(self.world.described), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).resolve()), "--world", str(file)]
        if self._certificate is not None and self._private_key is not None:
            command += ["--cert", self._certificate, "--key", self._private_key]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            self.__exit__(None, None, None)
            raise RuntimeError("the endpoint did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._folder.cleanup()

    def env(self) -> dict[str, str]:
        """The whole environment for a program under test: the caller's credentials, none of whoever runs the tests."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "BOTO_")) and not name.lower().endswith("_proxy")
        }
        key_id = access_key_id(self.world.caller_account, caller=True)
        region = HOME_REGIONS[self.world.partition]
        made = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": key_id,
            "AWS_SECRET_ACCESS_KEY": secret_of(key_id),
            "AWS_REGION": region,
            "AWS_DEFAULT_REGION": region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(Path(self._folder.name, "no-config")),
            "AWS_SHARED_CREDENTIALS_FILE": str(Path(self._folder.name, "no-credentials")),
        }
        if self._ca_bundle is not None:
            made["AWS_CA_BUNDLE"] = self._ca_bundle
        return {**kept, **made}

    def stats(self) -> Json:
        """What has been asked since the start or the last `reset`.

        requests {action: n}, by_account {account: {action: n}}, connections {service: opened}, connections_peak
        {service: most at once}, throttled, dropped, errored, hung, held, errors {code: n}, in_flight {account: most IAM
        calls at once}, in_flight_total, in_flight_seconds (of all requests together), assumed {account: fields of the
        last AssumeRole}, scopes {service/region: n}, user_agents {service: last}, recorded [[seconds, account, action]]
        if the world says `record`, seconds, cpu (of the endpoint, in seconds).
        """
        return self._control("GET", "/_stats")

    def reset(self) -> None:
        """Start the statistics anew; rules and reports stay as they are."""
        self._control("DELETE", "/_stats")

    def release(self) -> None:
        """Send the replies that are held."""
        self._control("POST", "/_release")

    def update(self, part: Json) -> None:
        """Replace top-level keys of the world, `rules` or `accounts` say; new accounts start without reports."""
        self.world.change(json.loads(json.dumps(part)))
        self._control("POST", "/_world", part)

    def _control(self, method: str, path: str, body: Json | None = None) -> Json:
        address = urllib.parse.urlsplit(self.url).netloc
        connection: http.client.HTTPConnection
        if self.url.startswith("https"):
            context = ssl.create_default_context(cafile=self._ca_bundle)
            connection = http.client.HTTPSConnection(address, timeout=TIMEOUT, context=context)
        else:
            connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None)
            answer = connection.getresponse()
            data: Json = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(f"{method} {path}: {data}")
        return data


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python3
"""iam-audit: all passwords, access keys and MFA devices of an AWS organization, a CSV per account.

From a profile of the management account, or of a delegated administrator, it assumes a role in
every member account and reads the IAM credential report and when each access key was last used.

Reads   the AWS profile's credentials, as the SDK finds them;
        CSV files and summaries of earlier runs in OUTPUT_DIR, or of the run that --previous names.
Writes  OUTPUT_DIR/<run>/: accounts/<account_id>.csv, findings.csv, changes.csv, events.csv and,
        last, summary.json; files with mode 0600, folders 0700. The summary goes to stdout.
        With --print, a document goes to stdout and nothing else happens.

Every AWS action that the program can call:
  with the profile's credentials
    sts:GetCallerIdentity                who runs the audit, and in which partition
    organizations:DescribeOrganization   which account is the management account
    organizations:ListAccounts           the accounts
    organizations:ListPolicies, DescribePolicy, ListTargetsForPolicy, ListParents
                                         the service control policies and where they are attached
    iam:ListOrganizationsFeatures        whether root credentials are managed centrally
    sts:AssumeRole                       the role, in every account that is audited
  with the assumed role; in the profile's own account, with the profile's credentials
    iam:GenerateCredentialReport, iam:GetCredentialReport, iam:ListUsers, iam:ListAccessKeys,
    iam:GetAccessKeyLastUsed, iam:ListMFADevices, iam:ListVirtualMFADevices, iam:GetLoginProfile;
    with --cloudtrail also cloudtrail:LookupEvents

GenerateCredentialReport makes IAM prepare a report; no other call changes anything in AWS. Every
session has a policy that allows only the role's actions above: even an administrator role is
read-only in the hands of this program. Credentials are never written, logged or put on a command
line. An account that cannot be read in full gets no CSV file: it is reported as failed, and why.

Sections, in reading order. To trust it with a role, read the run, AWS and audit: about 1,100 lines.
Nothing else opens a connection.
  run        the story: from the command line to the files, the summary and the exit code
  data       what several sections share: Account, User, AccessKey, the outcomes, Plan, Run
  AWS        permissions with their reasons; every network call, its credentials and repetition
  audit      one account from AssumeRole to its users; the organization as many of these
  files      rows and cells, atomic writing, reading an earlier run
  assess     gaps, maturity levels, the table of finding rules
  track      what changed since an earlier run, with CloudTrail as the witness
  enforce    what the organization's service control policies already prevent
  terminal   the summary for stdout and for mail; summary.json
  documents  the policies and templates that --print prints
  options    the command line, its validators and its help; the progress line
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import csv
import functools
import io
import itertools
import json
import os
import queue
import random
import re
import shlex
import signal
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar, Union, cast

import boto3
import botocore
import botocore.exceptions
import botocore.session
import botocore.utils
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError
from botocore.parsers import ResponseParserError

# --------------------------------------------------------------------------------------------------
# Run: the story, from the command line to the files, the summary and the exit code
# --------------------------------------------------------------------------------------------------

EXIT_OK = 0
EXIT_NOT_DONE = 1
EXIT_USAGE = 2  # argparse's own
EXIT_ACCOUNTS_FAILED = 3
EXIT_FAIL_ON = 4
EXIT_SIGNAL = 128  # plus the signal's number, as in a shell

CLOUDTRAIL_FIRST_LOOK = timedelta(days=30)  # without an earlier run


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for and return the exit code."""
    options = parse_arguments(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # under cron the locale may be ASCII
    try:
        with interruptible():
            if options.document is None:
                return run_audit(options, utc_now())
            role = options.role or DEFAULT_ROLE
            show(print_document(options.document, role, options.exempt_role))
            return EXIT_OK
    except Interrupted as stop:
        complain(f"iam_audit.py: stopped by {stop}; the CSVs finished so far are kept.")
        return EXIT_SIGNAL + stop.signum
    except Exception as error:
        if options.verbose:
            complain(*frames_of(error))
        complain(f"iam_audit.py: {printable(what_stopped_it(error))}")
        return EXIT_NOT_DONE


def run_audit(options: argparse.Namespace, started: datetime) -> int:
    """Audit the organization, write the files, print the summary."""
    folder = make_run_folder(Path(options.output_dir), started)
    try:
        aws = connect(open_session(options.profile), options.workers)
        organization = describe_organization(aws)
        tracking = open_tracking(folder.parent, options.previous, organization.id)
        plan = plan_of(options, aws.caller, organization, tracking, started)
        run = Run(started, folder, plan, aws.caller, organization, tracking, Enforcement())
        asyncio.run(audit_into(run, aws, options))
    except BaseException:
        remove_if_empty(folder)
        raise
    write_tables(run)
    finished = utc_now()
    write_json(folder / "summary.json", summary_document(run, finished))
    show(terminal_summary(run, finished, options.quiet))
    return exit_code(run, options.fail_on)


def plan_of(
    options: argparse.Namespace,
    caller: Caller,
    organization: Organization,
    tracking: Tracking,
    started: datetime,
) -> Plan:
    """What the options ask for, in this organization and since the earlier run."""
    reads = list(ROLE_READS)
    own_account = caller.account if caller.account == organization.management_account else None
    events_since, out_of_reach = None, False
    if options.cloudtrail:
        reads += CLOUDTRAIL_READS
        wanted, oldest = options.since, started - CLOUDTRAIL_KEEPS
        if wanted is None and tracking.earlier is not None:
            wanted = tracking.earlier.started
        elif wanted is None:
            wanted = started - CLOUDTRAIL_FIRST_LOOK
        events_since, out_of_reach = max(wanted, oldest), wanted < oldest
    return Plan(
        role=Role(
            name=options.role,
            partition=caller.partition,
            session_policy=session_policy(reads),
            external_id=options.external_id,
            own_account=own_account,
        ),
        scope=Scope(options.accounts, options.exclude, options.ou, options.include_management),
        workers=options.workers,
        report_timeout=options.report_timeout,
        production=options.production,
        max_key_age=options.max_key_age,
        event_names=EVENT_NAMES,
        events_since=events_since,
        events_out_of_reach=out_of_reach,
    )


async def audit_into(run: Run, aws: Aws, options: argparse.Namespace) -> None:
    """Audit the accounts side by side while the service control policies are read."""
    progress = Progress()
    status = Status(sys.stderr, progress, options.quiet, options.verbose)

    def finish(outcome: Outcome) -> None:
        """Write the account's CSV file at once; nothing else keeps its users."""
        if isinstance(outcome, AuditedAccount):
            path = account_csv(run.folder, outcome.account.id)
            write_csv(path, CSV_COLUMNS, rows_of(outcome))
        keep(run, outcome)
        progress.failed = len(run.failed)
        progress.done = len(run.audited) + len(run.failed)
        status.log(outcome_line(outcome))

    enforcement = asyncio.create_task(read_enforcement(aws, run.organization))
    with status.drawing():
        await audit_organization(aws, run, progress, finish, status.log)
        run.enforcement = await enforcement
        await apply_enforcement(aws, run)
    raise_phase1_levels(run)


def keep(run: Run, outcome: Outcome) -> None:
    """Add an account's outcome to the run."""
    if isinstance(outcome, AuditedAccount):
        run.audited.append(assess(outcome, run.plan, run.started))
        run.findings.extend(findings_of(outcome, run.plan, run.started))
        track_account(run.tracking, outcome)
        if outcome.trail is not None:
            run.trails.append((outcome.account, outcome.trail))
    elif isinstance(outcome, FailedAccount):
        run.failed.append(outcome)
    elif isinstance(outcome, SkippedAccount):
        run.skipped.append(outcome)
    else:
        run.out_of_scope.append(outcome)


def raise_phase1_levels(run: Run) -> None:
    """Phase 1 is Advanced in an account only if a policy also requires MFA there."""
    for index, figures in enumerate(run.audited):
        verdict = run.controls[figures.account.id][MFA_REQUIRED].verdict
        level = phase1_level(figures.gaps, mfa_enforced=verdict == ENFORCED)
        run.audited[index] = replace(figures, phase1=level)


def write_tables(run: Run) -> None:
    """Write the tables of the whole organization, once all accounts are done."""
    tracking = run.tracking
    run.findings.sort(key=most_urgent_first)
    findings = (finding_row(finding, run) for finding in run.findings)
    write_csv(run.folder / "findings.csv", FINDINGS_COLUMNS, findings)
    tracking.mfa_new.sort(key=change_order)
    if tracking.earlier is not None:
        tracking.changes += accounts_that_came_or_left(run)
        tracking.changes.sort(key=change_order)
        write_csv(run.folder / "changes.csv", CHANGES_COLUMNS, map(change_row, tracking.changes))
    if run.plan.events_since is not None:
        write_csv(run.folder / "events.csv", EVENTS_COLUMNS, event_rows(run))


def exit_code(run: Run, fail_on: FailOn) -> int:
    if run.failed:
        return EXIT_ACCOUNTS_FAILED
    if any(finding.priority <= fail_on.priority for finding in run.findings):
        return EXIT_FAIL_ON
    if fail_on.new_keys and new_keys(run):
        return EXIT_FAIL_ON
    return EXIT_OK


def what_stopped_it(error: Exception) -> str:
    """A sentence or two for the person who has to do something about it."""
    if isinstance(error, AuditError):
        return str(error)
    if in_words := sdk_error_in_words(error):
        return in_words
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or 'no file named'}"
    message = without_secrets(str(error))
    return f"Unexpected {type(error).__name__}: {message} (--verbose shows where)"


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into Interrupted.

    The event loop's tasks are cancelled first, so that no file is cut off.
    """
    received: list[int] = []

    def interrupt(signum: int, _frame: Any) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        received.append(signum)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise Interrupted(signum) from None
        loop.call_soon_threadsafe(cancel_all_tasks, loop)

    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in handlers:
        signal.signal(each, interrupt)
    try:
        yield
    except asyncio.CancelledError:
        raise Interrupted(received[0]) from None
    finally:
        if not received:  # otherwise both stay ignored while the interpreter shuts down
            for each, handler in handlers.items():
                signal.signal(each, handler)


def cancel_all_tasks(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()


def complain(*lines: str) -> None:
    """Print to stderr. If nobody can read it, the exit code stays what it is."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(*lines, sep="\n", file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print to stdout. A reader that closes the pipe early (`| head`) is not an error."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --------------------------------------------------------------------------------------------------
# Data: what several sections share, in AWS's words
# --------------------------------------------------------------------------------------------------

VERSION = "1.0.0"
TERMINAL_WIDTH = 100
MOST_URGENT, LEAST_URGENT = 1, 7  # priorities of findings

ROOT = "<root_account>"  # its name in the credential report
ROOT_ACCESS_KEYS = ("<root_access_key_1>", "<root_access_key_2>")  # the report has no IDs of them
NOT_APPLICABLE = "N/A"

CLOUDTRAIL_KEEPS = timedelta(days=90)

# AWS's error codes
DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"}
SESSION_EXPIRED = {"ExpiredToken", "ExpiredTokenException"}
# fmt: off
THROTTLED = {
    "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled", "SlowDown",
    "RequestThrottledException", "RequestLimitExceeded", "TooManyRequestsException",
}
# fmt: on
# The step in place of AssumeRole in the profile's own account
PROFILE_CREDENTIALS = "profile credentials"

T = TypeVar("T")
Log = Callable[[str], None]


@dataclass(frozen=True)
class Account:
    """An account. `path` is its place, `o-.../r-.../ou-.../ID/`; None if AWS did not give it."""

    id: str
    name: str
    state: str
    path: str | None = None


@dataclass(frozen=True)
class AccessKey:
    """An access key. If it was never used, `last_used` is None and `service_name` is N/A."""

    id: str
    status: str
    created: datetime
    last_used: datetime | None
    service_name: str


@dataclass(frozen=True)
class User:
    """An IAM user, or root. `mfa` has the kinds of their MFA devices.

    `password_last_used` is None if there is no password or it was never used.
    """

    name: str
    password: bool
    password_last_used: datetime | None
    mfa: tuple[str, ...]
    keys: tuple[AccessKey, ...]


class Event(NamedTuple):
    """A successful IAM event: what `actor` did to `user`. `status` is what UpdateAccessKey set."""

    time: datetime
    name: str
    user: str
    key_id: str
    status: str
    actor: str
    source_ip: str
    user_agent: str
    id: str


@dataclass(frozen=True)
class Trail:
    """CloudTrail's events of one account, oldest first. If the lookup failed, `error` says why."""

    events: tuple[Event, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class AuditedAccount:
    """An account that was read in full: root first, if it is in the report, then the users by name.

    `trail` is None if CloudTrail was not asked.
    """

    account: Account
    report_generated: datetime
    users: tuple[User, ...]
    trail: Trail | None = None


@dataclass(frozen=True)
class FailedAccount:
    """An account that could not be read in full: the failed operation, AWS's code and message."""

    account: Account
    step: str
    code: str
    message: str


@dataclass(frozen=True)
class SkippedAccount:
    """An account in scope that nobody can audit, because its state is not ACTIVE."""

    account: Account


@dataclass(frozen=True)
class OutOfScopeAccount:
    """An account that the options leave out."""

    account: Account


Outcome = Union[AuditedAccount, FailedAccount, SkippedAccount, OutOfScopeAccount]


@dataclass(frozen=True)
class Caller:
    """The answer of GetCallerIdentity, and the Region it came from."""

    account: str
    arn: str
    partition: str
    region: str


@dataclass(frozen=True)
class Organization:
    id: str
    management_account: str
    feature_set: str  # ALL, or CONSOLIDATED_BILLING, which has no policies


@dataclass(frozen=True)
class Scope:
    """The accounts that the options select; an empty set selects all."""

    accounts: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    ous: frozenset[str] = frozenset()
    include_management: bool = False

    @property
    def needs_whole_list(self) -> bool:
        """Whether it names accounts or OUs, which must exist: only the complete list can tell."""
        return bool(self.accounts or self.ous)


@dataclass(frozen=True)
class Role:
    """The role to assume. `own_account` is read with the profile's own credentials instead."""

    name: str
    partition: str
    session_policy: str
    external_id: str | None = None
    own_account: str | None = None

    def arn(self, account_id: str) -> str:
        return f"arn:{self.partition}:iam::{account_id}:role/{self.name}"


@dataclass(frozen=True)
class Plan:
    """What the options ask of an audit."""

    role: Role
    scope: Scope
    workers: int
    report_timeout: float  # seconds
    production: re.Pattern[str]
    max_key_age: timedelta
    event_names: tuple[str, ...]
    events_since: datetime | None  # None: CloudTrail is not asked
    events_out_of_reach: bool  # CloudTrail no longer keeps the oldest events that were wanted


@dataclass
class Run:
    """What a run has found so far. `controls` has every audited or failed account by its ID."""

    started: datetime
    folder: Path
    plan: Plan
    caller: Caller
    organization: Organization
    tracking: Tracking
    enforcement: Enforcement
    audited: list[AccountFigures] = field(default_factory=list)
    failed: list[FailedAccount] = field(default_factory=list)
    skipped: list[SkippedAccount] = field(default_factory=list)
    out_of_scope: list[OutOfScopeAccount] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    trails: list[tuple[Account, Trail]] = field(default_factory=list)
    controls: dict[str, Mapping[str, Control]] = field(default_factory=dict)


@dataclass
class Progress:
    """How many accounts in scope have been listed so far, are done, and have failed."""

    listed: int = 0
    done: int = 0
    failed: int = 0
    all_listed: bool = False


class AuditError(Exception):
    """The audit cannot start or go on. The text says what failed and what to do next."""


class StepFailed(Exception):
    """A call failed for good: the operation, the error code and the message.

    `kind` says whether a repetition may help: `throttled` and `transient` do, `final` does not.
    """

    def __init__(self, step: str, code: str, message: str, kind: str = "final") -> None:
        super().__init__(f"{step}: {code}: {message}")
        self.step, self.code, self.message, self.kind = step, code, message, kind


def parse_time(text: str) -> datetime:
    """An ISO 8601 time in UTC. AWS writes `Z` or `+00:00`; Python parses `Z` only from 3.11 on."""
    if text.endswith(("Z", "z")):
        text = text[:-1] + "+00:00"
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        return moment.replace(tzinfo=timezone.utc)
    try:
        return moment.astimezone(timezone.utc)
    except OverflowError as error:  # the calendar's first or last day, in another time zone
        raise ValueError(str(error)) from None


def to_second(moment: datetime) -> datetime:
    return moment.astimezone(timezone.utc).replace(microsecond=0)


def utc_now() -> datetime:
    return datetime.now(timezone.utc)


def iso(moment: datetime) -> str:
    return to_second(moment).isoformat()


def days_between(earlier: datetime, later: datetime) -> int:
    """Whole days; 0 for a key that was created after the run began."""
    return max(0, (later - earlier).days)


def printable(text: str) -> str:
    """The text without what could steer a terminal, such as escapes and reordering marks."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def clock(span: timedelta) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, seconds = divmod(max(0, int(span.total_seconds())), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# --------------------------------------------------------------------------------------------------
# AWS: permissions with their reasons; every network call, its credentials, pace and repetition
# --------------------------------------------------------------------------------------------------

# Each action with the reason for it, as in README.md
ROLE_READS = {
    "iam:GenerateCredentialReport": "has IAM prepare the credential report; not a pure read",
    "iam:GetCredentialReport": "passwords, their last use, and the root user",
    "iam:ListUsers": "the users there are now; the report may be four hours old",
    "iam:ListAccessKeys": "each user's access keys, their status and creation date",
    "iam:GetAccessKeyLastUsed": "when and for which service each access key was last used",
    "iam:ListMFADevices": "the kind of MFA device of each user who has a password or MFA",
    "iam:ListVirtualMFADevices": "whether root's MFA device is a virtual one",
    "iam:GetLoginProfile": "whether a user created after the report has a password",
}
CLOUDTRAIL_READS = {
    "cloudtrail:LookupEvents": "who changed users, passwords, access keys and MFA devices",
}
CALLER_READS = {
    "sts:GetCallerIdentity": "the caller's account and partition (needs no permission)",
    "organizations:DescribeOrganization": "which account is the management account",
    "organizations:ListAccounts": "the accounts, their names, states and organizational units",
    "organizations:ListPolicies": "the service control policies (SCPs)",
    "organizations:DescribePolicy": "what an SCP says",
    "organizations:ListTargetsForPolicy": "where an SCP is attached",
    "organizations:ListParents": "an account's OUs, where ListAccounts does not give them",
    "iam:ListOrganizationsFeatures": "whether root credentials are managed centrally",
}
POLICY_READS = ("organizations:DescribePolicy", "organizations:ListTargetsForPolicy")  # on one SCP
# What a user without MFA needs to set it up: the actions that AWS's example policy for self-managed
# MFA devices leaves out of its Deny, and the change of password that the first sign-in may demand.
MFA_SETUP = {
    "iam:ChangePassword": "a first sign-in may demand it",
    "iam:GetAccountPasswordPolicy": "the console shows the rules for the new password",
    "iam:GetUser": "the page of one's own security credentials",
    "iam:ListMFADevices": "the same page",
    "iam:GetMFADevice": "the same page",
    "iam:ListVirtualMFADevices": "the console looks for a free name",
    "iam:CreateVirtualMFADevice": "an authenticator app",
    "iam:EnableMFADevice": "assign the app, security key or token",
    "iam:ResyncMFADevice": "a token whose clock is off",
    "sts:GetSessionToken": "an MFA session for access keys, where Bool becomes BoolIfExists",
}

# Each partition's Region for IAM, where STS knows its credentials and CloudTrail records IAM
IAM_REGIONS = {"aws": "us-east-1", "aws-us-gov": "us-gov-west-1", "aws-cn": "cn-north-1"}

# --- the profile, its partition, the clients ---

CONNECT_TIMEOUT = 10  # seconds
READ_TIMEOUT = 30  # seconds
ASSUME_ROLE_AT_ONCE = 4  # one call per account needs few connections, and each costs CPU
UNKNOWN_KEY = {"InvalidClientTokenId", "UnrecognizedClientException"}
# So that no request of a shared client can be signed with the profile's credentials by mistake
PLACEHOLDERS: Any = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}


def open_session(profile: str | None) -> boto3.Session:
    """The SDK's session, its credentials resolved, so that a prompt for an MFA code comes first.

    Raises AuditError for a profile that needs an MFA code where nobody can type one: botocore would
    wait on a pipe forever. Raises BotoCoreError for an unknown profile or missing credentials.
    """
    core = botocore.session.Session(profile=profile)
    credentials = core.get_credentials()
    if credentials is None:
        raise AuditError("No AWS credentials: name a profile with --profile, or set AWS_PROFILE.")
    if credentials.method == "assume-role" and asks_for_mfa_code(core) and not has_terminal():
        raise AuditError(
            f"Profile {core.profile or 'default'} asks for an MFA code (mfa_serial), and there is "
            "no terminal to type it on: run it from a terminal, or give cron a profile without "
            "mfa_serial."
        )
    credentials.get_frozen_credentials()
    session = boto3.Session(botocore_session=core)
    # The SDK's user agent with ours at its end, built once: otherwise the SDK builds it again for
    # each request, which takes a fifth of the CPU time of a call.
    core.set_default_client_config(Config(user_agent=f"{core.user_agent()} iam-audit/{VERSION}"))
    parsers = core.get_component("response_parser_factory")
    parsers.set_parser_defaults(timestamp_parser=parse_timestamp)
    return session


def parse_timestamp(value: Any) -> datetime:
    """IAM and STS send ISO 8601; botocore's parser guesses the format, ten times as slowly."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return parse_time(value)
    return botocore.utils.parse_timestamp(value)


def asks_for_mfa_code(core: botocore.session.Session) -> bool:
    """Whether the profile, or one that it takes credentials from, is a role with an mfa_serial."""
    profiles: dict[str, dict[str, str]] = core.full_config["profiles"]
    name, seen = core.profile or "default", set[str]()
    while name in profiles and name not in seen:
        seen.add(name)
        if {"role_arn", "mfa_serial"} <= profiles[name].keys():
            return True
        name = profiles[name].get("source_profile", "")
    return False


def has_terminal() -> bool:
    """Whether getpass can ask: it opens the controlling terminal, or else reads standard input."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | getattr(os, "O_NOCTTY", 0)))
        return True
    except OSError:
        return sys.stdin is not None and sys.stdin.isatty()


def connect(session: boto3.Session, workers: int) -> Aws:
    """Identify the caller and create the clients for their partition.

    If the profile names no Region, each partition is asked until one knows the caller.
    """
    regions = [session.region_name] if session.region_name else list(IAM_REGIONS.values())
    config = client_config(connections=min(workers, ASSUME_ROLE_AT_ONCE), attempts=3)
    while True:
        region = regions.pop(0)
        sts = session.client("sts", region_name=region, config=config)
        try:
            return Aws(session, sts, get_caller_identity(sts, region), workers)
        except ClientError as error:
            if not regions or error_code(error) not in UNKNOWN_KEY:
                raise


def get_caller_identity(sts: Any, region: str) -> Caller:
    identity = sts.get_caller_identity()
    partition = identity["Arn"].split(":")[1]
    return Caller(identity["Account"], identity["Arn"], partition, region)


def client_config(*, connections: int, attempts: int) -> Config:
    return Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        max_pool_connections=connections,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )


class Aws:
    """The SDK's clients, created once for all accounts, and the threads that make their calls.

    All accounts share one IAM client: a client and TLS connections for each would cost more than
    the calls. AccountSession signs and repeats its calls; botocore makes one attempt only, because
    its retry quota belongs to the client, and one account would use up another's.
    """

    def __init__(self, session: boto3.Session, sts: Any, caller: Caller, workers: int) -> None:
        self.caller = caller
        self.threads = Threads(workers)
        self.sts = sts
        config = client_config(connections=2, attempts=10)
        self.organizations = session.client("organizations", caller.region, config=config)
        shared = client_config(connections=workers, attempts=1)
        self.iam = session.client("iam", caller.region, config=shared, **PLACEHOLDERS)
        self.iam.meta.events.register("before-sign.iam", sign_as_account)
        self._session, self._workers, self._shared = session, workers, shared

    @functools.cached_property
    def cloudtrail(self) -> Any:
        """The CloudTrail client, created on first use, in the partition's Region for IAM."""
        region = IAM_REGIONS.get(self.caller.partition)
        client = self._session.client("cloudtrail", region, config=self._shared, **PLACEHOLDERS)
        client.meta.events.register("before-sign.cloudtrail", sign_as_account)
        return client

    @functools.cached_property
    def assume_role_gate(self) -> asyncio.Semaphore:
        """Created on first use, because Python 3.9 binds it to the current event loop."""
        return asyncio.Semaphore(min(self._workers, ASSUME_ROLE_AT_ONCE))

    def profile_credentials(self) -> Credentials:
        """The profile's own credentials; the SDK refreshes them if necessary."""
        found = self._session.get_credentials()
        frozen: Any = found.get_frozen_credentials() if found else None
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token)

    async def ask(self, operation: Callable[..., T], *arguments: Any) -> T:
        """Run one of the operations on the organization in a thread, or raise StepFailed."""
        try:
            return await self.threads.run(FIRST, functools.partial(operation, self, *arguments))
        except SDK_ERRORS as error:
            raise step_failed(operation.__name__.title().replace("_", ""), error) from None


# --- one call: credentials, pace, repetition ---

# The credentials that sign the current thread's request
SIGNING: contextvars.ContextVar[Credentials] = contextvars.ContextVar("SIGNING")
# The operation that the current task began last: the step that failed if its answer is unexpected
STEP: contextvars.ContextVar[str] = contextvars.ContextVar("STEP", default="AssumeRole")

FIRST = (False, 0)  # the highest place in the queue for threads
# Steps that jump the queue, so that all reports are generated in parallel
URGENT_STEPS = {"AssumeRole", "GenerateCredentialReport", "GetCredentialReport"}
TRANSIENT_ATTEMPTS = 6  # 5xx, dropped connections and time-outs, in a row
CLOUDTRAIL_GAP = 0.5  # seconds between LookupEvents calls: AWS allows two per second and account


class AccountSession:
    """The calls for one account: their credentials, their pace, their repetition.

    `turn` is the account's place in the queue for threads: urgent steps first, then the accounts in
    the order in which they were begun.
    """

    def __init__(self, aws: Aws, account: Account, role: Role, turn: int, log: Log) -> None:
        self.aws, self.account, self.role = aws, account, role
        self.log = log
        self._turn = turn
        self._logged = set[str]()
        self._pace = Pace()
        self._cloudtrail_pace = Pace(least_gap=CLOUDTRAIL_GAP)
        self._renewal = asyncio.Lock()
        self._credentials: Credentials | None = None

    async def sign_in(self) -> None:
        """Get credentials: the role's or, in the profile's own account, the profile's."""
        if self.role.own_account == self.account.id:
            read = self.aws.profile_credentials
            self._credentials = await self._repeat(PROFILE_CREDENTIALS, read, self._pace)
        else:
            assume = functools.partial(assume_role, self.aws, self.role, self.account.id)
            gate = self.aws.assume_role_gate
            self._credentials = await self._repeat("AssumeRole", assume, self._pace, gate)

    async def call(self, operation: Callable[..., T], **parameters: Any) -> T:
        """Call an operation of a shared client in this account, or raise StepFailed.

        A session that has expired is renewed once.
        """
        client = operation.__self__  # type: ignore[attr-defined]
        step = client.meta.method_to_api_mapping[operation.__name__]
        pace = self._pace if client is self.aws.iam else self._cloudtrail_pace
        used = self._credentials
        try:
            request = functools.partial(call_as, used, operation, parameters)
            return await self._repeat(step, request, pace)
        except StepFailed as failure:
            if failure.code not in SESSION_EXPIRED:
                raise
        async with self._renewal:
            if self._credentials is used:  # no other call of this account has renewed it meanwhile
                await self.sign_in()
        request = functools.partial(call_as, self._credentials, operation, parameters)
        return await self._repeat(step, request, pace)

    async def _repeat(
        self, step: str, request: Callable[[], T], pace: Pace, gate: asyncio.Semaphore | None = None
    ) -> T:
        """Make a request in a thread until it is answered or a repetition cannot help.

        Only the attempts pass the gate, not the pauses: a throttled account holds up no other.
        """
        STEP.set(step)
        if step not in self._logged:
            self._logged.add(step)
            self.log(f"{self.account.id} {self.account.name}: {step}")
        urgency = (step not in URGENT_STEPS, self._turn)
        attempts = 0
        while True:
            await pace.turn()
            try:
                async with gate or contextlib.AsyncExitStack():
                    answer = await self.aws.threads.run(urgency, request)
            except SDK_ERRORS as error:
                failure = step_failed(step, error)
            else:
                pace.answered()
                return answer
            if failure.kind == "throttled" and pace.throttled():
                continue
            attempts += 1
            if failure.kind != "transient" or attempts == TRANSIENT_ATTEMPTS:
                raise failure
            await asyncio.sleep(random.uniform(0.25, 0.5) * 2**attempts)


def call_as(
    credentials: Credentials | None, operation: Callable[..., T], parameters: Mapping[str, Any]
) -> T:
    """Call an operation of a shared client, signed with these credentials, in this thread."""
    if credentials is None:
        raise LookupError("sign_in comes first")
    before = SIGNING.set(credentials)
    try:
        return operation(**parameters)
    finally:
        SIGNING.reset(before)


def sign_as_account(request: Any, **_: Any) -> None:
    """Handler of botocore's `before-sign` event: sign with the credentials that `call_as` has set.

    Outside `call_as` it raises LookupError, and nothing is sent.
    """
    signing = request.context.get("signing", {})
    request.context["signing"] = {**signing, "request_credentials": SIGNING.get()}


class Pace:
    """Spaces one account's calls as its throttling demands, in the event loop's thread.

    A throttled call widens the gap by a quarter, an answered one narrows it by 3 %. They balance
    where about one call in eight is throttled: just above the account's limit, to use all of it.
    """

    WIDEN, NARROW = 1.25, 0.97
    FIRST_GAP, LONGEST_GAP = 0.02, 5.0  # seconds
    NO_GAP = 0.005  # seconds; what is shorter is none
    PATIENCE = 900.0  # seconds without any answer but throttling

    def __init__(self, least_gap: float = 0.0) -> None:
        self._least_gap = self._gap = least_gap
        self._next = 0.0
        self._throttled_since: float | None = None

    async def turn(self) -> None:
        """Wait until this account may be called again."""
        start = max(time.monotonic(), self._next)
        self._next = start + self._gap
        if (pause := start - time.monotonic()) > 0:
            await asyncio.sleep(pause)

    def answered(self) -> None:
        self._throttled_since = None
        narrowed = self._gap * self.NARROW if self._gap > self.NO_GAP else 0.0
        self._gap = max(narrowed, self._least_gap)

    def throttled(self) -> bool:
        """Slow down; False if the account has only throttled for too long."""
        now = time.monotonic()
        self._throttled_since = self._throttled_since or now
        self._gap = min(max(self._gap * self.WIDEN, self.FIRST_GAP), self.LONGEST_GAP)
        return now - self._throttled_since < self.PATIENCE


class Threads:
    """Threads that make the calls, the most urgent first.

    The standard library's executor has no priorities, and at exit it waits for its threads: one
    that hangs in a read would keep an interrupted program alive. These are daemons.
    """

    def __init__(self, size: int) -> None:
        self._calls: queue.PriorityQueue[tuple[Any, int, Callable[[], Any], Future[Any]]]
        self._calls = queue.PriorityQueue()
        self._order = itertools.count()
        stay_on_one_cpu()
        for _ in range(size):
            threading.Thread(target=self._work, daemon=True).start()

    async def run(self, urgency: tuple[bool, int], call: Callable[[], T]) -> T:
        """Make a call in a thread when its turn has come; the lowest `urgency` goes first."""
        answer: Future[T] = Future()
        self._calls.put((urgency, next(self._order), call, answer))
        return await asyncio.wrap_future(answer)

    def _work(self) -> None:
        while True:
            _, _, call, answer = self._calls.get()
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(call())
                except BaseException as error:  # it belongs to the caller, not to this thread
                    answer.set_exception(error)


def stay_on_one_cpu() -> None:
    """Keep this thread and those that it starts on one CPU, where the system allows it.

    Python runs one of them at a time anyway. On several CPUs they wake each other across caches at
    every turn: a run then costs a fifth more CPU and takes longer.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # some containers do not allow it
            os.sched_setaffinity(0, {random.choice(tuple(os.sched_getaffinity(0)))})


# --- operations with the profile's credentials ---

SESSION_NAME = "iam-audit"


def describe_organization(aws: Aws) -> Organization:
    organization = aws.organizations.describe_organization()["Organization"]
    feature_set = organization.get("FeatureSet", "ALL")
    return Organization(organization["Id"], organization["MasterAccountId"], feature_set)


async def list_accounts(aws: Aws) -> AsyncIterator[Account]:
    """All accounts, page by page as they arrive; a page may be empty."""
    pages = iter(aws.organizations.get_paginator("list_accounts").paginate())
    seen = set[str]()
    while (page := await aws.threads.run(FIRST, lambda: next(pages, None))) is not None:
        for entry in page["Accounts"]:
            # An account that joins meanwhile may shift another to the next page.
            if entry["Id"] not in seen:
                seen.add(entry["Id"])
                yield account_of(entry)


def account_of(entry: Mapping[str, Any]) -> Account:
    """An entry of ListAccounts. State replaces Status, which AWS retired on 2026-09-09."""
    state = entry.get("State") or entry.get("Status")
    if not state:
        raise AuditError(
            f"ListAccounts gave no State for account {entry['Id']}: botocore "
            f"{botocore.__version__} may be too old (1.40.27 is the first that knows it). Upgrade "
            "boto3 and botocore."
        )
    paths = entry.get("Paths") or [None]
    return Account(entry["Id"], entry.get("Name", ""), state, paths[0])


def paths_missing() -> AuditError:
    return AuditError(
        f"--ou: ListAccounts gave no Paths: botocore {botocore.__version__} may be too old to know "
        "them. Upgrade boto3 and botocore."
    )


def list_policies(aws: Aws) -> list[tuple[str, str]]:
    """The ID and name of each service control policy."""
    pages = aws.organizations.get_paginator("list_policies")
    found = pages.paginate(Filter="SERVICE_CONTROL_POLICY").build_full_result()
    return [(policy["Id"], policy["Name"]) for policy in found["Policies"]]


def describe_policy(aws: Aws, policy_id: str) -> str:
    """The policy's JSON text."""
    return aws.organizations.describe_policy(PolicyId=policy_id)["Policy"]["Content"]


def list_targets_for_policy(aws: Aws, policy_id: str) -> frozenset[str]:
    """The IDs of the root, organizational units and accounts that the policy is attached to."""
    pages = aws.organizations.get_paginator("list_targets_for_policy")
    found = pages.paginate(PolicyId=policy_id).build_full_result()
    return frozenset(target["TargetId"] for target in found["Targets"])


def list_parents(aws: Aws, child_id: str) -> str:
    """The root or organizational unit directly above an account or organizational unit."""
    return aws.organizations.list_parents(ChildId=child_id)["Parents"][0]["Id"]


def list_organizations_features(aws: Aws) -> bool:
    """Whether root credentials of member accounts are managed centrally."""
    features = call_as(aws.profile_credentials(), aws.iam.list_organizations_features, {})
    return "RootCredentialsManagement" in features.get("EnabledFeatures", [])


def assume_role(aws: Aws, role: Role, account_id: str) -> Credentials:
    request = {"RoleArn": role.arn(account_id), "RoleSessionName": SESSION_NAME}
    if role.external_id is not None:
        request["ExternalId"] = role.external_id
    issued = aws.sts.assume_role(Policy=role.session_policy, **request)["Credentials"]
    return Credentials(issued["AccessKeyId"], issued["SecretAccessKey"], issued["SessionToken"])


def session_policy(actions: Sequence[str]) -> str:
    """The policy of each session, which gets only what both the role and this policy allow."""
    statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]}, separators=(",", ":"))


# --- operations in one account ---

UserEntry = Mapping[str, Any]  # of ListUsers
LastUsed = tuple[Union[datetime, None], str]


async def generate_credential_report(session: AccountSession) -> bool:
    """Whether the report is complete."""
    return (await session.call(session.aws.iam.generate_credential_report))["State"] == "COMPLETE"


async def get_credential_report(session: AccountSession) -> tuple[bytes, datetime]:
    """The report's CSV, and when it was generated."""
    answer = await session.call(session.aws.iam.get_credential_report)
    return answer["Content"], answer["GeneratedTime"]


async def list_users(session: AccountSession) -> list[UserEntry]:
    return await list_all(session, session.aws.iam.list_users, "Users", MaxItems=1000)


async def get_login_profile(session: AccountSession, user_name: str) -> bool:
    """Whether the user has a password. A deleted user has none; ListMFADevices then says so."""
    try:
        await session.call(session.aws.iam.get_login_profile, UserName=user_name)
        return True
    except StepFailed as failure:
        if failure.code == "NoSuchEntity":
            return False
        raise


async def list_access_keys(session: AccountSession, user_name: str) -> list[Any]:
    operation = session.aws.iam.list_access_keys
    return await list_all(session, operation, "AccessKeyMetadata", UserName=user_name)


async def get_access_key_last_used(session: AccountSession, key_id: str) -> LastUsed:
    """When the key was last used (None: never) and for which service (N/A: none)."""
    answer = await session.call(session.aws.iam.get_access_key_last_used, AccessKeyId=key_id)
    last_used = answer["AccessKeyLastUsed"]
    if "LastUsedDate" not in last_used:
        return None, NOT_APPLICABLE
    return to_second(last_used["LastUsedDate"]), last_used["ServiceName"]


async def list_mfa_devices(session: AccountSession, user_name: str) -> list[str]:
    """The serial numbers of the user's MFA devices."""
    operation = session.aws.iam.list_mfa_devices
    devices = await list_all(session, operation, "MFADevices", UserName=user_name)
    return [device["SerialNumber"] for device in devices]


async def list_virtual_mfa_devices(session: AccountSession) -> list[str]:
    """The ARNs of the users, root included, to whom a virtual MFA device is assigned."""
    operation = session.aws.iam.list_virtual_mfa_devices
    devices = await list_all(session, operation, "VirtualMFADevices", AssignmentStatus="Assigned")
    return [device.get("User", {}).get("Arn", "") for device in devices]


async def list_all(
    session: AccountSession, operation: Callable[..., Any], member: str, **parameters: Any
) -> list[Any]:
    """All items of an IAM list. botocore's paginator cannot go on after a throttled page."""
    items: list[Any] = []
    while True:
        page = await session.call(operation, **parameters)
        items += page[member]
        if not page.get("IsTruncated"):
            return items
        parameters["Marker"] = page["Marker"]


async def lookup_events(session: AccountSession, name: str, since: datetime) -> list[Event]:
    """The account's successful IAM events of that name."""
    request: dict[str, Any] = {
        "LookupAttributes": [{"AttributeKey": "EventName", "AttributeValue": name}],
        "StartTime": since,
        "MaxResults": 50,
    }
    found = []
    while True:
        answer = await session.call(session.aws.cloudtrail.lookup_events, **request)
        for entry in answer["Events"]:
            event = event_of(json.loads(entry["CloudTrailEvent"]))
            if event is not None and event.time >= since:
                found.append(event)
        if "NextToken" not in answer:
            return found
        request["NextToken"] = answer["NextToken"]


def event_of(record: Mapping[str, Any]) -> Event | None:
    """The event of a CloudTrail record; None if the call failed or was not IAM's.

    Transfer Family, for example, also has a CreateUser. What was acted on is in the request and the
    response; the attributes that LookupEvents itself gives are those of the caller. See "CloudTrail
    record contents" in the CloudTrail User Guide.
    """
    if record.get("errorCode") or not str(record.get("eventSource", "")).startswith("iam."):
        return None
    identity = record.get("userIdentity") or {}
    request = record.get("requestParameters") or {}
    created_key = (record.get("responseElements") or {}).get("accessKey") or {}
    named = ROOT if request.get("userName") == "AWS ROOT USER" else request.get("userName")
    actor = identity.get("arn") or identity.get("invokedBy") or identity.get("principalId")
    the_caller = ROOT if identity.get("type") == "Root" else identity.get("userName")
    return Event(
        time=to_second(parse_time(record["eventTime"])),
        name=str(record["eventName"]),
        user=str(named or the_caller or created_key.get("userName") or ""),
        key_id=str(request.get("accessKeyId") or created_key.get("accessKeyId") or ""),
        status=str(request.get("status") or ""),
        actor=str(actor or ""),
        source_ip=str(record.get("sourceIPAddress") or ""),
        user_agent=str(record.get("userAgent") or ""),
        id=str(record.get("eventID") or ""),
    )


# --- errors ---

SDK_ERRORS = (ClientError, BotoCoreError, ResponseParserError)
# As is every HTTP status from 500
TRANSIENT = {"RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete"}
# botocore's own text quotes the answer, which may hold credentials.
NOT_UNDERSTOOD = "AWS's answer could not be understood"
SIGN_IN_AGAIN = "Sign in again (aws sso login, for one)."
CANNOT_START = {
    "AWSOrganizationsNotInUseException": "The profile must belong to an account of an "
    "organization.",
    "AccessDenied": "The profile needs the permissions that README.md lists.",
    "AccessDeniedException": "The profile must belong to the management account or to a delegated "
    "administrator, and have the permissions that README.md lists.",
    "ExpiredToken": SIGN_IN_AGAIN,
    "ExpiredTokenException": SIGN_IN_AGAIN,
}


def step_failed(step: str, error: Exception) -> StepFailed:
    """What an error of the SDK means for the account that the call was made for."""
    kind = "final"
    if isinstance(error, ClientError):
        code, message = error_code(error), error_message(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in THROTTLED or status == 429:
            kind = "throttled"
        elif code in TRANSIENT or status >= 500:
            kind = "transient"
        return StepFailed(step, code, message, kind)
    code, message = type(error).__name__, without_secrets(str(error))
    if isinstance(error, ResponseParserError):
        message = NOT_UNDERSTOOD
    if isinstance(error, (ResponseParserError, HTTPClientError, ConnectionError)):
        kind = "transient"
    return StepFailed(step, code, message, kind)


def error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def error_message(error: ClientError) -> str:
    return without_secrets(str(error.response.get("Error", {}).get("Message", "")))


def sdk_error_in_words(error: Exception) -> str:
    """What an error of the SDK means for somebody who cannot start; empty for any other error."""
    if isinstance(error, ClientError):
        code = error_code(error)
        words = f"{error.operation_name}: {code}: {error_message(error)}"
        return f"{words} {CANNOT_START[code]}" if code in CANNOT_START else words
    if isinstance(error, botocore.exceptions.ProfileNotFound):
        return f"{error}: `aws configure list-profiles` shows the ones there are."
    if isinstance(error, ResponseParserError):
        return f"{NOT_UNDERSTOOD}: is a proxy in between?"
    if isinstance(error, BotoCoreError):
        return f"{type(error).__name__}: {without_secrets(str(error))}"
    return ""


def without_secrets(message: str) -> str:
    """An error message's first line without what looks like a signature or a session token.

    SignatureDoesNotMatch, for example, goes on to quote the signed request with the token.
    """
    first_line = message.strip().split("\n", 1)[0]
    return re.sub(r"[0-9a-f]{64}|[A-Za-z0-9+/=%]{100,}", "***", first_line)[:500]


def frames_of(error: BaseException) -> list[str]:
    """The traceback without the errors' texts, which may quote a signed request or credentials."""
    return "".join(traceback.format_tb(error.__traceback__)).splitlines()


# --------------------------------------------------------------------------------------------------
# Audit: one account from AssumeRole to its users; the organization as many of these side by side
# --------------------------------------------------------------------------------------------------

ACCOUNTS_PER_WORKER = 8  # accounts in hand; most of them wait for their report and hold no thread
# IAM throttles per account: more calls at a time gain nothing and disturb the account's owner.
READERS_PER_ACCOUNT = 7  # with the report's own, at most 8 calls at a time


async def audit_organization(
    aws: Aws, run: Run, progress: Progress, finish: Callable[[Outcome], None], log: Log
) -> None:
    """Audit the accounts, the first of them while others are still being listed.

    `finish` gets each outcome as soon as there is one. If it raises, the audit ends with its error.
    """
    organization, plan = run.organization, run.plan
    slots = asyncio.Semaphore(plan.workers * ACCOUNTS_PER_WORKER)
    audits: list[asyncio.Task[None]] = []

    async def audit(account: Account, turn: int) -> None:
        async with slots:
            session = AccountSession(aws, account, plan.role, turn, log)
            finish(await audit_account(session, plan))

    async for account in accounts_in_question(aws, organization, plan.scope, progress):
        left_out = leave_out(account, organization, plan.scope)
        if left_out is not None:
            finish(left_out)
        else:
            audits.append(asyncio.create_task(audit(account, len(audits))))
    await asyncio.gather(*audits)


async def accounts_in_question(
    aws: Aws, organization: Organization, scope: Scope, progress: Progress
) -> AsyncIterator[Account]:
    """The accounts as they are listed; all at the end if the scope must be checked against them."""
    listed = []
    async for account in list_accounts(aws):
        if leave_out(account, organization, scope) is None:
            progress.listed += 1
        if scope.needs_whole_list:
            listed.append(account)
        else:
            yield account
    progress.all_listed = True
    if scope.needs_whole_list:
        check_scope(scope, organization, listed)
    for account in listed:
        yield account


def check_scope(scope: Scope, organization: Organization, accounts: Sequence[Account]) -> None:
    """Raise AuditError for what does not exist: without it, the audit would look complete."""
    by_id = {account.id: account for account in accounts}
    if unknown := scope.accounts - by_id.keys():
        ids = ", ".join(sorted(unknown))
        raise AuditError(f"--accounts: not in organization {organization.id}: {ids}")
    management = organization.management_account
    if management in scope.accounts and not scope.include_management:
        reason = "is the management account: add --include-management."
        raise AuditError(f"--accounts: {management} {reason}")
    if not scope.ous:
        return
    places = set[str]()
    for account in accounts:
        if account.path is None:
            raise paths_missing()
        places.update(account.path.split("/"))
    if unknown := scope.ous - places:
        ids = ", ".join(sorted(unknown))
        raise AuditError(f"--ou: no account of organization {organization.id} lies below {ids}")
    for account_id in sorted(scope.accounts):
        if not is_below(by_id[account_id], scope.ous):
            raise AuditError(f"--accounts: not below --ou: {account_id}")


def is_below(account: Account, ous: frozenset[str]) -> bool:
    return not ous.isdisjoint((account.path or "").split("/"))


def leave_out(
    account: Account, organization: Organization, scope: Scope
) -> SkippedAccount | OutOfScopeAccount | None:
    """The outcome of an account that is not audited; None if it is."""
    in_scope = (
        (scope.include_management or account.id != organization.management_account)
        and (not scope.accounts or account.id in scope.accounts)
        and (not scope.ous or is_below(account, scope.ous))
        and account.id not in scope.exclude
    )
    if not in_scope:
        return OutOfScopeAccount(account)
    return None if account.state == "ACTIVE" else SkippedAccount(account)


async def audit_account(session: AccountSession, plan: Plan) -> AuditedAccount | FailedAccount:
    """Read one account in full, or say why not. No error here stops the other accounts."""
    try:
        return await naming_the_step(session, functools.partial(read_account, session, plan))
    except StepFailed as failure:
        return FailedAccount(session.account, failure.step, failure.code, failure.message)


async def naming_the_step(session: AccountSession, work: Callable[[], Awaitable[T]]) -> T:
    """The result of the work. Any error becomes a StepFailed of the task's last operation."""
    try:
        return await work()
    except StepFailed:
        raise
    except Exception as error:
        for line in frames_of(error):
            session.log(line)
        message = without_secrets(str(error))
        raise StepFailed(STEP.get(), type(error).__name__, message) from None


async def read_account(session: AccountSession, plan: Plan) -> AuditedAccount:
    """All users there are now, and root from the credential report."""
    await session.sign_in()
    # Nothing else is asked until IAM has accepted this: a role that may read nothing fails here.
    first_answer = await ask_for_report(session)
    # The users are read while IAM generates the report: only their passwords and MFA wait for it.
    wait = functools.partial(wait_for_report, session, first_answer, plan.report_timeout)
    report = asyncio.create_task(naming_the_step(session, wait))
    try:
        asked = utc_now()
        listed = await list_users(session)
        users = await read_users(session, listed, report)
        # Somebody in the new report whom the list lacks was created or renamed meanwhile.
        generated, rows = await report
        if generated >= asked - CLOCK_SKEW and has_unlisted_user(rows, listed, asked):
            users = await read_changed_users(session, users, listed, report)
    finally:
        report.cancel()
        await asyncio.gather(report, return_exceptions=True)  # what it raises now comes second
    in_order = [users[name] for name in sorted(users)]
    if ROOT in rows:
        in_order.insert(0, await read_root(session, rows[ROOT]))
    trail = None
    if plan.events_since is not None:
        trail = await read_trail(session, plan.event_names, plan.events_since)
    return AuditedAccount(session.account, to_second(generated), tuple(in_order), trail)


# --- the credential report ---

REPORT_FIRST_PAUSE = 2.0  # seconds; small reports take about that
REPORT_LONGEST_PAUSE = 10.0  # seconds
REPORT_PAUSE_GROWTH = 1.1
# botocore retries none of these, and rightly: they mean "not yet".
REPORT_NOT_YET = {"LimitExceeded", "ReportNotPresent", "ReportExpired", "ReportInProgress"}
REPORT_NO_DATE = {"n/a", "no_information", "not_supported"}
# fmt: off
REPORT_COLUMNS = {
    "user", "arn", "user_creation_time", "password_enabled", "password_last_used", "mfa_active",
    "access_key_1_active", "access_key_1_last_rotated",
    "access_key_1_last_used_date", "access_key_1_last_used_service",
    "access_key_2_active", "access_key_2_last_rotated",
    "access_key_2_last_used_date", "access_key_2_last_used_service",
}
# fmt: on
ReportRow = Mapping[str, str]


class CredentialReport(NamedTuple):
    """When the report was generated, and its rows by user name."""

    generated: datetime
    rows: Mapping[str, ReportRow]


class NotYet(NamedTuple):
    """There is no report yet: the operation that said so, and what it said."""

    step: str
    reason: str


async def ask_for_report(session: AccountSession) -> CredentialReport | NotYet:
    """Have IAM generate the report, and get it if it is complete."""
    try:
        if await generate_credential_report(session):
            content, generated = await get_credential_report(session)
            return CredentialReport(generated, parse_report(content, session.account.id))
    except StepFailed as failure:
        if failure.code not in REPORT_NOT_YET:
            raise
        return NotYet(failure.step, f"{failure.step} last answered {failure.code}")
    return NotYet("GenerateCredentialReport", "it was not COMPLETE")


async def wait_for_report(
    session: AccountSession, answer: CredentialReport | NotYet, timeout: float
) -> CredentialReport:
    """Ask for the report until it is complete. Raises StepFailed after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = REPORT_FIRST_PAUSE
    while isinstance(answer, NotYet):
        left = deadline - time.monotonic()
        if left <= 0:
            message = f"no credential report after {timeout:g} s: {answer.reason}"
            raise StepFailed(answer.step, "ReportTimeout", message)
        await asyncio.sleep(min(pause, left))
        pause = min(pause * REPORT_PAUSE_GROWTH, REPORT_LONGEST_PAUSE)
        answer = await ask_for_report(session)
    return answer


def parse_report(content: bytes, account_id: str) -> dict[str, ReportRow]:
    """The credential report's rows by user name.

    Raises StepFailed if it is not a credential report or if a row is of another account: all
    accounts share one client, and this makes a mix-up impossible to miss.
    """
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise damaged_report(f"it is no CSV ({error})") from None
    if missing := REPORT_COLUMNS.difference(reader.fieldnames or ()):
        raise damaged_report(f"it lacks the columns {', '.join(sorted(missing))}")
    by_user: dict[str, ReportRow] = {}
    for row in rows:
        if None in row or None in row.values():
            raise damaged_report(f"a row does not have as many cells as the header ({row['user']})")
        check_account(row["arn"], account_id, "GetCredentialReport")
        if row["user"] in by_user:
            raise damaged_report("it has two rows of one user")
        by_user[row["user"]] = row
    return by_user


def damaged_report(why: str) -> StepFailed:
    message = f"the answer is no credential report: {why}"
    return StepFailed("GetCredentialReport", "DamagedReport", message)


def check_account(arn: str, account_id: str, step: str) -> None:
    """Raise StepFailed if the ARN does not carry the ID of the account that was asked."""
    if arn.split(":")[4:5] != [account_id]:
        raise StepFailed(step, "WrongAccount", f"the answer is about another account: {arn}")


def report_date(row: ReportRow, column: str) -> datetime | None:
    text = row[column]
    if text.lower() in REPORT_NO_DATE:
        return None
    try:
        return to_second(parse_time(text))
    except ValueError:
        raise damaged_report(f"{column} of {row['user']} is {text!r}") from None


def report_flag(row: ReportRow, column: str) -> bool:
    text = row[column].lower()
    if text not in {"true", "false"}:
        raise damaged_report(f"{column} of {row['user']} is {row[column]!r}")
    return text == "true"


def has_password(row: ReportRow) -> bool:
    """Older reports have `not_supported` for root, which then has a password."""
    text = row["password_enabled"].lower()
    return text == "not_supported" or report_flag(row, "password_enabled")


# --- users ---

CLOCK_SKEW = timedelta(minutes=15)  # AWS accepts no signature with a larger difference to its clock
# NoSuchEntity is no proof of deletion: IAM is eventually consistent, users are renamed, and keys move
# with them. What a later list still has is read again after these pauses; then the account fails.
READ_AGAIN_AFTER = (2.0, 3.0, 5.0)  # seconds
NO_SUCH_ENTITY = "NoSuchEntity"


def has_unlisted_user(
    rows: Mapping[str, ReportRow], listed: Sequence[UserEntry], asked: datetime
) -> bool:
    """Whether the report has a name, or a new bearer of a name, that the list lacks."""
    created = {entry["UserName"]: to_second(entry["CreateDate"]) for entry in listed}
    for name, row in rows.items():
        if name == ROOT:
            continue
        moment = report_date(row, "user_creation_time")
        is_new = moment is not None and moment >= asked - CLOCK_SKEW
        if name not in created or (is_new and created[name] != moment):
            return True
    return False


async def read_changed_users(
    session: AccountSession,
    users: Mapping[str, User],
    listed: Sequence[UserEntry],
    report: asyncio.Task[CredentialReport],
) -> dict[str, User]:
    """List the users once more and read whoever is new in that list. Whoever it lacks is gone."""
    known = {(entry["UserName"], entry["UserId"]) for entry in listed}
    present, new = set(), []
    for entry in await list_users(session):
        present.add(entry["UserName"])
        if (entry["UserName"], entry["UserId"]) not in known:
            new.append(entry)
    kept = {name: user for name, user in users.items() if name in present}
    return {**kept, **await read_users(session, new, report)}


async def read_users(
    session: AccountSession,
    entries: Sequence[UserEntry],
    report: asyncio.Task[CredentialReport],
) -> dict[str, User]:
    """The users of these entries of ListUsers by name, a few read at a time."""
    users: dict[str, User] = {}
    remaining = iter(entries)

    async def read_one_after_another() -> None:
        for entry in remaining:
            user = await read_user(session, entry, report)
            if user is not None:
                users[user.name] = user

    readers: list[asyncio.Task[None]] = []
    for _ in range(min(READERS_PER_ACCOUNT, len(entries))):
        reader = naming_the_step(session, read_one_after_another)
        readers.append(asyncio.create_task(reader))
    try:
        await asyncio.gather(*readers)
    finally:  # after an error, nothing more is read
        for task in readers:
            task.cancel()
    return users


async def read_user(
    session: AccountSession, entry: UserEntry, report: asyncio.Task[CredentialReport]
) -> User | None:
    """One user, under their present name; None if a later ListUsers lacks them."""
    for pause in (*READ_AGAIN_AFTER, None):
        try:
            return await read_user_once(session, entry, report)
        except StepFailed as failure:
            if failure.code != NO_SUCH_ENTITY or failure.step == "GetAccessKeyLastUsed":
                raise
            present = await find_user(session, entry)
            if present is None:
                return None
            if pause is None:
                raise
        if present["UserName"] == entry["UserName"]:
            await asyncio.sleep(pause)
        entry = present
    return None


async def find_user(session: AccountSession, entry: UserEntry) -> UserEntry | None:
    """The same user in a new list, perhaps renamed; else whoever has the name now."""
    namesake: UserEntry | None = None
    for other in await list_users(session):
        if other["UserId"] == entry["UserId"]:
            return other
        if other["UserName"] == entry["UserName"]:
            namesake = other
    return namesake


async def read_user_once(
    session: AccountSession, entry: UserEntry, report: asyncio.Task[CredentialReport]
) -> User:
    """One user, from live answers and their row of the report; StepFailed with NoSuchEntity."""
    name, created = entry["UserName"], to_second(entry["CreateDate"])
    check_account(entry["Arn"], session.account.id, "ListUsers")
    keys = await read_access_keys(session, name)
    row = (await report).rows.get(name)
    if row is not None and report_date(row, "user_creation_time") == created:
        password, may_have_mfa = has_password(row), report_flag(row, "mfa_active")
        password_last_used = report_date(row, "password_last_used")
    else:  # created or renamed since the report
        password, may_have_mfa = await get_login_profile(session, name), True
        password_last_used = entry.get("PasswordLastUsed")
    serials = []
    if password or may_have_mfa:
        serials = await list_mfa_devices(session, name)
    mfa = tuple(sorted({mfa_kind(serial) for serial in serials}))
    return User(name, password, password_last_used if password else None, mfa, keys)


async def read_access_keys(session: AccountSession, user_name: str) -> tuple[AccessKey, ...]:
    """The user's keys, without those that a later ListAccessKeys lacks."""
    keys = []
    for entry in await list_access_keys(session, user_name):
        key_id, created = entry["AccessKeyId"], to_second(entry["CreateDate"])
        found = await read_last_used(session, user_name, key_id)
        if found is not None:
            last_used, service_name = found
            keys.append(AccessKey(key_id, entry["Status"], created, last_used, service_name))
    return by_creation(keys)


async def read_last_used(session: AccountSession, user_name: str, key_id: str) -> LastUsed | None:
    """When and for what the key was last used; None if a later ListAccessKeys lacks the key."""
    for pause in (*READ_AGAIN_AFTER, None):
        try:
            return await get_access_key_last_used(session, key_id)
        except StepFailed as failure:
            # AWS may also answer AccessDenied for a key that is gone.
            if failure.code != NO_SUCH_ENTITY and failure.code not in DENIED:
                raise
            listed = await list_access_keys(session, user_name)
            if key_id not in {entry["AccessKeyId"] for entry in listed}:
                return None
            if pause is None or failure.code in DENIED:
                raise
        await asyncio.sleep(pause)
    return None


def by_creation(keys: Iterable[AccessKey]) -> tuple[AccessKey, ...]:
    return tuple(sorted(keys, key=lambda key: (key.created, key.id)))


def mfa_kind(serial: str) -> str:
    """The kind of an MFA device by its serial number; what is not an ARN is a hardware TOTP token.

    https://docs.aws.amazon.com/IAM/latest/APIReference/API_MFADevice.html
    """
    if not serial.startswith("arn:"):
        return "Hardware"
    kinds = {"mfa": "Virtual", "u2f": "Security key", "sms-mfa": "SMS"}
    resource_type = serial.split(":", 5)[-1].partition("/")[0]
    return kinds.get(resource_type, "Unknown")


async def read_root(session: AccountSession, row: ReportRow) -> User:
    """Root as the report shows it. ListVirtualMFADevices is asked only if root has MFA."""
    password = has_password(row)
    last_used = report_date(row, "password_last_used") if password else None
    mfa: tuple[str, ...] = ()
    if report_flag(row, "mfa_active"):
        # A role cannot list root's other devices: what is not virtual is a token or a security key.
        virtual = row["arn"] in await list_virtual_mfa_devices(session)
        mfa = ("Virtual",) if virtual else ("Hardware",)
    keys = []
    for slot in (1, 2):
        key = root_access_key(row, slot)
        if key is not None:
            keys.append(key)
    return User(ROOT, password, last_used, mfa, by_creation(keys))


def root_access_key(row: ReportRow, slot: int) -> AccessKey | None:
    """Root's access key in that slot.

    `active` is false both for no key and for an inactive key. Only `last_rotated` tells them apart,
    and it is the creation date as far as the report knows it.
    """
    active = report_flag(row, f"access_key_{slot}_active")
    created = report_date(row, f"access_key_{slot}_last_rotated")
    if created is None:
        if active:
            raise damaged_report(f"root's access key {slot} is active and has no last_rotated")
        return None
    last_used = report_date(row, f"access_key_{slot}_last_used_date")
    service = row[f"access_key_{slot}_last_used_service"] if last_used else NOT_APPLICABLE
    status = "Active" if active else "Inactive"
    return AccessKey(ROOT_ACCESS_KEYS[slot - 1], status, created, last_used, service)


async def read_trail(session: AccountSession, names: Sequence[str], since: datetime) -> Trail:
    """CloudTrail's events of the account. A refusal costs the changes their witness, no more."""
    events = []
    try:
        for name in names:
            events += await lookup_events(session, name, since)
    except StepFailed as failure:
        return Trail(error=f"{failure.step}: {failure.code}: {failure.message}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # a record that is not what AWS documents
        return Trail(error=f"LookupEvents: DamagedEvent: {type(error).__name__}")
    return Trail(tuple(sorted(events)))


# --------------------------------------------------------------------------------------------------
# Files: rows, cells, atomic writing, reading a run back
# --------------------------------------------------------------------------------------------------


CSV_COLUMNS = (
    "account_id",
    "account_name",
    "username",
    "password_status",
    "password_last_used",
    "access_key_id",
    "status",
    "created_date",
    "last_used_date",
    "service_name",
    "mfa_status",
)
PASSWORD_SET = "Configurada"
PASSWORD_NOT_SET = "No configurada"
PASSWORD_NEVER_USED = "Nunca"
KEY_NEVER_USED = "Nunca utilizada"
NO_MFA = "None"
KEY_STATUSES = ("Active", "Inactive", "Expired", NOT_APPLICABLE)
FORMULA = re.compile(
    r"'*[=+\-@\t\r]"
)  # how a cell starts that a spreadsheet would take for a formula
SUMMARY_FORMAT = 1  # of summary.json; a number more for each change that a reader must know about


class UserState(NamedTuple):
    """What is compared of a user between two runs. `keys` maps access key IDs to status and creation date."""

    password_status: str
    mfa_status: str
    keys: Mapping[str, tuple[str, str]]

    @property
    def lacks_mfa(self) -> bool:
        return self.password_status == PASSWORD_SET and self.mfa_status == NO_MFA


States = Mapping[str, UserState]  # by user name


def make_run_folder(output_dir: Path, started: datetime) -> Path:
    """A new folder for this run, named by its UTC start; a second run in the same second gets `-2`, and so on."""
    for missing in reversed([one for one in (output_dir, *output_dir.parents) if not one.exists()]):
        missing.mkdir(
            mode=0o700, exist_ok=True
        )  # makedirs would give this mode to the last one alone
    name = f"{started:%Y%m%dT%H%M%SZ}"
    for folder in itertools.chain(
        [output_dir / name], (output_dir / f"{name}-{n}" for n in itertools.count(2))
    ):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            break
    (folder / "accounts").mkdir(mode=0o700)
    return folder


def remove_if_empty(folder: Path) -> None:
    """Take back the folder of a run that has written nothing."""
    with contextlib.suppress(OSError):
        (folder / "accounts").rmdir()
        folder.rmdir()


def account_csv(folder: Path, account_id: str) -> Path:
    return folder / "accounts" / f"{account_id}.csv"


def rows_of(audited: AuditedAccount) -> Iterator[tuple[str, ...]]:
    """The account's CSV rows: one for each access key, one for a user without keys."""
    account = audited.account
    for user in audited.users:
        who = (account.id, account.name, user.name, *password_cells(user))
        for key in user.keys or (None,):
            yield (*who, *access_key_cells(key), mfa_status(user))


def password_cells(user: User) -> tuple[str, str]:
    if not user.password:
        return PASSWORD_NOT_SET, NOT_APPLICABLE
    return PASSWORD_SET, iso(
        user.password_last_used
    ) if user.password_last_used else PASSWORD_NEVER_USED


def access_key_cells(key: AccessKey | None) -> tuple[str, ...]:
    if key is None:
        return (NOT_APPLICABLE,) * 5
    last_used = iso(key.last_used) if key.last_used else KEY_NEVER_USED
    return key.id, key.status, iso(key.created), last_used, key.service_name


def mfa_status(user: User) -> str:
    return "+".join(user.mfa) or NO_MFA


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with atomic_file(path) as file:
        writer = csv.writer(LineFeeds(file), lineterminator="\r\n")
        writer.writerow(columns)
        writer.writerows([neutral(cell) for cell in row] for row in rows)


def neutral(cell: str) -> str:
    """The cell, with an apostrophe before what a spreadsheet would take for a formula.

    `original` undoes it; that is why a cell with such an apostrophe of its own gets one more.
    """
    return "'" + cell if FORMULA.match(cell) else cell


def original(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


class LineFeeds:
    """Between csv.writer and a file: rows end in LF, as grep and awk expect, while the writer believes in CRLF, the one
    line end with which every version of Python quotes both CR and LF inside a cell."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row[:-2] + "\n")


def write_json(path: Path, document: Any) -> None:
    with atomic_file(path) as file:
        json.dump(document, file, indent=2)
        file.write("\n")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """A file that is there in full or not at all: written beside its place (mkstemp makes it 0600), then renamed."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        # backslashreplace: what strangers write can hold half a character, and must not cost the whole file
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise AuditError(f"Cannot write {path}: {error.strerror or error}") from None
        raise


def finished_runs(output_dir: Path) -> list[Path]:
    """The folders of finished runs, newest first."""
    found = []
    for folder in output_dir.iterdir():
        name = re.fullmatch(r"(\d{8}T\d{6}Z)(?:-(\d+))?", folder.name)
        if name and os.path.exists(folder / "summary.json"):
            found.append((name[1], int(name[2] or 1), folder))
    return [folder for _, _, folder in sorted(found, reverse=True)]


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary.json of a finished run. Raises AuditError if it cannot be read, ValueError if it is not one."""
    path = folder / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AuditError(f"Cannot read the earlier run's {path}: {error.strerror}") from None
    if summary["tool"] != "iam-audit" or summary["format"] != SUMMARY_FORMAT:
        raise ValueError(f"it is not of format {SUMMARY_FORMAT}")
    return summary


def read_states(path: Path, account_id: str) -> dict[str, UserState]:
    """An account's CSV of an earlier run. Raises AuditError for one that this program has not written so."""
    try:
        text = path.read_bytes().decode("utf-8")
        if not text.endswith("\n"):
            raise ValueError("it does not end with a line feed")
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        if tuple(next(rows, ())) != CSV_COLUMNS:
            raise ValueError("its header is not that of an account's CSV")
        return states_of_rows(rows, account_id)
    except (OSError, ValueError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise AuditError(f"Cannot read the earlier run's {path}: {why}") from None


def states_of_rows(rows: Iterable[Sequence[str]], account_id: str) -> dict[str, UserState]:
    states: dict[str, UserState] = {}
    for number, row in enumerate(rows, 2):
        if len(row) != len(CSV_COLUMNS) or row[0] != account_id:
            raise ValueError(f"row {number} is not one of account {account_id}")
        _, _, name, password, _, key_id, status, created, _, _, mfa = row
        if (
            password not in (PASSWORD_SET, PASSWORD_NOT_SET)
            or status not in KEY_STATUSES
            or not mfa
        ):
            raise ValueError(f"row {number} has words that no such CSV has")
        state = states.setdefault(original(name), UserState(password, mfa, {}))
        if key_id != NOT_APPLICABLE:
            cast("dict[str, tuple[str, str]]", state.keys)[key_id] = (status, created)
    return states


# --------------------------------------------------------------------------------------------------
# Assess: gaps, maturity levels, what to fix first; pure, the clock is an argument
# --------------------------------------------------------------------------------------------------


# What is found, with its priority: the most urgent that applies names the finding. Console users without MFA come first
# in production accounts and fourth elsewhere.
PRIORITIES = {
    "root-access-key": 1,
    "console-without-mfa": 4,
    "key-older-than-1-year": 2,
    "key-in-use": 3,
    "unused-key": 5,
    "key-older-than-90-days": 6,
    "inactive-key": 7,
}
ONE_YEAR = timedelta(days=365)
UNUSED_AFTER = timedelta(days=90)
IN_USE_WITHIN = timedelta(days=30)
# AWS Security Maturity Model v2; the order is the ranking
LEVELS = ("Not Started", "In Progress", "Complete", "Advanced")
NOT_STARTED, IN_PROGRESS, COMPLETE, ADVANCED = LEVELS
PHASES = ("phase1", "phase2")
FINDINGS_COLUMNS = (
    "priority",
    "finding",
    "account_id",
    "account_name",
    "production",
    "username",
    "access_key_id",
    "age_days",
    "last_used_date",
    "service_name",
    "reasons",
    "recommendation",
)


class OldestKey(NamedTuple):
    """The oldest active access key somewhere, and whose it is."""

    created: datetime
    account_id: str
    account_name: str
    username: str
    access_key_id: str


@dataclass(frozen=True)
class Gaps:
    """Long-term credentials, counted; of one account, or added up over several. Root counts as a user."""

    console_users: int = 0
    console_users_without_mfa: int = 0
    access_keys: int = 0
    active_keys: int = 0
    inactive_keys: int = 0
    expired_keys: int = 0
    active_keys_older_than_max_age: int = 0
    active_keys_older_than_1_year: int = 0
    active_keys_never_used: int = 0
    active_keys_not_used_for_90_days: int = 0
    active_keys_used_within_30_days: int = 0
    root_access_keys: int = 0
    users_with_two_active_keys: int = 0
    oldest_active_key: OldestKey | None = None

    def __add__(self, other: Gaps) -> Gaps:
        numbers = {name: getattr(self, name) + getattr(other, name) for name in GAP_COUNTS}
        oldest = min(filter(None, (self.oldest_active_key, other.oldest_active_key)), default=None)
        return Gaps(**numbers, oldest_active_key=oldest)

    @property
    def mfa_coverage_percent(self) -> float:
        """Console users with MFA, in percent of all, rounded down: 100 means all, and there may be none."""
        covered = self.console_users - self.console_users_without_mfa
        return 1000 * covered // self.console_users / 10 if self.console_users else 100.0


GAP_COUNTS = tuple(each.name for each in fields(Gaps) if each.name != "oldest_active_key")


@dataclass(frozen=True)
class AccountFigures:
    """What is kept of an audited account once its CSV is written."""

    account: Account
    report_generated: datetime
    has_root: bool
    users: int
    production: bool
    gaps: Gaps
    phase1: str
    phase2: str


class Finding(NamedTuple):
    """One thing to fix: a user who needs MFA (`key` is None), or an access key that must go."""

    priority: int
    finding: str
    account: Account
    production: bool
    user: str
    key: AccessKey | None
    password_last_used: datetime | None
    reasons: tuple[str, ...]


def assess(audited: AuditedAccount, plan: Plan, now: datetime) -> AccountFigures:
    """The figures of one account."""
    gaps = sum(
        (gaps_of(audited.account, user, plan.max_key_age, now) for user in audited.users), Gaps()
    )
    users = sum(user.name != ROOT for user in audited.users)
    return AccountFigures(
        account=audited.account,
        report_generated=audited.report_generated,
        has_root=users < len(audited.users),
        users=users,
        production=is_production(audited.account, plan.production),
        gaps=gaps,
        phase1=phase1_level(gaps),
        phase2=phase2_level(gaps),
    )


def is_production(account: Account, pattern: re.Pattern[str]) -> bool:
    """Whether the account's name, ID or path in the organization says so."""
    return any(pattern.search(text) for text in (account.name, account.id, account.path or ""))


def gaps_of(account: Account, user: User, max_key_age: timedelta, now: datetime) -> Gaps:
    """What one user adds to the account's gaps."""
    active = [key for key in user.keys if key.status == "Active"]
    used = [now - key.last_used for key in active if key.last_used is not None]
    return Gaps(
        console_users=int(user.password),
        console_users_without_mfa=int(user.password and not user.mfa),
        access_keys=len(user.keys),
        active_keys=len(active),
        inactive_keys=sum(key.status == "Inactive" for key in user.keys),
        expired_keys=sum(key.status == "Expired" for key in user.keys),
        active_keys_older_than_max_age=sum(now - key.created > max_key_age for key in active),
        active_keys_older_than_1_year=sum(now - key.created > ONE_YEAR for key in active),
        active_keys_never_used=len(active) - len(used),
        active_keys_not_used_for_90_days=sum(span > UNUSED_AFTER for span in used),
        active_keys_used_within_30_days=sum(span <= IN_USE_WITHIN for span in used),
        root_access_keys=len(user.keys) if user.name == ROOT else 0,
        users_with_two_active_keys=int(len(active) > 1),
        oldest_active_key=min(
            (OldestKey(key.created, account.id, account.name, user.name, key.id) for key in active),
            default=None,
        ),
    )


def phase1_level(gaps: Gaps, mfa_enforced: bool = False) -> str:
    """Multi-factor authentication; Advanced where a policy also keeps console users without MFA from acting."""
    if gaps.console_users_without_mfa:
        return IN_PROGRESS
    return ADVANCED if mfa_enforced else COMPLETE


def phase2_level(gaps: Gaps) -> str:
    """Use temporary credentials."""
    if gaps.active_keys_older_than_max_age:
        return IN_PROGRESS
    return COMPLETE if gaps.active_keys else ADVANCED


def organization_level(levels: Iterable[str], failed: int) -> str:
    """The lowest level among the audited accounts; accounts that nobody could look into hold it at In Progress."""
    ranks = [LEVELS.index(level) for level in levels]
    if not ranks:
        return NOT_STARTED
    return LEVELS[min(ranks + [LEVELS.index(IN_PROGRESS)] * bool(failed))]


def total_gaps(accounts: Iterable[AccountFigures]) -> Gaps:
    return sum((account.gaps for account in accounts), Gaps())


def findings_of(audited: AuditedAccount, plan: Plan, now: datetime) -> Iterator[Finding]:
    """What to fix in one account: each user without MFA and each key at most once."""
    account, production = audited.account, is_production(audited.account, plan.production)
    for user in audited.users:
        if user.password and not user.mfa:
            reasons = (
                "console user without MFA",
                *["root"] * (user.name == ROOT),
                *["production"] * production,
            )
            finding = "console-without-mfa"
            priority = MOST_URGENT if production else PRIORITIES[finding]
            yield Finding(
                priority,
                finding,
                account,
                production,
                user.name,
                None,
                user.password_last_used,
                reasons,
            )
        for key in user.keys:
            if applies := key_findings(key, user.name == ROOT, plan.max_key_age, now):
                finding = min(applies, key=PRIORITIES.__getitem__)
                priority, reasons = PRIORITIES[finding], tuple(applies.values())
                yield Finding(priority, finding, account, production, user.name, key, None, reasons)


def key_findings(
    key: AccessKey, is_root: bool, max_key_age: timedelta, now: datetime
) -> dict[str, str]:
    """All findings that apply to an access key, each with its reason in words."""
    if key.status != "Active":
        return {"inactive-key": "expired" if key.status == "Expired" else "inactive"}
    old = now - key.created
    unused = None if key.last_used is None else now - key.last_used
    applies = {
        "root-access-key": "active root access key" if is_root else "",
        "key-older-than-1-year": "older than 1 year" if old > ONE_YEAR else "",
        "key-in-use": "used within 30 days"
        if unused is not None and unused <= IN_USE_WITHIN
        else "",
        "unused-key": unused_reason(old, unused),
        "key-older-than-90-days": f"older than {max_key_age.days} days"
        if old > max_key_age
        else "",
    }
    return {finding: reason for finding, reason in applies.items() if reason}


def unused_reason(old: timedelta, unused: timedelta | None) -> str:
    """Why a key is safe to deactivate; a young key that was never used may be about to be used."""
    if old <= UNUSED_AFTER:
        return ""
    if unused is None:
        return "never used"
    return "not used for 90 days" if unused > UNUSED_AFTER else ""


def most_urgent_first(finding: Finding) -> tuple[Any, ...]:
    """The order of findings.csv: by priority, production first, oldest first, by account and name."""
    key = finding.key
    born = key.created.timestamp() if key else float("inf")
    return (
        finding.priority,
        not finding.production,
        born,
        finding.account.id,
        finding.user,
        key.id if key else "",
    )


def finding_row(finding: Finding, run: Run) -> tuple[str, ...]:
    """The finding's line in findings.csv."""
    key = finding.key
    if key is None:
        last_used = (
            iso(finding.password_last_used) if finding.password_last_used else PASSWORD_NEVER_USED
        )
        key_id, age_days, service = NOT_APPLICABLE, "", NOT_APPLICABLE
    else:
        key_id, _, _, last_used, service = access_key_cells(key)
        age_days = str(days_between(key.created, run.started))
    return (
        str(finding.priority),
        finding.finding,
        finding.account.id,
        finding.account.name,
        "true" if finding.production else "false",
        finding.user,
        key_id,
        age_days,
        last_used,
        service,
        "; ".join(finding.reasons),
        recommendation(finding, run),
    )


def recommendation(finding: Finding, run: Run) -> str:
    """The next step in a sentence, with the AWS CLI command for it, its arguments quoted for a shell."""
    account, user, key = finding.account.id, shlex.quote(printable(finding.user)), finding.key
    if finding.user == ROOT:
        return recommendation_for_root(finding, run)
    if key is None:
        return (
            f"Have the user register an MFA device or, if temporary credentials serve, remove the password: "
            f"`aws iam delete-login-profile --user-name={user}` in account {account}."
        )
    arguments = f"--user-name={user} --access-key-id={shlex.quote(printable(key.id))}"
    if key.status != "Active":
        return f"Delete it: `aws iam delete-access-key {arguments}` in account {account}."
    deactivate = f"`aws iam update-access-key {arguments} --status=Inactive` in account {account}"
    if not {"never used", "not used for 90 days"}.isdisjoint(finding.reasons):
        return f"Deactivate it: {deactivate}; delete it once nobody has missed it."
    if key.last_used is None:
        return f"Ask its owner what it is for, then deactivate it: {deactivate}."
    if "used within 30 days" in finding.reasons:
        return f"Move what uses it to temporary credentials (an IAM role), then deactivate it: {deactivate}."
    return f"Find out what used it last, then deactivate it: {deactivate}."


def recommendation_for_root(finding: Finding, run: Run) -> str:
    """Without root's own sign-in only AssumeRoot can do it, and only in a member account.

    https://docs.aws.amazon.com/IAM/latest/UserGuide/id_root-user-privileged-task.html
    """
    account, is_key = finding.account.id, finding.key is not None
    if account == run.organization.management_account:
        to_do = "delete the access key" if is_key else "register an MFA device"
        step = f"sign in as root of the management account and {to_do}: no role can do that there."
    else:
        if is_key:
            what = "root's access key"
            commands = "`aws iam list-access-keys`, then `aws iam delete-access-key` with its ID"
        else:
            what = "root's password (or sign in as root and register MFA)"
            commands = "`aws iam delete-login-profile`"
        task = f"arn:{run.caller.partition}:iam::aws:policy/root-task/IAMDeleteRootUserCredentials"
        step = (
            f"delete {what}, with the session that `aws sts assume-root --target-principal {account} "
            f"--task-policy-arn arn={task}` gives (it takes centralized root access): {commands}."
        )
    if "used within 30 days" in finding.reasons:
        return f"Move what uses it to temporary credentials (an IAM role), then {step}"
    return step[0].upper() + step[1:]


# --------------------------------------------------------------------------------------------------
# Track: each account against an earlier run, with CloudTrail as a witness
# --------------------------------------------------------------------------------------------------


# Each change with the CloudTrail events that explain it, and those that contradict it where none explains it.
EXPLAINED_BY = {
    "access-key-created": (("CreateAccessKey",), ("DeleteAccessKey",)),
    "access-key-deleted": (("DeleteAccessKey",), ("CreateAccessKey",)),
    "access-key-activated": (("UpdateAccessKey=Active",), ("UpdateAccessKey=Inactive",)),
    "access-key-deactivated": (("UpdateAccessKey=Inactive",), ("UpdateAccessKey=Active",)),
    "mfa-added": (("EnableMFADevice",), ("DeactivateMFADevice",)),
    "mfa-removed": (("DeactivateMFADevice",), ("EnableMFADevice",)),
    "mfa-changed": (("EnableMFADevice", "DeactivateMFADevice"), ()),
    "console-enabled": (("CreateLoginProfile",), ("DeleteLoginProfile",)),
    "console-disabled": (("DeleteLoginProfile",), ("CreateLoginProfile",)),
    "user-created": (("CreateUser",), ("DeleteUser",)),
    "user-deleted": (("DeleteUser",), ("CreateUser",)),
}
CAME_AND_WENT = "access-key-came-and-went"
EVENT_NAMES = tuple(
    sorted({name.split("=")[0] for explained, _ in EXPLAINED_BY.values() for name in explained})
)
RUNS_SHOWN = 12
CHANGES_COLUMNS = (
    "account_id",
    "account_name",
    "username",
    "access_key_id",
    "change",
    "before",
    "after",
    "witness",
    "event_name",
    "event_time",
    "actor",
    "source_ip",
)
EVENTS_COLUMNS = (
    "account_id",
    "account_name",
    "event_time",
    "event_name",
    "username",
    "access_key_id",
    "actor",
    "source_ip",
    "user_agent",
    "event_id",
)


class Change(NamedTuple):
    """One line of changes.csv. `witness` is confirmed, contradicted, not found, unavailable, or empty: not asked."""

    account_id: str
    account_name: str
    user: str
    key_id: str
    change: str
    before: str = ""
    after: str = ""
    witness: str = ""
    event: Event | None = None


@dataclass(frozen=True)
class RunFigures:
    """A finished run in the table of runs."""

    started: datetime
    audited: int
    console_users_without_mfa: int
    active_keys: int
    active_keys_older_than_max_age: int


@dataclass(frozen=True)
class EarlierRun:
    """The run that this one is compared with: each account's ID with name and result; the organization's level in both
    phases, and by ID those of each account that it audited."""

    folder: Path
    started: datetime
    max_key_age_days: int
    accounts: Mapping[str, tuple[str, str]]
    levels: Mapping[str, str]
    account_levels: Mapping[str, Mapping[str, str]]


@dataclass
class Tracking:
    """What has changed since the earlier run, as far as the run has come; without one (None) there is no change.

    `compared` are the IDs of the accounts that both runs audited. In all others a key is new if its creation date says
    so: `new_keys_elsewhere`.
    """

    earlier: EarlierRun | None = None
    runs: list[RunFigures] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    compared: set[str] = field(default_factory=set)
    new_keys_elsewhere: list[Change] = field(default_factory=list)
    mfa_fixed: int = 0
    mfa_new: list[Change] = field(default_factory=list)


def open_tracking(output_dir: Path, named: Path | None, organization_id: str) -> Tracking:
    """The run to compare with, `named` or the newest of this organization, and the last runs for the table.

    Whatever will be compared is checked now: a damaged file must not come to light after hours of auditing.
    """
    tracking = Tracking()
    for folder in finished_runs(output_dir):
        if len(tracking.runs) == RUNS_SHOWN - 1:
            break
        try:
            with naming_the_file(folder):
                summary = read_summary(folder)
                if summary["organization"]["id"] != organization_id:
                    continue
                tracking.runs.insert(0, run_figures(summary))
                if tracking.earlier is None and named is None:
                    tracking.earlier = earlier_run(folder, summary)
        except AuditError:
            if tracking.earlier is None and named is None:
                raise
            tracking.unreadable.append(
                folder.name
            )  # it would only have been a line in the table of runs
    if named is not None:
        with naming_the_file(named):
            summary = read_summary(named)
            if summary["organization"]["id"] != organization_id:
                raise AuditError(
                    f"--previous: {named} is a run of organization {summary['organization']['id']}."
                )
            tracking.earlier = earlier_run(named, summary)
    return tracking


@contextlib.contextmanager
def naming_the_file(folder: Path) -> Iterator[None]:
    """What a summary.json lacks or has wrong becomes an AuditError that says which one."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else repr(error)
        raise AuditError(
            f"Cannot read the earlier run's {folder / 'summary.json'}: {what}"
        ) from None


def run_figures(summary: Mapping[str, Any]) -> RunFigures:
    gaps = summary["gaps"]["organization"]
    return RunFigures(
        parse_time(summary["started"]),
        summary["totals"]["audited"],
        gaps["console_users_without_mfa"],
        gaps["active_keys"],
        gaps["active_keys_older_than_max_age"],
    )


def earlier_run(folder: Path, summary: Mapping[str, Any]) -> EarlierRun:
    """The earlier run, all of its CSVs read once to see that they hold what its summary counts."""
    accounts = {entry["id"]: (entry["name"], entry["result"]) for entry in summary["accounts"]}
    for entry in summary["accounts"]:
        if entry["result"] == "audited":
            states = read_states(account_csv(folder, entry["id"]), entry["id"])
            keys = sum(len(state.keys) for state in states.values())
            if (len(states), keys) != (
                entry["users"] + entry["root"],
                entry["gaps"]["access_keys"],
            ):
                path = account_csv(folder, entry["id"])
                raise AuditError(
                    f"Cannot read the earlier run's {path}: it lacks rows that summary.json counts"
                )
    accounts.update(
        {entry["id"]: (entry["name"], "out of scope") for entry in summary["out_of_scope"]}
    )
    return EarlierRun(
        folder=folder,
        started=parse_time(summary["started"]),
        max_key_age_days=timedelta(
            days=summary["max_key_age_days"]
        ).days,  # refuses what is no number of days
        accounts=accounts,
        levels={phase: level_of(summary["maturity"][phase]["level"]) for phase in PHASES},
        account_levels={
            entry["id"]: {phase: level_of(entry["maturity"][phase]) for phase in PHASES}
            for entry in summary["accounts"]
            if entry["result"] == "audited"
        },
    )


def level_of(text: str) -> str:
    """The level of that name; ValueError if there is none."""
    return LEVELS[LEVELS.index(text)]


def track_account(tracking: Tracking, audited: AuditedAccount) -> None:
    """Compare an account with what the earlier run saw of it; where that saw nothing, dates tell which keys are new."""
    account, earlier = audited.account, tracking.earlier
    if earlier is None:
        return
    trail = audited.trail and trail_since(audited.trail, earlier.started)
    if earlier.accounts.get(account.id, ("", ""))[1] != "audited":
        created = keys_created_since(audited, earlier.started)
        tracking.new_keys_elsewhere += [with_witness(change, trail) for change in created]
        return
    before = read_states(account_csv(earlier.folder, account.id), account.id)
    after = {user.name: state_of(user) for user in audited.users}
    changes = [
        *changes_between(account, before, after),
        *came_and_went(account, before, after, trail),
    ]
    tracking.compared.add(account.id)
    tracking.changes += [with_witness(change, trail) for change in changes]
    unknown, renamed = {ROOT} - (before.keys() & after.keys()), renamed_users(before, after)
    lacking_before = {
        renamed.get(name, name) for name, state in before.items() if state.lacks_mfa
    } - unknown
    lacking_now = {name for name, state in after.items() if state.lacks_mfa} - unknown
    tracking.mfa_fixed += len(lacking_before - lacking_now)
    new = sorted(lacking_now - lacking_before)
    tracking.mfa_new += [
        Change(account.id, account.name, name, "", "console-without-mfa") for name in new
    ]


def keys_created_since(audited: AuditedAccount, moment: datetime) -> Iterator[Change]:
    account = audited.account
    for user in audited.users:
        for key in user.keys:
            if key.created >= moment:
                yield Change(
                    account.id,
                    account.name,
                    user.name,
                    key.id,
                    "access-key-created",
                    "",
                    key.status,
                )


def trail_since(trail: Trail, moment: datetime) -> Trail:
    """What can explain a change: with --since, CloudTrail may have been asked for older events too."""
    return replace(trail, events=tuple(event for event in trail.events if event.time >= moment))


def state_of(user: User) -> UserState:
    status, _ = password_cells(user)
    return UserState(
        status, mfa_status(user), {key.id: (key.status, iso(key.created)) for key in user.keys}
    )


def changes_between(account: Account, before: States, after: States) -> Iterator[Change]:
    """Root is compared only if both reports have it; it neither comes nor goes. A user who was renamed is another one,
    and his keys, which kept their IDs, are neither new nor gone."""
    renamed = renamed_users(before, after)
    name_before = {new: old for old, new in renamed.items()}
    for name in sorted(before.keys() | after.keys()):
        then, now = before.get(name), after.get(name)
        if name == ROOT and (then is None or now is None):
            continue
        change = functools.partial(Change, account.id, account.name, name)
        if then is None:
            yield change("", "user-created")
        elif now is None:
            yield change("", "user-deleted")
        else:
            yield from sign_in_changes(change, then, now)
        if name in renamed:
            continue  # his keys are compared under the new name
        had = then or before.get(name_before.get(name, ""))
        keys_then, keys_now = had.keys if had else {}, now.keys if now else {}
        yield from key_changes(
            change, in_their_slots(keys_then, keys_now) if name == ROOT else keys_then, keys_now
        )


def renamed_users(before: States, after: States) -> dict[str, str]:
    """The new name by the old one, as far as keys tell: they stay with their user."""
    old_owner = {
        key_id: name for name, state in before.items() if name not in after for key_id in state.keys
    }
    new_owner = {
        key_id: name for name, state in after.items() if name not in before for key_id in state.keys
    }
    return {
        old_owner[key_id]: new_owner[key_id]
        for key_id in sorted(old_owner.keys() & new_owner.keys())
    }


def sign_in_changes(
    change: Callable[..., Change], then: UserState, now: UserState
) -> Iterator[Change]:
    if then.password_status != now.password_status:
        what = "console-enabled" if now.password_status == PASSWORD_SET else "console-disabled"
        yield change("", what, then.password_status, now.password_status)
    if then.mfa_status != now.mfa_status:
        what = {then.mfa_status: "mfa-added", now.mfa_status: "mfa-removed"}.get(
            NO_MFA, "mfa-changed"
        )
        yield change("", what, then.mfa_status, now.mfa_status)


def key_changes(
    change: Callable[..., Change],
    then: Mapping[str, tuple[str, str]],
    now: Mapping[str, tuple[str, str]],
) -> Iterator[Change]:
    """The changes of one user's access keys. Root's have no IDs: another creation date means another key."""
    for key_id in sorted(then.keys() | now.keys()):
        status_then, created_then = then.get(key_id, ("", ""))
        status_now, created_now = now.get(key_id, ("", ""))
        replaced = bool(status_then and status_now) and created_then != created_now
        if not status_now or replaced:
            yield change(key_id, "access-key-deleted", status_then)
        if not status_then or replaced:
            yield change(key_id, "access-key-created", "", status_now)
        elif status_now and (status_then == "Active") != (status_now == "Active"):
            what = "access-key-activated" if status_now == "Active" else "access-key-deactivated"
            yield change(key_id, what, status_then, status_now)


def in_their_slots(
    then: Mapping[str, tuple[str, str]], now: Mapping[str, tuple[str, str]]
) -> Mapping[str, tuple[str, str]]:
    """Root's keys of then, exchanged if that puts more of them where they are now: no order of theirs is promised."""
    first, second = ROOT_ACCESS_KEYS
    other = {first: second, second: first}
    exchanged = {other.get(key_id, key_id): key for key_id, key in then.items()}
    return max(
        then,
        exchanged,
        key=lambda keys: sum(keys[each][1] == now[each][1] for each in keys.keys() & now.keys()),
    )


def came_and_went(
    account: Account, before: States, after: States, trail: Trail | None
) -> Iterator[Change]:
    """Keys that were created and deleted between two runs, which no snapshot shows."""
    seen = {
        key_id for states in (before, after) for state in states.values() for key_id in state.keys
    }
    events = trail.events if trail else ()
    created = {event.key_id for event in events if event.name == "CreateAccessKey" and event.key_id}
    for event in events:
        if event.name == "DeleteAccessKey" and event.key_id in created - seen:
            yield Change(
                account.id, account.name, event.user, event.key_id, CAME_AND_WENT, event=event
            )


def with_witness(change: Change, trail: Trail | None) -> Change:
    """The change with CloudTrail's word on it: the latest event that explains it, or else one that contradicts it."""
    if trail is None:
        return change
    if trail.error:
        return change._replace(witness="unavailable")
    if change.change == CAME_AND_WENT:
        return change._replace(witness="confirmed")
    about = [event for event in trail.events if is_about(event, change)]
    for witness, names in zip(("confirmed", "contradicted"), EXPLAINED_BY[change.change]):
        for event in reversed(about):
            if event.name in names or f"{event.name}={event.status}" in names:
                return change._replace(witness=witness, event=event)
    return change._replace(witness="not found")


def is_about(event: Event, change: Change) -> bool:
    """Whether the event acted on what changed: the access key (root's have no ID in the report), else the user."""
    if change.key_id and change.user != ROOT:
        return event.key_id == change.key_id
    return event.user == change.user


def accounts_that_came_or_left(run: Run) -> list[Change]:
    """One change for each account that has joined or left the organization since the earlier run."""
    if run.tracking.earlier is None:
        return []
    then = {account_id: name for account_id, (name, _) in run.tracking.earlier.accounts.items()}
    now = {account.id: account.name for account in accounts_now(run).values()}
    joined = [
        Change(each, now[each], "", "", "account-joined")
        for each in sorted(now.keys() - then.keys())
    ]
    return joined + [
        Change(each, then[each], "", "", "account-left")
        for each in sorted(then.keys() - now.keys())
    ]


def accounts_now(run: Run) -> dict[str, Account]:
    """All accounts of the organization, in scope or not."""
    everyone: list[Any] = [*run.audited, *run.failed, *run.skipped, *run.out_of_scope]
    return {one.account.id: one.account for one in everyone}


def change_row(change: Change) -> tuple[str, ...]:
    """The change's line in changes.csv."""
    event = change.event
    seen = (
        (event.name, iso(event.time), event.actor, event.source_ip) if event else ("", "", "", "")
    )
    return (*change[:8], *seen)


def event_rows(run: Run) -> list[tuple[str, ...]]:
    """The lines of events.csv, oldest first."""
    found = sorted(
        (event, account.id, account.name) for account, trail in run.trails for event in trail.events
    )
    return [
        (account_id, name, iso(event.time), event.name, event.user, event.key_id, *event[5:])
        for event, account_id, name in found
    ]


# --------------------------------------------------------------------------------------------------
# Enforce: what the organization's policies already prevent
# --------------------------------------------------------------------------------------------------


MFA_REQUIRED, NEW_KEYS_PREVENTED = "mfa-required", "new-keys-prevented"
CONTROLS = {MFA_REQUIRED: "console users need MFA to act", NEW_KEYS_PREVENTED: "no new access keys"}
ENFORCED, NOT_CHECKED, PARTIAL, ABSENT = "enforced", "not checked", "partial", "absent"
VERDICTS = (ENFORCED, NOT_CHECKED, PARTIAL, ABSENT)  # where several apply, the first of them holds
# What an MFA requirement may leave out and still be one: setting up MFA, reading IAM, signing in. Not iam:* or sts:*,
# with which a stolen password makes itself an access key or assumes a role, and nothing that deactivates an MFA device
# (DeleteVirtualMFADevice, in an example of AWS's, can only delete one that nobody has).
MFA_BASICS = (
    *MFA_SETUP,
    "iam:Get*",
    "iam:List*",
    "iam:DeleteVirtualMFADevice",
    "sts:GetCallerIdentity",
    "signin:AuthorizeOAuth2Access",
    "signin:CreateOAuth2Token",
)
# Operator, key and value of a condition that holds without MFA, and of one that holds only with it. Access keys send
# no aws:MultiFactorAuthPresent at all, console sessions without MFA send false: Null true of that key, alone, stops the
# first and not the second, and so does not count.
WITHOUT_MFA = {
    ("bool", "aws:multifactorauthpresent"): "false",
    ("null", "aws:multifactorauthage"): "true",
}
WITH_MFA = {
    ("bool", "aws:multifactorauthpresent"): "true",
    ("null", "aws:multifactorauthage"): "false",
}
# Holds for what the caller asks itself, not for what a service then asks for it (Athena of S3, CloudFormation of EC2):
# those requests say MFA false even for an access key. Without a first request of its own, nobody gets there.
BY_THE_CALLER = {("bool", "aws:viaawsservice"): "false"}
# A principal that an exemption names. Roles are no console users, so any role may be exempt from MFA; of new keys only
# roles with a name, whose end may be open after a hyphen or underscore (stacksets-exec-*), though not if that takes in
# AWS's own paths, and those of an Identity Center permission set (AWSReservedSSO_Admin_*). A policy variable ($) can
# stand for anybody.
NAMED = {
    MFA_REQUIRED: re.compile(r"arn:[^:]*:iam::[^:]*:(root|user/[^*?$]+|role/.+)"),
    NEW_KEYS_PREVENTED: re.compile(
        r"arn:[^:]*:iam::[^:]*:(root|user/[^*?$]+|role/([^$]*/)?([^*?$/]+|AWSReservedSSO_[^*?$/]+_\*)"
        r"|role/(?!aws-|.*AWSReservedSSO_)[^*?$]+[-_]\*)"
    ),
}
ALL_BUT_USERS = "all principals but IAM users"


@dataclass(frozen=True)
class Policy:
    """A service control policy and the IDs of the root, OUs and accounts it is attached to."""

    id: str
    name: str
    content: str
    targets: frozenset[str]


@dataclass(frozen=True)
class Judgement:
    """What one statement or policy does for one control; a condition for each statement that is narrowed."""

    verdict: str
    exemptions: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Control:
    """What holds in one account, and the names of the policies it rests on, by ID."""

    verdict: str
    policies: Mapping[str, str]
    exemptions: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Condition:
    """One key of a Condition element: operator and key in lower case, and the whole as a person reads it."""

    operator: str
    key: str
    values: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Statement:
    """A policy statement; of actions and not_actions one is empty, and so of resources and not_resources."""

    effect: str
    actions: tuple[str, ...]
    not_actions: tuple[str, ...]
    resources: tuple[str, ...]
    not_resources: tuple[str, ...]
    conditions: tuple[Condition, ...]


JudgedPolicy = tuple[Policy, Mapping[str, Judgement]]


@dataclass(frozen=True)
class Enforcement:
    """What was found out about service control policies and root credentials; `why_not` where it could not be."""

    judged: tuple[JudgedPolicy, ...] = ()
    why_not: str = ""
    root_credentials_managed: bool | None = None
    root_why_not: str = ""


async def read_enforcement(aws: Aws, organization: Organization) -> Enforcement:
    """Read and judge the service control policies. What cannot be read is not checked: the audit goes on without."""

    async def ask(call: Callable[..., T], *arguments: Any) -> T:
        return await aws.threads.run((0, 0), functools.partial(call, aws, *arguments))

    policies: list[Policy] = []
    why_not, root_managed, root_why_not = "", None, ""
    try:
        for policy_id, name in await ask(list_policies):
            with unless_gone("PolicyNotFoundException"):
                content, targets = (
                    await ask(describe_policy, policy_id),
                    await ask(list_targets_for_policy, policy_id),
                )
                policies.append(Policy(policy_id, name, content, targets))
    except Exception as error:  # whatever it is, it must not cost the audit
        why_not = reason_of("service control policies", error)
    try:
        root_managed = await ask(list_organizations_features)
    except Exception as error:
        root_why_not = reason_of("ListOrganizationsFeatures", error)
    if organization.feature_set != "ALL":
        why_not = "the organization has consolidated billing only, service control policies need all features"
    elif not why_not and not any(policy.targets for policy in policies):
        why_not = (
            "service control policies are off: none is attached to anything, not even FullAWSAccess"
        )
    judged = tuple(judge_policies(policies, aws.caller.partition))
    return Enforcement(judged, why_not, root_managed, root_why_not)


@contextlib.contextmanager
def unless_gone(code: str) -> Iterator[None]:
    """Pass over a policy, or an account, that is gone since it was listed."""
    try:
        yield
    except ClientError as error:
        if error_code(error) != code:
            raise


async def apply_enforcement(aws: Aws, run: Run) -> None:
    """Decide the controls of each account, audited or failed, and with them the level of phase 1."""
    management, parents, paths = (
        run.organization.management_account,
        dict[str, str](),
        dict[str, Sequence[str]](),
    )
    accounts = [*(one.account for one in run.audited), *(one.account for one in run.failed)]
    try:
        for account in accounts if not run.enforcement.why_not else ():
            with unless_gone("ChildNotFoundException"):
                paths[account.id] = (
                    [] if account.id == management else await path_of(aws, account, parents)
                )
    except Exception as error:  # whatever it is, it must not cost the audit
        run.enforcement = replace(run.enforcement, why_not=reason_of("ListParents", error))
    for account in accounts:
        run.controls[account.id] = dict.fromkeys(CONTROLS, Control(NOT_CHECKED, {}))
        if account.id in paths and not run.enforcement.why_not:
            is_management = account.id == management
            run.controls[account.id] = controls_of_account(
                paths[account.id], run.enforcement.judged, is_management
            )
    for number, figures in enumerate(run.audited):
        enforced = run.controls[figures.account.id][MFA_REQUIRED].verdict == ENFORCED
        run.audited[number] = replace(figures, phase1=phase1_level(figures.gaps, enforced))


async def path_of(aws: Aws, account: Account, parents: dict[str, str]) -> list[str]:
    """The IDs of the account, its organizational units and the root; each parent that ListAccounts did not tell is
    asked for once, and remembered in `parents`."""
    if account.path is not None:
        return account.path.split("/")
    ids = [account.id]
    while not ids[-1].startswith("r-"):
        if ids[-1] not in parents:
            parents[ids[-1]] = await aws.threads.run(
                (0, 0), functools.partial(list_parents, aws, ids[-1])
            )
        ids.append(parents[ids[-1]])
    return ids


def controls_of_account(
    path_ids: Sequence[str], judged: Iterable[JudgedPolicy], is_management: bool
) -> dict[str, Control]:
    """The controls of the account whose root, OUs and own ID are path_ids. The management account is under no SCP."""
    applying = (
        []
        if is_management
        else [each for each in judged if not each[0].targets.isdisjoint(path_ids)]
    )
    return {control: control_of_account(control, applying) for control in CONTROLS}


def control_of_account(control: str, applying: Sequence[JudgedPolicy]) -> Control:
    whole = strongest([judgements[control] for _, judgements in applying])
    resting = [
        policy
        for policy, judgements in applying
        if judgements[control].verdict == whole.verdict != ABSENT
    ]
    names = {policy.id: policy.name for policy in resting}
    return Control(whole.verdict, names, whole.exemptions, whole.conditions)


def judge_policies(policies: Iterable[Policy], partition: str) -> list[JudgedPolicy]:
    return [(policy, judge_policy(policy.content, partition)) for policy in policies]


def judge_policy(content: str, partition: str = "aws") -> dict[str, Judgement]:
    """What a policy does for each control. Only Deny statements count; whatever is not understood is not checked."""
    users = f"arn:{partition}:iam::*:user/*"
    try:
        denials = [statement for statement in parse_policy(content) if statement.effect == "Deny"]
    except (ValueError, RecursionError):  # of the parser, for JSON nested too deep
        return {control: Judgement(NOT_CHECKED) for control in CONTROLS}
    judges = {MFA_REQUIRED: judge_mfa_required, NEW_KEYS_PREVENTED: judge_new_keys_prevented}
    return {
        control: strongest([judge(denial, users) for denial in denials])
        for control, judge in judges.items()
    }


def judge_mfa_required(statement: Statement, users: str) -> Judgement:
    """Whether a Deny statement keeps console users without MFA from everything but setting it up."""
    conditions = statement.conditions
    about_mfa = [
        condition for condition in conditions if condition.key.startswith("aws:multifactorauth")
    ]
    denies_nothing = (
        any(covers(action, "*:*") for action in statement.not_actions)
        or "*" in statement.not_resources
    )
    if (
        not about_mfa
        or denies_nothing
        or any(holds(condition, WITH_MFA) for condition in about_mfa)
    ):
        return Judgement(ABSENT)
    # A second condition on MFA may contradict the first, so only one is taken for what it says.
    test = next((condition for condition in about_mfa if holds(condition, WITHOUT_MFA)), None)
    basics = [basic.lower() for basic in MFA_BASICS]
    extra = [
        a for a in statement.not_actions if not any(covers(basic, a.lower()) for basic in basics)
    ]
    narrowed = [f"NotAction {', '.join(extra)}"] if extra else []
    if statement.actions and not any(covers(action, "*:*") for action in statement.actions):
        narrowed.append(f"Action {', '.join(statement.actions)}")
    if "*" not in statement.resources:
        narrowed.append(resources_text(statement))
    rest = [each for each in conditions if each is not test and not holds(each, BY_THE_CALLER)]
    return judge_conditions(MFA_REQUIRED, rest, users, narrowed)


def judge_new_keys_prevented(statement: Statement, users: str) -> Judgement:
    """Whether a Deny statement keeps everybody from creating access keys for IAM users."""
    named = any(
        covers(action.lower(), "iam:createaccesskey")
        for action in statement.actions + statement.not_actions
    )
    denied = named if statement.actions else not named
    listed = statement.resources + statement.not_resources
    all_users = any(covers_arn(resource, users) for resource in listed)
    some_users = any(touches_users(resource, users) for resource in listed)
    denies_all, denies_some = (
        (all_users, some_users) if statement.resources else (not some_users, not all_users)
    )
    if not denied or not (denies_all or denies_some):
        return Judgement(ABSENT)
    narrowed = [] if denies_all else [resources_text(statement)]
    return judge_conditions(NEW_KEYS_PREVENTED, statement.conditions, users, narrowed)


def judge_conditions(
    control: str, conditions: Iterable[Condition], users: str, narrowed: list[str]
) -> Judgement:
    """Enforced, if conditions only pick all IAM users or exempt named principals and nothing else narrows."""
    exemptions: list[str] = []
    for condition in conditions:
        if picks_users(condition, users):
            exemptions += [ALL_BUT_USERS] if control == NEW_KEYS_PREVENTED else []
        elif exempts_named(condition, control):
            exemptions += condition.values
        else:
            narrowed = [*narrowed, condition.text]
    if narrowed:
        return Judgement(PARTIAL, tuple(exemptions), (" and ".join(narrowed),))
    return Judgement(ENFORCED, tuple(exemptions))


def holds(condition: Condition, table: Mapping[tuple[str, str], str]) -> bool:
    return {value.lower() for value in condition.values} == {
        table.get((condition.operator, condition.key))
    }


def picks_users(condition: Condition, users: str) -> bool:
    """Whether the condition holds for every IAM user."""
    if condition.key == "aws:principaltype":
        return condition.operator in ("stringequals", "stringlike") and "User" in condition.values
    if condition.key != "aws:principalarn" or condition.operator not in (
        "arnlike",
        "arnequals",
        "stringlike",
    ):
        return False
    values = [
        value for value in condition.values if value != "*" or condition.operator == "stringlike"
    ]
    return any(
        covers_arn(value, users) for value in values
    )  # no ARN operator is known to take a bare *


def exempts_named(condition: Condition, control: str) -> bool:
    """Whether the condition holds for everybody except principals that it names."""
    if condition.operator not in ("arnnotlike", "arnnotequals", "stringnotlike", "stringnotequals"):
        return False
    if condition.key == "aws:username":
        return not any(set(value) & set("*?$") for value in condition.values)
    return condition.key == "aws:principalarn" and all(
        NAMED[control].fullmatch(value) for value in condition.values
    )


def resources_text(statement: Statement) -> str:
    element = "Resource" if statement.resources else "NotResource"
    return f"{element} {', '.join(statement.resources or statement.not_resources)}"


def strongest(judgements: Sequence[Judgement]) -> Judgement:
    """What holds where all of these apply. A principal must be exempt from every enforcing one to be free, so the one
    with the fewest exemptions tells most; partial ones add up, to partial."""
    verdict = min(
        (judgement.verdict for judgement in judgements), key=VERDICTS.index, default=ABSENT
    )
    same = [judgement for judgement in judgements if judgement.verdict == verdict]
    if verdict == ENFORCED:
        return min(
            same,
            key=lambda judgement: (
                ALL_BUT_USERS in judgement.exemptions,
                len(judgement.exemptions),
            ),
        )
    exemptions = dict.fromkeys(
        exemption for judgement in same for exemption in judgement.exemptions
    )
    conditions = dict.fromkeys(
        condition for judgement in same for condition in judgement.conditions
    )
    return Judgement(verdict, tuple(exemptions), tuple(conditions))


def covers(pattern: str, other: str) -> bool:
    """Whether an IAM pattern matches all that `other` stands for, which may be a pattern itself: its * is a character
    that only a * matches."""
    return fnmatchcase(other, pattern.replace("[", "[[]").replace("?", "[!*]"))


def covers_arn(pattern: str, arns: str) -> bool:
    """The same for ARNs, segment by segment as AWS compares them."""
    segments = pattern.split(":", 5)
    return pattern == "*" or (len(segments) == 6 and all(map(covers, segments, arns.split(":", 5))))


def touches_users(pattern: str, users: str) -> bool:
    """Whether a resource pattern may match the ARN of some IAM user; in doubt, as with a policy variable, it may."""
    segments = re.sub(r"\$\{[^}]*\}", "*", pattern).split(":", 5)
    of_iam = all(map(covers, segments[:4], users.split(":")))
    start = re.split(r"[*$]", segments[-1])[0][: len("user/")]
    return len(segments) < 6 or (of_iam and covers(start, "user/"[: len(start)]))


def parse_policy(content: str) -> tuple[Statement, ...]:
    """The statements of a policy; ValueError for anything but a policy of the elements that SCPs have."""
    document = expect_object(json.loads(content, object_pairs_hook=without_repetition))
    listed = document.get("Statement")
    return tuple(map(parse_statement, listed if isinstance(listed, list) else [listed]))


def parse_statement(element: Any) -> Statement:
    members = expect_object(element)
    unknown = members.keys() - {
        "Sid",
        "Effect",
        "Action",
        "NotAction",
        "Resource",
        "NotResource",
        "Condition",
    }
    names = ("Action", "NotAction", "Resource", "NotResource")
    actions, not_actions, resources, not_resources = (
        texts(members.get(name, [])) for name in names
    )
    if unknown or bool(actions) == bool(not_actions) or bool(resources) == bool(not_resources):
        raise ValueError("not a statement of a service control policy")
    effect = members.get("Effect")
    if effect not in ("Allow", "Deny"):
        raise ValueError("Effect is neither Allow nor Deny")
    conditions = parse_conditions(members.get("Condition", {}))
    return Statement(effect, actions, not_actions, resources, not_resources, conditions)


def parse_conditions(block: Any) -> tuple[Condition, ...]:
    """ForAnyValue and IfExists change nothing for the keys judged here, as every signed request has them, except where
    the operator negates or asks for absence: ForAnyValue fails on an absent key. Such an operator stays unknown."""
    conditions = []
    for operator, keys in expect_object(block).items():
        plain = re.sub(r"^foranyvalue:(?!null|\w*not)|ifexists$", "", operator.lower())
        for key, value in expect_object(keys).items():
            if not texts(value):
                raise ValueError("a condition without a value")
            text = f"{operator} {key} {', '.join(texts(value))}"
            conditions.append(Condition(plain, key.lower(), texts(value), text))
    return tuple(conditions)


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; with a name twice, nobody can say which of the two AWS goes by."""
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return members


def expect_object(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError("not a JSON object")


def texts(value: Any) -> tuple[str, ...]:
    """A string, boolean or number, or a list of them, as JSON writes them: false is "false"."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, (str, int, float)) for each in values):
        raise ValueError("not a string, boolean or number")
    return tuple(each if isinstance(each, str) else json.dumps(each) for each in values)


# --------------------------------------------------------------------------------------------------
# Terminal: the summary for stdout and for mail, summary.json; values in, text out
# --------------------------------------------------------------------------------------------------


FINDINGS_SHOWN = 10  # on the terminal
ACCOUNTS_SHOWN = 5
REMARKS_SHOWN = 10
NEW_KEYS_SHOWN = 10


def terminal_summary(run: Run, finished: datetime, quiet: bool) -> str:
    """What stdout gets; with `quiet` only what needs attention, which may be nothing."""
    lines = failed_lines(run)
    if quiet:
        urgent = [finding for finding in run.findings if finding.priority == MOST_URGENT]
        lines += [*(finding_lines(run, urgent) if urgent else []), *alert_lines(run)]
        lines = lines[1:] if lines and not lines[0] else lines
    else:
        lines = [*audited_lines(run, finished), *lines, *left_out_lines(run)]
        lines += [
            *maturity_lines(run),
            *gap_lines(run),
            *finding_lines(run, run.findings[:FINDINGS_SHOWN]),
        ]
        lines += [*enforcement_lines(run), *change_lines(run), *witness_lines(run), *run_lines(run)]
        lines.append("")
    lines = [cut(printable(line), TERMINAL_WIDTH) for line in lines]
    if not quiet:
        lines.append(f"Files: {printable(str(run.folder))}")
    return "".join(f"{line}\n" for line in lines)


def audited_lines(run: Run, finished: datetime) -> list[str]:
    gaps = total_gaps(run.audited)
    users = sum(account.users for account in run.audited)
    production = sum(account.production for account in run.audited)
    lines = [
        f"Organization {run.organization.id}, {iso(run.started)}, took {clock(finished - run.started)}",
        f"Audited: {count(len(run.audited), 'account')} ({production:,} production), {count(users, 'user')}, "
        f"{count(gaps.access_keys, 'access key')}",
    ]
    if run.audited:
        oldest = finished - min(account.report_generated for account in run.audited)
        lines.append(f"Oldest credential report: {age(oldest)} (passwords and root are as of then)")
    if rootless := sum(not account.has_root for account in run.audited):
        lines.append(
            f"Root is missing from the credential report of {count(rootless, 'account')}: not covered there"
        )
    return lines


def failed_lines(run: Run) -> list[str]:
    """Each failed account, under the step and code it failed with and what to do about that."""
    groups: dict[tuple[str, str], list[FailedAccount]] = {}
    for failed in sorted(run.failed, key=lambda one: one.account.id):
        groups.setdefault((failed.step, failed.code), []).append(failed)
    production = sum(is_production(failed.account, run.plan.production) for failed in run.failed)
    number = f"{count(len(run.failed), 'account')} ({production:,} production)"
    lines = [f"Failed: {number}, of which nothing is known"] if run.failed else []
    for (step, code), members in groups.items():
        lines.append(f"  {step}: {code}")
        for one in members:
            lines += wrapped(f"    {one.account.id} {one.account.name}: {one.message}")
        if hint := next_step(step, code, run):
            lines += wrapped(f"    Next: {hint}")
    return lines


def next_step(step: str, code: str, run: Run) -> str:
    """What to do about an account that failed there with that code."""
    if step == "AssumeRole" and code in DENIED:
        return (
            f"does role {run.plan.role.name} exist in the account, does its trust policy trust {run.caller.arn} and "
            "the external ID, may the profile assume it, and does no SCP forbid it? AWS answers all of these alike."
        )
    if step == "AssumeRole" and (
        code in SESSION_EXPIRED or "Token" in code or "Credential" in code or "MFA" in code
    ):
        return "the profile's own session has ended: sign in again (aws sso login, for one), then run the audit again."
    if code == "RegionDisabledException":
        return "the profile's Region is not enabled there: set AWS_DEFAULT_REGION=us-east-1, or the like."
    if code in DENIED:
        return f"the role must allow iam:{step}, and no SCP may deny it; README.md lists the permissions."
    if code == "ReportTimeout":
        return "run the audit again, or give the report longer with --report-timeout."
    if code in THROTTLED:
        return "something else uses up the account's IAM API rate: run the audit again later."
    return ""


def left_out_lines(run: Run) -> list[str]:
    lines = (
        [f"Skipped, because not ACTIVE: {count(len(run.skipped), 'account')}"]
        if run.skipped
        else []
    )
    for skipped in sorted(run.skipped, key=lambda one: one.account.id):
        lines.append(f"  {skipped.account.id} {skipped.account.name}: {skipped.account.state}")
    management = run.organization.management_account
    others = sum(one.account.id != management for one in run.out_of_scope)
    if others < len(run.out_of_scope):
        lines.append(f"Not included: the management account, {management} (--include-management)")
    if others:
        lines.append(f"Out of scope: {count(others, 'account')}")
    return lines


def maturity_lines(run: Run) -> list[str]:
    """Both phases with the organization's level and the number behind it, and the accounts at each level."""
    gaps = total_gaps(run.audited)
    phases = {
        "phase1": ("Phase 1, multi-factor authentication", mfa_in_words(gaps)),
        "phase2": ("Phase 2, use temporary credentials", keys_in_words(gaps, run.plan.max_key_age)),
    }
    lines = [""]
    for phase, (title, why) in phases.items():
        maturity = maturity_document(run, phase)
        only_for_failures = maturity["level"] != organization_level(
            (getattr(one, phase) for one in run.audited), 0
        )
        reason = f"{count(len(run.failed), 'account')} not audited" if only_for_failures else why
        lines.append(f"{title:<38}{maturity['level']:<13}{reason}")
        levels = (f"{number:,} {level}" for level, number in maturity["accounts"].items() if number)
        lines.append(f"  accounts: {', '.join(levels) or 'none'}")
    if holding := accounts_holding_back(run):
        lines += ["Held back most by", *(f"  {line}" for line in holding[:ACCOUNTS_SHOWN])]
    return lines


def accounts_holding_back(run: Run) -> list[str]:
    """The accounts with gaps, largest first, and those that nobody could look into."""
    with_gaps = sorted(
        filter(gap_size, run.audited), key=lambda one: (-gap_size(one), one.account.id)
    )
    unseen = sorted(run.failed, key=lambda one: one.account.id)
    return [account_line(one, run.plan.max_key_age) for one in with_gaps] + [
        f"{one.account.id} {cut(one.account.name, 28):<28} not audited" for one in unseen
    ]


def gap_size(figures: AccountFigures) -> int:
    """How much of both phases an account lacks."""
    return figures.gaps.console_users_without_mfa + figures.gaps.active_keys_older_than_max_age


def account_line(figures: AccountFigures, max_key_age: timedelta) -> str:
    gaps = figures.gaps
    return (
        f"{figures.account.id} {cut(figures.account.name, 28):<28} "
        f"{gaps.console_users_without_mfa:,} without MFA, "
        f"{count(gaps.active_keys_older_than_max_age, 'active key')} older than {max_key_age.days} days"
    )


def mfa_in_words(gaps: Gaps) -> str:
    if not gaps.console_users:
        return "no console users"
    return f"{gaps.console_users_without_mfa:,} of {count(gaps.console_users, 'console user')} without MFA"


def keys_in_words(gaps: Gaps, max_key_age: timedelta) -> str:
    old = gaps.active_keys_older_than_max_age
    if not gaps.active_keys:
        return "no active keys"
    return f"{old:,} of {count(gaps.active_keys, 'active key')} older than {max_key_age.days} days"


def gap_lines(run: Run) -> list[str]:
    """A table of the gaps, of the organization and of its production accounts."""
    columns = [total_gaps(run.audited), total_gaps(one for one in run.audited if one.production)]
    days = run.plan.max_key_age.days
    labels = {
        "console_users": "console users",
        "console_users_without_mfa": "  without MFA",
        "access_keys": "access keys (long-term credentials)",
        "active_keys": "  active",
        "active_keys_older_than_max_age": f"    older than {days} days",
        "active_keys_older_than_1_year": "    older than 1 year",
        "active_keys_never_used": "    never used",
        "active_keys_not_used_for_90_days": "    not used for 90 days",
        "active_keys_used_within_30_days": "    used within 30 days",
        "inactive_keys": "  inactive",
        "expired_keys": "  expired",
        "root_access_keys": "  of root",
        "users_with_two_active_keys": "users with two active keys",
    }
    lines = ["", f"{'Gaps':<38}{'organization':>18}{'production':>18}"]
    for name, label in labels.items():
        lines.append(f"{label:<38}" + "".join(f"{getattr(gaps, name):>18,}" for gaps in columns))
    coverage = (
        f"{gaps.mfa_coverage_percent:.1f} %" if gaps.console_users else "no console users"
        for gaps in columns
    )
    lines.insert(4, f"{'  MFA coverage':<38}" + "".join(f"{text:>18}" for text in coverage))
    if oldest := columns[0].oldest_active_key:
        old = count(days_between(oldest.created, run.started), "day")
        whose = f"{cut(oldest.username, 24)} in {oldest.account_id} {oldest.account_name}"
        lines.append(f"oldest active key: {old}, {oldest.access_key_id} of {whose}")
    return lines


def finding_lines(run: Run, findings: Sequence[Finding]) -> list[str]:
    """These findings, most urgent first, and how many more there are."""
    if not findings:
        return ["", nothing_to_fix(run)]
    lines = [
        "",
        f"What to fix first ({len(findings):,} of {len(run.findings):,}; all are in findings.csv)",
    ]
    for one in findings:
        where = f"{one.account.id} {cut(one.account.name, 20):<20}"
        lines.append(f"  {one.priority}  {one.finding:<23}{where} {one.user}")
        lines += wrapped(f"     {f'{one.key.id}: ' if one.key else ''}{'; '.join(one.reasons)}")
    return lines


def nothing_to_fix(run: Run) -> str:
    if not run.audited:
        return "Nothing was audited."
    return "Nothing to fix in the accounts that were audited." if run.failed else "Nothing to fix."


def enforcement_lines(run: Run) -> list[str]:
    """What service control policies already prevent, and where nothing does."""
    lines = ["", "Enforced by service control policies"]
    if run.enforcement.why_not:
        lines += wrapped(f"  not checked: {run.enforcement.why_not}")
    for control, verdicts in enforcement_document(run)["accounts"].items():
        words = ", ".join(f"{number:,} {verdict}" for verdict, number in verdicts.items() if number)
        lines.append(f"  {CONTROLS[control]:<36}{words or 'no account'}")
        for remark in control_remarks(run, control):
            lines += wrapped(f"    {remark}")
    managed = {True: "yes", False: "no", None: "not checked"}[
        run.enforcement.root_credentials_managed
    ]
    lines.append(f"  {'root credentials managed centrally':<36}{managed}")
    if run.enforcement.root_why_not:
        lines += wrapped(f"    {run.enforcement.root_why_not}")
    if bare := without_controls(run):
        lines.append("With neither control, and most active keys")
    for one in bare[:ACCOUNTS_SHOWN]:
        lines.append(
            f"  {one.account.id} {cut(one.account.name, 28):<28} {count(one.gaps.active_keys, 'active key')}"
        )
    return lines


def without_controls(run: Run) -> list[AccountFigures]:
    """The accounts with active keys where neither control is even partial, most keys first."""
    verdicts = {
        each: {control.verdict for control in controls.values()}
        for each, controls in run.controls.items()
    }
    bare = [
        one for one in run.audited if one.gaps.active_keys and verdicts[one.account.id] == {ABSENT}
    ]
    return sorted(bare, key=lambda one: (-one.gaps.active_keys, one.account.id))


def control_remarks(run: Run, control: str) -> list[str]:
    """The policies behind a control's verdicts, once each, with what they exempt and what narrows them."""
    remarks = dict[str, None]()
    for found in (run.controls[account_id][control] for account_id in sorted(run.controls)):
        if found.policies:
            parts = [
                f"{found.verdict} by {', '.join(f'{name} ({each})' for each, name in found.policies.items())}"
            ]
            parts += [f"except {', '.join(found.exemptions)}"] * bool(found.exemptions)
            parts += [f"only if {'; or if '.join(found.conditions)}"] * bool(found.conditions)
            remarks[", ".join(parts)] = None
    more = len(remarks) - REMARKS_SHOWN
    return [*list(remarks)[:REMARKS_SHOWN], *[f"and {more:,} more, in summary.json"] * (more > 0)]


def change_lines(run: Run) -> list[str]:
    """What has changed since the earlier run, for better and for worse."""
    changes = changes_document(run)
    if changes is None or run.tracking.earlier is None:
        return ["", "No earlier run of this organization: this one is the baseline."]
    counts, mfa = changes["counts"], changes["console_users_without_mfa"]
    span = age(run.started - run.tracking.earlier.started)
    lines = ["", f"Since the run of {changes['since']}, {span} before"]
    lines.append(f"  console users without MFA: {mfa['fixed']:,} fixed, {mfa['new']:,} new")
    lines.append(
        f"  access keys: {counts['access-key-deleted']:,} deleted, {counts['access-key-deactivated']:,} deactivated, "
        f"{counts['access-key-created']:,} created"
    )
    for phase, levels in changes["maturity"].items():
        lines.append(f"  phase {phase[-1]}: {levels_in_words(levels)}")
    if run.tracking.earlier.max_key_age_days != run.plan.max_key_age.days:
        days = f"{run.tracking.earlier.max_key_age_days:,}, now {run.plan.max_key_age.days:,}"
        lines.append(
            f"  --max-key-age was {days}: phase 2 and the number of old keys do not compare"
        )
    if counts["account-joined"] or counts["account-left"]:
        lines.append(
            f"  accounts: {counts['account-joined']:,} joined, {counts['account-left']:,} left"
        )
    if changes["accounts_not_compared"]:
        number = count(changes["accounts_not_compared"], "account")
        lines.append(f"  not compared: {number}, not audited in this run or the earlier one")
    return lines + new_key_lines(run)


def levels_in_words(levels: Mapping[str, str | None]) -> str:
    """The organization's level then and now; if the accounts that both runs audited tell another story, theirs too."""
    then, now = levels["compared_then"], levels["compared_now"]
    theirs = f" (the accounts compared: {then}, now {now})"
    differ = then is not None and (then, now) != (levels["then"], levels["now"])
    return f"{levels['then']}, now {levels['now']}{theirs if differ else ''}"


def new_key_lines(run: Run) -> list[str]:
    keys = new_keys(run)
    lines = ["New access keys since the earlier run"] if keys else []
    for key in keys[:NEW_KEYS_SHOWN]:
        lines.append(
            f"  {change_line(key)}{'' if key.account_id in run.tracking.compared else ' (account not compared)'}"
        )
    if len(keys) > NEW_KEYS_SHOWN:
        lines.append(f"  and {len(keys) - NEW_KEYS_SHOWN:,} more, in summary.json")
    return lines


def change_line(change: Change) -> str:
    """The change and, where CloudTrail knows, who made it."""
    parts = [change.account_id, cut(change.account_name, 20), cut(change.user, 24), change.key_id]
    parts.append("deleted again" if change.change == CAME_AND_WENT else "")
    if change.event:
        parts.append(
            f"by {change.event.actor.rpartition(':')[2]}" if change.witness == "confirmed" else ""
        )
        parts.append("(contradicted by CloudTrail)" if change.witness == "contradicted" else "")
    return " ".join(filter(None, parts))


def alert_lines(run: Run) -> list[str]:
    """What --quiet says of changes: new access keys, new console users without MFA, and MFA removed."""
    removed = [change for change in run.tracking.changes if change.change == "mfa-removed"]
    lines = new_key_lines(run)
    for title, changes in (
        ("New console users without MFA", run.tracking.mfa_new),
        ("MFA removed", removed),
    ):
        if changes:
            lines += [
                f"{title} since the earlier run",
                *(f"  {change_line(change)}" for change in changes),
            ]
    if blind := blind_spots(run):
        lines.append(
            f"Not compared, because the earlier run had not audited them: {count(len(blind), 'account')}"
        )
        lines += [f"  {account.id} {account.name}" for account in blind[:ACCOUNTS_SHOWN]]
    return lines


def witness_lines(run: Run) -> list[str]:
    """What CloudTrail had to say, and what it could not."""
    trail = cloudtrail_document(run)
    if trail is None or run.plan.events_since is None:
        return []
    lines = [
        "",
        f"CloudTrail since {trail['since']}: {count(trail['events'], 'IAM event')}, in events.csv",
    ]
    if run.plan.events_out_of_reach:
        lines.append(
            f"  CloudTrail keeps {CLOUDTRAIL_KEEPS.days} days: what happened before has no witness."
        )
    elif run.tracking.earlier and run.tracking.earlier.started < run.plan.events_since:
        lines.append(
            "  The earlier run began before that: what happened in between has no witness."
        )
    witnesses = Counter(change.witness for change in run.tracking.changes if change.witness)
    if witnesses:
        lines.append(
            "  changes: "
            + ", ".join(f"{number:,} {witness}" for witness, number in sorted(witnesses.items()))
        )
    silent: dict[str, list[str]] = {}
    for account_id, error in sorted(trail["unavailable"].items()):
        silent.setdefault(": ".join(error.split(": ")[:2]), []).append(account_id)
    for what, accounts in silent.items():
        which = ", ".join([*accounts[:ACCOUNTS_SHOWN], *["..."] * (len(accounts) > ACCOUNTS_SHOWN)])
        lines += wrapped(f"  no witness in {count(len(accounts), 'account')} ({which}): {what}")
    if any(what.endswith(tuple(DENIED)) for what in silent):
        lines.append(
            "    Next: the role must allow cloudtrail:LookupEvents, and no SCP may deny it."
        )
    return lines


def run_lines(run: Run) -> list[str]:
    """The table of runs; a first run has nothing to be compared with."""
    if not run.tracking.runs:
        return []
    lines = [
        "",
        f"{'Runs':<28}{'audited':>9}{'without MFA':>13}{'active keys':>13}{'of them old':>13}",
    ]
    for one in all_runs(run):
        figures = (
            one.console_users_without_mfa,
            one.active_keys,
            one.active_keys_older_than_max_age,
        )
        lines.append(
            f"{iso(one.started):<28}{one.audited:>9,}"
            + "".join(f"{number:>13,}" for number in figures)
        )
    if run.tracking.unreadable:
        lines += wrapped(f"not readable, and so left out: {', '.join(run.tracking.unreadable)}")
    return lines


def wrapped(line: str) -> list[str]:
    """The line, folded to TERMINAL_WIDTH; what follows the first part is set in further."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(
        printable(line), TERMINAL_WIDTH, subsequent_indent=indent, break_on_hyphens=False
    )


def cut(text: str, width: int) -> str:
    """The text in at most `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def age(span: timedelta) -> str:
    """A rough age: `12 minutes`, `3 hours`, `5 days`."""
    minutes = max(0, int(span.total_seconds() // 60))
    if minutes < 120:
        return count(minutes, "minute")
    return count(minutes // 60, "hour") if minutes < 48 * 60 else count(minutes // 1440, "day")


def summary_document(run: Run, finished: datetime) -> dict[str, Any]:
    """What summary.json says; README.md documents its keys."""
    audited, failed, skipped = run.audited, run.failed, run.skipped
    return {
        "format": SUMMARY_FORMAT,
        "tool": "iam-audit",
        "version": VERSION,
        "started": iso(run.started),
        "finished": iso(finished),
        "role": run.plan.role.name,
        "production_pattern": run.plan.production.pattern,
        "max_key_age_days": run.plan.max_key_age.days,
        "caller": {
            "account": run.caller.account,
            "arn": run.caller.arn,
            "partition": run.caller.partition,
        },
        "organization": {
            "id": run.organization.id,
            "management_account": run.organization.management_account,
            "management_account_included": run.plan.scope.include_management,
        },
        "totals": {
            "audited": len(audited),
            "failed": len(failed),
            "skipped": len(skipped),
            "out_of_scope": len(run.out_of_scope),
            "production": sum(account.production for account in audited),
            "users": sum(account.users for account in audited),
        },
        "gaps": {
            "organization": gaps_document(total_gaps(audited), run.started),
            "production": gaps_document(
                total_gaps(one for one in audited if one.production), run.started
            ),
        },
        "maturity": {phase: maturity_document(run, phase) for phase in PHASES},
        "changes": changes_document(run),
        "runs": [{**vars(one), "started": iso(one.started)} for one in all_runs(run)],
        "cloudtrail": cloudtrail_document(run),
        "enforcement": enforcement_document(run),
        "findings": {
            str(priority): number for priority, number in findings_by_priority(run).items()
        },
        "accounts": sorted(
            [audited_entry(one, run) for one in audited]
            + [failed_entry(one, run) for one in failed]
            + [account_entry(one.account, "skipped") for one in skipped],
            key=lambda entry: str(entry["id"]),
        ),
        "out_of_scope": sorted(
            ({"id": one.account.id, "name": one.account.name} for one in run.out_of_scope),
            key=lambda one: one["id"],
        ),
    }


def account_entry(account: Account, result: str) -> dict[str, Any]:
    return {
        "id": account.id,
        "name": account.name,
        "path": account.path,
        "state": account.state,
        "result": result,
    }


def audited_entry(figures: AccountFigures, run: Run) -> dict[str, Any]:
    return {
        **account_entry(figures.account, "audited"),
        "report_generated": iso(figures.report_generated),
        "users": figures.users,
        "root": figures.has_root,
        "production": figures.production,
        "maturity": {phase: getattr(figures, phase) for phase in PHASES},
        "controls": controls_document(run.controls[figures.account.id]),
        "gaps": gaps_document(figures.gaps, run.started),
    }


def failed_entry(failed: FailedAccount, run: Run) -> dict[str, Any]:
    return {
        **account_entry(failed.account, "failed"),
        "step": failed.step,
        "error": {"code": failed.code, "message": failed.message},
        "production": is_production(failed.account, run.plan.production),
        "maturity": dict.fromkeys(PHASES, NOT_STARTED),
        "controls": controls_document(run.controls[failed.account.id]),
    }


def gaps_document(gaps: Gaps, now: datetime) -> dict[str, Any]:
    oldest = gaps.oldest_active_key
    return {
        **{name: getattr(gaps, name) for name in GAP_COUNTS},
        "mfa_coverage_percent": gaps.mfa_coverage_percent,
        "oldest_active_key": None
        if oldest is None
        else {
            **oldest._asdict(),
            "created": iso(oldest.created),
            "age_days": days_between(oldest.created, now),
        },
    }


def maturity_document(run: Run, phase: str) -> dict[str, Any]:
    audited = [getattr(account, phase) for account in run.audited]
    levels = audited + [NOT_STARTED] * len(run.failed)
    return {
        "level": organization_level(audited, len(run.failed)),
        "accounts": {level: levels.count(level) for level in LEVELS},
    }


def all_runs(run: Run) -> list[RunFigures]:
    """The last finished runs, this one at the end."""
    gaps = total_gaps(run.audited)
    counts = (gaps.console_users_without_mfa, gaps.active_keys, gaps.active_keys_older_than_max_age)
    return [*run.tracking.runs, RunFigures(run.started, len(run.audited), *counts)]


def changes_document(run: Run) -> dict[str, Any] | None:
    """What has changed since the earlier run; None where there is none."""
    tracking, earlier = run.tracking, run.tracking.earlier
    if earlier is None:
        return None
    compared = [one for one in run.audited if one.account.id in tracking.compared]
    counts = Counter(change.change for change in tracking.changes)
    kinds = (*EXPLAINED_BY, CAME_AND_WENT, "account-joined", "account-left")
    return {
        "since": iso(earlier.started),
        "folder": str(earlier.folder),
        "accounts_compared": len(tracking.compared),
        "accounts_not_compared": not_compared(run),
        "console_users_without_mfa": {"fixed": tracking.mfa_fixed, "new": len(tracking.mfa_new)},
        "counts": {kind: counts[kind] for kind in kinds},
        "witnesses": dict(Counter(change.witness for change in tracking.changes if change.witness)),
        "maturity": {
            phase: {
                "then": earlier.levels[phase],
                "now": maturity_document(run, phase)["level"],
                "compared_then": lowest(
                    earlier.account_levels[one.account.id][phase] for one in compared
                ),
                "compared_now": lowest(getattr(one, phase) for one in compared),
            }
            for phase in PHASES
        },
        "max_key_age_days_then": earlier.max_key_age_days,
        "new_access_keys": [new_key_document(key, run) for key in new_keys(run)],
    }


def lowest(levels: Iterable[str]) -> str | None:
    """The lowest of the levels; None if there is none."""
    return min(levels, key=LEVELS.index, default=None)


def new_key_document(key: Change, run: Run) -> dict[str, Any]:
    event = key.event
    return {
        "account_id": key.account_id,
        "account_name": key.account_name,
        "username": key.user,
        "access_key_id": key.key_id,
        "change": key.change,
        "account_compared": key.account_id in run.tracking.compared,
        "witness": key.witness,
        "event_name": event.name if event else None,
        "event_time": iso(event.time) if event else None,
        "actor": event.actor if event else None,
    }


def not_compared(run: Run) -> int:
    """Accounts in scope of either run, neither joined nor left, that one of the two runs did not audit."""
    then = run.tracking.earlier.accounts if run.tracking.earlier else {}
    left_out_now = {one.account.id for one in run.out_of_scope}
    left_out_then = {
        account_id for account_id, (_, result) in then.items() if result == "out of scope"
    }
    both = then.keys() & accounts_now(run).keys()
    return len(both - (left_out_now & left_out_then)) - len(run.tracking.compared)


def blind_spots(run: Run) -> list[Account]:
    """Accounts audited now that the earlier run did not audit or know: little of what is new in them can be told."""
    if run.tracking.earlier is None:
        return []
    accounts = (one.account for one in run.audited if one.account.id not in run.tracking.compared)
    return sorted(accounts, key=lambda account: account.id)


def new_keys(run: Run) -> list[Change]:
    """The access keys created since the earlier run, with those that are gone again."""
    kinds = ("access-key-created", CAME_AND_WENT)
    found = [change for change in run.tracking.changes if change.change in kinds]
    return sorted([*found, *run.tracking.new_keys_elsewhere], key=lambda change: change[:5])


def cloudtrail_document(run: Run) -> dict[str, Any] | None:
    """How far back CloudTrail was asked, and the accounts where it told nothing; None if it was not asked."""
    if run.plan.events_since is None:
        return None
    return {
        "since": iso(run.plan.events_since),
        "out_of_reach": run.plan.events_out_of_reach,
        "events": sum(len(trail.events) for _, trail in run.trails),
        "unavailable": {account.id: trail.error for account, trail in run.trails if trail.error},
    }


def controls_document(controls: Mapping[str, Control]) -> dict[str, Any]:
    return {
        name: {
            "verdict": control.verdict,
            "policies": [
                {"id": policy_id, "name": policy} for policy_id, policy in control.policies.items()
            ],
            "exemptions": list(control.exemptions),
            "conditions": list(control.conditions),
        }
        for name, control in controls.items()
    }


def enforcement_document(run: Run) -> dict[str, Any]:
    """How many of the accounts in scope each control covers, and how."""
    verdicts = {
        name: Counter(controls[name].verdict for controls in run.controls.values())
        for name in CONTROLS
    }
    return {
        "why_not_checked": run.enforcement.why_not or None,
        "accounts": {
            control: {each: found[each] for each in VERDICTS} for control, found in verdicts.items()
        },
        "root_credentials_managed_centrally": run.enforcement.root_credentials_managed,
        "root_credentials_why_not_checked": run.enforcement.root_why_not or None,
    }


def findings_by_priority(run: Run) -> dict[int, int]:
    found = Counter(finding.priority for finding in run.findings)
    return {priority: found[priority] for priority in range(MOST_URGENT, LEAST_URGENT + 1)}


def outcome_line(outcome: Outcome) -> str:
    """A line for --verbose."""
    name = f"{outcome.account.id} {outcome.account.name}"
    if isinstance(outcome, AuditedAccount):
        return f"{name}: audited, {count(len(outcome.users), 'user')}"
    if isinstance(outcome, FailedAccount):
        return f"{name}: failed at {outcome.step}: {outcome.code}: {outcome.message}"
    return f"{name}: {'skipped, ' + outcome.account.state if isinstance(outcome, SkippedAccount) else 'out of scope'}"


# --------------------------------------------------------------------------------------------------
# Documents: what --print prints
# --------------------------------------------------------------------------------------------------


ALERT_EVENTS = ("CreateAccessKey", "CreateLoginProfile", "DeactivateMFADevice")
DEFAULT_ROLE = "IAMAuditRole"
SCP_LONGEST = 5120  # characters, white space among them
EXAMPLE_ACCOUNT = "111122223333"  # AWS's own account ID for examples
DOCUMENTS = (
    "caller-policy",
    "role-policy",
    "role-trust",
    "role-template",
    "scp-require-mfa",
    "scp-deny-access-keys",
    "alert-rule",
)


def print_document(name: str, role: str = DEFAULT_ROLE, exempt_roles: Sequence[str] = ()) -> str:
    """The text of one of DOCUMENTS: JSON, valid on its own."""
    documents = {
        "caller-policy": caller_policy(role),
        "role-policy": policy_document(role_statements()),
        "role-trust": policy_document([trust_statement(EXAMPLE_ACCOUNT)]),
        "role-template": role_template(role),
        "scp-require-mfa": scp_require_mfa(),
        "scp-deny-access-keys": scp_deny_access_keys(exempt_roles),
        "alert-rule": alert_rule(),
    }
    return json.dumps(documents[name], indent=2) + "\n"


def caller_policy(role: str) -> dict[str, Any]:
    statements = [
        allow(
            "ReadOrganization", [action for action in CALLER_READS if action not in POLICY_READS]
        ),
        allow(
            "ReadPolicies", POLICY_READS, "arn:*:organizations::*:policy/*service_control_policy/*"
        ),
        allow("AssumeAuditRole", ["sts:AssumeRole"], role_arns(role)),
    ]
    return policy_document(statements)


def role_statements() -> list[dict[str, Any]]:
    return [allow("ReadIAM", ROLE_READS), allow("ReadCloudTrail", CLOUDTRAIL_READS)]


def role_template(role: str) -> dict[str, Any]:
    """CloudFormation for a StackSet: the audit role in every account, to be assumed from the one that audits."""
    path, _, name = f"/{role}".rpartition("/")
    trust = trust_statement({"Fn::Sub": "arn:${AWS::Partition}:iam::${ManagementAccountId}:root"})
    external_id = {"StringEquals": {"sts:ExternalId": {"Ref": "ExternalId"}}}
    trust["Condition"] = {"Fn::If": ["HasExternalId", external_id, {"Ref": "AWS::NoValue"}]}
    properties = {
        "RoleName": {"Ref": "RoleName"},
        "Path": f"{path}/",
        "Description": "Read by iam_audit.py: users, access keys and MFA devices",
        "AssumeRolePolicyDocument": policy_document([trust]),
        "Policies": [
            {"PolicyName": "iam-audit", "PolicyDocument": policy_document(role_statements())}
        ],
    }
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "The role that iam_audit.py assumes, read-only",
        "Parameters": {
            "RoleName": text_parameter("Name of the role", r"[\w+=,.@-]{1,64}", Default=name),
            "ManagementAccountId": text_parameter("Account that runs the audit", r"\d{12}"),
            "ExternalId": text_parameter(
                "Value of --external-id, if any", r"([\w+=,.@:/-]{2,1224})?", Default=""
            ),
        },
        "Conditions": {"HasExternalId": {"Fn::Not": [{"Fn::Equals": [{"Ref": "ExternalId"}, ""]}]}},
        "Resources": {"Role": {"Type": "AWS::IAM::Role", "Properties": properties}},
    }


def text_parameter(description: str, pattern: str, **more: str) -> dict[str, str]:
    return {"Type": "String", "Description": description, "AllowedPattern": pattern, **more}


def scp_require_mfa() -> dict[str, Any]:
    condition = {
        "Bool": {"aws:MultiFactorAuthPresent": "false"},
        "BoolIfExists": {"aws:ViaAWSService": "false"},
        "ArnLike": {"aws:PrincipalArn": "arn:*:iam::*:user/*"},
    }
    statement = {
        "Effect": "Deny",
        "NotAction": list(MFA_SETUP),
        "Resource": "*",
        "Condition": condition,
    }
    return policy_document([{"Sid": "DenyUsersWithoutMFA", **statement}])


def scp_deny_access_keys(exempt_roles: Sequence[str]) -> dict[str, Any]:
    statement: dict[str, Any] = {"Sid": "DenyNewAccessKeysAndPasswords", "Effect": "Deny"}
    statement.update(Action=["iam:CreateAccessKey", "iam:CreateLoginProfile"], Resource="*")
    if exempt_roles:
        statement["Condition"] = {
            "ArnNotLike": {"aws:PrincipalArn": [role_arns(role) for role in exempt_roles]}
        }
    return policy_document([statement])


def alert_rule() -> dict[str, Any]:
    """CloudFormation for us-east-1, where CloudTrail records IAM: a message for each of ALERT_EVENTS that succeeds."""
    topic = {"Ref": "Topic"}
    succeeded = {
        "eventSource": ["iam.amazonaws.com"],
        "eventName": [*ALERT_EVENTS],
        "errorCode": [{"exists": False}],
    }
    pattern = {
        "source": ["aws.iam"],
        "detail-type": ["AWS API Call via CloudTrail"],
        "detail": succeeded,
    }
    # No condition on the rule's ARN: AWS does not support conditions in the topic policies that EventBridge needs.
    publish = {
        "Effect": "Allow",
        "Principal": {"Service": "events.amazonaws.com"},
        "Action": "sns:Publish",
    }
    resources = {
        "Topic": {"Subscription": [{"Protocol": "email", "Endpoint": {"Ref": "Email"}}]},
        "TopicPolicy": {
            "Topics": [topic],
            "PolicyDocument": policy_document([{**publish, "Resource": topic}]),
        },
        "Rule": {"EventPattern": pattern, "Targets": [{"Id": "Topic", "Arn": topic}]},
    }
    types = {
        "Topic": "AWS::SNS::Topic",
        "TopicPolicy": "AWS::SNS::TopicPolicy",
        "Rule": "AWS::Events::Rule",
    }
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "A message when an access key or password is created or MFA is deactivated (for us-east-1)",
        "Parameters": {"Email": text_parameter("Who gets the messages", r"[^@\s]+@[^@\s]+")},
        "Resources": {
            name: {"Type": types[name], "Properties": resources[name]} for name in resources
        },
    }


def policy_document(statements: list[dict[str, Any]]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": statements}


def allow(sid: str, actions: Iterable[str], resource: str = "*") -> dict[str, Any]:
    """A statement; the resource stays * where an action takes no other, and for IAM's reads of a user: of one deleted
    meanwhile IAM knows no ARN, and would answer AccessDenied where the audit needs to hear NoSuchEntity."""
    return {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": resource}


def trust_statement(principal: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Principal": {"AWS": principal}, "Action": "sts:AssumeRole"}


def role_arns(role: str) -> str:
    """The role of this name, or path and name, in any account of any partition."""
    return f"arn:*:iam::*:role/{role}"


# --------------------------------------------------------------------------------------------------
# Options: the command line, its validators and help; the progress line
# --------------------------------------------------------------------------------------------------


DEFAULT_MAX_KEY_AGE = 90  # days
# prod, prd, production or live as a word of its own (prod2 too), and not after no, non, not or pre as a word
DEFAULT_PRODUCTION = (
    r"(?<![a-z0-9])(?<!(?<![a-z0-9])no[-_. ])(?<!(?<![a-z0-9])no[nt][-_. ])(?<!(?<![a-z0-9])pre[-_. ])"
    r"(?:prod|prd|production|live)[0-9]*(?![a-z0-9])"
)
HELP_EPILOG = """\
examples:
  python iam_audit.py --profile mgmt-profile --role AWSControlTowerExecution
  python iam_audit.py --profile mgmt-profile --role audit/IAMAuditRole --ou ou-ab12-cdefgh34 --quiet

documents of --print:
  caller-policy         IAM policy of the profile
  role-policy           IAM policy of the role
  role-trust            trust policy of the role
  role-template         CloudFormation template of the role, for a StackSet
  scp-require-mfa       service control policy: console users need MFA to act
  scp-deny-access-keys  service control policy: no new access keys and passwords
  alert-rule            CloudFormation template: a message for each new access key or password

exit codes:
  0    every account in scope was audited
  1    the audit could not start or finish
  2    the command line is wrong
  3    some accounts in scope could not be audited; all others were written
  4    what --fail-on names was found
  130  interrupted (SIGINT); 143: terminated (SIGTERM)
"""


class FailOn(NamedTuple):
    """What ends with exit code 4: findings of that priority or more urgent (0: none), new access keys."""

    priority: int = 0
    new_keys: bool = False


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser()
    options = parser.parse_args(argv)
    if options.role is None and options.document is None:
        parser.error("the following arguments are required: --role")
    if options.exempt_role and options.document != "scp-deny-access-keys":
        parser.error("argument --exempt-role: it goes with --print scp-deny-access-keys")
    if options.document and any(
        set(name) & set("*?$") for name in (*options.exempt_role, options.role or "")
    ):
        parser.error(
            "argument --print: in a policy, * ? and $ in the path of a role would stand for other roles"
        )
    if (
        options.exempt_role
        and (length := len(print_document(options.document, "", options.exempt_role))) > SCP_LONGEST
    ):
        parser.error(
            f"argument --exempt-role: a policy of {length:,} characters, and an SCP has at most {SCP_LONGEST:,}"
        )
    if both := options.accounts & options.exclude:
        parser.error(f"argument --exclude: {', '.join(sorted(both))} is in --accounts too")
    if options.since and not options.cloudtrail:
        parser.error("argument --since: it goes with --cloudtrail")
    return options


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iam_audit.py",
        description="Write down every IAM user, password, access key and MFA device of an AWS organization.",
        epilog=HELP_EPILOG,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, width=TERMINAL_WIDTH
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"iam-audit {VERSION}")
    access_options(parser.add_argument_group("access").add_argument)
    scope_options(parser.add_argument_group("which accounts").add_argument)
    pace_options(parser.add_argument_group("pace").add_argument)
    judging_options(parser.add_argument_group("what counts as a gap").add_argument)
    tracking_options(parser.add_argument_group("what has changed").add_argument)
    output_options(parser.add_argument_group("output").add_argument)
    document_options(parser.add_argument_group("documents to deploy").add_argument)
    return parser


def access_options(add: Callable[..., Any]) -> None:
    add(
        "--profile",
        metavar="NAME",
        type=not_empty,
        help="AWS profile of the management account or of a delegated administrator "
        "(default: the SDK's default credential chain)",
    )
    add(
        "--role",
        metavar="NAME",
        type=role_name,
        help="role to assume in each account, required for an audit: a name, or a path and a name (audit/IAMAuditRole)",
    )
    add(
        "--external-id",
        metavar="ID",
        type=external_id,
        help="external ID that the role's trust policy asks for",
    )


def scope_options(add: Callable[..., Any]) -> None:
    add(
        "--accounts",
        metavar="ID[,ID...]",
        type=account_ids,
        help="audit only these accounts",
        default=frozenset(),
    )
    add(
        "--exclude",
        metavar="ID[,ID...]",
        type=account_ids,
        help="leave these accounts out",
        default=frozenset(),
    )
    add(
        "--ou",
        metavar="OU_ID[,OU_ID...]",
        type=ou_ids,
        default=frozenset(),
        help="audit only accounts below these organizational units",
    )
    add(
        "--include-management",
        action="store_true",
        help="audit the management account too: with the profile's own credentials if it is the profile's account, "
        "else through the role",
    )


def pace_options(add: Callable[..., Any]) -> None:
    add(
        "--workers",
        metavar="N",
        type=workers,
        default=32,
        help="API requests in flight, 1 to 256 (default: %(default)s)",
    )
    add(
        "--report-timeout",
        metavar="SECONDS",
        type=seconds,
        default=300.0,
        help="how long one account's credential report may take (default: 300)",
    )


def judging_options(add: Callable[..., Any]) -> None:
    add(
        "--production",
        metavar="REGEX",
        type=pattern,
        default=DEFAULT_PRODUCTION,
        help="what makes an account production: searched in its name, ID and organization path, upper or lower case "
        "(default: prod, prd, production or live as a word of its own)",
    )
    add(
        "--max-key-age",
        metavar="DAYS",
        type=days,
        default=str(DEFAULT_MAX_KEY_AGE),
        help="older active access keys are a gap (default: %(default)s)",
    )


def tracking_options(add: Callable[..., Any]) -> None:
    add(
        "--previous",
        metavar="DIR",
        type=existing_folder,
        help="folder of the run to compare with (default: the newest finished one of this organization in "
        "--output-dir)",
    )
    add(
        "--cloudtrail",
        action="store_true",
        help="ask CloudTrail in each account who made the changes; the role then needs cloudtrail:LookupEvents",
    )
    add(
        "--since",
        metavar="DATE",
        type=past_date,
        help="ask CloudTrail from this date on, 2026-01-31 or 2026-01-31T12:00:00Z (default: since the earlier run "
        "began, or 30 days)",
    )


def output_options(add: Callable[..., Any]) -> None:
    add(
        "--output-dir",
        metavar="DIR",
        type=not_empty,
        default="reports",
        help="where the run's own folder is made (default: %(default)s)",
    )
    add(
        "--fail-on",
        metavar="WHAT[,WHAT]",
        type=fail_on,
        default=FailOn(),
        help="end with exit code 4 if there are `findings`, or with findings:N any of priority N or more urgent (1 to "
        "7), or with new-keys any access key created since the earlier run",
    )
    add(
        "-q",
        "--quiet",
        action="store_true",
        help="print nothing unless something needs attention (an account failed, say)",
    )
    add(
        "-v",
        "--verbose",
        action="store_true",
        help="a line an account and step on stderr; tracebacks",
    )


def document_options(add: Callable[..., Any]) -> None:
    add(
        "--print",
        metavar="NAME",
        dest="document",
        choices=DOCUMENTS,
        help="print a document to deploy (see below), with --role filled in, and end",
    )
    add(
        "--exempt-role",
        metavar="NAME[,NAME...]",
        type=role_names,
        default=(),
        help="roles that --print scp-deny-access-keys lets create access keys",
    )


def matching(pattern: str, what: str, text: str) -> str:
    if not re.fullmatch(pattern, text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return text


def not_empty(text: str) -> str:
    return matching(r"(?s).+", "a name: it is empty", text)


def role_name(text: str) -> str:
    """A role's name, or its path and name without the slash in front, as an ARN ends.

    https://docs.aws.amazon.com/IAM/latest/APIReference/API_CreateRole.html
    """
    what = "a role's name or path and name (no ARN: the account differs)"
    return matching(r"(?!arn:)([!-.0-~]{1,510}/)*[\w+=,.@-]{1,64}", what, text)


def role_names(text: str) -> tuple[str, ...]:
    return tuple(role_name(part.strip()) for part in text.split(","))


def account_ids(text: str) -> frozenset[str]:
    return frozenset(
        matching(r"\d{12}", "an account ID of 12 digits", part.strip()) for part in text.split(",")
    )


def ou_ids(text: str) -> frozenset[str]:
    """https://docs.aws.amazon.com/organizations/latest/APIReference/API_OrganizationalUnit.html"""
    what = "the ID of an organizational unit (ou-ab12-cdefgh34)"
    return frozenset(
        matching(r"ou-[0-9a-z]{4,32}-[0-9a-z]{8,32}", what, part.strip())
        for part in text.split(",")
    )


def external_id(text: str) -> str:
    """https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html"""
    return matching(
        r"[\w+=,.@:/-]{2,1224}", "an external ID (2 to 1224 of letters, digits and _+=,.@:/-)", text
    )


def workers(text: str) -> int:
    number = int(matching(r"\d{1,3}", "a number from 1 to 256", text))
    if not 1 <= number <= 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 256")
    return number


def seconds(text: str) -> float:
    number = float(matching(r"\d{1,6}(\.\d+)?", "a number of seconds", text))
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(not_empty(text), re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def days(text: str) -> timedelta:
    number = int(matching(r"\d{1,4}", "a number of days from 1 to 9999", text))
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days from 1 to 9999")
    return timedelta(days=number)


def existing_folder(text: str) -> Path:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return Path(text)


def past_date(text: str) -> datetime:
    try:
        moment = parse_time(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2026-01-31") from None
    if moment > utc_now():
        raise argparse.ArgumentTypeError(f"{text!r} lies in the future")
    return moment


def fail_on(text: str) -> FailOn:
    chosen = FailOn()
    for part in text.split(","):
        what = "findings, findings:N with N from 1 to 7, or new-keys"
        name, _, number = matching(r"findings(:[1-7])?|new-keys", what, part.strip()).partition(":")
        if name == "new-keys":
            chosen = chosen._replace(new_keys=True)
        else:
            chosen = chosen._replace(priority=max(chosen.priority, int(number or LEAST_URGENT)))
    return chosen


class Status:
    """stderr: the progress line, where there is a terminal to draw it on, and the lines of --verbose.

    A stream that is closed, or whose reader has gone, costs these lines and not the run.
    """

    def __init__(
        self, stream: TextIO | None, progress: Progress, quiet: bool, verbose: bool
    ) -> None:
        self._stream, self._progress = stream, progress
        self._verbose = verbose and stream is not None
        terminal = (
            stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        )
        self._draws = terminal and not quiet
        self._started = time.monotonic()

    def log(self, line: str) -> None:
        if self._verbose:
            self.clear()
            self._write(f"{time.monotonic() - self._started:8.2f}s {printable(line)}\n")

    def clear(self) -> None:
        if self._draws:
            self._write("\r\x1b[K")

    def draw(self) -> None:
        if self._draws and self._stream is not None:
            line = progress_line(self._progress, time.monotonic() - self._started)
            self._write("\r\x1b[K" + line[: columns_of(self._stream) - 1])

    def _write(self, text: str) -> None:
        try:
            if self._stream is not None:
                print(text, end="", file=self._stream, flush=True)
        except OSError:
            self._draws = self._verbose = False

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Keep the progress line moving meanwhile, and take it away at the end."""
        task = asyncio.create_task(self._keep_drawing())
        try:
            yield
        finally:
            task.cancel()
            self.clear()

    async def _keep_drawing(self) -> None:
        while self._draws:
            self.draw()
            await asyncio.sleep(0.2)


def progress_line(progress: Progress, elapsed: float) -> str:
    total = f"{progress.listed:,}" if progress.all_listed else f"{progress.listed:,}+"
    parts = [f"{progress.done:,} of {total} accounts"]
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    parts.append(clock(timedelta(seconds=elapsed)))
    if progress.done and progress.all_listed:
        left = elapsed / progress.done * (progress.listed - progress.done)
        parts.append(f"about {clock(timedelta(seconds=left))} left")
    return ", ".join(parts)


def columns_of(terminal: TextIO) -> int:
    """Its width; one that knows none, as in some containers and on serial lines, says 0."""
    with contextlib.suppress(OSError):
        return os.get_terminal_size(terminal.fileno()).columns or 80
    return 80


def change_order(change):
    return change[:8]


def reason_of(step: str, error: Exception) -> str:
    if isinstance(error, SDK_ERRORS):
        return str(step_failed(step, error))
    return f"{step}: {type(error).__name__}"


if __name__ == "__main__":
    raise SystemExit(main())

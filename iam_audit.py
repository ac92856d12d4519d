#!/usr/bin/env python3
"""iam-audit: who has which password, access key and MFA device in an AWS organization.

From a profile of the management account, or of a delegated administrator, it assumes a role in
every member account, reads the IAM credential report and when each access key was last used, and
writes one CSV file per account. It reads no secret values.

Reads   the AWS profile's credentials, as the SDK finds them;
        in OUTPUT_DIR or --previous DIR, summaries of earlier runs and CSV files to compare with.
Writes  OUTPUT_DIR/<run>/: accounts/<account_id>.csv, findings.csv, changes.csv (if there is an
        earlier run), events.csv (with --cloudtrail) and, last, summary.json; files with mode 0600,
        folders 0700. The summary goes to stdout. With --print, a document goes to stdout and
        nothing else happens.

Every AWS action that the program can call:
  with the profile's credentials
    sts:GetCallerIdentity                who runs the audit, and in which partition
    organizations:DescribeOrganization   which account is the management account
    organizations:ListAccounts           the accounts
    organizations:ListPolicies, DescribePolicy, ListTargetsForPolicy, ListParents
                                         the service control policies and where they are attached
    iam:ListOrganizationsFeatures        whether root credentials are managed centrally
    sts:AssumeRole                       the role, in the accounts that are audited
  with the assumed role; in the management account, if the profile belongs to it, with the
  profile's credentials
    iam:GenerateCredentialReport, iam:GetCredentialReport, iam:ListUsers, iam:ListAccessKeys,
    iam:GetAccessKeyLastUsed, iam:ListMFADevices, iam:ListVirtualMFADevices, iam:GetLoginProfile;
    with --cloudtrail also cloudtrail:LookupEvents

GenerateCredentialReport makes IAM prepare a report; no other call changes anything in AWS. Every
session of the role has a policy that allows only the role's actions above: even an administrator
role is read-only in the hands of this program. The profile's own credentials are not restricted in
this way. To get and refresh them, the SDK may call other services, run a credential_process (which
is ended if it hangs) and write its own token cache. The program itself never writes or logs
credentials or puts them on a command line. An account that cannot be read in full gets no CSV
file: it is reported as failed, with the reason.

Sections, in reading order. To trust it with a role, read the run, AWS and audit: about 1,500 lines.
Nothing else opens a connection.
  run        the story, from the command line to the files, the summary and the exit code
  data       what several sections share: Account, User, Credential, the outcomes, Plan, Run
  AWS        permissions with their reasons; every network call, its credentials, pace and retries
  audit      one account, from AssumeRole to its users; all accounts concurrently
  files      rows, cells, atomic writing, reading a run back
  assess     gaps, maturity levels, the table of finding rules
  track      what changed since an account's last audit, with CloudTrail as a witness
  enforce    what the organization's service control policies already prevent
  terminal   the summary as text and as summary.json
  documents  the policies and templates that --print prints
  options    the command line, its validators and its help; the progress line
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Until `interruptible` takes over: Ctrl-C during the imports below would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections import Counter, namedtuple
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
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar, Union
from urllib.request import getproxies

import boto3
import botocore
import botocore.exceptions
import botocore.session
import botocore.utils
from botocore.config import Config
from botocore.credentials import Credentials, RefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.parsers import ResponseParserError

# === Run: the story, from the command line to the files, the summary and the exit code ===========

EXIT_OK = 0
EXIT_NOT_DONE = 1
EXIT_USAGE = 2  # argparse's own
EXIT_ACCOUNTS_FAILED = 3
EXIT_FAIL_ON = 4
EXIT_FAILED_AND_FAIL_ON = 5
EXIT_SIGNAL = 128  # plus the signal's number, as in a shell

CLOUDTRAIL_FIRST_LOOK = timedelta(days=30)  # in an account that no earlier run can tell about
FIRST_ACCOUNTS = 20  # a role that is denied in all of these probably has another name or trust


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


def run_audit(options: Any, started: datetime) -> int:
    """Audit the organization, write the files, print the summary."""
    folder = make_run_folder(Path(options.output_dir), started)
    try:
        aws = connect(open_session(options.profile), options.workers)
        organization = describe_organization(aws)
        history = History(finished_runs(folder.parent, started), organization.id)
        tracking = open_tracking(history, options.previous, scope_of(options))
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
    options: Any, caller: Caller, organization: Organization, tracking: Tracking, started: datetime
) -> Plan:
    """The options, resolved for this organization."""
    reads = [*ROLE_READS, *(CLOUDTRAIL_READS if options.cloudtrail else ())]
    own_account = caller.account if caller.account == organization.management_account else None
    policy = session_policy(reads)
    asked_since = functools.partial(events_since, tracking, options.since, started)
    return Plan(
        role=Role(options.role, caller.partition, policy, options.external_id, own_account),
        scope=scope_of(options),
        workers=options.workers,
        report_timeout=options.report_timeout,
        production=options.production,
        max_key_age=options.max_key_age,
        event_names=EVENT_NAMES,
        events_since=asked_since if options.cloudtrail else None,
    )


def events_since(
    tracking: Tracking, asked: datetime | None, now: datetime, account_id: str
) -> datetime:
    """Find the account's baseline, and say from when on CloudTrail is asked: --since, else that."""
    baseline = tracking.baselines[account_id] = baseline_of(tracking, account_id)
    wanted = asked or baseline.since or now - CLOUDTRAIL_FIRST_LOOK
    since = max(wanted, now - CLOUDTRAIL_KEEPS)
    tracking.events_from = min(since, tracking.events_from or since)
    tracking.events_out_of_reach |= wanted < since
    return since


def scope_of(options: Any) -> Scope:
    return Scope(options.accounts, options.exclude, options.ou, options.include_management)


async def audit_into(run: Run, aws: Aws, options: Any) -> None:
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
        if isinstance(outcome, FailedAccount):
            warn_of_role(run, status)

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
        findings = list(findings_of(outcome, run.plan, run.started))
        run.findings += findings
        urgent = [finding for finding in findings if finding.priority == MOST_URGENT]
        track_account(run.tracking, outcome, urgent)
        if outcome.trail is not None:
            run.trails.append((outcome.account, outcome.trail))
    elif isinstance(outcome, FailedAccount):
        run.failed.append(outcome)
    elif isinstance(outcome, SkippedAccount):
        run.skipped.append(outcome)
    else:
        run.out_of_scope.append(outcome)


def warn_of_role(run: Run, status: Status) -> None:
    """If just now the first accounts have all failed with the same denial, say so at once."""
    causes = {(one.step, one.code) for one in run.failed[:FIRST_ACCOUNTS]}
    just_now = len(run.failed) == FIRST_ACCOUNTS and not run.audited
    if just_now and causes == {("AssumeRole", "AccessDenied")}:
        wrong = f"the name of role {run.plan.role.name} or its trust policy is probably wrong"
        status.warn(f"AssumeRole was denied in the first {FIRST_ACCOUNTS} accounts alike: {wrong}")


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
    tracking.urgent_new.sort(key=most_urgent_first)
    if tracking.earlier is not None:
        tracking.changes += accounts_that_came_or_left(run, tracking.earlier)
        tracking.changes.sort(key=change_order)
        write_csv(run.folder / "changes.csv", CHANGES_COLUMNS, map(change_row, tracking.changes))
    if run.plan.events_since is not None:
        write_csv(run.folder / "events.csv", EVENTS_COLUMNS, event_rows(run))


def exit_code(run: Run, fail_on: FailOn) -> int:
    found = any(finding.priority <= fail_on.priority for finding in run.findings)
    if fail_on.new_keys and (new_keys(run) or run.tracking.blind):
        found = True  # where no earlier run can be read, new keys cannot be ruled out
    if run.failed:
        return EXIT_FAILED_AND_FAIL_ON if found else EXIT_ACCOUNTS_FAILED
    return EXIT_FAIL_ON if found else EXIT_OK


def what_stopped_it(error: Exception) -> str:
    """A sentence or two for the person who has to do something about it."""
    if isinstance(error, (AuditError, StepFailed)):
        return str(error)
    if in_words := sdk_error_in_words(error):
        return in_words
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or 'no file named'}"
    message = without_secrets(str(error))
    return f"Unexpected {type(error).__name__}: {message} (--verbose shows where)"


SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # Windows has none
    SIGNALS.append(signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """One of SIGNALS was received."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn a signal into Interrupted, after the event loop's tasks are cancelled.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored.
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

    handlers = {each: signal.getsignal(each) for each in SIGNALS}
    for each, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(each, interrupt)
    try:
        yield
    except asyncio.CancelledError:
        raise Interrupted(received[0]) from None
    finally:
        if not received:  # otherwise all stay ignored while the interpreter shuts down
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


# === Data: what several sections share: Account, User, Credential, the outcomes, Plan, Run =======

VERSION = "1.0.0"
TERMINAL_WIDTH = 100
MOST_URGENT, LEAST_URGENT = 1, 7  # priorities of findings

ROOT = "<root_account>"  # its name in the credential report
ROOT_ACCESS_KEYS = ("<root_access_key_1>", "<root_access_key_2>")  # the report has no IDs
CERTIFICATES = ("<signing_certificate_1>", "<signing_certificate_2>")  # nor of these
NOT_APPLICABLE, UNKNOWN = "N/A", "unknown"
KINDS = ("access-key", "api-key", "service-password", "signing-certificate")
ACCESS_KEY, API_KEY, SERVICE_PASSWORD, SIGNING_CERTIFICATE = KINDS

CLOUDTRAIL_KEEPS = timedelta(days=90)

T = TypeVar("T")
Log = Callable[[str], None]


@dataclass(frozen=True)
class Account:
    """An account. `path` is its place, `o-.../r-.../ou-.../ID/`; None if AWS did not give it. `ou`
    has the names of its OUs from the root down, `Workloads/Prod`; an unread name is the OU's ID."""

    id: str
    name: str
    state: str
    path: str | None = None
    email: str = ""
    ou: str = ""


@dataclass(frozen=True)
class Credential:
    """A long-term credential other than a password, of one of KINDS.

    If an access key was never used, `last_used` is None and `service_name` is N/A. Of the other
    kinds AWS does not tell the last use. Only API keys and passwords for services can expire.
    """

    id: str
    status: str
    created: datetime
    last_used: datetime | None
    service_name: str
    kind: str = ACCESS_KEY
    expires: datetime | None = None


@dataclass(frozen=True)
class User:
    """An IAM user, or root. `mfa` has the kinds of their MFA devices, `keys` the access keys.

    `password_last_used` is None if there is no password or it was never used. `owner` is a tag of
    the user or else the account's e-mail address; `administrator` is true, false or unknown.
    `exposed`: AWS has found one of their keys in public.
    """

    name: str
    password: bool
    password_last_used: datetime | None
    mfa: tuple[str, ...]
    keys: tuple[Credential, ...]
    others: tuple[Credential, ...] = ()
    password_changed: datetime | None = None
    owner: str = ""
    administrator: str = UNKNOWN
    exposed: bool = False


class Event(NamedTuple):
    """A successful IAM event: what `actor` did to `user`. `status` is what UpdateAccessKey set,
    `new_name` what UpdateUser did."""

    time: datetime
    name: str
    user: str
    key_id: str
    status: str
    actor: str
    source_ip: str
    user_agent: str
    id: str
    new_name: str = ""


@dataclass(frozen=True)
class Trail:
    """CloudTrail's events of one account, oldest first. If the lookup failed, `error` says why."""

    events: tuple[Event, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class AuditedAccount:
    """An account that was read in full: root first, if it is in the report, then the users by name.

    `trail` is None if CloudTrail was not asked. `not_checked` has the error codes of the operations
    that were denied without failing the account: nothing may be claimed of what they read.
    """

    account: Account
    report_generated: datetime
    users: tuple[User, ...]
    trail: Trail | None = None
    not_checked: Mapping[str, str] = field(default_factory=dict)


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
    exclude_ous: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Role:
    """The role to assume. `own_account`, the management account if the profile belongs to it, is
    read with the profile's own credentials instead."""

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
    event_names: tuple[str, ...]  # what CloudTrail is asked for
    # From when on CloudTrail is asked in the account of that ID; None: it is not asked
    events_since: Callable[[str], datetime] | None
    max_unused: timedelta = timedelta(days=90)
    owner_tags: tuple[str, ...] = ()


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
    ous_why_not: str = ""  # why some OUs have no names


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
    """A call failed: the operation (or PROFILE_STEP), AWS's code, the message.

    `kind` is throttled (repeated at a slower pace), transient (repeated some times) or final.
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


def is_active(status: str) -> bool:
    """Whether an access key can be used; a status that AWS adds counts as active."""
    return status not in ("Inactive", "Expired")


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


# === AWS: permissions with their reasons; every network call, its credentials, pace and retries ==

# Each action with the reason for it, as in README.md
ROLE_READS = {
    "iam:GenerateCredentialReport": "has IAM prepare the credential report; not a pure read",
    "iam:GetCredentialReport": "passwords, their last use, and the root user",
    "iam:ListUsers": "the current users; the report may be four hours old",
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
GUESS_TIMEOUT = 3  # seconds to connect to a partition that may not be the profile's
READ_TIMEOUT = 30  # seconds
REFRESH_TIMEOUT = 60.0  # seconds for new credentials of the profile, once the audit runs
ASSUME_ROLE_AT_ONCE = 4  # one call per account needs few connections, and each costs CPU
PARENTS_AT_ONCE = 4
UNKNOWN_KEY = {"InvalidClientTokenId", "UnrecognizedClientException"}


def open_session(profile: str | None) -> boto3.Session:
    """The SDK's session, its credentials resolved, so that it asks for an MFA code before all else.

    Raises AuditError where nobody can type that code: botocore would wait on a pipe forever.
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

    If the profile names no Region, each partition is asked until one knows the access key; if none
    does, the first refusal is raised.
    """
    regions = [session.region_name] if session.region_name else list(IAM_REGIONS.values())
    credentials = frozen_credentials(session)
    refusal: Exception | None = None
    for region in regions:
        config = client_config(connections=1, attempts=3)
        if refusal is not None:  # a guess, perhaps behind a firewall
            once: Any = {"max_attempts": 0}
            config = config.merge(Config(connect_timeout=GUESS_TIMEOUT, retries=once))
        sts = signed_client(session, "sts", region, config)
        try:
            caller = call_as(credentials, get_caller_identity, {"sts": sts, "region": region})
            return Aws(session, caller, workers)
        except SDK_ERRORS as error:
            known = isinstance(error, ClientError) and error_code(error) not in UNKNOWN_KEY
            if known or (refusal is None and not isinstance(error, ClientError)):
                raise
            refusal = refusal or error
    raise refusal or AuditError("There is no Region to ask.")


def get_caller_identity(sts: Any, region: str) -> Caller:
    identity = sts.get_caller_identity()
    account, arn = identity["Account"], identity["Arn"]
    return Caller(account, arn, partition=arn.split(":")[1], region=region)


def frozen_credentials(session: boto3.Session) -> Credentials:
    """The profile's own credentials. If necessary the SDK refreshes them, which may take long."""
    found: Any = session.get_credentials()  # open_session has found some
    frozen = found.get_frozen_credentials()
    return Credentials(frozen.access_key, frozen.secret_key, frozen.token)


def signed_client(session: boto3.Session, service: Any, region: Any, config: Config) -> Any:
    """A client that can make calls only inside `call_as`, which signs them.

    It has placeholders for credentials, so that nothing is signed with the profile's by mistake.
    """
    client: Any = session.client(
        service, region, config=config, aws_access_key_id="none", aws_secret_access_key="none"
    )
    client.meta.events.register(f"before-sign.{service}", sign_as_set)
    return client


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
    the calls. AccountSession retries the calls for an account; botocore does not, because its
    retry quota belongs to the client, and one account would use up another's.
    """

    def __init__(self, session: boto3.Session, caller: Caller, workers: int) -> None:
        self.caller = caller
        self.threads = Threads(workers)
        once = client_config(connections=min(workers, ASSUME_ROLE_AT_ONCE), attempts=1)
        self.sts = signed_client(session, "sts", caller.region, once)
        few = client_config(connections=PARENTS_AT_ONCE, attempts=10)
        self.organizations = signed_client(session, "organizations", caller.region, few)
        shared = client_config(connections=workers, attempts=1)
        self.iam = signed_client(session, "iam", caller.region, shared)
        self.session, self._workers, self._shared = session, workers, shared
        self._refresh_failure = ""

    @functools.cached_property
    def cloudtrail(self) -> Any:
        """The CloudTrail client, created on first use, in the partition's Region for IAM."""
        region = IAM_REGIONS.get(self.caller.partition, self.caller.region)
        return signed_client(self.session, "cloudtrail", region, self._shared)

    @functools.cached_property
    def assume_role_gate(self) -> asyncio.Semaphore:
        """Created on first use, because Python 3.9 binds it to the current event loop."""
        return asyncio.Semaphore(min(self._workers, ASSUME_ROLE_AT_ONCE))

    async def profile_credentials(self) -> Credentials:
        """The profile's own credentials. Raises StepFailed if they cannot be refreshed.

        A refresh runs in a thread of its own, because it may hang: a credential_process may wait
        for a person. What has hung once is not tried again.
        """
        found = self.session.get_credentials()
        get = functools.partial(frozen_credentials, self.session)
        if not isinstance(found, RefreshableCredentials) or not found.refresh_needed():
            return get()
        answer: Future[Credentials] = Future()
        if not self._refresh_failure:
            threading.Thread(target=settle, args=(answer, get), daemon=True).start()
            try:
                return await asyncio.wait_for(asyncio.wrap_future(answer), REFRESH_TIMEOUT)
            except SDK_ERRORS as error:
                if not self._refresh_failure:  # else its process was ended for another account
                    raise step_failed(PROFILE_STEP, error) from None
            except asyncio.TimeoutError:
                end_child_processes()
                self._refresh_failure = f"no answer to the refresh within {REFRESH_TIMEOUT:g} s"
        raise StepFailed(PROFILE_STEP, "RefreshTimeout", self._refresh_failure)

    async def ask(self, operation: Callable[..., T], *arguments: Any) -> T:
        """Run one of the operations on the organization in a thread, or raise StepFailed."""
        call = functools.partial(operation, self, *arguments)
        credentials = await self.profile_credentials()
        try:
            return await self.threads.run(FIRST, functools.partial(call_as, credentials, call, {}))
        except SDK_ERRORS as error:
            step = operation.__name__.title().replace("_", "")  # list_parents: ListParents
            raise step_failed(step, error) from None


def end_child_processes() -> None:
    """End a credential_process that hangs, on Linux: this program itself starts no process."""
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for process_id in children.read_text().split():
                os.kill(int(process_id), signal.SIGTERM)


async def side_by_side(most: int, items: Sequence[T], work: Callable[[T], Awaitable[None]]) -> None:
    """Do the work for each item, for at most so many at a time. After an error, no more is done."""
    remaining = iter(items)

    async def one_after_another() -> None:
        for item in remaining:
            await work(item)

    tasks = [asyncio.create_task(one_after_another()) for _ in range(min(most, len(items)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


# --- one call: credentials, pace, retries ---

# The credentials that sign the current thread's request
SIGNING: contextvars.ContextVar[Credentials] = contextvars.ContextVar("SIGNING")
# The operation that the current task began last: the step that failed if its answer is unexpected
STEP: contextvars.ContextVar[str] = contextvars.ContextVar("STEP", default="AssumeRole")

FIRST = (False, 0)  # the rank of what goes first: see `_retry`
# Steps that jump the queue, so that all reports are generated in parallel
URGENT_STEPS = {"AssumeRole", "GenerateCredentialReport", "GetCredentialReport"}
PROFILE_STEP = "profile credentials"  # the step before AssumeRole
SESSION_EXPIRED = {"ExpiredToken", "ExpiredTokenException"}
TRANSIENT_ATTEMPTS = 6  # after 5xx, dropped connections and time-outs
FIRST_PAUSE = (0.5, 1.0)  # seconds, at random between these; doubled for each further attempt
CLOUDTRAIL_GAP = 0.5  # seconds between LookupEvents calls: AWS allows two per second and account


class AccountSession:
    """The calls for one account: their credentials, their pace, their retries.

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
        self._credentials: Credentials  # after sign_in

    async def sign_in(self) -> None:
        """Get credentials: the role's or, in the profile's own account, the profile's."""
        STEP.set(PROFILE_STEP)
        credentials = await self.aws.profile_credentials()
        if self.role.own_account != self.account.id:
            arguments = {"aws": self.aws, "role": self.role, "account_id": self.account.id}
            assume = functools.partial(call_as, credentials, assume_role, arguments)
            gate = self.aws.assume_role_gate
            credentials = await self._retry("AssumeRole", assume, self._pace, gate)
        self._credentials = credentials

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
            return await self._retry(step, request, pace)
        except StepFailed as failure:
            if failure.code not in SESSION_EXPIRED:
                raise
        async with self._renewal:
            if self._credentials is used:  # no other call of this account has renewed it meanwhile
                await self.sign_in()
        request = functools.partial(call_as, self._credentials, operation, parameters)
        return await self._retry(step, request, pace)

    async def _retry(
        self, step: str, request: Callable[[], T], pace: Pace, gate: asyncio.Semaphore | None = None
    ) -> T:
        """Make a request in a thread until it is answered or a retry cannot help.

        Only the attempts pass the gate, not the pauses: a throttled account holds up no other.
        """
        STEP.set(step)
        if step not in self._logged:
            self._logged.add(step)
            self.log(f"{self.account.id} {self.account.name}: {step}")
        rank = (step not in URGENT_STEPS, self._turn)
        attempts = 0
        while True:
            await pace.wait()
            try:
                async with gate or contextlib.AsyncExitStack():
                    answer = await self.aws.threads.run(rank, request)
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
            await asyncio.sleep(random.uniform(*FIRST_PAUSE) * 2 ** (attempts - 1))


def call_as(
    credentials: Credentials, operation: Callable[..., T], parameters: Mapping[str, Any]
) -> T:
    """Call an operation with these credentials, in this thread."""
    before = SIGNING.set(credentials)
    try:
        return operation(**parameters)
    finally:
        SIGNING.reset(before)


def sign_as_set(request: Any, **_: Any) -> None:
    """Handler of `before-sign`: without `call_as` it raises LookupError, and nothing is sent."""
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

    async def wait(self) -> None:
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

    async def run(self, rank: tuple[bool, int], call: Callable[[], T]) -> T:
        """Make a call in a thread when its turn has come; the lowest rank goes first."""
        answer: Future[T] = Future()
        self._calls.put((rank, next(self._order), call, answer))
        return await asyncio.wrap_future(answer)

    def _work(self) -> None:
        while True:
            _, _, call, answer = self._calls.get()
            settle(answer, call)


def settle(answer: Future[T], call: Callable[[], T]) -> None:
    """Make the call, unless nobody waits for the answer any more."""
    if answer.set_running_or_notify_cancel():
        try:
            answer.set_result(call())
        except BaseException as error:  # it belongs to the caller, not to this thread
            answer.set_exception(error)


def stay_on_one_cpu() -> None:
    """Keep this thread and those that it starts on one CPU, where the system allows it.

    Python runs one at a time anyway; on several CPUs a run costs a fifth more CPU and time.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # some containers do not allow it
            os.sched_setaffinity(0, {random.choice(tuple(os.sched_getaffinity(0)))})


# --- operations with the profile's credentials, signed by `Aws.ask`; assume_role by `sign_in`, and
# describe_organization and list_accounts by themselves ---

SESSION_NAME = "iam-audit"


def describe_organization(aws: Aws) -> Organization:
    describe = aws.organizations.describe_organization
    organization = call_as(frozen_credentials(aws.session), describe, {})["Organization"]
    feature_set = organization.get("FeatureSet", "ALL")
    return Organization(organization["Id"], organization["MasterAccountId"], feature_set)


async def list_accounts(aws: Aws) -> AsyncIterator[Account]:
    """All accounts, page by page as they arrive; a page may be empty."""
    pages = iter(aws.organizations.get_paginator("list_accounts").paginate())
    seen = set[str]()
    read_page = functools.partial(next, pages, None)
    while True:
        credentials = await aws.profile_credentials()
        read = functools.partial(call_as, credentials, read_page, {})
        page: Any = await aws.threads.run(FIRST, read)
        if page is None:
            return
        for entry in page["Accounts"]:
            # An account that joins meanwhile may shift another to the next page.
            if entry["Id"] not in seen:
                seen.add(entry["Id"])
                yield account_of(entry)


def account_of(entry: Mapping[str, Any]) -> Account:
    """An entry of ListAccounts. State replaces Status, which AWS retired on 2026-09-09."""
    state = entry.get("State") or entry.get("Status")
    if not re.fullmatch("[0-9]{12}", entry["Id"]):  # it becomes the name of a file
        raise AuditError(f"ListAccounts gave {entry['Id']!r}, not an account ID of 12 digits.")
    if not state:
        raise sdk_too_old(f"State for account {entry['Id']}")
    paths = entry.get("Paths") or [None]
    return Account(entry["Id"], entry.get("Name", ""), state, paths[0])


def sdk_too_old(what: str) -> AuditError:
    upgrade = "may be too old. Upgrade boto3 and botocore."
    return AuditError(f"ListAccounts gave no {what}: botocore {botocore.__version__} {upgrade}")


def list_policies(aws: Aws) -> list[tuple[str, str]]:
    """The ID and name of each service control policy."""
    pages = aws.organizations.get_paginator("list_policies")
    found = pages.paginate(Filter="SERVICE_CONTROL_POLICY").build_full_result()
    return [(policy["Id"], policy["Name"]) for policy in found["Policies"]]


def describe_policy(aws: Aws, policy_id: str) -> str:
    """The policy's JSON text."""
    return str(aws.organizations.describe_policy(PolicyId=policy_id)["Policy"]["Content"])


def list_targets_for_policy(aws: Aws, policy_id: str) -> frozenset[str]:
    """The IDs of the root, organizational units and accounts that the policy is attached to."""
    pages = aws.organizations.get_paginator("list_targets_for_policy")
    found = pages.paginate(PolicyId=policy_id).build_full_result()
    return frozenset(target["TargetId"] for target in found["Targets"])


def list_parents(aws: Aws, child_id: str) -> str:
    """The root or OU directly above an account or OU; empty if that has left the organization."""
    try:
        return str(aws.organizations.list_parents(ChildId=child_id)["Parents"][0]["Id"])
    except aws.organizations.exceptions.ChildNotFoundException:
        return ""


def list_organizations_features(aws: Aws) -> bool:
    """Whether root credentials of member accounts are managed centrally."""
    try:
        features = aws.iam.list_organizations_features()
    except ClientError as error:
        if error_code(error) == "ServiceAccessNotEnabledException":
            return False  # IAM has never had trusted access in this organization
        raise
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
    answer: Any = await session.call(session.aws.iam.generate_credential_report)
    return bool(answer["State"] == "COMPLETE")


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
        if failure.code == NO_SUCH_ENTITY:
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
            record = json.loads(entry["CloudTrailEvent"])
            if record.get("recipientAccountId", session.account.id) != session.account.id:
                raise StepFailed("LookupEvents", "WrongAccount", "an event is of another account")
            event = event_of(record)
            if event is not None and event.time >= since:
                found.append(event)
        if "NextToken" not in answer:
            return found
        request["NextToken"] = answer["NextToken"]


# Somebody in the management account who uses AssumeRoot; the record does not say who.
ASSUMED_ROOT = "root session (AssumeRoot)"


def event_of(record: Mapping[str, Any]) -> Event | None:
    """The event of a CloudTrail record; None if the call failed or was not IAM's.

    The attributes that LookupEvents itself gives are the caller's: what was acted on is in the
    request and the response. See "CloudTrail record contents" in the CloudTrail User Guide.
    """
    if record.get("errorCode") or not str(record.get("eventSource", "")).startswith("iam."):
        return None
    identity = record.get("userIdentity") or {}
    request = record.get("requestParameters") or {}
    created_key = (record.get("responseElements") or {}).get("accessKey") or {}
    named = ROOT if request.get("userName") == "AWS ROOT USER" else request.get("userName")
    actor = identity.get("arn") or identity.get("invokedBy") or identity.get("principalId")
    context = identity.get("sessionContext") or {}
    if str(context.get("assumedRoot")).lower() == "true":
        actor = ASSUMED_ROOT
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
        new_name=str(request.get("newUserName") or ""),
    )


# --- errors ---

SDK_ERRORS = (ClientError, BotoCoreError, ResponseParserError)
TRANSIENT_ERRORS = (ResponseParserError, HTTPClientError, botocore.exceptions.ConnectionError)
# fmt: off
THROTTLED = {
    "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled", "SlowDown",
    "RequestThrottledException", "RequestLimitExceeded", "TooManyRequestsException",
}
# fmt: on
DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"}
NO_SUCH_ENTITY = "NoSuchEntity"
# As is every HTTP status from 500
TRANSIENT = {"RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete"}
# botocore's own text quotes the answer, which may hold credentials.
NOT_UNDERSTOOD = "AWS's answer could not be understood"
SIGN_IN_AGAIN = "Sign in again (aws sso login, for one)."
CANNOT_START = {
    "AWSOrganizationsNotInUseException": "The profile's account must be in an organization.",
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
    if isinstance(error, TRANSIENT_ERRORS):
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

    SignatureDoesNotMatch goes on to quote the signed request with the token.
    """
    first_line = message.strip().split("\n", 1)[0]
    for proxy in getproxies().values():  # urllib3 may quote a part of a URL that it cannot parse
        for part in re.split("[#/?]", proxy.rpartition("@")[0].rpartition("://")[2]):
            if len(part) > 1:
                first_line = first_line.replace(part, "***")
    return re.sub(r"(?<=://)\S*(?=@)|[0-9a-f]{64}|[A-Za-z0-9+/=%]{100,}", "***", first_line)[:500]


def frames_of(error: BaseException) -> list[str]:
    """The traceback without the errors' texts, which may quote a signed request or credentials."""
    return "".join(traceback.format_tb(error.__traceback__)).splitlines()


# === Audit: one account, from AssumeRole to its users; all accounts concurrently =================

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

    async for account in accounts_to_consider(aws, organization, plan.scope, progress):
        left_out = left_out_outcome(account, organization, plan.scope)
        if left_out is not None:
            finish(left_out)
        else:
            audits.append(asyncio.create_task(audit(account, len(audits))))
    await asyncio.gather(*audits)


async def accounts_to_consider(
    aws: Aws, organization: Organization, scope: Scope, progress: Progress
) -> AsyncIterator[Account]:
    """The accounts as they are listed; all at the end if the scope must be checked first."""
    listed, must_check = [], bool(scope.accounts or scope.ous)
    async for account in list_accounts(aws):
        if left_out_outcome(account, organization, scope) is None:
            progress.listed += 1
        if must_check:
            listed.append(account)
        else:
            yield account
    progress.all_listed = True
    if must_check:
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
        hint = "add --include-management."
        raise AuditError(f"--accounts: {management} is the management account: {hint}")
    if not scope.ous:
        return
    places = set[str]()
    for account in accounts:
        if account.path is None:
            raise sdk_too_old("Paths for --ou")
        places.update(account.path.split("/"))
    if unknown := scope.ous - places:
        ids = ", ".join(sorted(unknown))
        raise AuditError(f"--ou: no account of organization {organization.id} lies below {ids}")
    for account_id in sorted(scope.accounts):
        if not is_below(by_id[account_id], scope.ous):
            raise AuditError(f"--accounts: not below --ou: {account_id}")


def is_below(account: Account, ous: frozenset[str]) -> bool:
    return not ous.isdisjoint((account.path or "").split("/"))


def left_out_outcome(
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
        await asyncio.gather(report, return_exceptions=True)  # an earlier error takes precedence
    in_order = [users[name] for name in sorted(users)]
    if ROOT in rows:
        in_order.insert(0, await read_root(session, rows[ROOT]))
    trail = None
    if plan.events_since is not None:
        since = plan.events_since(session.account.id)
        trail = await read_trail(session, plan.event_names, since)
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
# NoSuchEntity is no proof of deletion: IAM is eventually consistent, users are renamed, keys move
# with them. What a later list still has is read again after these pauses; then the account fails.
READ_AGAIN_AFTER = (2.0, 3.0, 5.0)  # seconds


def has_unlisted_user(
    rows: Mapping[str, ReportRow], listed: Sequence[UserEntry], asked: datetime
) -> bool:
    """Whether the report has a name, or a new user with an old name, that the list lacks."""
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

    async def read(entry: UserEntry) -> None:
        work = functools.partial(read_user, session, entry, report)
        if user := await naming_the_step(session, work):
            users[user.name] = user

    await side_by_side(READERS_PER_ACCOUNT, entries, read)
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
    """One user, from live answers and the report; StepFailed (NoSuchEntity) if they are gone."""
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


async def read_access_keys(session: AccountSession, user_name: str) -> tuple[Credential, ...]:
    """The user's keys, without those that a later ListAccessKeys lacks."""
    keys = []
    for entry in await list_access_keys(session, user_name):
        key_id, created = entry["AccessKeyId"], to_second(entry["CreateDate"])
        found = await read_last_used(session, user_name, key_id)
        if found is not None:
            last_used, service_name = found
            keys.append(Credential(key_id, entry["Status"], created, last_used, service_name))
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


def by_creation(keys: Iterable[Credential]) -> tuple[Credential, ...]:
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
    """Root as the report shows it. ListVirtualMFADevices is asked only if root has MFA.

    In AWS GovCloud (US), root can neither sign in to the console nor have MFA.
    """
    password = session.role.partition != "aws-us-gov" and has_password(row)
    last_used = report_date(row, "password_last_used") if password else None
    mfa: tuple[str, ...] = ()
    if report_flag(row, "mfa_active"):
        # A role cannot list root's other devices: what is not virtual is a token or a security key.
        virtual = row["arn"] in await list_virtual_mfa_devices(session)
        mfa = ("Virtual",) if virtual else ("Hardware",)
    keys = filter(None, (root_access_key(row, slot=1), root_access_key(row, slot=2)))
    return User(ROOT, password, last_used, mfa, by_creation(keys))


def root_access_key(row: ReportRow, slot: int) -> Credential | None:
    """Root's access key in that slot.

    `active` is false for no key too: only `last_rotated`, the creation date, tells them apart.
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
    return Credential(ROOT_ACCESS_KEYS[slot - 1], status, created, last_used, service)


async def read_trail(session: AccountSession, names: Sequence[str], since: datetime) -> Trail:
    """CloudTrail's events of the account. A refusal only leaves the changes unexplained."""
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


# === Files: rows, cells, atomic writing, reading a run back ======================================

PASSWORD_SET, PASSWORD_NOT_SET, PASSWORD_NEVER_USED = "Configurada", "No configurada", "Nunca"
KEY_NEVER_USED, NO_MFA = "Nunca utilizada", "None"
AccountRow = namedtuple(
    "AccountRow",
    "account_id account_name username password_status password_last_used access_key_id status "
    "created_date last_used_date service_name mfa_status",
)
CSV_COLUMNS = AccountRow._fields
# Where a spreadsheet may begin a formula: in many countries it splits rows at semicolons.
CELL_START, FORMULA = r"(?<![^;,\t\r\n])", r"(?='*[=+\-@\t\r])"


def make_run_folder(output_dir: Path, started: datetime) -> Path:
    """Create this run's folder, named by its UTC start. A second run in that second gets `-2`."""
    for each in reversed((output_dir, *output_dir.parents)):
        if not each.exists():
            each.mkdir(mode=0o700, exist_ok=True)  # makedirs gives its mode to the last one alone
    for number in itertools.count(1):
        folder = output_dir / (f"{started:%Y%m%dT%H%M%SZ}" + (f"-{number}" if number > 1 else ""))
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            break
    (folder / "accounts").mkdir(mode=0o700)
    return folder


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / "accounts").rmdir()
        folder.rmdir()


def account_csv(folder: Path, account_id: str) -> Path:
    return folder / "accounts" / f"{account_id}.csv"


def rows_of(audited: AuditedAccount) -> Iterator[AccountRow]:
    """One row for each access key, one for a user without keys."""
    for user in audited.users:
        last = iso(user.password_last_used) if user.password_last_used else PASSWORD_NEVER_USED
        password = (PASSWORD_SET, last) if user.password else (PASSWORD_NOT_SET, NOT_APPLICABLE)
        whose = (audited.account.id, audited.account.name, user.name, *password)
        mfa = "+".join(user.mfa) or NO_MFA
        for key in user.keys:
            last = iso(key.last_used) if key.last_used else KEY_NEVER_USED
            of_key = (key.id, key.status, iso(key.created), last, key.service_name)
            yield AccountRow._make((*whose, *of_key, mfa))
        if not user.keys:
            yield AccountRow._make((*whose, *[NOT_APPLICABLE] * 5, mfa))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The rows end in LF, as grep and awk expect."""
    with atomic_file(path) as file:
        for row in itertools.chain([columns], rows):
            file.write(",".join(map(quoted, row)) + "\n")


def quoted(cell: str) -> str:
    """The cell, neutral and, if anybody may split it, in quotes. csv.writer ignores semicolons."""
    cell = neutral(cell)
    return '"' + cell.replace('"', '""') + '"' if re.search('[;,\t\r\n"]', cell) else cell


def neutral(cell: str) -> str:
    """The cell, with an apostrophe before what a spreadsheet would run as a formula. Where it has
    such an apostrophe of its own, it gets another one, so that `original` gives it back."""
    return re.sub(CELL_START + FORMULA, "'", cell)


def original(cell: str) -> str:
    return re.sub(f"{CELL_START}'{FORMULA}", "", cell) if "'" in cell else cell


def write_json(path: Path, document: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(document, indent=2) + "\n")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """A file that exists in full or not at all: written beside its place, as 0600, then renamed."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:  # backslashreplace: half a character in a user agent must not cost the file
            with open(handle, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                yield file
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise AuditError(f"Cannot write {path}: {error.strerror or error}") from None


class KeyState(NamedTuple):
    status: str
    created: str


class UserState(NamedTuple):
    """What is compared of a user between two runs."""

    password_status: str
    mfa_status: str
    keys: dict[str, KeyState]

    @property
    def lacks_mfa(self) -> bool:
        return self.password_status == PASSWORD_SET and self.mfa_status == NO_MFA


Keys = Mapping[str, KeyState]  # by access key ID
States = Mapping[str, UserState]  # by user name
SUMMARY_FORMAT = 2  # of summary.json; goes up with each change that a reader must know about
LOOK_BACK = timedelta(days=400)  # earlier runs that are older do not count
# fmt: off
DAMAGE = (
    OSError, csv.Error, KeyError, TypeError, ValueError, AttributeError, OverflowError,
    RecursionError,
)
# fmt: on


def finished_runs(output_dir: Path, now: datetime) -> list[Path]:
    """The folders of the finished runs of the last 400 days, newest first, readable or not."""
    runs, oldest = [], f"{now - LOOK_BACK:%Y%m%dT%H%M%SZ}"
    for folder in output_dir.iterdir():
        name = re.fullmatch(r"(\d{8}T\d{6}Z)(?:-(\d+))?", folder.name)
        if name and name[1] >= oldest and may_exist(folder / "summary.json"):
            runs.append((name[1], int(name[2] or 1), folder))
    return [folder for *_, folder in sorted(runs, reverse=True)]


def may_exist(path: Path) -> bool:
    """Whether the file exists or that is unknown: whoever reads it will hear why."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with an earlier run's file becomes an AuditError that names the file."""
    try:
        yield
    except DAMAGE as error:
        why = getattr(error, "strerror", None) or error
        if isinstance(error, KeyError):
            why = f"it lacks {error}"
        raise AuditError(f"Cannot read the earlier run's {path}: {why}") from None


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary.json of a finished run; to be called in `reading`."""
    summary: dict[str, Any] = json.loads(read_regular(folder / "summary.json"))
    if summary["tool"] != "iam-audit" or summary["format"] not in (1, SUMMARY_FORMAT):
        raise ValueError(f"it is not of format 1 or {SUMMARY_FORMAT}")
    return summary


def read_regular(path: Path) -> str:
    """A file's text. Opening a FIFO would hang, and a device may have no end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is not a regular file")
    return path.read_bytes().decode("utf-8")


def read_states(path: Path, account_id: str) -> dict[str, UserState]:
    """The users in an earlier run's CSV of this account. Raises AuditError if it is damaged."""
    found = []
    with reading(path):
        text = read_regular(path)
        if not text.endswith("\n"):
            raise ValueError("it does not end with a line feed")
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        if tuple(next(rows)) != CSV_COLUMNS:
            raise ValueError("its header is not that of an account's CSV")
        for number, cells in enumerate(rows, 2):
            if len(cells) != len(CSV_COLUMNS) or cells[0] != account_id:
                raise ValueError(f"row {number} is not one of account {account_id}")
            row = AccountRow(*map(original, cells))
            known = row.password_status in (PASSWORD_SET, PASSWORD_NOT_SET)
            if not known or not row.status or not row.mfa_status:
                raise ValueError(f"row {number} has words that no such CSV has")
            found.append(row)
    return states_of(found)


def states_of(rows: Iterable[AccountRow]) -> dict[str, UserState]:
    """The users that an account's rows are about, by name."""
    states: dict[str, UserState] = {}
    for row in rows:
        state = states.setdefault(row.username, UserState(row.password_status, row.mfa_status, {}))
        if row.access_key_id != NOT_APPLICABLE:
            state.keys[row.access_key_id] = KeyState(row.status, row.created_date)
    return states


# === Assess: gaps, maturity levels, what to fix first; pure, the clock is an argument ============


class OldestKey(NamedTuple):
    """The oldest active access key somewhere, and whose it is."""

    created: datetime
    account_id: str
    account_name: str
    username: str
    access_key_id: str


@dataclass(frozen=True)
class Gaps:
    """Long-term credentials, counted, per account or in all. Root counts as a user."""

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
    def mfa_coverage_percent(self) -> float | None:
        """Console users with MFA, rounded down so that 100 means all; None if there are none."""
        covered = self.console_users - self.console_users_without_mfa
        return 1000 * covered // self.console_users / 10 if self.console_users else None


GAP_COUNTS = tuple(each.name for each in fields(Gaps) if each.name != "oldest_active_key")
ONE_YEAR = timedelta(days=365)
UNUSED_AFTER, IN_USE_WITHIN = timedelta(days=90), timedelta(days=30)


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


def assess(audited: AuditedAccount, plan: Plan, now: datetime) -> AccountFigures:
    account, has_root = audited.account, any(user.name == ROOT for user in audited.users)
    gaps = sum((gaps_of(account, user, plan.max_key_age, now) for user in audited.users), Gaps())
    return AccountFigures(
        account=account,
        report_generated=audited.report_generated,
        has_root=has_root,
        users=len(audited.users) - has_root,
        production=is_production(account, plan.production),
        gaps=gaps,
        phase1=phase1_level(gaps),
        phase2=phase2_level(gaps),
    )


def is_production(account: Account, pattern: re.Pattern[str]) -> bool:
    """Whether the account's name, ID or path in the organization says so."""
    return any(map(pattern.search, (account.name, account.id, account.path or "")))


def gaps_of(account: Account, user: User, max_key_age: timedelta, now: datetime) -> Gaps:
    """What one user adds to the account's gaps."""
    active = [key for key in user.keys if is_active(key.status)]
    statuses = Counter(key.status for key in user.keys)
    ages = [now - key.created for key in active]
    unused = [now - key.last_used for key in active if key.last_used is not None]
    keys = [OldestKey(key.created, account.id, account.name, user.name, key.id) for key in active]
    return Gaps(
        console_users=int(user.password),
        console_users_without_mfa=int(user.password and not user.mfa),
        access_keys=len(user.keys),
        active_keys=len(active),
        inactive_keys=statuses["Inactive"],
        expired_keys=statuses["Expired"],
        active_keys_older_than_max_age=sum(span > max_key_age for span in ages),
        active_keys_older_than_1_year=sum(span > ONE_YEAR for span in ages),
        active_keys_never_used=len(active) - len(unused),
        active_keys_not_used_for_90_days=sum(span > UNUSED_AFTER for span in unused),
        active_keys_used_within_30_days=sum(span <= IN_USE_WITHIN for span in unused),
        root_access_keys=len(user.keys) if user.name == ROOT else 0,
        users_with_two_active_keys=int(len(active) > 1),
        oldest_active_key=min(keys, default=None),
    )


# AWS Security Maturity Model v2, lowest level first
LEVELS = ("Not Started", "In Progress", "Complete", "Advanced")
NOT_STARTED, IN_PROGRESS, COMPLETE, ADVANCED = LEVELS
PHASES = ("phase1", "phase2")


def phase1_level(gaps: Gaps, mfa_enforced: bool = False) -> str:
    """Multi-factor authentication; Advanced if a policy also keeps users from acting without it."""
    if gaps.console_users_without_mfa:
        return IN_PROGRESS
    return ADVANCED if mfa_enforced else COMPLETE


def phase2_level(gaps: Gaps) -> str:
    """Use temporary credentials."""
    if gaps.active_keys_older_than_max_age:
        return IN_PROGRESS
    return COMPLETE if gaps.active_keys else ADVANCED


def organization_level(levels: Iterable[str], failed: int) -> str:
    """The lowest level of the audited accounts; at most In Progress if accounts failed."""
    lowest = min(levels, key=LEVELS.index, default=NOT_STARTED)
    return IN_PROGRESS if failed and lowest in (COMPLETE, ADVANCED) else lowest


def total_gaps(accounts: Iterable[AccountFigures]) -> Gaps:
    return sum((account.gaps for account in accounts), Gaps())


FINDINGS_COLUMNS = (
    *("priority", "finding", "account_id", "account_name", "production", "username"),
    *("access_key_id", "age_days", "last_used_date", "service_name", "reasons", "recommendation"),
)
USER, ACTIVE_KEY, INACTIVE_KEY, EXPIRED_KEY = "user", "active key", "inactive key", "expired key"
NEVER = timedelta.max


class Case(NamedTuple):
    """What rules judge: a user, or one of their access keys."""

    about: str  # USER, ACTIVE_KEY, ...
    root: bool
    no_mfa: bool
    production: bool
    max_age: timedelta
    age: timedelta = timedelta(0)
    unused: timedelta = NEVER  # since the last use; NEVER: it was never used


class Rule(NamedTuple):
    """A reason for the finding of this name. {max_key_age} (in days) in `reason`, {user}, {key} and
    {account} in `advice` are filled in on output. `controls` are those of CIS and Security Hub."""

    name: str
    priority: int
    about: str
    applies: Callable[[Case], bool]
    reason: str
    advice: str = ""
    controls: tuple[str, ...] = ()


# fmt: off
ADD_MFA = (
    "Have the user register an MFA device or, if temporary credentials serve, remove the password: "
    "`aws iam delete-login-profile {user}` in account {account}."
)
MOVE = "Move what uses it to temporary credentials (an IAM role), then "
DEACTIVATE = "`aws iam update-access-key {user} {key} --status=Inactive` in account {account}"
DEACTIVATE_USED = f"{MOVE}deactivate it: {DEACTIVATE}."
DEACTIVATE_UNUSED = f"Deactivate it: {DEACTIVATE}; delete it once nobody has missed it."
ASK_OWNER = f"Ask its owner what it is for, then deactivate it: {DEACTIVATE}."
FIND_OUT = f"Find out what used it last, then deactivate it: {DEACTIVATE}."
DELETE = "Delete it: `aws iam delete-access-key {user} {key}` in account {account}."
# A user or an access key is one finding, named by the most urgent rule that applies. All rules that
# apply are its reasons, in this order. The advice is that of the first that has any: what to do
# about an old key depends on its use.
RULES = (
    Rule("root-access-key", 1, ACTIVE_KEY, lambda it: it.root, "active root access key"),
    Rule("console-without-mfa", 4, USER, lambda it: it.no_mfa, "console user without MFA", ADD_MFA),
    Rule("console-without-mfa", 4, USER, lambda it: it.no_mfa and it.root, "root"),
    Rule("console-without-mfa", 1, USER, lambda it: it.no_mfa and it.production, "production"),
    Rule("key-older-than-1-year", 2, ACTIVE_KEY, lambda it: it.age > ONE_YEAR, "older than 1 year"),
    Rule("key-in-use", 3, ACTIVE_KEY, lambda it: it.unused <= IN_USE_WITHIN,
         "used within 30 days", DEACTIVATE_USED),
    Rule("unused-key", 5, ACTIVE_KEY, lambda it: it.age > UNUSED_AFTER and it.unused == NEVER,
         "never used", DEACTIVATE_UNUSED),  # a younger one may yet be used
    Rule("unused-key", 5, ACTIVE_KEY,
         lambda it: it.age > UNUSED_AFTER and UNUSED_AFTER < it.unused < NEVER,
         "not used for 90 days", DEACTIVATE_UNUSED),
    Rule("key-older-than-90-days", 6, ACTIVE_KEY, lambda it: it.age > it.max_age,
         "older than {max_key_age} days"),
    Rule("inactive-root-access-key", 2, INACTIVE_KEY, lambda it: it.root, "inactive root key"),
    Rule("inactive-root-access-key", 2, EXPIRED_KEY, lambda it: it.root, "expired root key"),
    Rule("inactive-key", 7, INACTIVE_KEY, lambda it: not it.root, "inactive", DELETE),
    Rule("inactive-key", 7, EXPIRED_KEY, lambda it: not it.root, "expired", DELETE),
)
# fmt: on


class Finding(NamedTuple):
    """One thing to fix: a user (`key` is None) or an access key, with all rules that apply."""

    priority: int
    finding: str
    account: Account
    production: bool
    user: str
    key: Credential | None
    password_last_used: datetime | None
    rules: tuple[Rule, ...]


def findings_of(audited: AuditedAccount, plan: Plan, now: datetime) -> Iterator[Finding]:
    account, production = audited.account, is_production(audited.account, plan.production)
    for user in audited.users:
        no_mfa = user.password and not user.mfa
        whose = Case(USER, user.name == ROOT, no_mfa, production, plan.max_key_age)
        for key in (None, *user.keys):
            case = whose
            if key:
                about = ACTIVE_KEY if is_active(key.status) else f"{key.status.lower()} key"
                unused = now - key.last_used if key.last_used else NEVER
                case = whose._replace(about=about, age=now - key.created, unused=unused)
            rules = tuple(rule for rule in RULES if rule.about == case.about and rule.applies(case))
            if rules:
                first = min(rules, key=lambda rule: rule.priority)
                which = (user.name, key, user.password_last_used)
                yield Finding(first.priority, first.name, account, production, *which, rules)


def most_urgent_first(finding: Finding) -> tuple[Any, ...]:
    """By priority, production before the rest, oldest first, then by account and name."""
    key = finding.key
    born = key.created.timestamp() if key else float("inf")
    where = (finding.account.id, finding.user, key.id if key else "")
    return (finding.priority, not finding.production, born, *where)


def finding_row(finding: Finding, run: Run) -> tuple[str, ...]:
    """The finding's row in findings.csv."""
    account, key, used = finding.account, finding.key, finding.password_last_used
    credential = (NOT_APPLICABLE, "", iso(used) if used else PASSWORD_NEVER_USED, NOT_APPLICABLE)
    if key:
        age_days = str(days_between(key.created, run.started))
        last_used = iso(key.last_used) if key.last_used else KEY_NEVER_USED
        credential = (key.id, age_days, last_used, key.service_name)
    whose = (account.id, account.name, "true" if finding.production else "false", finding.user)
    words = ("; ".join(reasons_of(finding, run.plan)), recommendation(finding, run))
    return (str(finding.priority), finding.finding, *whose, *credential, *words)


def reasons_of(finding: Finding, plan: Plan) -> list[str]:
    reasons = [rule.reason.format(max_key_age=plan.max_key_age.days) for rule in finding.rules]
    if (key := finding.key) and is_active(key.status) and key.status != "Active":
        reasons.append(f"status {key.status}")
    return reasons


def recommendation(finding: Finding, run: Run) -> str:
    """The next step, with the AWS CLI command for it, its arguments quoted for a shell."""
    if finding.user == ROOT:
        return recommendation_for_root(finding, run)
    key = finding.key
    advised = [rule.advice for rule in finding.rules if rule.advice]
    advised.append(FIND_OUT if key and key.last_used else ASK_OWNER)
    user = f"--user-name={shlex.quote(printable(finding.user))}"
    user = re.sub(",(?=[=+@-])", r",\\", user)  # else `neutral` puts an apostrophe into a command
    key_id = f"--access-key-id={shlex.quote(printable(key.id))}" if key else ""
    return advised[0].format(user=user, key=key_id, account=finding.account.id)


def recommendation_for_root(finding: Finding, run: Run) -> str:
    """Without root's own sign-in only AssumeRoot can do it, and only in a member account:
    https://docs.aws.amazon.com/IAM/latest/UserGuide/id_root-user-privileged-task.html"""
    key, account = finding.key, finding.account.id
    if account == run.organization.management_account:
        to_do = "delete the access key" if key else "register an MFA device"
        step = f"sign in as root of the management account and {to_do}: no role can do that there."
    else:
        what = "access key" if key else "password (or sign in as root and register MFA)"
        commands = "`aws iam delete-login-profile`"
        if key:
            commands = "`aws iam list-access-keys`, then `aws iam delete-access-key` with its ID"
        task = f"arn:{run.caller.partition}:iam::aws:policy/root-task/IAMDeleteRootUserCredentials"
        step = (
            f"delete root's {what}, with the session that `aws sts assume-root --target-principal "
            f"{account} --task-policy-arn arn={task}` gives (it takes centralized root access): "
            f"{commands}."
        )
    in_use = any(rule.name == "key-in-use" for rule in finding.rules)
    return MOVE + step if in_use else step[0].upper() + step[1:]


# === Track: each account against the newest run that audited it, with CloudTrail as a witness ====

CHANGES_COLUMNS = (
    *("account_id", "account_name", "username", "access_key_id", "change", "before", "after"),
    *("witness", "event_name", "event_time", "actor", "source_ip", "since"),
)
EVENTS_COLUMNS = (
    *("account_id", "account_name", "event_time", "event_name", "username", "access_key_id"),
    *("actor", "source_ip", "user_agent", "event_id"),
)
CAME_AND_WENT, USER_CAME_AND_WENT = "access-key-came-and-went", "user-came-and-went"
RUNS_SHOWN = 12  # in the table of runs, this one included
RUNS_SEARCHED = 30  # earlier runs, for those of the same scope: each costs some 40 ms
RUN_GAPS = ("console_users_without_mfa", "active_keys", "active_keys_older_than_max_age")


class Change(NamedTuple):
    """A row of changes.csv, with the CloudTrail event that tells of it."""

    account_id: str
    account_name: str
    user: str = ""
    key_id: str = ""
    change: str = ""
    before: str = ""
    after: str = ""
    witness: str = ""  # confirmed, contradicted, not found, unavailable; "" without --cloudtrail
    event: Event | None = None
    since: datetime | None = None  # when the run began that the account is compared with


class EarlierAccount(NamedTuple):
    """An account in an earlier run. Its CSV has so many `users`, root too, and `keys`."""

    name: str
    result: str  # audited, failed, skipped or out of scope
    production: bool = False
    users: int = 0
    keys: int = 0
    levels: Sequence[int] = ()  # in the order of PHASES, as indexes of LEVELS


class EarlierRun(NamedTuple):
    folder: Path
    started: datetime
    organization_id: str
    scope: Any  # as in summary.json
    max_key_age_days: int
    figures: dict[str, Any]  # as in the table of runs
    accounts: dict[str, EarlierAccount]  # the whole organization, in scope or not


class History:
    """The earlier runs of an organization, newest first. Each summary is read once, if at all; in
    place of a run that cannot be read there is the AuditError that says why."""

    def __init__(self, folders: Sequence[Path] = (), organization_id: str = "") -> None:
        self.folders, self.organization_id = folders, organization_id
        self._unread, self._read = iter(folders), list[Union[EarlierRun, AuditError]]()
        self.held: dict[str, States] = {}  # of the run that --previous names, by account ID

    def __iter__(self) -> Iterator[EarlierRun | AuditError]:
        yield from self._read
        for folder in self._unread:
            try:
                run: EarlierRun | AuditError = earlier_run(folder)
            except AuditError as error:
                run = error
            if isinstance(run, AuditError) or run.organization_id == self.organization_id:
                self._read.append(run)
                yield run

    def name_one(self, folder: Path) -> None:
        """Have this run alone. Raises AuditError if any of its files is damaged."""
        run = earlier_run(folder)
        if run.organization_id != self.organization_id:
            raise AuditError(
                f"--previous: {folder} is a run of organization {run.organization_id}."
            )
        for account_id, account in run.accounts.items():
            if account.result == "audited":
                self.held[account_id] = states_before(run, account_id)
        self.folders, self._unread, self._read = [], iter(()), [run]


class Baseline(NamedTuple):
    """What an account is compared with. Without a run, keys created from `since` on are new."""

    run: EarlierRun | None
    states: States
    since: datetime | None
    passed_over: Sequence[str]  # messages on files that cannot be read


@dataclass
class Tracking:
    """What has changed, each account compared with the newest run that audited it."""

    history: History = field(default_factory=History)
    earlier: EarlierRun | None = None  # the newest one: since it began, accounts have come and left
    runs: list[dict[str, Any]] = field(default_factory=list)  # of the same scope
    unreadable: list[str] = field(default_factory=list)  # what the table of runs may lack
    baselines: dict[str, Baseline] = field(default_factory=dict)  # of accounts in hand
    compared: dict[str, EarlierRun] = field(default_factory=dict)  # by account ID
    passed_over: dict[str, None] = field(default_factory=dict)  # messages
    blind: list[Account] = field(default_factory=list)  # where new keys cannot be ruled out
    changes: list[Change] = field(default_factory=list)
    new_keys_elsewhere: list[Change] = field(default_factory=list)  # by their creation dates
    mfa_fixed: int = 0
    mfa_new: list[Change] = field(default_factory=list)
    urgent_new: list[Finding] = field(default_factory=list)
    events_from: datetime | None = None  # the earliest date from which CloudTrail was asked
    events_out_of_reach: bool = False  # CloudTrail no longer has the oldest of some account


def open_tracking(history: History, named: Path | None, scope: Scope) -> Tracking:
    """The last runs of this scope, and the newest of all or the named one."""
    tracking = Tracking(history)
    for run in itertools.islice(history, RUNS_SEARCHED):
        if isinstance(run, AuditError):
            tracking.unreadable.append(str(run))
        elif run.scope == scope_document(scope):
            tracking.runs.insert(0, run.figures)
        if len(tracking.runs) == RUNS_SHOWN - 1:
            break
    if named is not None:
        history.name_one(named)
    tracking.earlier = next((run for run in history if isinstance(run, EarlierRun)), None)
    return tracking


def scope_document(scope: Scope) -> dict[str, Any]:
    """The scope as summary.json has it."""
    names, ids = ("accounts", "exclude", "ous"), (scope.accounts, scope.exclude, scope.ous)
    return {**dict(zip(names, map(sorted, ids))), "include_management": scope.include_management}


def earlier_run(folder: Path) -> EarlierRun:
    """A finished run by its summary. Raises AuditError if anything there is not what it must be."""
    with reading(folder / "summary.json"):
        summary, accounts = read_summary(folder), {}
        organization, gaps = summary["organization"], summary["gaps"]["organization"]
        for entry in [*summary["accounts"], *summary["out_of_scope"]]:
            if not re.fullmatch(r"\d{12}", entry["id"], re.ASCII):
                raise ValueError(f"{entry['id']!r:.40} is not an account ID of 12 digits")
            accounts[sys.intern(entry["id"])] = earlier_account(entry)  # most runs have the same
        started, scope = parse_time(summary["started"]), summary.get("scope")
        if scope is None and len(summary["out_of_scope"]) < 2:  # format 1, the whole organization
            included = organization["management_account_included"]
            scope = scope_document(Scope(include_management=included))
        figures = {"started": iso(started), "audited": typed(int, summary["totals"]["audited"])}
        for name in RUN_GAPS:
            figures[name] = typed(int, gaps[name])
        organization_id, days = typed(str, organization["id"]), summary["max_key_age_days"]
        of_run = (folder, started, organization_id, scope, typed(int, days), figures)
        return EarlierRun(*of_run, accounts)


def earlier_account(entry: Mapping[str, Any]) -> EarlierAccount:
    """An account. Its texts are the same in many runs: interned, a year of them is some 50 MB."""
    name, result = sys.intern(entry["name"]), sys.intern(entry.get("result", "out of scope"))
    if result in ("failed", "skipped", "out of scope"):
        return EarlierAccount(name, result)
    if result != "audited":
        raise ValueError(f"{result!r:.40} is not the result of an account")
    levels = tuple(LEVELS.index(entry["maturity"][phase]) for phase in PHASES)
    users = typed(int, entry["users"]) + typed(bool, entry["root"])
    keys, production = typed(int, entry["gaps"]["access_keys"]), typed(bool, entry["production"])
    return EarlierAccount(name, result, production, users, keys, levels)


def typed(kind: type[T], value: Any) -> T:
    """The value, if it is of exactly this type: a bool is not a number."""
    if type(value) is not kind:
        raise ValueError(f"{value!r:.40} is not of type {kind.__name__}")
    return value


def states_before(run: EarlierRun, account_id: str) -> States:
    """The account's users in the earlier run, all that its summary counts, or AuditError."""
    path, counted = account_csv(run.folder, account_id), run.accounts[account_id]
    states = read_states(path, account_id)
    keys = sum(len(state.keys) for state in states.values())
    with reading(path):
        if (len(states), keys) != (counted.users, counted.keys):
            raise ValueError("it lacks rows that summary.json counts")
    return states


def baseline_of(tracking: Tracking, account_id: str) -> Baseline:
    """The newest run that audited the account and can be read. Without one, its keys' dates tell
    which are new: those created since it first failed, or else since the newest run."""
    history, passed_over = tracking.history, list[str]()
    since = tracking.earlier.started if tracking.earlier else None
    for run in history:
        try:
            if isinstance(run, AuditError):
                raise run
            account = run.accounts.get(account_id)
            if account and account.result == "audited":
                held = account_id in history.held
                states = history.held.pop(account_id) if held else states_before(run, account_id)
                return Baseline(run, states, run.started, passed_over)
        except AuditError as error:
            passed_over.append(str(error))
            continue
        if account is None:  # it joined later, unless it was here before
            csvs = (account_csv(folder, account_id) for folder in history.folders)
            if not any(map(may_exist, csvs)):
                break
        elif account.result == "failed":
            since = run.started
    return Baseline(None, {}, since, passed_over)


def track_account(tracking: Tracking, audited: AuditedAccount, urgent: list[Finding]) -> None:
    """Compare an account, and its findings of priority 1, with its baseline."""
    account, trail = audited.account, audited.trail
    baseline = tracking.baselines.pop(account.id, None) or baseline_of(tracking, account.id)
    run, before, since, passed_over = baseline
    tracking.passed_over.update(dict.fromkeys(passed_over))
    if trail is not None and since is not None:
        # --since may ask for older events, which explain nothing
        events = tuple(event for event in trail.events if event.time >= since)
        trail = replace(trail, events=events)
    if run is None:
        tracking.urgent_new += urgent
        if passed_over:
            tracking.blind.append(account)
        created = [*keys_created_since(audited, since)] if since else []
        if trail is not None and since is not None:
            gone = came_and_went(account, {}, states_of(rows_of(audited)), trail.events)
            created += [change for change in gone if change.change == CAME_AND_WENT]
        for change in created:
            tracking.new_keys_elsewhere.append(with_witness(change, trail)._replace(since=since))
        return
    after = states_of(rows_of(audited))
    events = trail.events if trail else ()
    persons = [*persons_of(before, after, events)]
    tracking.compared[account.id] = run
    changes = [*changes_between(account, persons)]
    changes += came_and_went(account, before, after, events)
    if ROOT not in before:  # the earlier report lacked its row: the dates of its keys tell
        dated = keys_created_since(audited, run.started)
        changes += [change for change in dated if change.user == ROOT]
    tracking.changes += [with_witness(change, trail)._replace(since=since) for change in changes]
    track_mfa(tracking, account, persons)
    was_production = run.accounts[account.id].production
    tracking.urgent_new += newly_urgent(urgent, persons, was_production)


def newly_urgent(
    urgent: Sequence[Finding], persons: Sequence[Person], was_production: bool
) -> Iterator[Finding]:
    """The findings of priority 1 that the baseline had not, or could not have."""
    states = {person.name: person.then for person in persons if person.now}
    for finding in urgent:
        state, key = states.get(finding.user), finding.key
        if state is None or (key is None and not (was_production and state.lacks_mfa)):
            yield finding
        elif key and KeyState(key.status, iso(key.created)) not in state.keys.values():
            yield finding  # a key of root, which has no ID


def keys_created_since(audited: AuditedAccount, moment: datetime) -> Iterator[Change]:
    for user in audited.users:
        of_user = Change(audited.account.id, audited.account.name, user.name)
        for key in user.keys:
            if key.created >= moment:
                yield of_user._replace(key_id=key.id, change="access-key-created", after=key.status)


class Person(NamedTuple):
    """A user then and now (None: not there). `name` is the present one, or the last one."""

    name: str
    old_name: str
    then: UserState | None
    now: UserState | None


def persons_of(before: States, after: States, events: Sequence[Event] = ()) -> Iterator[Person]:
    """All users; root only if both credential reports had it: root neither comes nor goes."""
    names = before.keys() | after.keys()
    renamed = {**renamed_by_events(before, after, events), **renamed_users(before, after)}
    if ROOT not in before or ROOT not in after:
        names.discard(ROOT)
    moved = set(renamed.values())
    for name in sorted(names):
        if name in after:
            old_name = renamed.get(name, name)
            is_other = name in moved and name not in renamed  # who had the name has another now
            yield Person(name, old_name, None if is_other else before.get(old_name), after[name])
        if name in before and name not in moved and (name not in after or name in renamed):
            yield Person(name, name, before[name], None)


def renamed_users(before: States, after: States) -> dict[str, str]:
    """The old name by the new one, as far as keys tell: they stay with their user."""
    owners: dict[str, set[str]] = {}
    for name, state in sorted(before.items()):
        for key_id in state.keys:
            owners.setdefault(key_id, set()).add(name)
    renamed = {}
    for name, state in after.items():
        had = set[str]().union(*(owners.get(key_id, ()) for key_id in state.keys))
        if had and name not in had and ROOT not in (name, *had):
            renamed[name] = min(had)
    return renamed


def renamed_by_events(before: States, after: States, events: Iterable[Event]) -> dict[str, str]:
    """The old name by the new one, as CloudTrail tells. IAM knows a name in any letter case."""
    current, moved = {name: name.lower() for name in before}, set[str]()
    for event in events:
        for name, now in current.items():
            if now == event.user.lower() and event.name == "DeleteUser":
                current[name] = ""
            elif now == event.user.lower() and event.new_name:
                current[name] = event.new_name.lower()
                moved.add(name)
    present = {name.lower(): name for name in after}
    renamed = {}
    for name in moved:
        if present.get(current[name], name) != name:
            renamed[present[current[name]]] = name
    return renamed


def track_mfa(tracking: Tracking, account: Account, persons: Iterable[Person]) -> None:
    """Count the console users without MFA who have it now or are gone, and keep the new ones."""
    for name, _old_name, then, now in persons:
        lacked = then is not None and then.lacks_mfa
        lacks = now is not None and now.lacks_mfa
        tracking.mfa_fixed += lacked and not lacks
        if lacks and not lacked:
            new = Change(account.id, account.name, name, change="console-without-mfa")
            tracking.mfa_new.append(new)


def changes_between(account: Account, persons: Iterable[Person]) -> Iterator[Change]:
    for name, old_name, then, now in persons:
        of_user = Change(account.id, account.name, name)
        if then is None or now is None:
            yield of_user._replace(change="user-created" if now else "user-deleted")
        else:
            if old_name != name:
                yield of_user._replace(change="user-renamed", before=old_name, after=name)
            yield from sign_in_changes(of_user, then, now)
        yield from key_changes(of_user, then.keys if then else {}, now.keys if now else {})


def sign_in_changes(of_user: Change, then: UserState, now: UserState) -> Iterator[Change]:
    if then.password_status != now.password_status:
        what = "console-enabled" if now.password_status == PASSWORD_SET else "console-disabled"
        yield of_user._replace(change=what, before=then.password_status, after=now.password_status)
    if then.mfa_status != now.mfa_status:
        what = "mfa-changed"
        if NO_MFA in (then.mfa_status, now.mfa_status):
            what = "mfa-added" if then.mfa_status == NO_MFA else "mfa-removed"
        yield of_user._replace(change=what, before=then.mfa_status, after=now.mfa_status)


def key_changes(of_user: Change, before: Keys, after: Keys) -> Iterator[Change]:
    """One user's access keys. Root's have no IDs: another creation date means another key."""
    if of_user.user == ROOT:
        before = in_their_slots(before, after)
    for key_id in sorted(before.keys() | after.keys()):
        of_key = of_user._replace(key_id=key_id)
        then, now = before.get(key_id), after.get(key_id)
        if then is None or now is None or then.created != now.created:
            if then is not None:
                yield of_key._replace(change="access-key-deleted", before=then.status)
            if now is not None:
                yield of_key._replace(change="access-key-created", after=now.status)
        elif is_active(then.status) != is_active(now.status):
            what = "access-key-activated" if is_active(now.status) else "access-key-deactivated"
            yield of_key._replace(change=what, before=then.status, after=now.status)


def in_their_slots(before: Keys, after: Keys) -> Keys:
    """Root's earlier keys, exchanged if more creation dates match then: AWS promises no order."""
    other = dict(zip(ROOT_ACCESS_KEYS, reversed(ROOT_ACCESS_KEYS)))
    exchanged = {other.get(key_id, key_id): key for key_id, key in before.items()}
    now = {(key_id, key.created) for key_id, key in after.items()}
    same = sum((key_id, key.created) in now for key_id, key in before.items())
    same_exchanged = sum((key_id, key.created) in now for key_id, key in exchanged.items())
    return exchanged if same_exchanged > same else before


def came_and_went(
    account: Account, before: States, after: States, events: Sequence[Event]
) -> Iterator[Change]:
    """Access keys and console users that came and went between the runs: only events show them."""
    keys_seen = {""}.union(*(state.keys for state in (*before.values(), *after.values())))
    done: dict[str, set[str]] = {"CreateAccessKey": set(), "CreateLoginProfile": set()}
    for event in events:
        done.setdefault(event.name, set()).add(event.key_id or event.user.lower())
    keys = done["CreateAccessKey"] - keys_seen
    users = done["CreateLoginProfile"] & done.get("CreateUser", set())
    users -= {name.lower() for name in (*before, *after)}
    for event in events:
        of_user = Change(account.id, account.name, event.user, event=event)
        if event.name == "DeleteAccessKey" and event.key_id in keys:
            yield of_user._replace(key_id=event.key_id, change=CAME_AND_WENT)
        elif event.name == "DeleteUser" and event.user.lower() in users:
            yield of_user._replace(change=USER_CAME_AND_WENT)


# The CloudTrail events that confirm a change or else contradict it; after "=", the status they set
EXPLAINED_BY: dict[str, tuple[set[str], set[str]]] = {
    "access-key-created": ({"CreateAccessKey"}, {"DeleteAccessKey"}),
    "access-key-deleted": ({"DeleteAccessKey"}, {"CreateAccessKey"}),
    "access-key-activated": ({"UpdateAccessKey=Active"}, {"UpdateAccessKey=Inactive"}),
    "access-key-deactivated": ({"UpdateAccessKey=Inactive"}, {"UpdateAccessKey=Active"}),
    "mfa-added": ({"EnableMFADevice"}, {"DeactivateMFADevice"}),
    "mfa-removed": ({"DeactivateMFADevice"}, {"EnableMFADevice"}),
    "mfa-changed": ({"EnableMFADevice", "DeactivateMFADevice"}, set()),
    "console-enabled": ({"CreateLoginProfile"}, {"DeleteLoginProfile"}),
    "console-disabled": ({"DeleteLoginProfile"}, {"CreateLoginProfile"}),
    "user-created": ({"CreateUser"}, {"DeleteUser"}),
    "user-deleted": ({"DeleteUser"}, {"CreateUser"}),
    "user-renamed": ({"UpdateUser"}, set()),
}
CONFIRMING = set[str]().union(*(confirming for confirming, _ in EXPLAINED_BY.values()))
EVENT_NAMES = tuple(sorted({event.partition("=")[0] for event in CONFIRMING}))


def with_witness(change: Change, trail: Trail | None) -> Change:
    """The change with the latest event that explains it, or else the latest that contradicts it."""
    if trail is None:
        return change
    if trail.error:
        return change._replace(witness="unavailable")
    if change.change in (CAME_AND_WENT, USER_CAME_AND_WENT):
        return change._replace(witness="confirmed")
    for witness, names in zip(("confirmed", "contradicted"), EXPLAINED_BY[change.change]):
        for event in reversed(trail.events):
            told = event.name in names or f"{event.name}={event.status}" in names
            if told and is_about(event, change):
                return change._replace(witness=witness, event=event)
    return change._replace(witness="not found")


def is_about(event: Event, change: Change) -> bool:
    """Whether the event acted on what has changed; root's keys have no IDs in the report."""
    if change.key_id and change.user != ROOT:
        return event.key_id == change.key_id
    name = event.new_name if change.change == "user-renamed" else event.user
    return name.lower() == change.user.lower()


def accounts_that_came_or_left(run: Run, earlier: EarlierRun) -> Iterator[Change]:
    """One change for each account that joined or left the organization since the newest run."""
    then, now, since = earlier.accounts, accounts_now(run), earlier.started
    for account_id in now.keys() - then.keys():
        yield Change(account_id, now[account_id].name, change="account-joined", since=since)
    for account_id in then.keys() - now.keys():
        yield Change(account_id, then[account_id].name, change="account-left", since=since)


def accounts_now(run: Run) -> dict[str, Account]:
    """All accounts of the organization, in scope or not."""
    everyone: list[Any] = [*run.audited, *run.failed, *run.skipped, *run.out_of_scope]
    return {one.account.id: one.account for one in everyone}


def change_order(change: Change) -> tuple[str, ...]:
    """The order of changes.csv: by its columns, without those of the event."""
    who = (change.account_id, change.account_name, change.user, change.key_id)
    return (*who, change.change, change.before, change.after, change.witness)


def change_row(change: Change) -> tuple[str, ...]:
    """The change's row in changes.csv."""
    seen = ("", "", "", "")
    if event := change.event:
        seen = (event.name, iso(event.time), event.actor, event.source_ip)
    return (*change_order(change), *seen, iso(change.since) if change.since else "")


def event_rows(run: Run) -> Iterator[tuple[str, ...]]:
    """The rows of events.csv, oldest first."""
    found: list[tuple[Event, tuple[str, str]]] = []
    for account, trail in run.trails:
        found += [(event, (account.id, account.name)) for event in trail.events]
    for event, where in sorted(found):
        who = (event.actor, event.source_ip, event.user_agent, event.id)
        yield (*where, iso(event.time), event.name, event.user, event.key_id, *who)


# === Enforce: what the organization's policies already prevent ===================================

CONTROLS = {
    "mfa-required": "console users need MFA to act",
    "new-keys-prevented": "no new access keys",
    "new-api-keys-prevented": "no new API keys",
}
MFA_REQUIRED, NEW_KEYS_PREVENTED, NEW_API_KEYS_PREVENTED = CONTROLS
# What the other controls prevent. To reset an API key is to get a new one.
API_KEYS = "iam:CreateServiceSpecificCredential", "iam:ResetServiceSpecificCredential"
ACTIONS = {NEW_KEYS_PREVENTED: ("iam:CreateAccessKey",), NEW_API_KEYS_PREVENTED: API_KEYS}
VERDICTS = ("enforced", "not checked", "partial", "absent")  # of several the first one counts
ENFORCED, NOT_CHECKED, PARTIAL, ABSENT = VERDICTS


@dataclass(frozen=True)
class Control:
    verdict: str  # what a Deny statement does for a control, or what holds in one account
    policies: Mapping[str, str] = field(default_factory=dict)  # what it rests on: names by ID
    exemptions: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()  # one per narrowed statement
    why_not_checked: str | None = None


class Policy(NamedTuple):
    names: Mapping[str, str]  # its own, by its ID
    targets: frozenset[str]  # the IDs that it is attached to
    denials: Mapping[str, Any]  # what each Deny statement does, by control: see judge_policy
    allowed: set[str]  # the actions that an Allow without a condition lets everybody do


class Enforcement(NamedTuple):
    policies: tuple[Policy, ...] = ()
    why_not: str = ""  # why the policies are not known
    root_credentials_managed: bool | None = None
    root_why_not: str = ""


async def read_enforcement(aws: Aws, organization: Organization) -> Enforcement:
    policies, why_not = await best_effort(read_policies(aws, organization.id), [])
    root_managed, root_why_not = await best_effort(aws.ask(list_organizations_features), None)
    if organization.feature_set != "ALL":
        why_not = "the organization has consolidated billing only, and policies need all features"
    elif not why_not and not policies:
        why_not = "service control policies are off: none is attached, not even FullAWSAccess"
    return Enforcement(tuple(policies), why_not, root_managed, root_why_not)


async def best_effort(question: Awaitable[T], otherwise: T) -> tuple[T, str]:
    """What was read and "", or `otherwise` and why it is not checked: the audit goes on."""
    try:
        return await question, ""
    except Exception as error:
        return otherwise, str(error) if isinstance(error, StepFailed) else type(error).__name__


async def read_policies(aws: Aws, organization: str) -> list[Policy]:
    """The policies that are attached somewhere."""
    policies = []
    for policy_id, name in await aws.ask(list_policies):
        try:
            content = await aws.ask(describe_policy, policy_id)
            if targets := await aws.ask(list_targets_for_policy, policy_id):
                judged = judge_policy(content, aws.caller.partition, organization)
                policies.append(Policy({policy_id: name}, targets, *judged))
        except StepFailed as failure:
            if failure.code != "PolicyNotFoundException":  # deleted since it was listed
                raise
    return policies


async def apply_enforcement(aws: Aws, run: Run) -> None:
    """Decide the controls of each account, audited or failed."""
    everyone: list[Any] = [*run.audited, *run.failed]
    paths = {one.account.id: one.account.path for one in everyone}
    if run.organization.management_account in paths:
        paths[run.organization.management_account] = ""  # no service control policy applies to it
    why_not = run.enforcement.why_not
    if not why_not:
        _, why_not = await best_effort(read_paths(aws, paths), None)
    run.enforcement = run.enforcement._replace(why_not=why_not)
    for account_id, path in paths.items():
        ids = None if why_not or path is None else path.split("/")
        run.controls[account_id] = controls_of_account(ids, run.enforcement.policies)


async def read_paths(aws: Aws, paths: dict[str, str | None]) -> None:
    """Add the paths that ListAccounts did not give; each account and OU is asked about once."""
    parents = dict[str, str]()

    async def read(child_id: str) -> None:
        parents[child_id] = await aws.ask(list_parents, child_id)

    level = unknown = [account_id for account_id, path in paths.items() if path is None]
    while level:
        await side_by_side(PARENTS_AT_ONCE, level, read)
        level = sorted({up for up in parents.values() if up.startswith("ou-")} - parents.keys())
    for account_id in unknown:
        ids = [account_id]
        while ids[-1] in parents:
            ids.append(parents[ids[-1]])
        paths[account_id] = "/".join(ids) if ids[-1] else None  # it left since it was listed


def controls_of_account(path: Sequence[str] | None, judged: Iterable[Policy]) -> dict[str, Control]:
    """The controls of the account with this path; not checked if the path is None."""
    if path is None:
        return dict.fromkeys(CONTROLS, Control(NOT_CHECKED))
    applying = [policy for policy in judged if not policy.targets.isdisjoint(path)]
    controls = {}
    for control in CONTROLS:
        denied, closed = strongest(control, applying), without_allow(control, path, applying)
        controls[control] = denied if denied.verdict == NOT_CHECKED else stronger(denied, closed)
    return controls


def without_allow(control: str, path: Sequence[str], applying: Iterable[Policy]) -> Control:
    """Not checked if at some level of the path (root, OU, account) nothing lets everybody act: one
    policy of every level has to, or else nobody may. FullAWSAccess was detached there."""
    for level in path:
        names, closed = dict[str, str](), {*ACTIONS.get(control, ())}
        for policy in applying:
            if level in policy.targets:
                names.update(policy.names)
                closed -= policy.allowed
        if names and closed:
            why = f"no Allow without a condition lets {' or '.join(sorted(closed))} through"
            return Control(NOT_CHECKED, names, why_not_checked=why)
    return Control(ABSENT)


def strongest(control: str, policies: Iterable[Policy]) -> Control:
    """What holds where all of these apply. Full denials of a part of the actions may add up to all
    actions: of one policy or of several."""
    whole, added_up, in_full = Control(ABSENT), Control(ABSENT), list[Statement]()
    for policy in policies:
        for judgement, statement in policy.denials.get(control, ()):
            denial = replace(judgement, policies=policy.names)
            whole = stronger(whole, denial)
            if statement:
                in_full.append(statement)
                added_up = stronger(added_up, denial)
    if whole.verdict == ENFORCED or undenied(control, in_full):
        return whole
    return replace(added_up, verdict=ENFORCED, conditions=())


def stronger(one: Control, other: Control) -> Control:
    """What holds where both apply. A principal is free only if every enforcing statement exempts
    it, so the one with the fewest exemptions tells most. Partial ones add up, to partial."""
    if one.verdict != other.verdict:
        return min(one, other, key=lambda each: VERDICTS.index(each.verdict))
    exemptions = tuple(dict.fromkeys(one.exemptions + other.exemptions))
    if one.verdict == ENFORCED:
        exemptions = min(one.exemptions, other.exemptions, key=len)
    conditions = dict.fromkeys(one.conditions + other.conditions)
    policies = {**one.policies, **other.policies}
    return Control(one.verdict, policies, exemptions, tuple(conditions))


# What an MFA requirement may leave out: setting up MFA, reading IAM and signing in. Not iam:* or
# sts:*, with which a stolen password creates an access key or assumes a role, and nothing that
# deactivates an MFA device (iam:DeleteVirtualMFADevice deletes only devices that nobody has).
MFA_BASICS = (
    *MFA_SETUP, "iam:Get*", "iam:List*", "iam:DeleteVirtualMFADevice", "sts:GetCallerIdentity",
    "signin:AuthorizeOAuth2Access", "signin:CreateOAuth2Token")  # fmt: skip
Known = Mapping[str, str]  # what every request has of a condition's key, as a pattern
# A condition holds for console users without MFA, for everybody whom the control is about, for none
# of them, for all but those whom it names, or it is not known for whom.
TESTS_MFA, ALWAYS_HOLDS, NEVER_HOLDS = "tests MFA", "always holds", "never holds"
EXEMPTS, NARROWS = "exempts", "narrows"


class Condition(NamedTuple):
    operator: str  # in lower case, as the key
    key: str
    values: tuple[str, ...]  # without those that match nobody
    text: str  # the whole condition as it is written


class Statement(NamedTuple):
    effect: str  # Deny or Allow
    action: str  # Action or NotAction
    actions: tuple[str, ...]
    resource: str  # Resource or NotResource
    resources: tuple[str, ...]
    conditions: tuple[Condition, ...]


def judge_policy(content: str, partition: str, organization: str) -> tuple[Any, set[str]]:
    """By control what each Deny statement does, with the statement if it denies in full what it
    names; and the actions that an Allow without a condition lets everybody do."""
    known = {ARN: f"arn:{partition}:iam::*:user/*", ORGANIZATION: organization}
    known[REGION] = IAM_REGIONS.get(partition, "")
    denials, allowed = dict[str, Any](), set[str]()
    try:
        statements = parse_policy(content)
    except (ValueError, AttributeError, RecursionError):  # the last: JSON nested too deep
        return dict.fromkeys(CONTROLS, ((Control(NOT_CHECKED), None),)), allowed
    for statement, control in itertools.product(statements, CONTROLS):
        judgement, in_full = judge_statement(statement, control, known)
        if statement.effect == "Deny" and judgement.verdict != ABSENT:
            denials.setdefault(control, []).append((judgement, statement if in_full else None))
        elif in_full and not statement.conditions:
            allowed.update({*ACTIONS.get(control, ())} - {*undenied(control, [statement])})
    return denials, allowed


def judge_statement(statement: Statement, control: str, known: Known) -> tuple[Control, bool]:
    """What a statement does for a control: enforced, unless an element or a condition narrows it;
    and whether at least all actions that it names are denied in full."""
    of_mfa, negated = control == MFA_REQUIRED, statement.action == "NotAction"
    left = undenied(control, [statement])
    named_none = left == [*ACTIONS.get(control, ())]
    if of_mfa and negated:
        named_none = any_covers(statement.actions, "*:*")
    elif of_mfa:
        named_none = all(map(functools.partial(any_covers, MFA_BASICS), statement.actions))
    everywhere, somewhere = reach(statement, ALL if of_mfa else known[ARN])
    of_root, _ = reach(statement, known[ARN].replace("user/*", "root"))
    exempt = ["root"] if control == NEW_KEYS_PREVENTED and not of_root else []  # has no API keys
    narrowed = [] if everywhere else [f"{statement.resource} {', '.join(statement.resources)}"]
    about = not of_mfa
    for condition in statement.conditions:
        effect = effect_of(condition, control, known)
        somewhere &= effect != NEVER_HOLDS
        about |= effect in (TESTS_MFA, NARROWS) and condition.key.startswith("aws:multifactorauth")
        exempt += condition.values if effect == EXEMPTS else ()
        narrowed += [condition.text] if effect == NARROWS else ()
    if named_none or not somewhere or not about:
        return Control(ABSENT), False
    in_full = not narrowed
    if left and of_mfa and not negated:
        narrowed.insert(0, f"Action {', '.join(statement.actions)}")
    elif left:
        narrowed.insert(0, f"NotAction {', '.join(left)}")
    conditions = (" and ".join(narrowed),) if narrowed else ()
    return Control(PARTIAL if narrowed else ENFORCED, {}, tuple(exempt), conditions), in_full


def undenied(control: str, statements: Iterable[Statement]) -> list[str]:
    """The actions that no statement denies; for MFA, patterns of them without MFA_BASICS."""
    if control in ACTIONS:
        left = [*ACTIONS[control]]
        for statement in statements:
            negated = statement.action == "NotAction"
            left = [each for each in left if any_covers(statement.actions, each) == negated]
        return left
    denied, left, services = [*MFA_BASICS], ["*:*"], {"*"}
    for statement in statements:
        denied += statement.actions if statement.action == "Action" else ()
    for statement in statements:
        if statement.action == "NotAction":  # two of them leave out only what is on both lists
            shared, services, left = services, set(), []
            for name in statement.actions:
                service = re.sub(r".*[*?].*", "*", name.lower().partition(":")[0])
                if not any_covers(denied, name) and (service == "*" or {"*", service} & shared):
                    services.add(service)
                    left.append(name)
    return [] if any_covers(denied, "*:*") else left


def reach(statement: Statement, arns: str) -> tuple[bool, bool]:
    """Whether a statement is about all resources with these ARNs; whether it may be about some."""
    whole, part, kind = False, False, arns.split(":", 5)[-1].rstrip("*")
    for pattern in statement.resources:
        segments = re.sub(r"\$\{[^}]*\}", "*", pattern).split(":", 5)  # a variable can be anything
        start = re.split(r"[*$]", segments[-1])[0][: len(kind)]
        of_iam = all(map(covers, segments[:4], arns.split(":")))  # in any account
        whole |= pattern == "*" or covers(pattern, arns)
        part |= arns == ALL or len(segments) < 6 or (of_iam and covers(start, kind[: len(start)]))
    return (whole, part) if statement.resource == "Resource" else (not part, not whole)


def effect_of(condition: Condition, control: str, known: Known) -> str:
    """The effect by the first of CONDITION_RULES that fits; without one, the condition narrows."""
    everybody, values = known.get(condition.key, ""), [*condition.values]
    if condition.key == REGION and not everybody:  # a partition whose Region for IAM is not known
        return NARROWS
    for index, value in enumerate(values):
        if everybody and covers(value, everybody):
            values[index] = ANY_USER if condition.key == ARN else ALL
    for operator, key, quantifier, value, on_mfa, on_new in CONDITION_RULES:
        effect = on_mfa if control == MFA_REQUIRED else on_new
        about = all(map(re.fullmatch, (operator, key), (condition.operator, condition.key)))
        if effect != NARROWS and about and quantifier(map(re.compile(value).fullmatch, values)):
            return effect
    return NARROWS


def any_covers(patterns: Iterable[str], action: str) -> bool:
    """Whether a pattern covers the action, upper or lower case."""
    return any(covers(pattern.lower(), action.lower()) for pattern in patterns)


def covers(pattern: str, other: str) -> bool:
    """Whether an IAM pattern matches all that `other` stands for: only a * matches its *. ARNs are
    compared segment by segment, as AWS does."""
    if other.startswith("arn:"):
        segments = pattern.split(":", 5)
        return len(segments) == 6 and all(map(covers, segments, other.split(":", 5)))
    return fnmatchcase(other, pattern.replace("[", "[[]").replace("?", "[!*]"))


# Where every request has the key, ForAnyValue and IfExists change nothing.
BOOL, EQUALS = r"(for\w+:)?bool(ifexists)?", r"(foranyvalue:)?string(equals|like)(ifexists)?"
LIKE_ARN = r"(foranyvalue:)?(arn(like|equals)|stringlike)(ifexists)?"
UNEQUAL = r"stringnot(equals|like)(ifexists)?"
UNLIKE_ARN = r"(arn|string)not(equals|like)(ifexists)?"
IF_PRESENT = r"(foranyvalue:)?(?!null|for|.*not|.*ifexists)\w+"
AGED, AGED_OR_ABSENT = r"numeric(less|greater)than(equals)?", r"numericgreaterthan(equals)?ifexists"
FALSE, TRUE, ANYTHING, ALL = "(?ai)false", "(?ai)true", "(?s).*", "*"
MFA_PRESENT, MFA_AGE = "aws:multifactorauthpresent", "aws:multifactorauthage"
ARN, TYPE, REGION = "aws:principalarn", "aws:principaltype", "aws:requestedregion"
ORGANIZATION, BY_AWS = "aws:principalorgid", "aws:principalisawsservice"
# Roles are not console users: any may be exempt from MFA, but from new-keys-prevented only those
# that are named. A name may end in * after - or _ (stacksets-exec-*) or eight characters or more
# (AWSAccelerator*), but not include AWS's own roles, except those of one permission set
# (AWSReservedSSO_Admin_*). A variable ($) can be anybody.
ANY_USER, IAM_PRINCIPAL = "arn:*:iam::*:user/*", r"arn:[^:]*:iam::[^:]*:(root|user/[^*?$]+|"
ONE_ROLE = r"role/([^$]*/)?([^*?$/]+|AWSReservedSSO_[^*?$/]+_\*)"
OPEN_END = r"role/(?!aws-|(.*/)?AWSReserved)([^*?$]+[-_]|([^*?$]+/)?[^*?$/]{8,})\*"
NO_USER = r"(?s)arn:[^:]*:(iam::[^:]*:(root|role/.*)|sts::[^:]*:assumed-role/.*)"
NEITHER = r"(?s)arn:[^:]*:(iam::[^:]*:root|sts::[^:]*:assumed-role/.*)"  # user nor role
# Keys that no CreateAccessKey has: of other services, but for those that go with a role's
# credentials to every service; of tags to set; of services that call for a resource.
NEVER_SENT = (
    r"(?!aws:|iam:|saml:|sts:|ec2:role|glue:|identitystore:|\w+:source\w+arn)[a-z0-9-]+:.*"
    r"|aws:(tagkeys|requesttag/.*|source(arn|account|orgid|orgpaths))")  # fmt: skip
CONDITION_RULES = (
    # operator, key, whether any or all values must fit, value; effect on MFA and on new keys.
    # Access keys send no aws:MultiFactorAuthPresent, console sessions without MFA send false. So
    # Null true of that key stops the first and not the second: it narrows.
    (BOOL, MFA_PRESENT, all, FALSE, TESTS_MFA, NARROWS),
    (BOOL, MFA_PRESENT, all, TRUE, NEVER_HOLDS, NARROWS),
    ("null", MFA_PRESENT, all, FALSE, ALWAYS_HOLDS, NARROWS),
    ("null", MFA_AGE, all, TRUE, TESTS_MFA, NARROWS),
    ("null", MFA_AGE, all, FALSE, NEVER_HOLDS, NARROWS),
    (AGED, MFA_AGE, all, ANYTHING, NEVER_HOLDS, NARROWS),
    (AGED_OR_ABSENT, MFA_AGE, all, ANYTHING, TESTS_MFA, NARROWS),
    # A service's requests for a caller say MFA false even for a key. The caller's own come first.
    (BOOL, "aws:viaawsservice", all, FALSE, ALWAYS_HOLDS, NARROWS),
    (BOOL, BY_AWS, all, FALSE, ALWAYS_HOLDS, ALWAYS_HOLDS),
    (BOOL, BY_AWS, all, TRUE, NEVER_HOLDS, NEVER_HOLDS),
    # This organization's; does an ARN operator take *?
    (EQUALS, f"{ORGANIZATION}|{ARN}", any, re.escape(ALL), ALWAYS_HOLDS, ALWAYS_HOLDS),
    (UNEQUAL, ORGANIZATION, any, re.escape(ALL), NEVER_HOLDS, NEVER_HOLDS),
    (EQUALS, TYPE, any, "User", ALWAYS_HOLDS, NARROWS),
    (EQUALS, TYPE, all, "Account|FederatedUser|Service", NEVER_HOLDS, NEVER_HOLDS),
    (EQUALS, TYPE, all, "Account|FederatedUser|Service|AssumedRole", NEVER_HOLDS, NARROWS),
    (UNEQUAL, TYPE, any, "User", NEVER_HOLDS, NARROWS),
    (UNEQUAL, TYPE, all, "Service", ALWAYS_HOLDS, ALWAYS_HOLDS),
    (LIKE_ARN, ARN, any, re.escape(ANY_USER), ALWAYS_HOLDS, NARROWS),
    (f"{EQUALS}|{LIKE_ARN}", ARN, all, NEITHER, NEVER_HOLDS, NEVER_HOLDS),
    (f"{EQUALS}|{LIKE_ARN}", ARN, all, NO_USER, NEVER_HOLDS, NARROWS),
    (UNLIKE_ARN, ARN, any, re.escape(ANY_USER), NEVER_HOLDS, NARROWS),
    (UNLIKE_ARN, ARN, all, f"{IAM_PRINCIPAL}{ONE_ROLE}|{OPEN_END})", NARROWS, EXEMPTS),
    (UNLIKE_ARN, ARN, all, f"{IAM_PRINCIPAL}role/.+)", EXEMPTS, NARROWS),
    (UNEQUAL, "aws:username", all, r"[^*?$]*", EXEMPTS, EXEMPTS),
    # "IAM calls are always made to the us-east-1 Region", as AWS's guide to global keys has it.
    (EQUALS, REGION, all, r"[^*?$]+\*?", NARROWS, NEVER_HOLDS),
    (UNEQUAL, REGION, any, re.escape(ALL), NARROWS, NEVER_HOLDS),
    (IF_PRESENT, NEVER_SENT, all, ANYTHING, NARROWS, NEVER_HOLDS),
    ("null", NEVER_SENT, all, FALSE, NARROWS, NEVER_HOLDS),
)
# Without Like, * and ? stand for themselves. An assumed role's aws:PrincipalArn is the role's.
MATCHES_NOBODY = re.compile(
    r"(?s)\S*string(not)?equals(ifexists)? \S* [^$]*[*?][^$]*|"
    rf"{UNLIKE_ARN} {ARN} arn:[^:]*:sts::[^:]*:assumed-role/.*")  # fmt: skip
ELEMENTS = {"Sid", "Effect", "Action", "NotAction", "Resource", "NotResource", "Condition"}


def parse_policy(content: str) -> list[Statement]:
    """The statements. ValueError or AttributeError for anything but a service control policy."""
    listed = json.loads(content, object_pairs_hook=without_repetition).get("Statement")
    statements = []
    for members in listed if isinstance(listed, list) else [listed]:
        if members.keys() - ELEMENTS or members.get("Effect") not in ("Allow", "Deny"):
            raise ValueError("not a statement of a service control policy")
        elements: Any = [members["Effect"]]
        for name, negated in (("Action", "NotAction"), ("Resource", "NotResource")):
            given = [each for each in (name, negated) if members.get(each, []) != []]
            if len(given) != 1:
                raise ValueError(f"not exactly one of {name} and {negated}")
            elements += given[0], texts(members[given[0]])
        conditions = parse_conditions(members.get("Condition", {}))
        statements.append(Statement._make((*elements, conditions)))
    return statements


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError if a name occurs twice: AWS does not say which one counts."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return dict(pairs)


def parse_conditions(block: Mapping[str, Mapping[str, Any]]) -> tuple[Condition, ...]:
    conditions = []
    for operator, keys in block.items():
        for key, value in keys.items():
            values, names = texts(value), f"{operator} {key}".lower()
            somebody = [each for each in values if not MATCHES_NOBODY.fullmatch(f"{names} {each}")]
            text = f"{operator} {key} {', '.join(values)}"
            conditions.append(Condition(operator.lower(), key.lower(), tuple(somebody), text))
    return tuple(conditions)


def texts(value: Any) -> tuple[str, ...]:
    """A string, boolean or number, or a list of them, as JSON writes them: false is "false"."""
    found = []
    for each in value or [None] if isinstance(value, list) else [value]:
        if not isinstance(each, (str, int, float)):
            raise ValueError("not a string, boolean or number, nor a list of them")
        found.append(each if isinstance(each, str) else json.dumps(each))
    return tuple(found)


# === Terminal: the summary for stdout and for mail, summary.json; values in, text out ============

FINDINGS_SHOWN = 10
ACCOUNTS_SHOWN = 5
LINES_SHOWN = 10  # of other lists
Summary = Mapping[str, Any]  # the content of summary.json, or a part of it


def terminal_summary(run: Run, finished: datetime, quiet: bool) -> str:
    """The text for stdout. With `quiet`, only what needs attention: it may be empty."""
    summary = summary_document(run, finished)
    if quiet:
        lines = quiet_lines(run, summary)
        title = f"Organization {run.organization.id}, {summary['started']}: {run.folder}"
        return f"{printable(title)}\n{fitted(lines)}" if lines else ""
    heading = audited_lines(run, summary, finished)
    heading += failed_lines(run, summary) + left_out_lines(run, summary)
    unreadable = [*run.tracking.unreadable, *run.tracking.passed_over]
    blocks = [
        heading,
        maturity_lines(run, summary) + held_back_lines(run, summary),
        gap_lines(run, summary),
        finding_lines(run, run.findings[:FINDINGS_SHOWN]),
        enforcement_lines(run, summary),
        change_lines(run, summary) + damage_lines(run, unreadable),
        witness_lines(run, summary),
        run_lines(run, summary),
    ]
    text = "\n".join(map(fitted, filter(None, blocks)))
    return f"{text}\nFiles: {printable(str(run.folder))}\n"  # in full, to be copied


def quiet_lines(run: Run, summary: Summary) -> list[str]:
    """Failed accounts, what is new and urgent since each account's baseline, damaged files."""
    tracking, urgent = run.tracking, run.tracking.urgent_new
    removed = [change for change in tracking.changes if change.change == "mfa-removed"]
    lines = [
        *failed_lines(run, summary),
        *(skipped_lines(summary) if run.plan.scope.accounts else ()),
        *root_lines(run),
        *listed_findings(run, urgent, "New findings of priority 1"),
        *new_key_lines(run),
        *titled("New console users without MFA", map(change_line, tracking.mfa_new)),
        *titled("MFA removed", map(change_line, removed)),
        *damage_lines(run, tracking.passed_over),
        *no_witness_lines(summary),
    ]
    standing = summary["findings"][str(MOST_URGENT)] - len(urgent)
    if lines and standing:
        verb = "stands" if standing == 1 else "stand"
        lines.append(f"{count(standing, 'finding')} of priority 1 {verb} unchanged")
    return lines


def accounts_of(summary: Summary, result: str) -> list[Summary]:
    """The accounts that were audited, or failed, or skipped, by ID."""
    return [entry for entry in summary["accounts"] if entry["result"] == result]


def audited_lines(run: Run, summary: Summary, finished: datetime) -> list[str]:
    totals, keys = summary["totals"], summary["gaps"]["organization"]["access_keys"]
    took = clock(finished - run.started)
    accounts = f"{count(totals['audited'], 'account')} ({totals['production']:,} production)"
    users = f"{count(totals['users'], 'user')}, {count(keys, 'access key')}"
    lines = [f"Organization {run.organization.id}, {summary['started']}, took {took}"]
    lines.append(f"Audited: {accounts}, {users}")
    if run.audited:
        span = age(finished - min(one.report_generated for one in run.audited))
        lines.append(f"Oldest credential report: {span} (passwords and root are as of then)")
    return lines + root_lines(run)


def root_lines(run: Run) -> list[str]:
    """For how many accounts root is not covered, if there are any."""
    number = sum(not one.has_root for one in run.audited)
    words = f"Root is missing from the credential report of {count(number, 'account')}"
    return [f"{words}: not covered there"] if number else []


def failed_lines(run: Run, summary: Summary) -> list[str]:
    """The failed accounts, grouped by step and error code, with the next step for each group."""
    failed, production = accounts_of(summary, "failed"), 0
    groups: dict[tuple[str, str], list[str]] = {}
    for one in failed:
        told = groups.setdefault((one["step"], one["error"]["code"]), [])
        told.append(f"{one['id']} {one['name']}: {one['error']['message']}")
        production += one["production"]
    number = f"{count(len(failed), 'account')} ({production:,} production)"
    lines = [f"Failed: {number}, of which nothing is known"] if failed else []
    for (step, code), told in groups.items():
        lines.append(f"  {step}: {code}")
        for line in shortened(told):
            lines += wrapped(f"    {line}")
        for at_step, codes, advice in NEXT_STEPS:
            if at_step in ("", step) and re.search(codes, code):
                words = advice.format(step=step, role=run.plan.role.name, caller=run.caller.arn)
                lines += wrapped(f"    Next: {words}")
                break
    return lines


ACCESS_DENIED = "AccessDenied|UnauthorizedOperation"
# The step ("" for any), what the error code contains, and what to do about it
# fmt: off
NEXT_STEPS = (
    ("AssumeRole", ACCESS_DENIED,
     "does role {role} exist in the account, does its trust policy trust {caller} and the external "
     "ID, may the profile assume it, and does no SCP forbid it? AWS answers all of these alike."),
    ("profile credentials", "",
     "the profile's credentials could not be renewed: sign in again (aws sso login, for one), or "
     "mend its credential_process, which must not wait for anybody, then run the audit again."),
    ("AssumeRole", "Token|Credential|MFA",
     "the profile's own session has ended: sign in again (aws sso login, for one), then run the "
     "audit again."),
    ("", "RegionDisabledException",
     "the profile's Region is not enabled there: set AWS_DEFAULT_REGION=us-east-1, or the like."),
    ("", ACCESS_DENIED,
     "the role must allow iam:{step}, and no SCP may deny it; README.md lists the permissions."),
    ("", "ReportTimeout", "run the audit again, or give the report longer with --report-timeout."),
    ("", "Throttl|RequestLimitExceeded|TooManyRequests|SlowDown",
     "something else uses up the account's IAM API rate: run the audit again later."),
)
# fmt: on


def skipped_lines(summary: Summary) -> list[str]:
    lines = []
    for one in accounts_of(summary, "skipped"):
        lines.append(f"{one['id']} {one['name']}: {one['state']}")
    return titled(f"Skipped, because not ACTIVE: {count(len(lines), 'account')}", lines)


def left_out_lines(run: Run, summary: Summary) -> list[str]:
    lines, others = skipped_lines(summary), len(summary["out_of_scope"])
    management = run.organization.management_account
    if management in map(itemgetter("id"), summary["out_of_scope"]):
        lines.append(f"Not included: the management account, {management} (--include-management)")
        others -= 1
    if others:
        lines.append(f"Out of scope: {count(others, 'account')}")
    return lines


def maturity_lines(run: Run, summary: Summary) -> list[str]:
    """Per phase, the organization's level, the reason for it, and the accounts at each level."""
    gaps, days = summary["gaps"]["organization"], run.plan.max_key_age.days
    mfa, keys = "no console users", "no active keys"
    if gaps["console_users"]:
        users = count(gaps["console_users"], "console user")
        mfa = f"{gaps['console_users_without_mfa']:,} of {users} without MFA, root included"
    if gaps["active_keys"]:
        active = count(gaps["active_keys"], "active key")
        keys = f"{gaps['active_keys_older_than_max_age']:,} of {active} older than {days} days"
    phase1 = ("Phase 1, multi-factor authentication", mfa, summary["maturity"]["phase1"])
    phase2 = ("Phase 2, use temporary credentials", keys, summary["maturity"]["phase2"])
    lines = []
    for title, gap, maturity in (phase1, phase2):
        held_back_by_gap = maturity["level"] != IN_PROGRESS or maturity["accounts"][IN_PROGRESS]
        reason = gap if held_back_by_gap else f"{count(len(run.failed), 'account')} not audited"
        lines.append(f"{title:<38}{maturity['level']:<13}{reason}")
        lines.append(f"  accounts: {numbers_in_words(maturity['accounts']) or 'none'}")
    return lines


def held_back_lines(run: Run, summary: Summary) -> list[str]:
    """The accounts with the largest gaps, then those that could not be audited."""
    sized = []
    for one in accounts_of(summary, "audited"):
        users = one["gaps"]["console_users_without_mfa"]
        keys = one["gaps"]["active_keys_older_than_max_age"]
        old = f"{count(keys, 'active key')} older than {run.plan.max_key_age.days} days"
        if users + keys:
            sized.append((-users - keys, f"{label(one)} {users:,} without MFA, {old}"))
    sized.sort()  # of the same size: by ID
    for one in accounts_of(summary, "failed"):
        sized.append((0, f"{label(one)} not audited"))
    return titled("Held back most by", map(itemgetter(1), sized[:ACCOUNTS_SHOWN]))


GAP_LABELS = {
    "console_users": "console users, root included",
    "console_users_without_mfa": "  without MFA",
    "mfa_coverage_percent": "  MFA coverage",
    "access_keys": "access keys (long-term credentials)",
    "active_keys": "  active",
    "active_keys_older_than_max_age": "    older than {days} days",
    "active_keys_older_than_1_year": "    older than 1 year",
    "active_keys_never_used": "    never used",
    "active_keys_not_used_for_90_days": "    not used for 90 days",
    "active_keys_used_within_30_days": "    used within 30 days",
    "inactive_keys": "  inactive",
    "expired_keys": "  expired",
    "root_access_keys": "  of root",
    "users_with_two_active_keys": "users with two active keys",
}


def gap_lines(run: Run, summary: Summary) -> list[str]:
    """The table of gaps: the organization beside its production accounts."""
    lines = [f"{'Gaps':<38}{'organization':>18}{'production':>18}"]
    for name, words in GAP_LABELS.items():
        line = f"{words.format(days=run.plan.max_key_age.days):<38}"
        for gaps in summary["gaps"].values():
            if gaps[name] is None:
                cell = "no console users"
            else:
                cell = (
                    f"{gaps[name]:.1f} %" if name == "mfa_coverage_percent" else f"{gaps[name]:,}"
                )
            line += f"{cell:>18}"
        lines.append(line)
    if oldest := summary["gaps"]["organization"]["oldest_active_key"]:
        whose = f"{cut(oldest['username'], 24)} in {oldest['account_id']} {oldest['account_name']}"
        key = f"{count(oldest['age_days'], 'day')}, {oldest['access_key_id']}"
        lines.append(f"oldest active key: {key} of {whose}")
    return lines


def finding_lines(run: Run, findings: Sequence[Finding]) -> list[str]:
    """These of the run's findings, each with its reasons."""
    if not run.audited:
        return ["Nothing was audited."]
    if not findings:
        return [f"Nothing to fix{' in the accounts that were audited' if run.failed else ''}."]
    number = f"{len(findings):,} of {len(run.findings):,}"
    title = f"What to fix first ({number}; all are in findings.csv)"
    return listed_findings(run, findings, title)


def listed_findings(run: Run, findings: Sequence[Finding], title: str) -> list[str]:
    lines = [title] if findings else []
    for one in findings:
        whose = f"{label(vars(one.account), 20)} {one.user}"
        lines.append(f"  {one.priority}  {one.finding:<23}{whose}")
        key_id = f"{one.key.id}: " if one.key else ""
        lines += wrapped(f"     {key_id}{'; '.join(reasons_of(one, run.plan))}")
    return lines


def enforcement_lines(run: Run, summary: Summary) -> list[str]:
    """What service control policies already prevent, and where nothing does."""
    enforcement, lines = summary["enforcement"], ["Enforced by service control policies"]
    if why_not := enforcement["why_not_checked"]:
        lines += wrapped(f"  not checked: {why_not}")
    for control, verdicts in enforcement["accounts"].items():
        lines.append(f"  {CONTROLS[control]:<36}{numbers_in_words(verdicts) or 'no account'}")
        for remark in shortened(control_remarks(run, control)):
            lines += wrapped(f"    {remark}")
    words = {True: "yes", False: "no", None: "not checked"}
    managed = words[enforcement["root_credentials_managed_centrally"]]
    lines.append(f"  {'root credentials managed centrally':<36}{managed}")
    if why_not := enforcement["root_credentials_why_not_checked"]:
        lines += wrapped(f"    {why_not}")
    bare = []
    for one in accounts_of(summary, "audited"):
        verdicts = {control["verdict"] for control in one["controls"].values()}
        if one["gaps"]["active_keys"] and verdicts == {ABSENT}:
            bare.append(one)
    bare.sort(key=lambda one: one["gaps"]["active_keys"], reverse=True)
    most = [f"{label(one)} {count(one['gaps']['active_keys'], 'active key')}" for one in bare]
    return lines + titled("With neither control, and most active keys", most[:ACCOUNTS_SHOWN])


def control_remarks(run: Run, control: str) -> list[str]:
    """The policies behind a control's verdicts, once each, with their exemptions and conditions."""
    remarks = []
    for _account_id, controls in sorted(run.controls.items()):
        found = controls[control]
        policies = ", ".join(f"{name} ({each})" for each, name in found.policies.items())
        remark = f"{found.verdict} by {policies}"
        if found.exemptions:
            remark += f", except {', '.join(found.exemptions)}"
        if found.conditions:
            remark += f", only if {'; or if '.join(found.conditions)}"
        if found.why_not_checked:
            remark += f": {found.why_not_checked}"
        if policies:
            remarks.append(remark)
    return list(dict.fromkeys(remarks))


def change_lines(run: Run, summary: Summary) -> list[str]:
    """What has changed since the accounts' baselines, for better and for worse."""
    changes, earlier, days = summary["changes"], run.tracking.earlier, run.plan.max_key_age.days
    if earlier is None:
        if run.tracking.unreadable:
            return ["No earlier run can be read: this one is the baseline."]
        return ["No earlier run of this organization to compare with: this one is the baseline."]
    counts, mfa = changes["counts"], changes["console_users_without_mfa"]
    deleted, deactivated = counts["access-key-deleted"], counts["access-key-deactivated"]
    keys = f"{deleted:,} deleted, {deactivated:,} deactivated"
    lines = [
        f"Since the run of {changes['since']}, {age(run.started - earlier.started)} before",
        f"  console users without MFA, root included: {mfa['fixed']:,} fixed, {mfa['new']:,} new",
        f"  access keys: {keys}, {counts['access-key-created']:,} created",
    ]
    for phase, levels in zip(("phase 1", "phase 2"), changes["maturity"].values()):
        now, compared = levels["now"], levels["compared_now"]
        words = f" (the accounts compared: {compared})" if compared not in (None, now) else ""
        lines.append(f"  {phase}: {levels['then'] or 'not compared'}, now {now}{words}")
    compared_with = run.tracking.compared.values()
    if others := sorted({run.max_key_age_days for run in compared_with} - {days}):
        was = f"  --max-key-age was {' or '.join(map(str, others))}, now {days:,}"
        lines.append(f"{was}: phase 2 and the number of old keys do not compare")
    older = [run.started for run in compared_with if run is not earlier]
    if older:
        first = iso(min(older))
        lines.append(f"  {count(len(older), 'account')} compared with older runs, from {first} on")
    joined, left = counts["account-joined"], counts["account-left"]
    if joined or left:
        lines.append(f"  accounts: {joined:,} joined, {left:,} left")
    if changes["accounts_not_compared"]:
        number = count(changes["accounts_not_compared"], "account")
        lines.append(f"  not compared: {number}, not audited in this run or in any earlier one")
    return lines + new_key_lines(run)


def damage_lines(run: Run, messages: Iterable[str]) -> list[str]:
    """Earlier files that could not be read, and the accounts that lack a baseline for it."""
    lines, output_dir = list[str](), f"{run.folder.parent}{os.sep}"
    for message in dict.fromkeys(messages):
        lines += wrapped(f"  {message.replace(output_dir, '')}")
    if lines:
        lines.insert(0, "Earlier files that cannot be read, and so were passed over")
    if blind := run.tracking.blind:
        number = count(len(blind), "account")
        lines.append(f"New access keys cannot be ruled out in {number}: no earlier run can be read")
        lines += [f"  {one.id} {one.name}" for one in blind[:ACCOUNTS_SHOWN]]
        lines += wrapped(
            "  Next: let the user who runs the audit read the earlier runs, or restore the files; "
            "otherwise this run is the baseline, and the keys there are in the accounts' CSVs."
        )
    return lines


def new_key_lines(run: Run) -> list[str]:
    lines = []
    for key in new_keys(run):
        where = "" if key.account_id in run.tracking.compared else " (account not compared)"
        lines.append(change_line(key) + where)
    return titled("New access keys since the last audit of their account", shortened(lines))


def change_line(change: Change) -> str:
    """Who and what changed and, where CloudTrail confirms it, who made the change."""
    parts = [change.account_id, cut(change.account_name, 20), cut(change.user, 24), change.key_id]
    if change.change == CAME_AND_WENT:
        parts.append("deleted again")
    if change.event and change.witness == "confirmed":
        parts.append(f"by {change.event.actor.rpartition(':')[2]}")
    if change.event and change.witness == "contradicted":
        parts.append("(contradicted by CloudTrail)")
    return " ".join(filter(None, parts))


def witness_lines(run: Run, summary: Summary) -> list[str]:
    """What CloudTrail says about the changes, and where it could not be asked."""
    trail, since = summary["cloudtrail"], run.tracking.events_from
    if trail is None or since is None:
        return []
    lines = [f"CloudTrail since {iso(since)}: {count(trail['events'], 'IAM event')}, in events.csv"]
    baselines = [earlier.started for earlier in run.tracking.compared.values()]
    if trail["out_of_reach"]:
        kept = f"CloudTrail keeps {CLOUDTRAIL_KEEPS.days} days"
        lines.append(f"  {kept}: what happened before has no witness.")
    elif baselines and min(baselines) < since:
        before = "An earlier run began before that"
        lines.append(f"  {before}: what happened in between has no witness.")
    if baselines and (witnesses := sorted(summary["changes"]["witnesses"].items())):
        lines.append(f"  changes: {numbers_in_words(dict(witnesses))}")
    return lines + no_witness_lines(summary)


def no_witness_lines(summary: Summary) -> list[str]:
    """The accounts where CloudTrail could not be asked, by the reason."""
    lines, trail = list[str](), summary["cloudtrail"] or {"unavailable": {}}
    groups: dict[str, list[str]] = {}
    for account_id, error in sorted(trail["unavailable"].items()):
        step, code, _message = error.split(": ", 2)
        groups.setdefault(f"{step}: {code}", []).append(account_id)
    for cause, account_ids in groups.items():
        shown = ", ".join(account_ids[:ACCOUNTS_SHOWN])
        if len(account_ids) > ACCOUNTS_SHOWN:
            shown += ", ..."
        lines += wrapped(f"  no witness in {count(len(account_ids), 'account')} ({shown}): {cause}")
    if re.search(ACCESS_DENIED, " ".join(groups)):
        lines.append("    Next: the role must allow cloudtrail:LookupEvents, and no SCP deny it.")
    return lines


def run_lines(run: Run, summary: Summary) -> list[str]:
    """The table of runs; empty for the first one, which has nothing to be compared with."""
    if not run.tracking.runs:
        return []
    lines = [f"{'Runs':<28}{'audited':>9}{'without MFA':>13}{'active keys':>13}{'of them old':>13}"]
    for one in summary["runs"]:
        line = f"{one['started']:<28}{one['audited']:>9,}"
        for name in RUN_GAPS:
            line += f"{one[name]:>13,}"
        lines.append(line)
    return lines


def outcome_line(outcome: Outcome) -> str:
    """One account's result, for --verbose."""
    name = f"{outcome.account.id} {outcome.account.name}"
    if isinstance(outcome, AuditedAccount):
        return f"{name}: audited, {count(len(outcome.users), 'user')}"
    if isinstance(outcome, FailedAccount):
        return f"{name}: failed at {outcome.step}: {outcome.code}: {outcome.message}"
    if isinstance(outcome, SkippedAccount):
        return f"{name}: skipped, {outcome.account.state}"
    return f"{name}: out of scope"


def titled(title: str, lines: Iterable[str]) -> list[str]:
    """The lines, indented below a title; without lines, no title."""
    indented = [f"  {line}" for line in lines]
    return [title, *indented] if indented else []


def shortened(lines: list[str]) -> list[str]:
    """The first lines, and how many more summary.json has."""
    more = len(lines) - LINES_SHOWN
    return lines if more <= 0 else [*lines[:LINES_SHOWN], f"and {more:,} more, in summary.json"]


def label(account: Summary, width: int = 28) -> str:
    """The account's ID and its name, cut or padded to `width`, as columns of a table."""
    return f"{account['id']} {cut(account['name'], width):<{width}}"


def numbers_in_words(numbers: Mapping[str, int]) -> str:
    """`3 enforced, 1 absent`: the numbers with their names, without zeros."""
    return ", ".join(f"{number:,} {name}" for name, number in numbers.items() if number)


def age(span: timedelta) -> str:
    """A rough age: `12 minutes`, `3 hours`, `5 days`."""
    minutes = max(0, int(span.total_seconds() // 60))
    for length, unit in ((1440, "day"), (60, "hour")):
        if minutes >= 2 * length:
            return count(minutes // length, unit)
    return count(minutes, "minute")


def fitted(lines: Iterable[str]) -> str:
    """The lines as text that neither wraps nor steers the terminal."""
    return "".join(cut(printable(line), TERMINAL_WIDTH) + "\n" for line in lines)


def wrapped(line: str) -> list[str]:
    """The line, folded at TERMINAL_WIDTH, with all but the first part indented two more spaces."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    text = printable(line)
    return textwrap.wrap(text, TERMINAL_WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def cut(text: str, width: int) -> str:
    """The text in at most `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def summary_document(run: Run, finished: datetime) -> dict[str, Any]:
    """The content of summary.json; README.md documents its keys."""
    caller, management = run.caller, run.organization.management_account
    production = [figures for figures in run.audited if figures.production]
    totals = {"audited": len(run.audited), "failed": len(run.failed), "skipped": len(run.skipped)}
    totals.update(out_of_scope=len(run.out_of_scope), production=len(production))
    totals["users"] = sum(figures.users for figures in run.audited)
    gaps = {}
    for name, accounts in (("organization", run.audited), ("production", production)):
        gaps[name] = gaps_document(total_gaps(accounts), run.started)
    this_run = {"started": iso(run.started), "audited": len(run.audited)}
    for name in RUN_GAPS:
        this_run[name] = gaps["organization"][name]
    maturity = maturity_document(run)
    priorities = map(str, range(MOST_URGENT, LEAST_URGENT + 1))
    left_out = []
    for outside in run.out_of_scope:
        left_out.append({"id": outside.account.id, "name": outside.account.name})
    return {
        "format": SUMMARY_FORMAT,
        "tool": "iam-audit",
        "version": VERSION,
        "started": iso(run.started),
        "finished": iso(finished),
        "role": run.plan.role.name,
        "production_pattern": run.plan.production.pattern,
        "max_key_age_days": run.plan.max_key_age.days,
        "scope": scope_document(run.plan.scope),
        "caller": {"account": caller.account, "arn": caller.arn, "partition": caller.partition},
        "organization": {
            "id": run.organization.id,
            "management_account": management,
            "management_account_included": run.plan.scope.include_management,
        },
        "totals": totals,
        "gaps": gaps,
        "maturity": maturity,
        "changes": changes_document(run, maturity),
        "new_keys_not_ruled_out": sorted(one.id for one in run.tracking.blind),
        "earlier_files_passed_over": list(run.tracking.passed_over),
        "runs": [*run.tracking.runs, this_run],
        "cloudtrail": cloudtrail_document(run),
        "enforcement": enforcement_document(run),
        "findings": tally(priorities, (str(finding.priority) for finding in run.findings)),
        "accounts": account_entries(run),
        "out_of_scope": sorted(left_out, key=itemgetter("id")),
    }


def tally(names: Iterable[str], found: Iterable[str]) -> dict[str, int]:
    """How often each of the names was found, zeros too."""
    numbers = Counter(found)
    return {name: numbers[name] for name in names}


def gaps_document(gaps: Gaps, now: datetime) -> dict[str, Any]:
    document = {**vars(gaps), "mfa_coverage_percent": gaps.mfa_coverage_percent}
    if key := document.pop("oldest_active_key"):
        age_days = days_between(key.created, now)
        key = {**key._asdict(), "created": iso(key.created), "age_days": age_days}
    return {**document, "oldest_active_key": key}


def maturity_document(run: Run) -> dict[str, dict[str, Any]]:
    """For each phase, the organization's level and how many accounts are at each level."""
    document, failed = {}, len(run.failed)
    for phase in PHASES:
        levels = [getattr(figures, phase) for figures in run.audited]
        accounts = tally(LEVELS, levels + [NOT_STARTED] * failed)
        document[phase] = {"level": organization_level(levels, failed), "accounts": accounts}
    return document


def changes_document(run: Run, maturity: Summary) -> dict[str, Any] | None:
    """What has changed since the accounts' baselines; None without an earlier run."""
    tracking, earlier = run.tracking, run.tracking.earlier
    if earlier is None:
        return None
    kinds = (*EXPLAINED_BY, CAME_AND_WENT, USER_CAME_AND_WENT, "account-joined", "account-left")
    stayed = earlier.accounts.keys() & accounts_now(run).keys()
    stayed -= {one.account.id for one in run.out_of_scope}
    return {
        "since": iso(earlier.started),
        "folder": str(earlier.folder),
        "accounts_compared": len(tracking.compared),
        "accounts_not_compared": len(stayed - tracking.compared.keys()),
        "console_users_without_mfa": {"fixed": tracking.mfa_fixed, "new": len(tracking.mfa_new)},
        "counts": tally(kinds, (change.change for change in tracking.changes)),
        "witnesses": Counter(change.witness for change in tracking.changes if change.witness),
        "maturity": {phase: level_changes(run, phase, maturity) for phase in PHASES},
        "max_key_age_days_then": earlier.max_key_age_days,
        "new_access_keys": [new_key_document(key, run) for key in new_keys(run)],
    }


def level_changes(run: Run, phase: str, maturity: Summary) -> dict[str, Any]:
    """The level of the accounts compared at their baselines, the organization's, and theirs now."""
    then, now = [], []
    for figures in run.audited:
        if earlier := run.tracking.compared.get(figures.account.id):
            then.append(earlier.accounts[figures.account.id].levels[PHASES.index(phase)])
            now.append(getattr(figures, phase))
    return {
        "then": LEVELS[min(then)] if then else None,
        "now": maturity[phase]["level"],
        "compared_now": min(now, key=LEVELS.index, default=None),
    }


def new_key_document(key: Change, run: Run) -> dict[str, Any]:
    return {
        "account_id": key.account_id,
        "account_name": key.account_name,
        "username": key.user,
        "access_key_id": key.key_id,
        "change": key.change,
        "account_compared": key.account_id in run.tracking.compared,
        "since": iso(key.since) if key.since else None,
        "witness": key.witness,
        "event_name": key.event.name if key.event else None,
        "event_time": iso(key.event.time) if key.event else None,
        "actor": key.event.actor if key.event else None,
    }


def cloudtrail_document(run: Run) -> dict[str, Any] | None:
    """How many events CloudTrail returned, and where it failed and why; None if not asked."""
    if run.plan.events_since is None:
        return None
    since = run.tracking.events_from
    return {
        "since": iso(since) if since else None,
        "out_of_reach": run.tracking.events_out_of_reach,
        "events": sum(len(trail.events) for _account, trail in run.trails),
        "unavailable": {account.id: trail.error for account, trail in run.trails if trail.error},
    }


def enforcement_document(run: Run) -> dict[str, Any]:
    """How many of the accounts in scope have each verdict of each control."""
    accounts = {}
    for control in CONTROLS:
        verdicts = (controls[control].verdict for controls in run.controls.values())
        accounts[control] = tally(VERDICTS, verdicts)
    return {
        "why_not_checked": run.enforcement.why_not or None,
        "accounts": accounts,
        "root_credentials_managed_centrally": run.enforcement.root_credentials_managed,
        "root_credentials_why_not_checked": run.enforcement.root_why_not or None,
    }


def account_entries(run: Run) -> list[dict[str, Any]]:
    """The accounts in scope, by ID."""
    entries = [account_entry(skipped.account, "skipped") for skipped in run.skipped]
    for failed in run.failed:
        entry = account_entry(failed.account, "failed")
        entry.update(step=failed.step, error={"code": failed.code, "message": failed.message})
        entry["production"] = is_production(failed.account, run.plan.production)
        entry["maturity"] = dict.fromkeys(PHASES, NOT_STARTED)
        entry["controls"] = controls_document(run.controls[failed.account.id])
        entries.append(entry)
    for figures in run.audited:
        entry = account_entry(figures.account, "audited")
        entry["report_generated"] = iso(figures.report_generated)
        entry.update(users=figures.users, root=figures.has_root, production=figures.production)
        entry["maturity"] = {"phase1": figures.phase1, "phase2": figures.phase2}
        entry["controls"] = controls_document(run.controls[figures.account.id])
        entry["gaps"] = gaps_document(figures.gaps, run.started)
        earlier = run.tracking.compared.get(figures.account.id)
        entry["since"] = iso(earlier.started) if earlier else None
        entries.append(entry)
    return sorted(entries, key=itemgetter("id"))


def account_entry(one: Account, result: str) -> dict[str, Any]:
    return {"id": one.id, "name": one.name, "path": one.path, "state": one.state, "result": result}


def controls_document(controls: Mapping[str, Control]) -> dict[str, Any]:
    document = {}
    for name, control in controls.items():
        policies = [{"id": each, "name": policy} for each, policy in control.policies.items()]
        document[name] = {**vars(control), "policies": policies}
    return document


def new_keys(run: Run) -> list[Change]:
    """The access keys created since the earlier run, with those that were deleted again."""
    kinds = ("access-key-created", CAME_AND_WENT)
    found = [change for change in run.tracking.changes if change.change in kinds]
    return sorted([*found, *run.tracking.new_keys_elsewhere], key=change_order)


# === Documents: what --print prints ==============================================================

DOCUMENTS = {
    "caller-policy": "IAM policy of the profile",
    "role-policy": "IAM policy of the role",
    "role-trust": "trust policy of the role",
    "role-template": "CloudFormation template of the role, for a StackSet",
    "scp-require-mfa": "service control policy: console users need MFA to act",
    "scp-deny-access-keys": "service control policy: no new long-term credentials",
    "alert-rule": "CloudFormation template: a message for each new credential",
}
DEFAULT_ROLE = "IAMAuditRole"
SCP_LONGEST = 10_240  # characters, including white space
# The caller's reads that IAM can limit: the Sid of their statement, and the ARNs
SCPS = "arn:*:organizations::*:policy/*service_control_policy/*"
LIMITED_READS = {
    **dict.fromkeys(POLICY_READS, ("ReadPolicies", SCPS)),
    "organizations:DescribeOrganizationalUnit": ("ReadOUs", "arn:*:organizations::*:ou/*"),
}
NEW_KEYS = (
    "iam:CreateAccessKey", "iam:CreateServiceSpecificCredential",
    "iam:ResetServiceSpecificCredential", "iam:UploadSigningCertificate",
    "iam:UploadSSHPublicKey")  # fmt: skip
NEW_PASSWORDS = ("iam:CreateLoginProfile", "iam:UpdateLoginProfile")


def print_document(name: str, role: str = DEFAULT_ROLE, exempt_roles: Sequence[str] = ()) -> str:
    """The text of one of DOCUMENTS: JSON, valid on its own."""
    reads = statement_of("Allow", "ReadIAM", ROLE_READS)
    role_policy = policy_of(reads, statement_of("Allow", "ReadCloudTrail", CLOUDTRAIL_READS))
    documents = {
        "caller-policy": caller_policy(role),
        "role-policy": role_policy,
        "role-trust": policy_of(grant({"AWS": "111122223333"}, "sts:AssumeRole")),  # AWS's example
        "role-template": role_template(role, role_policy),
        "scp-require-mfa": scp_require_mfa(),
        "scp-deny-access-keys": scp_deny_access_keys(exempt_roles),
        "alert-rule": alert_rule(),
    }
    return json.dumps(documents[name], indent=2) + "\n"


def caller_policy(role: str) -> dict[str, Any]:
    statements = dict[str, dict[str, Any]]()
    for read in CALLER_READS:
        sid, arns = LIMITED_READS.get(read, ("ReadOrganization", "*"))
        statements.setdefault(sid, statement_of("Allow", sid, (), arns))["Action"].append(read)
    role_arn = f"arn:*:iam::*:role/{role}"
    assume = statement_of("Allow", "AssumeAuditRole", ["sts:AssumeRole"], role_arn)
    return policy_of(*statements.values(), assume)


def role_template(role: str, role_policy: Mapping[str, Any]) -> dict[str, Any]:
    """CloudFormation for a StackSet: the role in every account, to be assumed from one account."""
    path, name = f"/{role}".rsplit("/", 1)
    account = {"AWS": {"Fn::Sub": "arn:${AWS::Partition}:iam::${AuditingAccountId}:root"}}
    external_id = {"StringEquals": {"sts:ExternalId": {"Ref": "ExternalId"}}}
    condition = {"Fn::If": ["HasExternalId", external_id, {"Ref": "AWS::NoValue"}]}
    trust = policy_of(grant(account, "sts:AssumeRole", Condition=condition))
    properties = {
        "RoleName": {"Ref": "RoleName"},
        "Path": f"{path}/",
        "Description": "Read by iam_audit.py: users, their credentials and MFA devices",
        "AssumeRolePolicyDocument": trust,
        "Policies": [{"PolicyName": "iam-audit", "PolicyDocument": role_policy}],
    }
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "The role that iam_audit.py assumes, read-only",
        "Parameters": {
            "RoleName": parameter("Name of the role", r"[\w+=,.@-]{1,64}", Default=name),
            "AuditingAccountId": parameter("Account that runs the audit", r"\d{12}"),
            "ExternalId": parameter(
                "--external-id, if any", r"([\w+=,.@:/-]{2,1224})?", Default=""
            ),
        },
        "Conditions": {"HasExternalId": {"Fn::Not": [{"Fn::Equals": [{"Ref": "ExternalId"}, ""]}]}},
        "Resources": {"Role": {"Type": "AWS::IAM::Role", "Properties": properties}},
    }


def scp_require_mfa() -> dict[str, Any]:
    condition = {
        "Bool": {"aws:MultiFactorAuthPresent": "false"},
        "BoolIfExists": {"aws:ViaAWSService": "false"},
        "ArnLike": {"aws:PrincipalArn": "arn:*:iam::*:user/*"},
    }
    statement = {"Sid": "DenyUsersWithoutMFA", "Effect": "Deny", "NotAction": list(MFA_SETUP)}
    return policy_of({**statement, "Resource": "*", "Condition": condition})


def scp_deny_access_keys(exempt_roles: Sequence[str]) -> dict[str, Any]:
    """No new keys for anybody. Passwords are denied to IAM users only: a root session recovers
    root's password with iam:CreateLoginProfile too."""
    exempt = [f"arn:*:iam::*:role/{role}" for role in exempt_roles]
    condition = {"Condition": {"ArnNotLike": {"aws:PrincipalArn": exempt}}} if exempt else {}
    passwords = statement_of("Deny", "DenyNewPasswords", NEW_PASSWORDS, "arn:*:iam::*:user/*")
    keys = statement_of("Deny", "DenyNewKeys", NEW_KEYS)
    return policy_of({**keys, **condition}, {**passwords, **condition})


def alert_rule() -> dict[str, Any]:
    """CloudFormation for us-east-1, where CloudTrail records IAM: a message for each event."""
    topic, email = {"Ref": "Topic"}, {"Protocol": "email", "Endpoint": {"Ref": "Email"}}
    # No condition on the rule's ARN: EventBridge does not support conditions in topic policies.
    publish = grant({"Service": "events.amazonaws.com"}, "sns:Publish", Resource=topic)
    policy = {"Topics": [topic], "PolicyDocument": policy_of(publish)}
    actions = (*NEW_KEYS, *NEW_PASSWORDS, "iam:DeactivateMFADevice")
    detail = {
        "eventSource": ["iam.amazonaws.com"],
        "eventName": [action.removeprefix("iam:") for action in actions],
        "errorCode": [{"exists": False}],
    }
    pattern = {"source": ["aws.iam"], "detail-type": ["AWS API Call via CloudTrail"]}
    rule = {
        "EventPattern": {**pattern, "detail": detail},
        "Targets": [{"Id": "Topic", "Arn": topic}],
    }
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "A message for each new credential or MFA deactivation (for us-east-1)",
        "Parameters": {"Email": parameter("Who gets the messages", r"[^@\s]+@[^@\s]+")},
        "Resources": {
            "Topic": {"Type": "AWS::SNS::Topic", "Properties": {"Subscription": [email]}},
            "TopicPolicy": {"Type": "AWS::SNS::TopicPolicy", "Properties": policy},
            "Rule": {"Type": "AWS::Events::Rule", "Properties": rule},
        },
    }


def parameter(description: str, pattern: str, **more: str) -> dict[str, str]:
    return {"Type": "String", "Description": description, "AllowedPattern": pattern, **more}


def policy_of(*statements: Mapping[str, Any]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": list(statements)}


def statement_of(effect: str, sid: str, actions: Iterable[str], arns: str = "*") -> dict[str, Any]:
    """IAM's reads of a user are allowed on * because a user who was just deleted has no ARN: IAM
    would answer AccessDenied where the audit expects NoSuchEntity."""
    return {"Sid": sid, "Effect": effect, "Action": list(actions), "Resource": arns}


def grant(principal: Mapping[str, Any], action: str, **more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Principal": principal, "Action": action, **more}


# === Options: the command line, its validators and help; the progress line =======================

# prod, prd, production or live as a word of its own (prod2 too), but not after no, non, not or pre
DEFAULT_PRODUCTION = (
    r"(?<![a-z0-9])(?<!(?<![a-z0-9])no[-_. ])(?<!(?<![a-z0-9])no[nt][-_. ])"
    r"(?<!(?<![a-z0-9])pre[-_. ])(?:prod|prd|production|live)[0-9]*(?![a-z0-9])"
)
DOCUMENT_LIST = "\n".join(f"  {name:<20}  {what}" for name, what in DOCUMENTS.items())
HELP_EPILOG = f"""\
examples:
  python iam_audit.py --profile mgmt-profile --role AWSControlTowerExecution
  python iam_audit.py --profile mgmt-profile --role audit/IAMAuditRole --ou ou-ab12-cdefgh34 --quiet

documents of --print:
{DOCUMENT_LIST}

exit codes:
  0    every account in scope was audited
  1    the audit could not start or finish
  2    the command line is wrong
  3    some accounts in scope could not be audited; all others were written
  4    what --fail-on names was found
  5    both 3 and 4
  130  interrupted (SIGINT); 143: terminated (SIGTERM); 129: hung up (SIGHUP)
"""


class FailOn(NamedTuple):
    """What ends with exit code 4 or 5: findings of `priority` or worse (0: none), new keys."""

    priority: int = 0
    new_keys: bool = False


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser()
    options = parser.parse_args(argv)
    if options.role is None and options.document is None:
        parser.error("the following arguments are required: --role")
    if options.exempt_role and options.document != "scp-deny-access-keys":
        parser.error("argument --exempt-role: it goes with --print scp-deny-access-keys")
    roles = "".join([*options.exempt_role, options.role or ""])
    if options.document and re.search(r"[*?$]", roles):
        what = "in a policy, * ? and $ in the path of a role would stand for other roles"
        parser.error(f"argument --print: {what}")
    if options.exempt_role:
        length = len(print_document(options.document, "", options.exempt_role))
        what = f"a policy of {length:,} characters, and an SCP has at most {SCP_LONGEST:,}"
        if length > SCP_LONGEST:
            parser.error(f"argument --exempt-role: {what}")
    if both := options.accounts & options.exclude:
        parser.error(f"argument --exclude: {', '.join(sorted(both))} is in --accounts too")
    if options.since and not options.cloudtrail:
        parser.error("argument --since: it goes with --cloudtrail")
    return options


def argument_parser() -> argparse.ArgumentParser:
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=TERMINAL_WIDTH)
    # fmt: off
    parser = argparse.ArgumentParser(
        prog="iam_audit.py", epilog=HELP_EPILOG, formatter_class=formatter, allow_abbrev=False,
        description="Write down every IAM user, password, access key and MFA device of an AWS "
                    "organization.")
    parser.add_argument("--version", action="version", version=f"iam-audit {VERSION}")
    add = parser.add_argument_group("access").add_argument
    add("--profile", metavar="NAME", type=parse_name,
        help="AWS profile of the management account or of a delegated administrator "
             "(default: the SDK's default credential chain)")
    add("--role", metavar="NAME", type=parse_role, help="role to assume in each account, required "
        "for an audit: a name, or a path and a name (audit/IAMAuditRole)")
    add("--external-id", metavar="ID", type=parse_external_id,
        help="external ID that the role's trust policy asks for")
    add = parser.add_argument_group("which accounts").add_argument
    add("--accounts", metavar="ID[,ID...]", type=parse_ids, default=frozenset(),
        help="audit only these accounts")
    add("--exclude", metavar="ID[,ID...]", type=parse_ids, default=frozenset(),
        help="leave these accounts out")
    add("--ou", metavar="OU_ID[,OU_ID...]", type=parse_ou_ids, default=frozenset(),
        help="audit only accounts below these organizational units")
    add("--include-management", action="store_true",
        help="audit the management account too: with the profile's own credentials if it is the "
             "profile's account, else through the role")
    add = parser.add_argument_group("pace").add_argument
    add("--workers", metavar="N", type=parse_workers, default=32,
        help="API requests in flight, 1 to 256 (default: %(default)s)")
    add("--report-timeout", metavar="SECONDS", type=parse_seconds, default=300.0,
        help="how long one account's credential report may take (default: 300)")
    add = parser.add_argument_group("what counts as a gap").add_argument
    add("--production", metavar="REGEX", type=parse_pattern, default=DEFAULT_PRODUCTION,
        help="what makes an account production: searched in its name, ID and organization path, "
             "upper or lower case (default: prod, prd, production or live as a word of its own)")
    add("--max-key-age", metavar="DAYS", type=parse_days, default="90",
        help="older active access keys are a gap (default: %(default)s)")
    add = parser.add_argument_group("what has changed").add_argument
    add("--previous", metavar="DIR", type=parse_folder, help="folder of the run to compare with "
        "(default: for each account, the newest finished one in --output-dir that audited it)")
    add("--cloudtrail", action="store_true", help="ask CloudTrail in each account who made the "
        "changes; the role then needs cloudtrail:LookupEvents")
    add("--since", metavar="DATE", type=parse_past_date, help="ask CloudTrail from this date on, "
        "2026-01-31 or 2026-01-31T12:00:00Z (default: since the run began that the account is "
        "compared with, or 30 days)")
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", metavar="DIR", type=parse_name, default="reports",
        help="where the run's own folder is made (default: %(default)s)")
    add("--fail-on", metavar="WHAT[,WHAT]", type=parse_fail_on, default=FailOn(),
        help="end with exit code 4 (5 if accounts failed too) if there are `findings`, or with "
             f"findings:N any of priority N or more urgent ({MOST_URGENT} to {LEAST_URGENT}), or "
             "with new-keys any access key created since the last audit of its account")
    add("-q", "--quiet", action="store_true",
        help="print nothing unless something needs attention (an account failed, say)")
    add("-v", "--verbose", action="store_true",
        help="a line an account and step on stderr; tracebacks")
    add = parser.add_argument_group("documents to deploy").add_argument
    add("--print", metavar="NAME", dest="document", choices=DOCUMENTS,
        help="print a document to deploy (see below), with --role filled in, and end")
    add("--exempt-role", metavar="NAME[,NAME...]", type=parse_roles, default=(),
        help="roles that --print scp-deny-access-keys lets create credentials")
    # fmt: on
    return parser


def matching(pattern: str, what: str, text: str) -> str:
    if not re.fullmatch(pattern, text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return text


def each_matching(kind: Callable[[Iterable[str]], T], pattern: str, what: str, text: str) -> T:
    """The parts of a comma-separated list, as a tuple or frozenset."""
    return kind(matching(pattern, what, part.strip()) for part in text.split(","))


def whole_number(most: int, what: str, text: str) -> int:
    number = int(matching(rf"\d{{1,{len(str(most))}}}", what, text))
    if not 1 <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


# Roles as ARNs end: https://docs.aws.amazon.com/IAM/latest/APIReference/API_CreateRole.html
# External IDs: https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html
# OUs: https://docs.aws.amazon.com/organizations/latest/APIReference/API_OrganizationalUnit.html
ROLE = r"(?!arn:)([!-.0-~]{1,510}/)*[\w+=,.@-]{1,64}"
A_ROLE = "a role's name or path and name (no ARN: the account differs)"
AN_EXTERNAL_ID = "an external ID (2 to 1224 of letters, digits and _+=,.@:/-)"
OU = (r"ou-[0-9a-z]{4,32}-[0-9a-z]{8,32}", "the ID of an organizational unit (ou-ab12-cdefgh34)")
parse_name = functools.partial(matching, r"(?s).+", "a name: it is empty")
parse_role = functools.partial(matching, ROLE, A_ROLE)
parse_roles = functools.partial(each_matching, tuple, ROLE, A_ROLE)
parse_external_id = functools.partial(matching, r"[\w+=,.@:/-]{2,1224}", AN_EXTERNAL_ID)
parse_ids = functools.partial(each_matching, frozenset, r"\d{12}", "an account ID of 12 digits")
parse_ou_ids = functools.partial(each_matching, frozenset, *OU)
parse_workers = functools.partial(whole_number, 256, "a number from 1 to 256")


def parse_days(text: str) -> timedelta:
    return timedelta(days=whole_number(9999, "a number of days from 1 to 9999", text))


def parse_seconds(text: str) -> float:
    seconds = float(matching(r"\d{1,6}(\.\d+)?", "a number of seconds", text))
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def parse_pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(parse_name(text), re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def parse_folder(text: str) -> Path:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return Path(text)


def parse_past_date(text: str) -> datetime:
    try:
        moment = parse_time(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2026-01-31") from None
    if moment > utc_now():
        raise argparse.ArgumentTypeError(f"{text!r} lies in the future")
    return moment


def parse_fail_on(text: str) -> FailOn:
    """Of several priorities, the least urgent one counts."""
    pattern = rf"findings(:[{MOST_URGENT}-{LEAST_URGENT}])?|new-keys"
    what = f"findings, findings:N with N from {MOST_URGENT} to {LEAST_URGENT}, or new-keys"
    priority, created = 0, False
    for word in each_matching(list[str], pattern, what, text):
        if word == "new-keys":
            created = True
        else:
            priority = max(priority, int(word.partition(":")[2] or LEAST_URGENT))
    return FailOn(priority, created)


class Status:
    """stderr: the progress line, if it is a terminal, and the lines of --verbose. If the stream is
    closed, or its reader has gone, these lines are lost and the run goes on."""

    def __init__(self, out: TextIO | None, progress: Progress, quiet: bool, verbose: bool) -> None:
        self._out, self._progress = out, progress
        self._verbose = verbose and out is not None
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        self._draws = out is not None and out.isatty() and not dumb and not quiet
        self._started = time.monotonic()

    def log(self, line: str) -> None:
        if self._verbose:
            self._write(f"{time.monotonic() - self._started:8.2f}s {printable(line)}\n")

    def warn(self, line: str) -> None:
        if self._out is not None:
            self._write(f"iam_audit.py: {printable(line)}; the run goes on.\n")

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Keep the progress line up to date meanwhile, and erase it at the end."""
        task = asyncio.create_task(self._keep_drawing())
        try:
            yield
        finally:
            task.cancel()
            if self._draws:
                self._write("")

    async def _keep_drawing(self) -> None:
        while self._draws and self._out is not None:
            columns = 80
            with contextlib.suppress(OSError):  # some terminals do not know their width and say 0
                columns = os.get_terminal_size(self._out.fileno()).columns or 80
            elapsed = time.monotonic() - self._started
            self._write(progress_line(self._progress, elapsed)[: columns - 1])
            await asyncio.sleep(0.2)

    def _write(self, text: str) -> None:
        """Write the text where the progress line is, if it is drawn."""
        if self._draws:
            text = "\r\x1b[K" + text
        try:
            print(text, end="", file=self._out, flush=True)
        except OSError:
            self._draws = self._verbose = False


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


if __name__ == "__main__":
    raise SystemExit(main())

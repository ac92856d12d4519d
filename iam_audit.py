#!/usr/bin/env python3
"""iam-audit: every long-term credential of an AWS organization, and what to do about it.

From a profile of the management account, or of a delegated administrator, it assumes a role in
every member account, reads the IAM credential report, users, access keys, API keys and policies,
and writes tables and a summary. It reads no secret values.

Reads   the AWS profile's credentials, as the SDK finds them;
        the files that --accounts @FILE, --exclude @FILE and --exceptions name;
        in OUTPUT_DIR or --previous DIR, summaries and tables of earlier runs, to compare with.
Writes  OUTPUT_DIR/<run>/: accounts/<account_id>.csv, credentials.csv, findings.csv, changes.csv (if
        there is an earlier run), events.csv (with --cloudtrail), report.html and, last,
        summary.json; files with mode 0600, folders 0700; OUTPUT_DIR/latest, a link to the run. The
        summary goes to stdout. With --print, a document goes to stdout and nothing else happens.

Every AWS action that the program can call:
  with the profile's credentials
    sts:GetCallerIdentity                who runs the audit, and in which partition
    organizations:DescribeOrganization   which account is the management account
    organizations:ListAccounts, DescribeOrganizationalUnit   the accounts, the names of their OUs
    organizations:ListPolicies, DescribePolicy, ListTargetsForPolicy   service control policies
    iam:ListOrganizationsFeatures        whether root credentials are managed centrally
    sts:AssumeRole                       the role, in the accounts that are audited
  with the assumed role; in the management account, with the profile if the profile belongs to it
    iam:GenerateCredentialReport, GetCredentialReport, ListUsers, ListAccessKeys, ListMFADevices,
    GetAccessKeyLastUsed, ListVirtualMFADevices, GetLoginProfile, ListServiceSpecificCredentials,
    GetAccountAuthorizationDetails; with --cloudtrail also cloudtrail:LookupEvents

GenerateCredentialReport makes IAM prepare a report; no other call changes anything in AWS. Every
session of the role has a policy that allows only the role's actions above: even an administrator
role is read-only here. The profile's own credentials are not restricted like this. To get
and refresh them, the SDK may call other services, run a credential_process (which is ended if it
hangs) and write its own token cache. The program itself never writes or logs credentials or puts
them on a command line. An account that cannot be read in full gets no CSV file: it is reported as
failed, with the reason. What the last two IAM actions read is reported as not checked if denied.

Sections, in reading order. To trust it with a role, read the run, AWS and audit: about 1,400 lines.
Nothing else opens a connection.
  run        the story, from the command line to the files, the summary and the exit code
  data       what several sections share: Account, User, Credential, the outcomes, Plan, Run
  AWS        permissions with their reasons; every network call, its credentials, pace and retries
  audit      one account, from AssumeRole to its users; all accounts concurrently
  files      rows, cells, atomic writing, reading a run back
  assess     gaps, maturity levels, the table of finding rules, exceptions
  track      what changed since an account's last audit, with CloudTrail as a witness
  enforce    what the organization's service control policies already prevent
  terminal   the summary as text and as summary.json
  page       report.html, a page that loads nothing
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
import base64
import bisect
import contextlib
import contextvars
import csv
import functools
import hashlib
import html
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
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime, timedelta, timezone
from fnmatch import fnmatchcase
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Union
from urllib.request import getproxies

import boto3
import botocore.exceptions
import botocore.session
import botocore.utils
from botocore.awsrequest import AWSHTTPSConnection, AWSHTTPSConnectionPool
from botocore.config import Config
from botocore.credentials import Credentials, RefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.parsers import ResponseParserError

# === Run: the story, from the command line to the files, the summary and the exit code ===========

EXIT_OK, EXIT_NOT_DONE, EXIT_USAGE = 0, 1, 2  # 2 is argparse's own
EXIT_ACCOUNTS_FAILED, EXIT_FAIL_ON, EXIT_FAILED_AND_FAIL_ON = 3, 4, 5
EXIT_SIGNAL = 128  # plus the signal's number, as in a shell

CLOUDTRAIL_FIRST_LOOK = timedelta(days=30)  # in an account without a baseline
FIRST_ACCOUNTS = 20  # a role that is denied in all of these probably has another name or trust
SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))  # for Windows


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
    except KeyboardInterrupt as stop:
        received = signal.Signals(stop.args[0])
        complain(f"iam_audit.py: stopped by {received.name}; the finished CSV files are kept.")
        return EXIT_SIGNAL + received
    except Exception as error:
        if options.verbose:
            complain("\n".join(frames_of(error)))
        complain(f"iam_audit.py: {printable(what_stopped_it(error))}")
        return EXIT_NOT_DONE


def run_audit(options: Any, started: datetime) -> int:
    """Audit the organization, write the files, print the summary."""
    folder = make_run_folder(Path(options.output_dir), started)
    try:
        aws = connect(open_session(options.profile), options.workers)
        organization = describe_organization(aws)
        history = History(finished_runs(folder.parent, started), organization.id)
        if options.retry_failed:
            options.scope = replace(options.scope, accounts=failed_before(history, options.quiet))
        tracking = open_tracking(history, options.previous, options.scope, started)
        plan = plan_of(options, aws.caller, organization, tracking, started)
        run = Run(started, folder, plan, aws.caller, organization, tracking, Enforcement())
        asyncio.run(audit_into(run, aws, options))
    except BaseException:
        with contextlib.suppress(OSError):  # it stays if it holds the CSV file of an account
            (folder / "accounts").rmdir()
            folder.rmdir()
        raise
    write_tables(run)
    summary = summary_document(run, utc_now())
    if plan.page:
        write_file(folder / "report.html", [report_page(run, summary)])
    write_file(folder / "summary.json", [json.dumps(summary, indent=2), "\n"])
    if (why_not := link_latest(folder)) and options.verbose:
        complain(f"iam_audit.py: {printable(why_not)}")
    show(terminal_summary(run, summary, options.quiet, **width_and_color()))
    return exit_code(run, options.fail_on)


def failed_before(history: History, quiet: bool) -> frozenset[str]:
    """The accounts that failed in the newest finished run. If there are none, the program ends."""
    no_run = AuditError("--retry-failed: no finished run of this organization in --output-dir.")
    newest = next(iter(history), no_run)
    if isinstance(newest, AuditError):
        raise newest
    failed = [one for one, account in newest.accounts.items() if account.result == "failed"]
    if not failed:
        show("" if quiet else f"No account failed in {newest.folder}: there is nothing to retry.\n")
        raise SystemExit(EXIT_OK)
    return frozenset(failed)


def plan_of(
    options: Any, caller: Caller, organization: Organization, tracking: Tracking, started: datetime
) -> Plan:
    """The options, resolved for this organization."""

    def events_since(account_id: str) -> datetime:
        """Find the account's baseline. CloudTrail is asked from --since on, else from that."""
        baseline = tracking.baselines[account_id] = baseline_of(tracking, account_id)
        wanted = options.since or baseline.since or started - CLOUDTRAIL_FIRST_LOOK
        since = max(wanted, started - CLOUDTRAIL_KEEPS)
        tracking.events_from = min(since, tracking.events_from or since)
        tracking.events_out_of_reach |= wanted < since
        return since

    own_account = caller.account if caller.account == organization.management_account else None
    policy = session_policy([*ROLE_READS, *(CLOUDTRAIL_READS if options.cloudtrail else ())])
    values = {**vars(options), "own_account": own_account, "session_policy": policy}
    values["event_names"] = EVENT_NAMES
    values["events_since"] = events_since if options.cloudtrail else None
    return Plan(**{each.name: values[each.name] for each in fields(Plan)})


async def audit_into(run: Run, aws: Aws, options: Any) -> None:
    """Audit the accounts side by side while the service control policies are read."""
    status = Status(run, options.quiet, options.verbose)

    def finish(outcome: Outcome) -> None:
        """Write the account's CSV file at once; nothing else keeps its users."""
        if isinstance(outcome, AuditedAccount):
            write_csv(account_csv(run.folder, outcome.account.id), CSV_COLUMNS, rows_of(outcome))
        keep(run, outcome)
        status.log(outcome_line(outcome))
        if isinstance(outcome, FailedAccount):
            warn_of_role(run, aws, status)

    enforcement = asyncio.create_task(read_enforcement(aws, run.organization))
    drawing = asyncio.create_task(status.draw())  # after an error, asyncio.run cancels it
    await audit_accounts(aws, run, finish, status.log)
    run.enforcement = await enforcement
    apply_enforcement(run)
    drawing.cancel()


def keep(run: Run, outcome: Outcome) -> None:
    if not isinstance(outcome, AuditedAccount):
        lists: dict[Any, list[Any]] = {FailedAccount: run.failed, SkippedAccount: run.skipped}
        lists.get(type(outcome), run.out_of_scope).append(outcome)
        return
    run.audited.append(assess(outcome, run.plan, run.started))
    run.credentials = run.credentials or Spool(run.folder / "credentials.csv")
    run.credentials.add(outcome.account.id, credential_rows(outcome, run.plan, run.started))
    findings = findings_of(outcome, run.plan, run.started)
    run.findings += track_account(run.tracking, outcome, findings)
    if outcome.trail is not None:
        run.trails.append((outcome.account, outcome.trail))


def warn_of_role(run: Run, aws: Aws, status: Status) -> None:
    """Once the first accounts have all failed with the same denial, say so."""
    causes = set(map(attrgetter("step", "code"), run.failed))
    just_now = len(run.failed) == FIRST_ACCOUNTS and not aws.role_assumed
    if just_now and causes == {("AssumeRole", "AccessDenied")}:
        wrong = f"the name of role {run.plan.role} or its trust policy is probably wrong"
        status.warn(f"AssumeRole was denied in all of the first {FIRST_ACCOUNTS} accounts: {wrong}")


def write_tables(run: Run) -> None:
    """Once all accounts are done: the levels that depend on policies, the organization's tables."""
    for index, figures in enumerate(run.audited):
        enforced = run.controls[figures.account.id][MFA_REQUIRED].verdict == ENFORCED
        if enforced and figures.phase1 == COMPLETE:
            run.audited[index] = figures._replace(phase1=ADVANCED)
    tracking, spool = run.tracking, run.credentials or Spool(run.folder / "credentials.csv")
    write_file(run.folder / "credentials.csv", spool.lines(CREDENTIALS_COLUMNS))
    run.findings.sort(key=most_urgent_first)
    rows = (finding_row(finding, run) for finding in run.findings)
    write_csv(run.folder / "findings.csv", FINDINGS_COLUMNS, rows)
    tracking.mfa_new.sort(key=change_order)
    tracking.urgent_new.sort(key=most_urgent_first)
    if tracking.earlier is not None:
        tracking.changes += accounts_that_came_or_left(run, tracking.earlier)
        tracking.changes.sort(key=change_order)
        write_csv(run.folder / "changes.csv", CHANGES_COLUMNS, map(change_row, tracking.changes))
    if run.plan.events_since is not None:
        write_csv(run.folder / "events.csv", EVENTS_COLUMNS, event_rows(run))


def exit_code(run: Run, fail_on: FailOn) -> int:
    found = any(one.priority <= fail_on.priority and not one.exception for one in run.findings)
    if fail_on.new_keys and (new_keys(run) or run.tracking.blind):
        found = True  # where no earlier run can be read, new keys cannot be ruled out
    if run.failed:
        return EXIT_FAILED_AND_FAIL_ON if found else EXIT_ACCOUNTS_FAILED
    return EXIT_FAIL_ON if found else EXIT_OK


def what_stopped_it(error: Exception) -> str:
    """One or two sentences: what failed and, where known, what to do about it."""
    if isinstance(error, (AuditError, StepFailed)):
        return str(error)
    if isinstance(error, SDK_ERRORS):
        return sdk_error_in_words(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or 'no file named'}"
    message = without_secrets(str(error))
    return f"Unexpected {type(error).__name__}: {message} (--verbose shows where)"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn a signal into KeyboardInterrupt with its number, after the event loop's tasks are
    cancelled. A signal that is ignored, as SIGHUP is under nohup, stays ignored."""
    received: list[int] = []

    def interrupt(signum: int, _frame: Any) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        received.append(signum)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise KeyboardInterrupt(signum) from None
        for task in asyncio.all_tasks(loop):
            loop.call_soon_threadsafe(task.cancel)

    handlers = dict(zip(SIGNALS, map(signal.getsignal, SIGNALS)))
    for each, handler in handlers.items():
        signal.signal(each, interrupt if handler != signal.SIG_IGN else handler)
    try:
        yield
    except asyncio.CancelledError:
        raise KeyboardInterrupt(received[0]) from None
    finally:
        if not received:  # otherwise all stay ignored while the interpreter shuts down
            for each, handler in handlers.items():
                signal.signal(each, handler)


def width_and_color() -> dict[str, Any]:
    """What stdout can show: 80 to 120 columns of a terminal, else 100 without colors."""
    width, terminal = columns_of(sys.stdout), sys.stdout is not None and sys.stdout.isatty()
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    width = min(max(80, width), 120) if width else TERMINAL_WIDTH
    return {"width": width, "color": terminal and not plain}


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
PASSWORD_SERVICES = {"codecommit.amazonaws.com", "cassandra.amazonaws.com"}  # the others: API keys
CLOUDTRAIL_KEEPS = timedelta(days=90)

T = TypeVar("T")
Log = Callable[[str], None]


@dataclass(frozen=True)
class Account:
    id: str
    name: str
    state: str
    path: str | None = None  # o-.../r-.../ou-.../ID/, its place; None if AWS did not give it
    email: str = ""
    ou: str = ""  # its OUs from the root down, Workloads/Prod; for a name that was not read, the ID


@dataclass(frozen=True)
class Credential:
    """A long-term credential other than a password."""

    id: str
    status: str
    created: datetime
    last_used: datetime | None  # of access keys only: None, with service_name N/A, means never
    service_name: str
    kind: str = ACCESS_KEY  # or another of KINDS
    expires: datetime | None = None  # access keys do not


@dataclass(frozen=True)
class User:
    name: str  # of an IAM user; ROOT is root's
    password: bool
    password_last_used: datetime | None  # None: there is no password, or it was never used
    mfa: tuple[str, ...]  # the kinds of their MFA devices
    keys: tuple[Credential, ...]  # access keys
    others: tuple[Credential, ...] = ()
    password_changed: datetime | None = None
    owner: str = ""  # a tag of the user or else the account's e-mail address
    administrator: str = UNKNOWN  # or true or false
    exposed: bool = False  # AWS has found one of their keys in public


# A successful IAM event: what `actor` did to `user`. `status` is what UpdateAccessKey set,
# `new_name` what UpdateUser set, `service_name` that of the service-specific credential created.
Event = namedtuple(
    "Event",
    "time name user key_id status actor source_ip user_agent id new_name service_name",
    defaults=("", ""),
)
# CloudTrail's events of one account, oldest first; why the lookup failed
Trail = namedtuple("Trail", "events error", defaults=((), ""))


@dataclass(frozen=True)
class AuditedAccount:
    account: Account  # it was read in full
    report_generated: datetime
    users: tuple[User, ...]  # root first, if it is in the report, then the users by name
    trail: Trail | None = None  # None: CloudTrail was not asked
    # Error codes by operation: denied without failing the account; what they read is unknown
    not_checked: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FailedAccount:
    account: Account  # it could not be read in full
    step: str  # the operation that failed
    code: str  # AWS's, as is the message
    message: str


@dataclass(frozen=True)
class SkippedAccount:
    account: Account  # in scope, but nobody can audit it, because its state is not ACTIVE


@dataclass(frozen=True)
class OutOfScopeAccount:
    account: Account  # the options leave it out


Outcome = Union[AuditedAccount, FailedAccount, SkippedAccount, OutOfScopeAccount]


@dataclass(frozen=True)
class Caller:
    account: str
    arn: str
    partition: str
    region: str  # that answered GetCallerIdentity


@dataclass(frozen=True)
class Organization:
    id: str
    management_account: str
    feature_set: str  # ALL, or CONSOLIDATED_BILLING, which has no policies


@dataclass(frozen=True)
class Scope:
    accounts: frozenset[str] = frozenset()  # empty: all
    exclude: frozenset[str] = frozenset()
    ous: frozenset[str] = frozenset()  # empty: all
    include_management: bool = False
    exclude_ous: frozenset[str] = frozenset()
    retry_failed: bool = False  # some of `accounts` may have left the organization


@dataclass(frozen=True)
class Plan:
    role: str
    external_id: str | None
    session_policy: str
    own_account: str | None  # read with the profile's own credentials, without the role
    scope: Scope
    workers: int
    report_timeout: float  # seconds
    production: re.Pattern[str]
    max_key_age: timedelta
    event_names: tuple[str, ...]  # what CloudTrail is asked for
    # From when on CloudTrail is asked in the account of that ID; None: it is not asked
    events_since: Callable[[str], datetime] | None
    max_unused: timedelta
    owner_tags: tuple[str, ...]
    exceptions: tuple[KnownException, ...]
    page: bool = True  # whether report.html is written


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
    ou_names: dict[str, str] = field(default_factory=dict)
    ous_why_not: str = ""  # why some OUs have no names
    credentials: Spool | None = None  # the rows of credentials.csv
    to_audit: int = 0  # how many accounts, as far as they are listed
    all_listed: bool = False


class AuditError(Exception):
    """The audit cannot start or go on. The text says what failed and what to do next."""


class StepFailed(Exception):
    """A call failed: the operation (or PROFILE_STEP), AWS's code, the message. `kind` is throttled
    (repeated at a slower pace), transient (repeated a few times) or final."""

    def __init__(self, step: str, code: str, message: str, kind: str = "final") -> None:
        super().__init__(f"{step}: {code}: {message}")
        self.step, self.code, self.message, self.kind = step, code, message, kind


def parse_time(text: str) -> datetime:
    """An ISO 8601 time in UTC. AWS writes `Z` or `+00:00`; Python parses `Z` only from 3.11 on."""
    moment = datetime.fromisoformat(f"{text[:-1]}+00:00" if text[-1:] in ("Z", "z") else text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
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
    shown = (char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return text if text.isprintable() else "".join(shown)


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
    "iam:GenerateCredentialReport": "makes IAM prepare the credential report; not a pure read",
    "iam:GetCredentialReport": "passwords, their last use, and the root user",
    "iam:ListUsers": "last use of passwords newer than the report; users, if details are denied",
    "iam:ListAccessKeys": "each user's access keys, their status and creation date",
    "iam:GetAccessKeyLastUsed": "when and for which service each access key was last used",
    "iam:ListMFADevices": "the kind of MFA device of each user who has a password or MFA",
    "iam:ListVirtualMFADevices": "whether root's MFA device is a virtual one",
    "iam:GetLoginProfile": "whether a user created after the report has a password",
    "iam:ListServiceSpecificCredentials": "the API keys and service passwords of all users",
    "iam:GetAccountAuthorizationDetails": "the current users, their tags, groups and policies",
}
CLOUDTRAIL_READS = {"cloudtrail:LookupEvents": "who changed users, credentials and MFA devices"}
CALLER_READS = {
    "sts:GetCallerIdentity": "the caller's account and partition (needs no permission)",
    "organizations:DescribeOrganization": "which account is the management account",
    "organizations:ListAccounts": "the accounts, their names, states and organizational units",
    "organizations:ListPolicies": "the service control policies (SCPs)",
    "organizations:DescribePolicy": "what an SCP says",
    "organizations:ListTargetsForPolicy": "where an SCP is attached",
    "organizations:DescribeOrganizationalUnit": "the names of organizational units (OUs)",
    "iam:ListOrganizationsFeatures": "whether root credentials are managed centrally",
}
POLICY_READS = ("organizations:DescribePolicy", "organizations:ListTargetsForPolicy")  # on one SCP
# What a user without MFA needs to set it up: what AWS's example policy for self-managed MFA devices
# leaves out of its Deny, a new password at the first sign-in, an MFA session for access keys.
MFA_SETUP = (
    "iam:ChangePassword", "iam:GetAccountPasswordPolicy", "iam:GetUser", "iam:ListMFADevices",
    "iam:GetMFADevice", "iam:ListVirtualMFADevices", "iam:CreateVirtualMFADevice",
    "iam:EnableMFADevice", "iam:ResyncMFADevice", "sts:GetSessionToken")  # fmt: skip
# Each partition's Region for IAM, where STS knows its credentials and CloudTrail records IAM
IAM_REGIONS = {"aws": "us-east-1", "aws-us-gov": "us-gov-west-1", "aws-cn": "cn-north-1"}

# --- the profile, its partition, the clients ---

TIMEOUTS = {"connect_timeout": 10, "read_timeout": 30}  # seconds
GUESS_TIMEOUT = 3  # seconds to connect to a guessed partition: a firewall may drop the packets
REFRESH_TIMEOUT = 60.0  # seconds for new credentials of the profile, once the audit runs
UNKNOWN_KEY = {"InvalidClientTokenId", "UnrecognizedClientException"}
# The profile's name, for advice on what keeps the program from starting
PROFILE: contextvars.ContextVar[str] = contextvars.ContextVar("PROFILE", default="default")


def open_session(profile: str | None) -> boto3.Session:
    """The SDK's session. Its credentials are resolved first, in case they require an MFA code."""
    core = botocore.session.Session(profile=profile)
    PROFILE.set(name := core.profile or "default")
    try:
        credentials = core.get_credentials()
        if credentials is None:
            raise botocore.exceptions.NoCredentialsError
        if credentials.method == "assume-role" and not any(map(os.isatty, (0, 1, 2))):
            refuse_mfa_code(core.full_config["profiles"], name)  # botocore may wait forever
        credentials.get_frozen_credentials()
    except (OSError, json.JSONDecodeError, KeyError) as error:  # a credential_process; a proxy
        why = {"provider": f"profile {name}", "error_msg": f"{type(error).__name__}: {error}"}
        raise botocore.exceptions.CredentialRetrievalError(**why) from error
    session = boto3.Session(botocore_session=core)
    # Built once: the SDK's own way, for each request, takes a fifth of the CPU time of a call.
    core.set_default_client_config(Config(user_agent=f"{core.user_agent()} iam-audit/{VERSION}"))
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=timestamp_of)
    AWSHTTPSConnectionPool.ConnectionCls = OneBundleConnection
    return session


class OneBundleConnection(AWSHTTPSConnection):
    """Loads the CA bundle into a client's SSL context once. urllib3 loads it for each connection,
    which takes 17 ms of CPU or more (its issue 3623). What is verified stays the same."""

    loading = threading.Lock()

    def connect(self) -> None:
        context, bundle = self.ssl_context, self.ca_certs
        # urllib3 also checks the certificate of a proxy that speaks TLS by `ca_certs`.
        if context and bundle and getattr(getattr(self, "proxy", 0), "scheme", "http") == "http":
            with self.loading, contextlib.suppress(OSError):  # then urllib3 reports the file
                if not context.cert_store_stats()["x509"]:
                    context.load_verify_locations(bundle)
                self.ca_certs = None
        super().connect()


def timestamp_of(value: Any) -> datetime:
    """IAM and STS send ISO 8601; botocore's parser guesses the format, ten times as slowly."""
    with contextlib.suppress(TypeError, ValueError):  # a number, another format
        return parse_time(value)
    return botocore.utils.parse_timestamp(value)


def refuse_mfa_code(profiles: Mapping[str, Any], name: str) -> None:
    """Raise AuditError if the profile, or one that it takes credentials from, asks for a code."""
    source = name
    for _ in profiles:  # none is its own source
        found = profiles.get(source, {})
        if {"role_arn", "mfa_serial"} <= found.keys():
            raise AuditError(
                f"Profile {name} asks for an MFA code (mfa_serial), and there is no terminal to "
                "type it on: run it from a terminal, or give cron a profile without mfa_serial."
            )
        source = found.get("source_profile", "")


def connect(session: boto3.Session, workers: int) -> Aws:
    """Identify the caller and create the clients for their partition."""
    # Without a Region, each partition is asked until one knows the access key.
    regions = [session.region_name] if session.region_name else list(IAM_REGIONS.values())
    credentials: Any = session.get_credentials()  # open_session has found some
    refusals, guess = list[Exception](), {"retries": 0, "connect_timeout": GUESS_TIMEOUT}
    for region in regions:
        sts = signed_client(session, "sts", region, **(guess if refusals else {"retries": 2}))
        try:
            identity = call_as(credentials, sts.get_caller_identity, {})
            account, arn = identity["Account"], identity["Arn"]
            return Aws(session, Caller(account, arn, arn.split(":")[1], region), workers)
        except SDK_ERRORS as error:
            answered = isinstance(error, ClientError)
            if step_failed("", error).code not in UNKNOWN_KEY and (answered or not refusals):
                raise
            refusals.append(error)
    raise refusals[0]


def frozen(credentials: Any) -> Credentials:
    """The credentials as they are now. If a refresh is due, the SDK does it: it may take long."""
    now = credentials.get_frozen_credentials()
    return Credentials(now.access_key, now.secret_key, now.token)


def signed_client(session: Any, service: Any, region: Any, retries: int = 0, **options: Any) -> Any:
    """A client without credentials: it can make calls only inside `call_as`, which signs them."""
    standard: Any = {"mode": "standard", "total_max_attempts": 1 + retries}
    config = Config(retries=standard, **{**TIMEOUTS, **options})
    none: Any = dict.fromkeys(("aws_access_key_id", "aws_secret_access_key"), "none")
    client: Any = session.client(service, region, config=config, **none)
    client.meta.events.register(f"before-sign.{service}", sign_as_set)
    return client


class Aws:
    """The SDK's clients, created once for all accounts, and the threads that make their calls."""

    def __init__(self, session: boto3.Session, caller: Caller, workers: int) -> None:
        self.session, self.caller, self.threads = session, caller, Threads(workers)
        home, iam_home = caller.region, IAM_REGIONS.get(caller.partition, caller.region)
        # AccountSession retries what is called for an account: botocore has one quota per client.
        most: Any = {"max_pool_connections": workers or MOST_THREADS}
        self.sts = signed_client(session, "sts", home, **most)
        self.iam = signed_client(session, "iam", home, **most)
        self.cloudtrail = signed_client(session, "cloudtrail", iam_home, **most)
        self.organizations = signed_client(session, "organizations", home, retries=9)
        self._refresh_failure, self.role_assumed = "", False  # in any account

    async def profile_credentials(self) -> Credentials:
        """The profile's own credentials. Raises StepFailed if they cannot be refreshed."""
        found: Any = self.session.get_credentials()
        if not isinstance(found, RefreshableCredentials) or not found.refresh_needed():
            return frozen(found)
        # It may hang, as a credential_process that waits for a person: then it is not tried again.
        if not self._refresh_failure:
            answer: asyncio.Future[Credentials] = asyncio.get_running_loop().create_future()
            work = (answer, functools.partial(frozen, found))
            threading.Thread(target=settle, args=work, daemon=True).start()
            try:
                return await asyncio.wait_for(answer, REFRESH_TIMEOUT)
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
            step = operation.__name__.title().replace("_", "")  # list_policies: ListPolicies
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
    """The calls for one account, which was begun as number `turn`: credentials, pace, retries."""

    def __init__(self, aws: Aws, account: Account, plan: Plan, turn: int, log: Log) -> None:
        self.aws, self.iam, self.account, self.plan = aws, aws.iam, account, plan
        self.log, self._turn, self._logged = log, turn, set[str]()
        self._pace, self._cloudtrail_pace = Pace(), Pace(least_gap=CLOUDTRAIL_GAP)
        self._renewal = asyncio.Lock()
        self._credentials: Credentials  # after sign_in

    async def sign_in(self) -> None:
        """Get credentials: the role's or, in the profile's own account, the profile's."""
        STEP.set(PROFILE_STEP)
        credentials = await self.aws.profile_credentials()
        if self.plan.own_account != self.account.id:
            arguments = {"aws": self.aws, "plan": self.plan, "account_id": self.account.id}
            credentials = await self._retry("AssumeRole", credentials, assume_role, arguments)
            self.aws.role_assumed = True
        self._credentials = credentials

    async def call(self, operation: Any, **parameters: Any) -> Any:
        """Call an operation of a shared client in this account; renew an expired session once."""
        step = operation.__self__.meta.method_to_api_mapping[operation.__name__]
        used = self._credentials
        try:
            return await self._retry(step, used, operation, parameters)
        except StepFailed as failure:
            if failure.code not in SESSION_EXPIRED:
                raise
        async with self._renewal:
            if self._credentials is used:  # no other call of this account has renewed it meanwhile
                await self.sign_in()
        return await self._retry(step, self._credentials, operation, parameters)

    async def _retry(self, step: str, credentials: Any, operation: Any, parameters: Any) -> Any:
        """Make a call in a thread until it is answered or a retry cannot help."""
        STEP.set(step)
        if step not in self._logged:
            self._logged.add(step)
            self.log(f"{self.account.id} {self.account.name}: {step}")
        rank, attempts = (step not in URGENT_STEPS, self._turn), 0
        request = functools.partial(call_as, credentials, operation, parameters)
        pace = self._cloudtrail_pace if step == "LookupEvents" else self._pace
        while True:
            await pace.wait()
            try:
                answer = await self.aws.threads.run(rank, request)
                pace.answered()
                return answer
            except SDK_ERRORS as error:
                failure = step_failed(step, error)
            if failure.kind == "throttled" and pace.throttled():
                continue
            attempts += 1
            if failure.kind != "transient" or attempts == TRANSIENT_ATTEMPTS:
                raise failure
            await asyncio.sleep(random.uniform(*FIRST_PAUSE) * 2 ** (attempts - 1))


def call_as(credentials: Any, operation: Callable[..., T], parameters: Any) -> T:
    """Call an operation with these credentials, in this thread."""
    before = SIGNING.set(credentials)
    try:
        return operation(**parameters)
    except KeyError as error:  # a part is missing: a proxy's page with status 200, for example
        raise ResponseParserError from error
    finally:
        SIGNING.reset(before)


def sign_as_set(request: Any, **_: Any) -> None:
    """Handler of `before-sign`: without `call_as` it raises LookupError, and nothing is sent."""
    signing = request.context.get("signing", {})
    request.context["signing"] = {**signing, "request_credentials": SIGNING.get()}


class Pace:
    """Spaces one account's calls as its throttling demands, in the event loop's thread."""

    # These balance where one call in eight is throttled, which uses all that the account allows.
    WIDEN, NARROW = 1.25, 0.97
    FIRST_GAP, LONGEST_GAP = 0.02, 5.0  # seconds
    PATIENCE = 900.0  # seconds without any answer but throttling

    def __init__(self, least_gap: float = 0.0) -> None:
        self._least_gap = self._gap = least_gap
        self._next = self._throttled_since = 0.0

    async def wait(self) -> None:
        start = max(time.monotonic(), self._next)
        self._next = start + self._gap
        if (pause := start - time.monotonic()) > 0:
            await asyncio.sleep(pause)

    def answered(self) -> None:
        self._throttled_since = 0.0
        self._gap = max(self._gap * self.NARROW, self._least_gap)

    def throttled(self) -> bool:
        """Slow down; False if the account has only throttled for too long."""
        now = time.monotonic()
        self._throttled_since = self._throttled_since or now
        self._gap = min(max(self._gap * self.WIDEN, self.FIRST_GAP), self.LONGEST_GAP)
        return now - self._throttled_since < self.PATIENCE


# --workers auto begins with FIRST_THREADS. Once calls have waited for a thread for WAITED seconds
# and the process used less than BUSY of one CPU meanwhile, it adds half as many threads again, or
# as many again if it used less than half of BUSY; never more than there are calls waiting. A
# throttled account's pauses hold no thread: refusals add none.
FIRST_THREADS, MOST_THREADS, WAITED, BUSY = 16, 256, 0.5, 0.85


class Threads:
    """Threads that make the calls, the most urgent first; a size of 0 is `--workers auto`."""

    def __init__(self, size: int) -> None:
        # The standard library's executor has no priorities, and at exit it waits for what hangs.
        self._calls, self._order = queue.PriorityQueue[Any](), itertools.count()
        self._automatic, self.size, self._unanswered = size == 0, 0, 0
        self._measured = time.monotonic(), time.process_time()
        # Python runs one thread at a time: on several CPUs a run costs a fifth more CPU and time.
        with contextlib.suppress(AttributeError, OSError):  # not on Linux; in some containers
            os.sched_setaffinity(0, {random.choice(tuple(os.sched_getaffinity(0)))})
        # A thread that waits for its turn asks for it this often, by default every 5 ms, for which
        # 256 of them use up to a fifth of the CPU. Calls give way whenever they wait for AWS.
        sys.setswitchinterval(0.02)
        for _ in range(size or FIRST_THREADS):
            self._start()

    async def run(self, rank: tuple[bool, int], call: Callable[[], T]) -> T:
        """Make a call in a thread when its turn has come; the lowest rank goes first."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.put((rank, next(self._order), call, answer))
        self._unanswered += 1
        try:
            if self._automatic:
                self._adapt()
            return await answer
        finally:
            self._unanswered -= 1

    def _adapt(self) -> None:
        """Add threads by the rule above. The time begins anew whenever no call waits."""
        now, cpu = time.monotonic(), time.process_time()
        seconds, used = now - self._measured[0], cpu - self._measured[1]
        waiting = self._unanswered - self.size
        if waiting > 0 and seconds < WAITED:
            return
        self._measured = now, cpu
        of_use = self.size if used < BUSY * seconds / 2 else self.size // 2
        if used < BUSY * seconds:
            for _ in range(min(of_use, waiting, MOST_THREADS - self.size)):  # none if negative
                self._start()

    def _start(self) -> None:
        self.size += 1
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            _, _, call, answer = self._calls.get()
            settle(answer, call)


def settle(answer: asyncio.Future[T], call: Callable[[], T]) -> None:
    """Make the call in this thread, unless nobody waits for the answer any more."""
    if answer.cancelled():
        return
    try:
        done = functools.partial(answer.set_result, call())
    except BaseException as error:  # it belongs to the caller, not to this thread
        done = functools.partial(answer.set_exception, error)
    with contextlib.suppress(RuntimeError):  # the event loop has ended
        answer.get_loop().call_soon_threadsafe(lambda: answer.cancelled() or done())


# --- operations with the profile's credentials, most of them called by `Aws.ask` ---


def describe_organization(aws: Aws) -> Organization:
    describe = aws.organizations.describe_organization
    found = call_as(aws.session.get_credentials(), lambda: describe()["Organization"], {})
    return Organization(found["Id"], found["MasterAccountId"], found.get("FeatureSet", "ALL"))


async def list_accounts(aws: Aws, found: Callable[[Account], None]) -> None:
    """Hand over all accounts, page by page as they arrive; a page may be empty."""
    pages = map(itemgetter("Accounts"), aws.organizations.get_paginator("list_accounts").paginate())
    seen, read_page = set[str](), functools.partial(next, pages, None)
    while True:
        request = functools.partial(call_as, await aws.profile_credentials(), read_page, {})
        entries = await aws.threads.run(FIRST, request)
        if entries is None:
            return
        for entry in entries:
            # An account that joins meanwhile may shift another to the next page.
            if entry["Id"] not in seen:
                seen.add(entry["Id"])
                found(account_of(entry))


def account_of(entry: Mapping[str, Any]) -> Account:
    """An entry of ListAccounts. State replaces Status, which AWS retired on 2026-09-09."""
    state = entry.get("State") or entry.get("Status")
    if not re.fullmatch("[0-9]{12}", entry["Id"]):  # it becomes the name of a file
        raise AuditError(f"ListAccounts gave {entry['Id']!r}, not an account ID of 12 digits.")
    if not state:
        raise sdk_too_old(f"State for account {entry['Id']}")
    paths = entry.get("Paths") or [None]
    return Account(entry["Id"], entry.get("Name", ""), state, paths[0], entry.get("Email", ""))


def sdk_too_old(what: str) -> AuditError:
    return AuditError(f"ListAccounts gave no {what}: upgrade botocore {botocore.__version__}.")


def list_policies(aws: Aws) -> list[tuple[str, str]]:
    """The ID and name of each service control policy."""
    pages = aws.organizations.get_paginator("list_policies")
    found = pages.paginate(Filter="SERVICE_CONTROL_POLICY").build_full_result()
    return list(map(itemgetter("Id", "Name"), found["Policies"]))


def describe_policy(aws: Aws, policy_id: str) -> str:
    """The policy's JSON text."""
    return str(aws.organizations.describe_policy(PolicyId=policy_id)["Policy"]["Content"])


def list_targets_for_policy(aws: Aws, policy_id: str) -> frozenset[str]:
    """The IDs of the root, organizational units and accounts that the policy is attached to."""
    pages = aws.organizations.get_paginator("list_targets_for_policy")
    found = pages.paginate(PolicyId=policy_id).build_full_result()
    return frozenset(map(itemgetter("TargetId"), found["Targets"]))


def describe_organizational_unit(aws: Aws, ou_id: str) -> str:
    """The name of the organizational unit."""
    answer = aws.organizations.describe_organizational_unit(OrganizationalUnitId=ou_id)
    return str(answer["OrganizationalUnit"]["Name"])


def list_organizations_features(aws: Aws) -> bool:
    """Whether root credentials of member accounts are managed centrally."""
    try:
        features = aws.iam.list_organizations_features()
        return "RootCredentialsManagement" in features.get("EnabledFeatures", [])
    except aws.iam.exceptions.ServiceAccessNotEnabledException:
        return False  # IAM has never had trusted access in this organization


def assume_role(aws: Aws, plan: Plan, account_id: str) -> Credentials:
    arn = f"arn:{aws.caller.partition}:iam::{account_id}:role/{plan.role}"
    request = {"RoleArn": arn, "RoleSessionName": "iam-audit", "Policy": plan.session_policy}
    if plan.external_id is not None:
        request["ExternalId"] = plan.external_id
    issued = aws.sts.assume_role(**request)["Credentials"]
    return Credentials(issued["AccessKeyId"], issued["SecretAccessKey"], issued["SessionToken"])


def session_policy(actions: Sequence[str]) -> str:
    """The policy of each session, which gets only what both the role and this policy allow."""
    statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]}, separators=(",", ":"))


# --- operations in one account ---

Entry = Mapping[str, Any]  # of a list, in AWS's words


async def list_all(session: AccountSession, call: Any, *lists: str, **request: Any) -> list[Entry]:
    """All entries of a list, or of several. botocore's paginators cannot go on after throttling."""
    marker = "NextToken" if call.__self__ is session.aws.cloudtrail else "Marker"
    entries: list[Entry] = []
    while True:
        page = await session.call(call, **request)
        for name in lists:
            entries += page[name] if name == lists[0] else page.get(name, ())
        if not page.get(marker):
            return entries
        request[marker] = page[marker]


async def generate_credential_report(session: AccountSession) -> str:
    answer: Any = await session.call(session.iam.generate_credential_report)
    return str(answer["State"])


async def get_credential_report(session: AccountSession) -> tuple[bytes, datetime]:
    """The report's CSV, and when it was generated."""
    answer = await session.call(session.iam.get_credential_report)
    return answer["Content"], answer["GeneratedTime"]


async def list_users(session: AccountSession) -> list[Entry]:
    return await list_all(session, session.iam.list_users, "Users", MaxItems=1000)


async def list_service_specific_credentials(session: AccountSession) -> dict[str, list[Credential]]:
    """The API keys and passwords for services of all users, by the user's name."""
    operation, name = session.iam.list_service_specific_credentials, "ServiceSpecificCredentials"
    found: dict[str, list[Credential]] = {}
    for entry in await list_all(session, operation, name, AllUsers=True, MaxItems=1000):
        service, expires = entry["ServiceName"], entry.get("ExpirationDate")
        kind = SERVICE_PASSWORD if service in PASSWORD_SERVICES else API_KEY
        created, expires = to_second(entry["CreateDate"]), expires and to_second(expires)
        known = (entry["ServiceSpecificCredentialId"], entry["Status"], created, None)
        found.setdefault(entry["UserName"], []).append(Credential(*known, service, kind, expires))
    return found


async def get_account_authorization_details(session: AccountSession) -> list[Entry]:
    """All users, with their tags, and groups, both with their policies decoded by botocore."""
    both, lists = ["User", "Group"], ("UserDetailList", "GroupDetailList")
    operation = session.iam.get_account_authorization_details
    return await list_all(session, operation, *lists, Filter=both, MaxItems=1000)


async def get_login_profile(session: AccountSession, user_name: str) -> bool:
    """Whether the user has a password. A deleted user has none; ListMFADevices then says so."""
    try:
        await session.call(session.iam.get_login_profile, UserName=user_name)
        return True
    except StepFailed as failure:
        if failure.code == NO_SUCH_ENTITY:
            return False
        raise


async def list_access_keys(session: AccountSession, name: str) -> list[Entry]:
    return await list_all(session, session.iam.list_access_keys, "AccessKeyMetadata", UserName=name)


async def get_access_key_last_used(session: AccountSession, key: str) -> tuple[Any, str]:
    """When the key was last used (None: never) and for which service (N/A: none)."""
    answer = await session.call(session.iam.get_access_key_last_used, AccessKeyId=key)
    last_used = answer["AccessKeyLastUsed"]
    if "LastUsedDate" not in last_used:
        return None, NOT_APPLICABLE
    return to_second(last_used["LastUsedDate"]), last_used["ServiceName"]


async def list_mfa_devices(session: AccountSession, name: str) -> list[str]:
    """The serial numbers of the user's MFA devices."""
    devices = await list_all(session, session.iam.list_mfa_devices, "MFADevices", UserName=name)
    return list(map(itemgetter("SerialNumber"), devices))


async def list_virtual_mfa_devices(session: AccountSession) -> list[str]:
    """The ARNs of the users, root included, to whom a virtual MFA device is assigned."""
    operation = session.iam.list_virtual_mfa_devices
    devices = await list_all(session, operation, "VirtualMFADevices", AssignmentStatus="Assigned")
    return [device.get("User", {}).get("Arn", "") for device in devices]


async def lookup_events(session: AccountSession, name: str, since: datetime) -> list[Event]:
    """The account's successful IAM events of that name."""
    by_name = [{"AttributeKey": "EventName", "AttributeValue": name}]
    request: Any = {"LookupAttributes": by_name, "StartTime": since, "MaxResults": 50}
    found = []
    for entry in await list_all(session, session.aws.cloudtrail.lookup_events, "Events", **request):
        record = json.loads(entry["CloudTrailEvent"])
        if record.get("recipientAccountId", session.account.id) != session.account.id:
            raise StepFailed("LookupEvents", "WrongAccount", "an event is of another account")
        event = event_of(record)
        if event is not None and event.time >= since:
            found.append(event)
    return found


def event_of(record: Mapping[str, Any]) -> Event | None:
    """The event of a CloudTrail record; None if the call failed or was not IAM's."""
    # See "CloudTrail record contents" in the CloudTrail User Guide. What LookupEvents itself names
    # is the caller's: what was acted on is in the request and the response.
    if record.get("errorCode") or not str(record.get("eventSource", "")).startswith("iam."):
        return None
    parts = ("userIdentity", "requestParameters", "responseElements")
    identity, request, response = (record.get(part) or {} for part in parts)
    key, certificate = response.get("accessKey"), response.get("certificate")
    created = key or response.get("serviceSpecificCredential") or certificate or {}
    told = {**created, **request}
    ids = ("accessKeyId", "serviceSpecificCredentialId", "certificateId")
    credential_id = next(filter(None, map(told.get, ids)), "")
    named = ROOT if request.get("userName") == "AWS ROOT USER" else request.get("userName")
    the_caller = ROOT if identity.get("type") == "Root" else identity.get("userName")
    user = named or the_caller or created.get("userName")
    actor = identity.get("arn") or identity.get("invokedBy") or identity.get("principalId")
    if str((identity.get("sessionContext") or {}).get("assumedRoot")).lower() == "true":
        actor = "root session (AssumeRoot)"  # the record does not identify the caller
    what = (record["eventName"], user, credential_id, request.get("status"))
    who = (actor, record.get("sourceIPAddress"), record.get("userAgent"), record.get("eventID"))
    more = (request.get("newUserName"), told.get("serviceName"))
    texts = (str(text or "") for text in (*what, *who, *more))  # in the order of Event
    return Event(to_second(parse_time(record["eventTime"])), *texts)


# --- errors ---

SDK_ERRORS = (ClientError, BotoCoreError, ResponseParserError)
TRANSIENT_ERRORS = (ResponseParserError, HTTPClientError, botocore.exceptions.ConnectionError)
THROTTLED = {"SlowDown", "RequestLimitExceeded", "TooManyRequestsException"}  # and *Throttl*, 429
DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"}
NO_SUCH_ENTITY = "NoSuchEntity"
TRANSIENT = {"RequestTimeout", "RequestTimeoutException", "PriorRequestNotComplete"}  # and 5xx
# What to do about an error at the start, by AWS's code (with its operation, if needed) or the SDK's
CANNOT_START = {
    "This is the profile's own role, not the audit role: its trust policy must allow the caller, "
    "and the caller's policy must allow sts:AssumeRole.": {"AssumeRole: AccessDenied"},
    "Use a profile of the management account or of a delegated administrator, with the permissions "
    "that README.md lists.": DENIED,
    "Use a profile whose account is in an organization.": {"AWSOrganizationsNotInUseException"},
    "Sign in again, for example with `aws sso login --profile {profile}`.": {
        "SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError",
        "UnauthorizedException", "LoginRefreshRequired", *SESSION_EXPIRED},
    "AWS does not accept this access key: check that it exists and is active, that the profile's "
    "Region is in its partition, and that a temporary key has its aws_session_token.": UNKNOWN_KEY,
    "Profile {profile} has none: sign in or add credentials to it, or name another profile with "
    "--profile or AWS_PROFILE.": {"NoCredentialsError"},
    "List the profiles that exist with `aws configure list-profiles`.": {"ProfileNotFound"},
    "Correct profile {profile}; check with `aws sts get-caller-identity --profile {profile}`.": {
        "PartialCredentialsError", "InvalidConfigError", "ConfigParseError",
        "CredentialRetrievalError", "InvalidRegionError"},
    "Check the network, HTTPS_PROXY and, if a proxy replaces certificates, AWS_CA_BUNDLE.": {
        "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "HTTPClientError",
        "ConnectionClosedError", "ProxyConnectionError", "SSLError", "ResponseParserError"},
}  # fmt: skip


def step_failed(step: str, error: Exception) -> StepFailed:
    """What an error of the SDK means: AWS's code and message, or the SDK's name for it and text."""
    code, message, status, kind = type(error).__name__, str(error), 0, "final"
    if isinstance(error, ClientError):
        told = error.response.get("Error", {})
        code, message = str(told.get("Code", "")), str(told.get("Message", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if not code or code.isdecimal() or isinstance(error, ResponseParserError):
        # A proxy's page, for example. botocore's text quotes it, which may hold credentials.
        code, message = "ResponseParserError", "AWS's answer could not be understood"
    if "Throttl" in code or code in THROTTLED or status == 429:
        kind = "throttled"
    elif code in TRANSIENT or status >= 500 or isinstance(error, TRANSIENT_ERRORS):
        kind = "transient"
    return StepFailed(step, code, without_secrets(message), kind)


def sdk_error_in_words(error: Exception) -> str:
    """What an error of the SDK at the start means, and what to do about it."""
    step = error.operation_name if isinstance(error, ClientError) else ""
    failure = step_failed(step, error)
    words = str(failure).removeprefix(": ")
    for advice, codes in CANNOT_START.items():
        if not codes.isdisjoint({failure.code, f"{step}: {failure.code}"}):
            return f"{words.rstrip(': .')}. {advice.format(profile=PROFILE.get())}"
    return words


def without_secrets(message: str) -> str:
    """An error message's first line without what looks like a signature or a session token."""
    # SignatureDoesNotMatch goes on to quote the signed request with the token.
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

# Accounts in hand; most of them wait for their report and hold no thread
ACCOUNTS_PER_WORKER, ACCOUNTS_IF_AUTO = 8, 256
# IAM throttles per account: more calls at a time gain nothing and disturb the account's owner.
READERS = 7  # per account; with the report's own, at most 8 calls at a time


async def audit_accounts(aws: Aws, run: Run, finish: Callable[[Outcome], None], log: Log) -> None:
    """Audit the accounts, the first of them while others are still being listed. `finish` gets each
    outcome as soon as there is one; if it raises, the audit ends with its error."""
    organization, plan, scope = run.organization, run.plan, run.plan.scope
    slots = asyncio.Semaphore(plan.workers * ACCOUNTS_PER_WORKER or ACCOUNTS_IF_AUTO)
    listed, tasks = list[Account](), list[asyncio.Task[None]]()
    naming, checked = asyncio.Lock(), asyncio.Event()
    if scope == Scope(include_management=scope.include_management):
        checked.set()  # otherwise all accounts must be known before the first is audited

    async def audit(account: Account, turn: int) -> None:
        await checked.wait()
        async with slots:
            session = AccountSession(aws, account, plan, turn, log)
            place = name_ous(aws, run, account, naming)
            ou, outcome = await asyncio.gather(place, audit_account(session))
            finish(replace(outcome, account=replace(account, ou=ou)))

    def found(account: Account) -> None:
        listed.append(account)
        if not in_scope(account, organization, scope):
            finish(OutOfScopeAccount(account))
        elif account.state != "ACTIVE":
            finish(SkippedAccount(account))
        else:
            run.to_audit += 1
            tasks.append(asyncio.create_task(audit(account, len(tasks))))

    await list_accounts(aws, found)
    run.all_listed = True
    check_scope(scope, organization, listed)
    checked.set()
    await asyncio.gather(*tasks)


def check_scope(scope: Scope, organization: Organization, accounts: Sequence[Account]) -> None:
    """Raise AuditError for what does not exist: without it, the audit would look complete."""
    known, named = set[str](), scope.accounts - scope.exclude
    for account in accounts:
        if account.path is None and (scope.ous or scope.exclude_ous):
            raise sdk_too_old("Paths for --ou and --exclude-ou")
        known.update((account.id, *(account.path or "").split("/")))
        if account.id in named and not in_scope(account, organization, scope):
            if account.id == organization.management_account and not scope.include_management:
                option = "--retry-failed" if scope.retry_failed else "--accounts"
                hint = "is the management account: add --include-management."
                raise AuditError(f"{option}: {account.id} {hint}")
            if not scope.retry_failed:
                raise AuditError(f"--accounts: {account.id} is left out by --ou or --exclude-ou")
    asked = {"--exclude": scope.exclude, "--ou": scope.ous, "--exclude-ou": scope.exclude_ous}
    if not scope.retry_failed:
        asked["--accounts"] = scope.accounts
    for option, ids in asked.items():
        if unknown := ", ".join(sorted(ids - known)):
            nobody = f"has no account {'below ' if option.endswith('ou') else ''}{unknown}"
            raise AuditError(f"{option}: organization {organization.id} {nobody}")


def in_scope(account: Account, organization: Organization, scope: Scope) -> bool:
    places = set((account.path or "").split("/"))
    return (
        (scope.include_management or account.id != organization.management_account)
        and (not scope.accounts or account.id in scope.accounts)
        and (not scope.ous or not scope.ous.isdisjoint(places))
        and account.id not in scope.exclude
        and scope.exclude_ous.isdisjoint(places)
    )


async def name_ous(aws: Aws, run: Run, account: Account, naming: asyncio.Lock) -> str:
    """The names of the account's OUs. Each OU is asked about once, and none after a failure: then
    their IDs stand in, and no account fails."""
    ou_ids = re.findall("ou-[^/]+", account.path or "")
    for ou_id in ou_ids:
        async with naming:
            try:
                if ou_id not in run.ou_names and not run.ous_why_not:
                    run.ou_names[ou_id] = await aws.ask(describe_organizational_unit, ou_id)
            except StepFailed as failure:
                run.ous_why_not = str(failure)
    return "/".join(run.ou_names.get(ou_id, ou_id) for ou_id in ou_ids)


async def audit_account(session: AccountSession) -> AuditedAccount | FailedAccount:
    """Read one account in full, or say why not. No error here stops the other accounts."""
    try:
        return await naming_step(session, read_account)
    except StepFailed as failure:
        return FailedAccount(session.account, failure.step, failure.code, failure.message)


async def naming_step(session: AccountSession, work: Callable[..., Awaitable[T]], *more: Any) -> T:
    """The result of the work. Any error becomes a StepFailed of the task's last operation."""
    try:
        return await work(session, *more)
    except StepFailed:
        raise
    except Exception as error:
        for line in frames_of(error):
            session.log(line)
        raise StepFailed(STEP.get(), type(error).__name__, without_secrets(str(error))) from None


async def read_account(session: AccountSession) -> AuditedAccount:
    """All users there are now, and root from the credential report."""
    await session.sign_in()
    # Nothing else is asked until IAM has accepted this: a role that may read nothing fails here.
    answer = await ask_for_report(session)
    # The users are read while IAM generates the report: only their passwords and MFA wait for it.
    report = asyncio.create_task(naming_step(session, wait_for_report, answer))
    try:
        users, denied = await read_users(session, report)
        generated, rows = await report
    finally:
        report.cancel()
        await asyncio.gather(report, return_exceptions=True)  # an earlier error takes precedence
    if ROOT in rows:
        users.insert(0, await read_root(session, rows[ROOT]))
    trail = await read_trail(session)
    return AuditedAccount(session.account, to_second(generated), tuple(users), trail, denied)


async def read_trail(session: AccountSession) -> Trail | None:
    """CloudTrail's events of the account. A refusal only leaves the changes unexplained."""
    if session.plan.events_since is None:
        return None
    events, since = [], session.plan.events_since(session.account.id)
    try:
        for name in session.plan.event_names:
            events += await lookup_events(session, name, since)
    except (StepFailed, KeyError, TypeError, AttributeError, ValueError) as error:
        damaged = f"LookupEvents: DamagedEvent: {type(error).__name__}"  # not as AWS documents it
        return Trail(error=str(error) if isinstance(error, StepFailed) else damaged)
    return Trail(tuple(sorted(events)))


# --- the credential report ---

# Seconds between two requests for a report; small reports take about two seconds.
REPORT_FIRST_PAUSE, REPORT_LONGEST_PAUSE, REPORT_PAUSE_GROWTH = 2.0, 10.0, 1.1
# botocore retries none of these, and rightly: they mean "not yet".
REPORT_NOT_YET = {"LimitExceeded", "ReportNotPresent", "ReportExpired", "ReportInProgress"}
ReportRow = Mapping[str, str]


class CredentialReport(NamedTuple):
    generated: datetime
    rows: Mapping[str, ReportRow]  # by user name


async def ask_for_report(session: AccountSession) -> CredentialReport | StepFailed:
    """The report, generated now if there is none; while it is not complete, what IAM said."""
    try:
        state = await generate_credential_report(session)
        if state != "COMPLETE":
            return StepFailed("GenerateCredentialReport", state, "")
        content, generated = await get_credential_report(session)
        return CredentialReport(generated, parse_report(content, session.account.id))
    except StepFailed as failure:
        if failure.code not in REPORT_NOT_YET:
            raise
        return failure


async def wait_for_report(
    session: AccountSession, answer: CredentialReport | StepFailed
) -> CredentialReport:
    """Ask for the report until it is complete. Raises StepFailed after `report_timeout` seconds."""
    timeout, pause = session.plan.report_timeout, REPORT_FIRST_PAUSE
    deadline = time.monotonic() + timeout
    while isinstance(answer, StepFailed):
        left = deadline - time.monotonic()
        if left <= 0:
            message = f"no credential report after {timeout:g} s: the last answer was {answer.code}"
            raise StepFailed(answer.step, "ReportTimeout", message)
        await asyncio.sleep(min(pause, left))
        pause = min(pause * REPORT_PAUSE_GROWTH, REPORT_LONGEST_PAUSE)
        answer = await ask_for_report(session)
    return answer


def parse_report(content: bytes, account_id: str) -> dict[str, ReportRow]:
    """The credential report's rows by user name; StepFailed if it is not one of this account."""
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise damaged_report(f"it is not a CSV file ({error})") from None
    if not rows or not {"user", "arn"} <= rows[0].keys():
        raise damaged_report("it has no rows, or not the columns user and arn")
    by_user: dict[str, ReportRow] = {}
    for row in rows:
        if None in row or None in row.values() or row["user"] in by_user:
            raise damaged_report(f"{row['user']} has two rows, or cells and columns do not match")
        check_account(row["arn"], account_id, "GetCredentialReport")
        by_user[row["user"]] = row
    return by_user


def damaged_report(why: str) -> StepFailed:
    message = f"the answer is not a credential report: {why}"
    return StepFailed("GetCredentialReport", "DamagedReport", message)


def check_account(arn: str, account_id: str, step: str) -> None:
    """Raise StepFailed for an ARN of another account: all accounts share one client."""
    if arn.split(":")[4:5] != [account_id]:
        raise StepFailed(step, "WrongAccount", f"the answer is about another account: {arn}")


def report_cell(row: ReportRow, column: str) -> Any:
    """A flag as bool, where the column's name says so; else a date, None if there is none."""
    text = row.get(column, "it lacks the column").lower()
    if column.endswith(("_active", "_enabled")):
        if text in {"true", "false", "not_supported"}:  # the last of root, who then has a password
            return text != "false"
    elif text in {"n/a", "no_information", "not_supported"}:
        return None
    else:
        with contextlib.suppress(ValueError):
            return to_second(parse_time(text))
    raise damaged_report(f"{column} of {row['user']} is {text!r}")


def report_password(row: ReportRow) -> tuple[bool, datetime | None, datetime | None]:
    """Whether there is a password, when it was last used, and when it was last changed."""
    if not report_cell(row, "password_enabled"):
        return False, None, None
    return True, report_cell(row, "password_last_used"), report_cell(row, "password_last_changed")


def report_credentials(row: ReportRow, kind: str) -> tuple[Credential, ...]:
    """Root's access keys, or anybody's signing certificates: they have slots in place of IDs."""
    is_key, found = kind == ACCESS_KEY, []
    for slot, credential_id in enumerate(ROOT_ACCESS_KEYS if is_key else CERTIFICATES, 1):
        prefix = f"access_key_{slot}" if is_key else f"cert_{slot}"
        status = "Active" if report_cell(row, f"{prefix}_active") else "Inactive"
        created = report_cell(row, f"{prefix}_last_rotated")
        last_used = report_cell(row, f"{prefix}_last_used_date") if is_key else None
        service = row[f"{prefix}_last_used_service"] if is_key else ""
        if created is not None:  # an empty slot is not active either
            found.append(Credential(credential_id, status, created, last_used, service, kind))
        elif status == "Active":
            raise damaged_report(f"{prefix} of {row['user']} is active and has no last_rotated")
    return in_order(found)


# --- users ---

CLOCK_SKEW = timedelta(minutes=15)  # AWS rejects signatures that differ more from its clock
# NoSuchEntity does not prove deletion: IAM is eventually consistent, users are renamed, keys move
# with them. What a later list still has is read again after these pauses; then the account fails.
READ_AGAIN_AFTER = (2.0, 3.0, 5.0)  # seconds
name_and_id = itemgetter("UserName", "UserId")  # either may be another user's later


class Lists(NamedTuple):
    users: Sequence[Entry]
    credentials: Mapping[str, Sequence[Credential]]  # by user name
    groups: Mapping[str, Entry]  # by name
    step: str  # the operation that listed the users; ListUsers tells nothing of their rights
    list_users: Callable[[], Awaitable[list[Entry]]]  # asked once, and only if it is needed
    denied: Mapping[str, str]  # AuditedAccount.not_checked


async def read_users(
    session: AccountSession, report: asyncio.Task[CredentialReport]
) -> tuple[list[User], Mapping[str, str]]:
    """The users there are now, by name, and what was denied. Whoever is listed is read until all of
    it is there, under their present name; whoever a later list lacks is gone."""
    read: dict[Any, User] = {}
    gone: StepFailed | None = None

    async def read_one(entry: Entry) -> None:
        nonlocal gone
        try:
            read[name_and_id(entry)] = await naming_step(session, read_user, entry, report, lists)
        except StepFailed as failure:
            # AWS may also answer AccessDenied for a key that is gone.
            of_key = failure.step == "GetAccessKeyLastUsed" and failure.code in DENIED
            if failure.code != NO_SUCH_ENTITY and not of_key:
                raise
            gone = failure

    for attempt, pause in enumerate((*READ_AGAIN_AFTER, None)):
        asked, gone = utc_now(), None
        lists = await read_lists(session)
        unread = [entry for entry in lists.users if name_and_id(entry) not in read]
        await side_by_side(READERS, unread, read_one)
        if gone is None:
            name = unlisted_user(lists, await report, asked)
            if name is None or (attempt and name not in lists.credentials):
                break
            gone = not_listed(lists.step, name)
        if pause is None or (attempt and gone.code in DENIED):
            raise gone
        await asyncio.sleep(pause)
    users = []
    for entry in sorted(lists.users, key=itemgetter("UserName")):
        users.append(complete(read[name_and_id(entry)], entry, lists, session.plan.owner_tags))
    return users, lists.denied


async def read_lists(session: AccountSession) -> Lists:
    """What is listed of all users at once. A role that may list no more than the users will do."""
    denied: dict[str, str] = {}

    async def unless_denied(operation: Callable[[AccountSession], Awaitable[T]]) -> T | None:
        try:
            return await operation(session)
        except StepFailed as failure:
            if failure.code not in DENIED:
                raise
            denied[failure.step] = failure.code
            return None

    @functools.lru_cache(None)
    def listing() -> asyncio.Task[list[Entry]]:
        return asyncio.create_task(naming_step(session, list_users))

    details = await unless_denied(get_account_authorization_details)
    step = "ListUsers" if details is None else "GetAccountAuthorizationDetails"
    entries = await listing() if details is None else details
    STEP.set(step)
    for entry in entries:
        check_account(entry["Arn"], session.account.id, step)
    users = [entry for entry in entries if "UserId" in entry]
    groups = {entry["GroupName"]: entry for entry in entries if "UserId" not in entry}
    credentials = await unless_denied(list_service_specific_credentials)
    return Lists(users, credentials or {}, groups, step, listing, denied)


def unlisted_user(lists: Lists, report: CredentialReport, asked: datetime) -> str | None:
    """A user who has a credential or is in a new report, but is missing from the list or has
    another user's date there: created or renamed in the meantime."""
    created = {entry["UserName"]: to_second(entry["CreateDate"]) for entry in lists.users}
    for name, credentials in lists.credentials.items():
        if name not in created or min(each.created for each in credentials) < created[name]:
            return name
    recent = asked - CLOCK_SKEW
    for name, row in report.rows.items():
        moment = report_cell(row, "user_creation_time")
        replaced = moment is not None and moment >= recent and moment != created.get(name)
        if report.generated >= recent and name != ROOT and (name not in created or replaced):
            return name
    return None


async def read_user(
    session: AccountSession, entry: Entry, report: asyncio.Task[CredentialReport], lists: Lists
) -> User:
    """One user, from live answers and the report; StepFailed (NoSuchEntity) if they are gone."""
    name, keys, mfa = entry["UserName"], list[Credential](), set[str]()
    for key in await list_access_keys(session, name):
        key_id, created = key["AccessKeyId"], to_second(key["CreateDate"])
        last_used, service = await get_access_key_last_used(session, key_id)
        keys.append(Credential(key_id, key["Status"], created, last_used, service))
    row = (await report).rows.get(name)
    if row and report_cell(row, "user_creation_time") == to_second(entry["CreateDate"]):
        password, last_used, changed = report_password(row)
        certificates = report_credentials(row, SIGNING_CERTIFICATE)
        may_have_mfa = report_cell(row, "mfa_active")
    else:  # created or renamed since the report
        password, may_have_mfa = await get_login_profile(session, name), True
        certificates = former_certificates(entry, await report, lists.users)
        last_used, changed = (await password_last_used(entry, lists) if password else None), None
    if password or may_have_mfa:
        mfa.update(map(mfa_kind, await list_mfa_devices(session, name)))
    who = (name, password, last_used, tuple(sorted(mfa)), in_order(keys), certificates, changed)
    return User(*who, session.account.email)


async def password_last_used(entry: Entry, lists: Lists) -> datetime | None:
    """When the password was last used, where the report does not say so."""
    for user in await lists.list_users():
        if name_and_id(user) == name_and_id(entry):
            return user.get("PasswordLastUsed")
    raise not_listed("ListUsers", entry["UserName"])


def not_listed(step: str, user_name: str) -> StepFailed:
    return StepFailed(step, NO_SUCH_ENTITY, f"it lacks {user_name}, which IAM still has")


def former_certificates(entry: Entry, report: CredentialReport, users: Sequence[Entry]) -> Any:
    """Those of a user renamed since the report: of the one row with their date and an old name."""
    created, former = to_second(entry["CreateDate"]), list[ReportRow]()
    listed = {ROOT, *map(itemgetter("UserName"), users)}
    for name in report.rows.keys() - listed if created <= report.generated else ():
        if report_cell(report.rows[name], "user_creation_time") == created:
            former.append(report.rows[name])
    return report_credentials(former[0], SIGNING_CERTIFICATE) if len(former) == 1 else ()


def in_order(credentials: Iterable[Credential]) -> tuple[Credential, ...]:
    return tuple(sorted(credentials, key=lambda one: (KINDS.index(one.kind), one.created, one.id)))


def mfa_kind(serial: str) -> str:
    """The kind of an MFA device by its serial number: see MFADevice in IAM's API reference."""
    if not serial.startswith("arn:"):
        return "Hardware"  # a TOTP token
    kinds = {"mfa": "Virtual", "u2f": "Security key", "sms-mfa": "SMS"}
    return kinds.get(serial.split(":", 5)[-1].partition("/")[0], "Unknown")


async def read_root(session: AccountSession, row: ReportRow) -> User:
    """Root as the report shows it. ListVirtualMFADevices is asked only if root has MFA."""
    no_console = session.aws.caller.partition == "aws-us-gov"  # nor has root MFA there
    password, last_used, changed = (False, None, None) if no_console else report_password(row)
    mfa: tuple[str, ...] = ()
    if report_cell(row, "mfa_active"):
        # A role cannot list root's other devices: what is not virtual is a token or a security key.
        virtual = row["arn"] in await list_virtual_mfa_devices(session)
        mfa = ("Virtual",) if virtual else ("Hardware",)
    keys, others = report_credentials(row, ACCESS_KEY), report_credentials(row, SIGNING_CERTIFICATE)
    email = session.account.email
    return User(ROOT, password, last_used, mfa, keys, others, changed, email, "true")


# --- who a user is ---

FULL_ACCESS = {"policy/AdministratorAccess", "policy/IAMFullAccess"}  # AWS's own
QUARANTINE = ":aws:policy/AWSCompromisedKeyQuarantine"  # ...V2, ...V3


def complete(user: User, entry: Entry, lists: Lists, owner_tags: Sequence[str]) -> User:
    """The user with what the lists say of them."""
    others = in_order((*user.others, *lists.credentials.get(user.name, ())))
    if lists.step == "ListUsers":
        return replace(user, others=others)
    tags = {tag["Key"]: tag["Value"] for tag in entry.get("Tags", ())}
    owner = next(filter(None, map(tags.get, owner_tags)), user.owner)
    attached = map(itemgetter("PolicyArn"), entry.get("AttachedManagedPolicies", ()))
    exposed, rights = any(QUARANTINE in arn for arn in attached), administrator(entry, lists.groups)
    return replace(user, others=others, owner=owner, administrator=rights, exposed=exposed)


def administrator(user: Entry, groups: Mapping[str, Entry]) -> str:
    """Whether an Allow lets the user do everything in IAM: true, false or unknown. Conditions, Deny
    statements and boundaries do not count: they seldom stop an administrator."""
    verdict, statements = "false", list[Entry]()
    for holder in (user, *map(groups.get, user.get("GroupList", ()))):
        if holder is None:  # a group that is younger than the answer's page of groups
            verdict = UNKNOWN
            continue
        for policy in holder.get("AttachedManagedPolicies", ()):
            owner, name = policy["PolicyArn"].split(":")[4:6]
            if owner == "aws" and name in FULL_ACCESS:
                return "true"
            verdict = verdict if owner == "aws" else UNKNOWN
        for policy in (*holder.get("UserPolicyList", ()), *holder.get("GroupPolicyList", ())):
            if isinstance(document := policy["PolicyDocument"], dict):
                found = document["Statement"]
                statements += found if isinstance(found, list) else [found]
            else:  # botocore could not decode it
                verdict = UNKNOWN
    of_iam = user["Arn"].partition("user/")[0]
    return "true" if any(allows_all_of_iam(one, of_iam) for one in statements) else verdict


def allows_all_of_iam(statement: Entry, of_iam: str) -> bool:
    """`of_iam` is how the ARNs of all resources in IAM begin."""
    for element, beginning in (("Action", "iam:"), ("Resource", of_iam)):
        negated, applies = f"Not{element}" in statement, False
        values = statement.get(f"Not{element}" if negated else element, ())
        for value in [values] if isinstance(values, str) else values:
            fixed = re.split(r"[*?$]", value.lower())[0]  # up to a wildcard or variable
            overlaps = beginning.startswith(fixed) or fixed.startswith(beginning)
            includes = fnmatchcase(beginning + "\0" * 99, value.lower().replace("[", "[[]"))
            applies |= overlaps if negated else includes  # to exclude a part of IAM is enough
        if applies == negated:
            return False
    return bool(statement["Effect"] == "Allow")


# === Files: rows, cells, atomic writing, reading a run back ======================================

PASSWORD, PASSWORD_SET, PASSWORD_NOT_SET = "password", "Configurada", "No configurada"
NEVER_USED = {PASSWORD: "Nunca", ACCESS_KEY: "Nunca utilizada"}  # others: unknown
NO_MFA = "None"
AccountRow = namedtuple(
    "AccountRow",
    "account_id account_name username password_status password_last_used access_key_id status "
    "created_date last_used_date service_name mfa_status",
)
CSV_COLUMNS = AccountRow._fields
# Where a spreadsheet may begin a formula: in many countries it splits rows at semicolons.
CELL_START, FORMULA = r"(?<![^;,\t\r\n])", r"(?='*[=+\-@\t\r])"
PLAIN = re.compile(r"(?![=+\-@'])[^;,\t\r\n\"]*")  # needs neither an apostrophe nor quotes


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


def link_latest(folder: Path) -> str:
    """Make `latest`, beside the run's folder, a link to it; if that cannot be, say why."""
    link, temporary = folder.with_name("latest"), folder.with_name(f".latest.{folder.name}")
    try:
        os.symlink(folder.name, temporary)
        os.replace(temporary, link)
        return ""
    except OSError as error:
        temporary.unlink(missing_ok=True)
        return f"There is no link {link} to this run: {error.strerror or error}"


def account_csv(folder: Path, account_id: str) -> Path:
    return folder / "accounts" / f"{account_id}.csv"


def rows_of(audited: AuditedAccount) -> Iterator[AccountRow]:
    """One row for each access key, one for a user without keys."""
    for user in audited.users:
        last = used_cell(PASSWORD, user.password_last_used)
        password = (PASSWORD_SET, last) if user.password else (PASSWORD_NOT_SET, NOT_APPLICABLE)
        whose = (audited.account.id, audited.account.name, user.name, *password)
        mfa = "+".join(user.mfa) or NO_MFA
        for key in user.keys:
            last = used_cell(ACCESS_KEY, key.last_used)
            of_key = (key.id, key.status, iso(key.created), last, key.service_name)
            yield AccountRow._make((*whose, *of_key, mfa))
        if not user.keys:
            yield AccountRow._make((*whose, *[NOT_APPLICABLE] * 5, mfa))


def used_cell(kind: str, used: datetime | None) -> str:
    return iso(used) if used else NEVER_USED.get(kind, "")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    write_file(path, map(csv_line, itertools.chain([columns], rows)))


class Spool:
    """Rows that come account by account, for a CSV file in the order of IDs; most wait on disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._places = path, list[tuple[str, int, int]]()
        self._file = tempfile.SpooledTemporaryFile(1_000_000, dir=str(path.parent))  # noqa: SIM115

    def add(self, account_id: str, rows: Iterable[Sequence[str]]) -> None:
        lines = "".join(map(csv_line, rows)).encode("utf-8", "backslashreplace")
        self._places.append((account_id, self._file.tell(), len(lines)))
        with blaming(f"write {self._path}"):
            self._file.write(lines)

    def lines(self, columns: Sequence[str]) -> Iterator[str]:
        yield csv_line(columns)
        with self._file:
            for _account_id, start, length in sorted(self._places):
                self._file.seek(start)
                yield self._file.read(length).decode("utf-8")


def csv_line(row: Sequence[str]) -> str:
    return ",".join(map(quoted, row)) + "\n"  # LF, as grep and awk expect


def quoted(cell: str) -> str:
    """The cell, neutral and, if anybody may split it, in quotes. csv.writer ignores semicolons."""
    if PLAIN.fullmatch(cell):  # seven times as fast, and nearly all are
        return cell
    cell = neutral(cell)
    return '"' + cell.replace('"', '""') + '"' if re.search('[;,\t\r\n"]', cell) else cell


def neutral(cell: str) -> str:
    """With an apostrophe before each formula, and before such an apostrophe of the cell's own."""
    return re.sub(CELL_START + FORMULA, "'", cell)


def original(cell: str) -> str:
    return re.sub(f"{CELL_START}'{FORMULA}", "", cell) if "'" in cell else cell


def write_file(path: Path, parts: Iterable[str]) -> None:
    """In full or not at all: the file is written beside its place, as 0600, then renamed."""
    with blaming(f"write {path}"):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:  # backslashreplace: half a character in a user agent must not cost the file
            with open(handle, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                file.writelines(parts)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


KeyState = namedtuple("KeyState", "status created kind", defaults=[ACCESS_KEY])


class UserState(NamedTuple):  # what is compared of a user between two runs
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
BAD_TYPES = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
DAMAGE = (OSError, csv.Error, *BAD_TYPES)


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
    except OSError as error:
        return not isinstance(error, (FileNotFoundError, NotADirectoryError))
    return True


def reading(path: Path) -> contextlib.AbstractContextManager[None]:
    return blaming(f"read the earlier run's {path}", DAMAGE)


@contextlib.contextmanager
def blaming(what: str, kinds: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Errors of these kinds become an AuditError that says what cannot be done, and why."""
    try:
        yield
    except kinds as error:
        why = getattr(error, "strerror", None) or error
        if isinstance(error, KeyError):
            why = f"it lacks {error}"
        raise AuditError(f"Cannot {what}: {why}") from None


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary.json of a finished run; to be called in `reading`."""
    text = regular(folder / "summary.json").read_bytes().decode("utf-8")
    summary: dict[str, Any] = json.loads(text)
    if summary["tool"] != "iam-audit" or summary["format"] not in (1, SUMMARY_FORMAT):
        raise ValueError(f"it is not of format 1 or {SUMMARY_FORMAT}")
    return summary


def regular(path: Path) -> Path:
    """The path, or ValueError: opening a FIFO would hang, and a device may have no end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is not a regular file")
    return path


def read_states(path: Path, account_id: str) -> dict[str, UserState]:
    """The users in an earlier run's CSV of this account. Raises AuditError if it is damaged."""
    found = []
    with reading(path):
        text = regular(path).read_bytes().decode("utf-8")
        if not text.endswith("\n"):
            raise ValueError("it does not end with a line feed")
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        if tuple(next(rows)) != CSV_COLUMNS:
            raise ValueError("its header is not that of an account's CSV")
        for number, cells in enumerate(rows, 2):
            row = AccountRow._make(map(original, cells))
            known = row.password_status in (PASSWORD_SET, PASSWORD_NOT_SET)
            if row.account_id != account_id or not (known and row.status and row.mfa_status):
                raise ValueError(f"row {number} is not one of account {account_id}")
            found.append(row)
    return states_of(found)


def states_of(rows: Iterable[AccountRow]) -> dict[str, UserState]:
    states: dict[str, UserState] = {}
    for row in rows:
        state = states.setdefault(row.username, UserState(row.password_status, row.mfa_status, {}))
        if row.access_key_id != NOT_APPLICABLE:
            state.keys[row.access_key_id] = KeyState(row.status, row.created_date)
    return states


# === Assess: gaps, maturity levels, what to fix first; pure, the clock is an argument ============

USER, KEY_PAIR, INACTIVE_KEY = "user", "pair", f"inactive {ACCESS_KEY}"
ACTIVE_KEY, ACTIVE_API_KEY, ACTIVE_SERVICE, ACTIVE_CERTIFICATE = (f"active {it}" for it in KINDS)
DAYS_30, DAYS_90, ONE_YEAR = timedelta(days=30), timedelta(days=90), timedelta(days=365)
NEVER, NO_TIME = timedelta.max, timedelta(0)
# What gaps and rules judge: a user, their password, their active access keys if there are two, or
# one credential, `key`. A password is as old as its last change, two keys are as the younger one.
# `unused` is the time since the last use; NEVER: a key that was never used. Unknown: NO_TIME.
Case = namedtuple("Case", "about user root no_mfa production max_unused age too_old unused key")


def cases_of(user: User, production: bool, plan: Plan, now: datetime) -> Iterator[Case]:
    whose, unknown = (user, user.name == ROOT, not user.mfa), (NO_TIME, False, NO_TIME, None)
    of_user = Case(USER, *whose, production, plan.max_unused, *unknown)
    yield of_user
    if user.password:
        changed = user.password_changed or now
        last = user.password_last_used or changed
        yield of_user._replace(about=PASSWORD, age=now - changed, unused=now - last)
    ages = [now - key.created for key in user.keys if is_active(key.status)]
    if len(ages) > 1:
        yield of_user._replace(about=KEY_PAIR, age=min(ages))
    for key in (*user.keys, *user.others):
        about = f"{'active' if is_active(key.status) else 'inactive'} {key.kind}"
        age, unused = now - key.created, now - key.last_used if key.last_used else NEVER
        facts = {"age": age, "too_old": age > plan.max_key_age, "unused": unused}
        yield of_user._replace(about=about, key=key, **facts)


OldestKey = namedtuple("OldestKey", "created account_id account_name username access_key_id")
KEY_AGES = ("< 30 days", "< 90 days", "< 180 days", "< 1 year", "< 2 years", "< 5 years", "older")
KEY_AGE_DAYS = (30, 90, 180, 365, 2 * 365, 5 * 365)


def counting(about: str, where: Callable[[Case], bool] = lambda _: True, or_about: str = "") -> Any:
    """A field of Gaps: the number of cases about this for which `where` holds."""
    return field(default=0, metadata={"about": (about, or_about), "where": where})


@dataclass(frozen=True)
class Gaps:
    """Long-term credentials, counted, per account or in all. Root counts as a user."""

    console_users: int = counting(PASSWORD)
    console_users_without_mfa: int = counting(PASSWORD, lambda it: it.no_mfa)
    access_keys: int = counting(ACTIVE_KEY, or_about=INACTIVE_KEY)
    active_keys: int = counting(ACTIVE_KEY)
    inactive_keys: int = counting(INACTIVE_KEY, lambda it: it.key.status == "Inactive")
    expired_keys: int = counting(INACTIVE_KEY, lambda it: it.key.status == "Expired")
    active_keys_older_than_max_age: int = counting(ACTIVE_KEY, lambda it: it.too_old)
    active_keys_older_than_1_year: int = counting(ACTIVE_KEY, lambda it: it.age > ONE_YEAR)
    active_keys_never_used: int = counting(ACTIVE_KEY, lambda it: it.unused == NEVER)
    active_keys_not_used_for_90_days: int = counting(
        ACTIVE_KEY, lambda it: DAYS_90 < it.unused < NEVER
    )
    active_keys_used_within_30_days: int = counting(ACTIVE_KEY, lambda it: it.unused <= DAYS_30)
    root_access_keys: int = counting(ACTIVE_KEY, lambda it: it.root, INACTIVE_KEY)
    users_with_two_active_keys: int = counting(KEY_PAIR)
    active_api_keys: int = counting(ACTIVE_API_KEY)
    active_api_keys_without_expiry: int = counting(ACTIVE_API_KEY, lambda it: not it.key.expires)
    active_api_keys_older_than_max_age: int = counting(ACTIVE_API_KEY, lambda it: it.too_old)
    active_service_passwords: int = counting(ACTIVE_SERVICE)
    active_signing_certificates: int = counting(ACTIVE_CERTIFICATE)
    active_key_ages: tuple[int, ...] = (0,) * len(KEY_AGES)  # of access keys
    oldest_active_key: OldestKey | None = None

    @property
    def mfa_coverage_percent(self) -> float | None:
        """Console users with MFA, rounded down so that 100 means all; None if there are none."""
        covered = self.console_users - self.console_users_without_mfa
        return 1000 * covered // self.console_users / 10 if self.console_users else None


GAP_COUNTS = {one.name: one.metadata for one in fields(Gaps) if one.metadata}
# AWS Security Maturity Model v2, lowest level first
LEVELS = ("Not Started", "In Progress", "Complete", "Advanced")
NOT_STARTED, IN_PROGRESS, COMPLETE, ADVANCED = LEVELS
PHASES = ("phase1", "phase2")
# What is kept of an audited account once its CSV is written: an Account, Gaps, the levels, ...
AccountFigures = namedtuple(
    "AccountFigures",
    "account report_generated has_root users production gaps phase1 phase2 not_checked",
)


def assess(audited: AuditedAccount, plan: Plan, now: datetime) -> AccountFigures:
    """Count the account's users and credentials, and judge it by them."""
    account, ages, keys = audited.account, [0] * len(KEY_AGES), []
    numbers: dict[str, Any] = dict.fromkeys(GAP_COUNTS, 0)
    for user in audited.users:
        for case in cases_of(user, False, plan, now):
            for name, counts in GAP_COUNTS.items():
                numbers[name] += case.about in counts["about"] and counts["where"](case)
            if case.about == ACTIVE_KEY:
                ages[bisect.bisect_right(KEY_AGE_DAYS, case.age.days)] += 1
                where = (account.id, account.name, user.name)
                keys.append(OldestKey(case.key.created, *where, case.key.id))
    gaps = Gaps(**numbers, active_key_ages=tuple(ages), oldest_active_key=min(keys, default=None))
    has_root = any(user.name == ROOT for user in audited.users)
    users, production = len(audited.users) - has_root, is_production(account, plan.production)
    phase1 = IN_PROGRESS if gaps.console_users_without_mfa else COMPLETE  # for more, see the run
    phase2 = phase2_level(gaps, "ListServiceSpecificCredentials" not in audited.not_checked)
    what = (account, audited.report_generated, has_root, users, production, gaps)
    return AccountFigures(*what, phase1, phase2, audited.not_checked)


def is_production(account: Account, pattern: re.Pattern[str]) -> bool:
    """Whether the account's name, ID, path in the organization or OUs' names say so."""
    return any(map(pattern.search, (account.name, account.id, account.path or "", account.ou)))


def phase2_level(gaps: Gaps, api_keys_known: bool) -> str:
    """Use temporary credentials; at most Complete where API keys could not be read."""
    old = gaps.active_keys_older_than_max_age + gaps.active_api_keys_older_than_max_age
    if old or gaps.active_api_keys_without_expiry:
        return IN_PROGRESS
    others = gaps.active_service_passwords + gaps.active_signing_certificates
    left = gaps.active_keys + gaps.active_api_keys + others
    return COMPLETE if left or not api_keys_known else ADVANCED


def organization_level(levels: Iterable[str], failed: int) -> str:
    """The lowest level of the audited accounts; at most In Progress if accounts failed."""
    lowest = min(levels, key=LEVELS.index, default=NOT_STARTED)
    return IN_PROGRESS if failed and lowest in (COMPLETE, ADVANCED) else lowest


def total_gaps(accounts: Iterable[AccountFigures]) -> Gaps:
    found = list(map(attrgetter("gaps"), accounts))
    total: dict[str, Any] = {name: sum(map(attrgetter(name), found)) for name in GAP_COUNTS}
    ages = zip(Gaps.active_key_ages, *map(attrgetter("active_key_ages"), found))
    oldest = min(filter(None, map(attrgetter("oldest_active_key"), found)), default=None)
    return Gaps(**total, active_key_ages=tuple(map(sum, ages)), oldest_active_key=oldest)


CREDENTIALS_COLUMNS = tuple(
    "account_id account_name account_email ou production username owner administrator kind "
    "credential_id status created_date age_days last_used_date unused_days service_name expires "
    "mfa_status".split()
)
FLAGS = {True: "true", False: "false", None: ""}
NEVER_EXPIRES = {API_KEY: "never", SERVICE_PASSWORD: "never"}  # others cannot expire


def credential_rows(audited: AuditedAccount, plan: Plan, now: datetime) -> Iterator[Sequence[str]]:
    """The account's rows of credentials.csv: of each user the password, then all other kinds."""
    account = audited.account
    production = FLAGS[is_production(account, plan.production)]
    where = (account.id, account.name, account.email, account.ou, production)
    for user in audited.users:
        mfa, credentials = "+".join(user.mfa) or NO_MFA, [*user.keys, *user.others]
        if user.password:
            facts: Any = (user.password_changed, user.password_last_used, "", PASSWORD)
            credentials.insert(0, Credential("", PASSWORD_SET, *facts))
        for one in credentials:
            made, used = iso(one.created) if one.created else "", used_cell(one.kind, one.last_used)
            since = (one.last_used or one.created) if one.kind in NEVER_USED else None
            age = str(days_between(one.created, now)) if one.created else ""
            unused = str(days_between(since, now)) if since else ""
            expires = iso(one.expires) if one.expires else NEVER_EXPIRES.get(one.kind, "")
            yield (
                *(*where, user.name, user.owner, user.administrator, one.kind, one.id, one.status),
                *(made, age, used, unused, one.service_name, expires, mfa),
            )


FINDINGS_COLUMNS = tuple(
    "priority finding account_id account_name production username access_key_id age_days "
    "last_used_date service_name reasons recommendation owner administrator ou older_than_max_age "
    "controls new exception until".split()
)
# A reason for the finding of this name; {words} in `reason` and `advice` are filled in on output.
# `controls_of` chooses from `controls`.
Rule = namedtuple("Rule", "name priority about applies reason advice controls", defaults=("", ()))
# fmt: off
OF_ROOT = {"1.3", "1.4", "IAM.4", "IAM.9"}  # the other controls are about IAM users
NO_ROOT_KEY, ROTATED, IN_USE = ("1.3", "IAM.4"), ("1.13", "IAM.3"), ("1.11", "IAM.8", "IAM.22")
REMOVE = "`aws iam delete-login-profile {user}` in account {account}."
ADD_MFA = f"Have the user register an MFA device or use a role and remove the password: {REMOVE}"
MOVE = "move what uses it to temporary credentials (an IAM role), then "
DEACTIVATE = (
    "deactivate it: `aws iam update-{name} {user} {key} --status=Inactive` in account {account}"
)
LIST_KEYS = "`aws iam list-access-keys {user}`"
KEEP_ONE = f"keep one key ({LIST_KEYS}): move what uses the other one to it, then {DEACTIVATE}."
FOLLOW_CASE = (
    f"follow AWS's support case: replace each of the user's keys ({LIST_KEYS}), {DEACTIVATE}, look "
    "in CloudTrail for what they were used for, and only then detach the quarantine policy."
)
DEACTIVATE_UNUSED = f"{DEACTIVATE}; delete it once you know that nothing uses it."
REPLACE = f"{MOVE}{DEACTIVATE}; finally `aws iam delete-{{name}} {{user}} {{key}}`."
REPLACE_CERTIFICATE = f"find its ID: `aws iam list-signing-certificates {{user}}`. {REPLACE}"
ASK_OWNER = f"ask its owner what it is for, then {DEACTIVATE}."
FIND_OUT = f"find out what used it last, then {DEACTIVATE}."
DELETE = "delete it: `aws iam delete-{name} {user} {key}` in account {account}."
# Without root's own sign-in only AssumeRoot can do it, and only in a member account:
# https://docs.aws.amazon.com/IAM/latest/UserGuide/id_root-user-privileged-task.html
ASSUME_ROOT = (
    "with the session that `aws sts assume-root --target-principal {account} --task-policy-arn "
    "arn=arn:{partition}:iam::aws:policy/root-task/IAMDeleteRootUserCredentials` gives (it "
    "requires centralized root access): `aws iam "
)
ROOT_PASSWORD = f"delete root's password (or add MFA as root) {ASSUME_ROOT}delete-login-profile`."
ROOT_KEY = f"delete root's {{kind}} {ASSUME_ROOT}list-{{name}}s`, then `aws iam delete-{{name}}`."
SIGN_IN = "sign in as root of the management account (a role cannot do that there) and "
# What a rule is about is one finding, named by the most urgent rule that applies. All rules that
# apply are its reasons, in this order. The advice is that of the first that has any: what to do
# about an old key depends on its use.
RULES = (
    Rule("exposed-credential", 1, USER, lambda it: it.user.exposed,
         "AWS found one of the user's keys in public", FOLLOW_CASE),
    Rule("root-access-key", 1, ACTIVE_KEY, lambda it: it.root, "active root access key",
         controls=NO_ROOT_KEY),
    Rule("console-without-mfa", 4, PASSWORD, lambda it: it.no_mfa, "console user without MFA",
         ADD_MFA, ("1.9", "IAM.5", "IAM.19", "1.4", "IAM.9")),
    Rule("console-without-mfa", 4, PASSWORD, lambda it: it.no_mfa and it.root, "root"),
    Rule("console-without-mfa", 1, PASSWORD, lambda it: it.no_mfa and it.production, "production"),
    Rule("unused-password", 5, PASSWORD, lambda it: it.unused > it.max_unused and not it.root,
         "not used for {max_unused} days", f"remove the password: {REMOVE}", IN_USE),
    Rule("key-older-than-1-year", 2, ACTIVE_KEY, lambda it: it.age > ONE_YEAR, "older than 1 year",
         controls=ROTATED),
    Rule("key-in-use", 3, ACTIVE_KEY, lambda it: it.unused <= DAYS_30, "used within 30 days",
         REPLACE),
    Rule("unused-key", 5, ACTIVE_KEY, lambda it: it.age > it.max_unused and it.unused == NEVER,
         "never used", DEACTIVATE_UNUSED, IN_USE),  # a younger one may yet be used
    Rule("unused-key", 5, ACTIVE_KEY, lambda it: it.age > it.max_unused < it.unused < NEVER,
         "not used for {max_unused} days", DEACTIVATE_UNUSED, IN_USE),
    Rule("key-older-than-90-days", 6, ACTIVE_KEY, lambda it: it.too_old,
         "older than {max_key_age} days", controls=ROTATED),
    Rule("two-active-keys", 6, KEY_PAIR, lambda it: it.age > DAYS_30 and not it.root,
         "two active keys, both older than 30 days", KEEP_ONE, ("1.12",)),
    Rule("inactive-root-access-key", 2, INACTIVE_KEY, lambda it: it.root, "{status} root key",
         controls=NO_ROOT_KEY),
    Rule("inactive-key", 7, INACTIVE_KEY, lambda it: not it.root, "{status}", DELETE),
    Rule("api-key-without-expiry", 2, ACTIVE_API_KEY, lambda it: not it.key.expires,
         "API key that never expires", REPLACE),
    Rule("api-key", 3, ACTIVE_API_KEY, lambda it: it.key.expires, "API key", REPLACE),
    Rule("service-password", 5, ACTIVE_SERVICE, lambda _: True, "password for a service", REPLACE),
    Rule("root-signing-certificate", 2, ACTIVE_CERTIFICATE, lambda it: it.root, "root certificate"),
    Rule("signing-certificate", 5, ACTIVE_CERTIFICATE, lambda it: not it.root,
         "active signing certificate", REPLACE_CERTIFICATE),
)
# fmt: on
# One thing to fix, with all rules that apply; `key` is None for a user, their password or two keys,
# `new` if nobody knows. With an `exception` it does not count for --fail-on and --quiet.
Finding = namedtuple(
    "Finding",
    "priority finding account production user key rules age password_last_used owner administrator "
    "new exception",
    defaults=(NO_TIME, None, "", UNKNOWN, None, None),
)
# A row of an --exceptions file: what it covers (* stands for any, and N/A for no credential, as in
# findings.csv), through which day (UTC), why, and in which line it ends
KnownException = namedtuple(
    "KnownException", "account_id username credential_id finding until reason line"
)
EXCEPTION_CELLS = {
    "account_id": (r"\d{12}|\*", "an account ID of 12 digits, or *"),
    "username": (".+", "a user's name, or *"),
    "credential_id": (".+", "a credential's ID, N/A, or *"),
    "finding": ("|".join({rule.name: "" for rule in RULES}) + r"|\*", "a finding's name, or *"),
    "until": (r"\d{4}-\d\d-\d\d", "a date such as 2026-12-31"),
    "reason": (".+", "a reason"),
}


def findings_of(audited: AuditedAccount, plan: Plan, now: datetime) -> Iterator[Finding]:
    account, production = audited.account, is_production(audited.account, plan.production)
    today, ids = now.date(), ("*", account.id)
    exceptions = [one for one in plan.exceptions if one.account_id in ids and one.until >= today]
    exceptions.sort(key=attrgetter("until"))
    for user in audited.users:
        for case in cases_of(user, production, plan, now):
            rules = tuple(rule for rule in RULES if rule.about == case.about and rule.applies(case))
            if not rules:
                continue
            first = min(rules, key=attrgetter("priority"))
            what = (first.priority, first.name, account, production, user.name, case.key, rules)
            whose = (case.age, user.password_last_used, user.owner, user.administrator)
            finding = Finding(*what, *whose)
            for one in exceptions:  # the one that lasts longest covers
                if is_excepted(finding, one):
                    finding = finding._replace(exception=one)
            yield finding


def is_excepted(finding: Finding, one: KnownException) -> bool:
    """Whether this exception covers the finding, if it has not expired."""
    key_id = finding.key.id if finding.key else NOT_APPLICABLE
    about = (finding.account.id, finding.user, key_id, finding.finding)
    return all(cell in ("*", its) for cell, its in zip(one, about))  # its first four


def most_urgent_first(finding: Finding) -> tuple[Any, ...]:
    """What no exception covers, by priority; production, then administrators, then the oldest.
    Exposed credentials, which have no age, come before those that have one."""
    rank = (finding.exception is not None, finding.priority, not finding.production)
    not_exposed = finding.finding != "exposed-credential"
    oldest = (finding.administrator != "true", not_exposed, -finding.age, finding.account.id)
    return (*rank, *oldest, finding.user, finding.key.id if finding.key else "", finding.finding)


def finding_row(finding: Finding, run: Run) -> tuple[str, ...]:
    """The finding's row in findings.csv."""
    account, key, plan, covered = finding.account, finding.key, run.plan, finding.exception
    key_id, age, used, service, old = NOT_APPLICABLE, "", NOT_APPLICABLE, NOT_APPLICABLE, False
    if key:
        key_id, service, old = key.id, key.service_name, finding.age > plan.max_key_age
        age, used = str(max(0, finding.age.days)), used_cell(key.kind, key.last_used)
    elif finding.rules[0].about == PASSWORD:
        used = used_cell(PASSWORD, finding.password_last_used)
    return (
        *(str(finding.priority), finding.finding, account.id, account.name),
        *(FLAGS[finding.production], finding.user, key_id, age, used, service),
        *("; ".join(reasons_of(finding, plan)), recommendation(finding, run), finding.owner),
        *(finding.administrator, account.ou, FLAGS[old], controls_of(finding, plan)),
        *(FLAGS[finding.new], *((covered.reason, str(covered.until)) if covered else ("", ""))),
    )


def reasons_of(finding: Finding, plan: Plan) -> list[str]:
    status = finding.key.status if finding.key else ""
    words = {"max_key_age": plan.max_key_age.days, "max_unused": plan.max_unused.days}
    reasons = [rule.reason.format(**words, status=status.lower()) for rule in finding.rules]
    if status not in ("", "Active", "Inactive", "Expired"):
        reasons.append(f"status {status}")
    return reasons


def controls_of(finding: Finding, plan: Plan) -> str:
    """The controls of CIS AWS Foundations 5.0 and Security Hub that the finding fails. One with a
    number of days is named if the option has that number, so that all that fail it are findings.
    https://docs.aws.amazon.com/securityhub/latest/userguide/iam-controls.html"""
    old, unused = plan.max_key_age.days, plan.max_unused.days
    other_days = {"1.13": old != 90, "IAM.3": old != 90, "1.11": unused < 45}
    other_days.update({"IAM.8": unused != 90, "IAM.22": unused != 45})
    failed: dict[str, list[str]] = {"CIS 5.0": [], "Security Hub": []}
    for control in dict.fromkeys(itertools.chain(*(rule.controls for rule in finding.rules))):
        if (control in OF_ROOT) == (finding.user == ROOT) and not other_days.get(control):
            failed["Security Hub" if control.startswith("IAM") else "CIS 5.0"].append(control)
    return "; ".join(f"{name}: {', '.join(ids)}" for name, ids in failed.items() if ids)


def recommendation(finding: Finding, run: Run) -> str:
    """The next step, with the AWS CLI command for it, its arguments quoted for a shell."""
    key, advised = finding.key, [rule.advice for rule in finding.rules if rule.advice]
    advice: str = [*advised, FIND_OUT if key and key.last_used else ASK_OWNER][0]
    if finding.user == ROOT:
        advice = ROOT_KEY if key else ROOT_PASSWORD
        if finding.account.id == run.organization.management_account:
            advice = SIGN_IN + ("delete the {kind}." if key else "register an MFA device.")
        if REPLACE in advised:  # the key is in use
            advice = MOVE + advice
    user = f"--user-name={shlex.quote(printable(finding.user))}"
    user = re.sub(",(?=[=+@-])", r",\\", user)  # else `neutral` puts an apostrophe into a command
    name, key_id = key.kind if key else ACCESS_KEY, "ID"  # ID: `aws iam list` tells it
    if key and key.kind != SIGNING_CERTIFICATE:
        key_id = shlex.quote(printable(key.id))
    if name in NEVER_EXPIRES:
        name = "service-specific-credential"
    words = {"account": finding.account.id, "partition": run.caller.partition, "user": user}
    option = f"--{name.replace('signing-', '')}-id={key_id}"
    words.update(name=name, kind=name.replace("-", " "), key=option)
    return (advice[0].upper() + advice[1:]).format_map(words)


def parse_exceptions(text: str) -> tuple[KnownException, ...]:
    """The rows of an --exceptions file. Raises AuditError with the line and cell at fault."""
    rows, exceptions, where = csv.reader(io.StringIO(text, newline=""), strict=True), [], ""
    try:
        if (header := next(rows, [])) != [*EXCEPTION_CELLS]:
            raise ValueError(f"{','.join(header)!r} is not {','.join(EXCEPTION_CELLS)}")
        for cells in filter(any, rows):  # spreadsheets leave empty rows at the end
            if len(cells) != len(EXCEPTION_CELLS):
                raise ValueError(f"it has {len(cells)} cells, not {len(EXCEPTION_CELLS)}")
            row: dict[str, Any] = {"line": rows.line_num}
            for cell, (column, (pattern, what)) in zip(cells, EXCEPTION_CELLS.items()):
                where, row[column] = f"{column} {cell!r}: ", original(cell.strip())
                if not re.fullmatch(pattern, row[column], re.ASCII | re.DOTALL):
                    raise ValueError(f"it is not {what}")
                if column == "until":
                    row[column] = date.fromisoformat(row[column])
            exceptions.append(KnownException(**row))
            where = ""
    except (csv.Error, ValueError) as error:
        raise AuditError(f"line {max(1, rows.line_num)}: {where}{error}") from None
    return tuple(exceptions)


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
API_KEY_CAME_AND_WENT = "api-key-came-and-went"
NEW_KEY_CHANGES = ("access-key-created", "api-key-created", CAME_AND_WENT, API_KEY_CAME_AND_WENT)
LISTING, KINDS_LISTED = "ListServiceSpecificCredentials", (API_KEY, SERVICE_PASSWORD)
WITHOUT_ID = {"", NOT_APPLICABLE, *ROOT_ACCESS_KEYS, *CERTIFICATES}
RUNS_KEPT = 60  # in summary.json, this one included
RUNS_SEARCHED = 30  # earlier runs, for those of the same scope: each costs some 40 ms
# The present name (or the last), the earlier one, and the user then and now, if they were there
Person = tuple[str, str, "UserState | None", "UserState | None"]
RUN_GAPS = ("console_users_without_mfa", "active_keys", "active_keys_older_than_max_age")
# A row of changes.csv. `witness` is confirmed, contradicted, not found, unavailable or, without
# CloudTrail, empty; `since` is when the run began that the account is compared with.
Change = namedtuple(
    "Change",
    "account_id account_name user key_id change before after witness event since",
    defaults=("", "", "", "", "", "", None, None),
)
Changes = Iterable[Change]
Events = Iterable[Event]
Findings = Iterable[Finding]
# An account in an earlier run: audited, failed, skipped or out of scope; how many users, root too,
# and keys its CSV has; its levels as indexes of LEVELS; whether its API keys were read (`listed`)
EarlierAccount = namedtuple(
    "EarlierAccount",
    "name result production users keys levels listed",
    defaults=(False, 0, 0, (), False),
)
# `runs` are those of its scope before it that its summary tells of, and itself; `accounts` those of
# the whole organization, in scope or not, by ID; `scope` is as in summary.json
EarlierRun = namedtuple(
    "EarlierRun", "folder started organization_id scope max_key_age_days runs accounts"
)


@dataclass
class History:
    """The earlier runs, newest first, each read once; for a damaged one, the AuditError."""

    folders: Sequence[Path] = ()
    organization_id: str = ""
    read: dict[Path, EarlierRun | AuditError] = field(default_factory=dict)

    def __iter__(self) -> Iterator[EarlierRun | AuditError]:
        for folder in self.folders:
            if folder not in self.read:
                try:
                    self.read[folder] = earlier_run(folder)
                except AuditError as error:
                    self.read[folder] = error
            run = self.read[folder]
            if isinstance(run, AuditError) or run.organization_id == self.organization_id:
                yield run


# What an account is compared with. Without a run, keys created from `since` on are new; those of
# `unknown` kinds by their dates alone (from `listed` on, when a run read them). None if unknown:
# `known`, hashes of findings (account, user, finding, key) and of users who were no administrators
# (account, user); `others`, for each account its users' credentials (user, ID, state)
Baseline = namedtuple(
    "Baseline",
    "run states since passed_over known others unknown listed",
    defaults=(None, None, KINDS, None),
)


@dataclass
class Tracking:
    """What has changed, each account compared with the newest run that audited it."""

    history: History = field(default_factory=History)
    earlier: EarlierRun | None = None  # the newest one: since it began, accounts have come and left
    runs: list[dict[str, Any]] = field(default_factory=list)  # of the same scope, oldest first
    unreadable: list[str] = field(default_factory=list)  # runs that may be missing from the table
    baselines: dict[str, Baseline] = field(default_factory=dict)  # of accounts in hand
    tables: dict[Path, tuple[Any, Any]] = field(default_factory=dict)  # read, by their folder
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


def open_tracking(
    history: History, previous: Path | timedelta | None, scope: Scope, now: datetime
) -> Tracking:
    """The last runs of this scope, and what to compare with; AuditError if `previous` is unfit."""
    tracking = Tracking(history)
    for run in itertools.islice(history, RUNS_SEARCHED):
        if isinstance(run, AuditError):
            tracking.unreadable.append(str(run))
        elif run.scope == scope_document(scope):
            tracking.runs = [*run.runs, *tracking.runs]
            if len(run.runs) > 1:
                break
    del tracking.runs[: 1 - RUNS_KEPT]
    if isinstance(previous, timedelta):
        latest = f"{now - previous:%Y%m%dT%H%M%SZ}"
        history.folders = [each for each in history.folders if each.name[: len(latest)] <= latest]
    elif previous is not None:
        history.folders = [previous]
        other = AuditError(f"--previous: {previous} is of another organization.")
        named = next(iter(history), other)
        if isinstance(named, AuditError):
            raise named
        for account_id, account in named.accounts.items():
            if account.result == "audited":
                states_before(named, account_id)
    tracking.earlier = next((run for run in history if isinstance(run, EarlierRun)), None)
    return tracking


def scope_document(scope: Scope) -> dict[str, Any]:
    """The scope as summary.json has it. Earlier versions wrote no `exclude_ous`."""
    names = ("accounts", "exclude", "ous", *(["exclude_ous"] if scope.exclude_ous else ()))
    listed = {name: sorted(getattr(scope, name)) for name in names}
    return {**listed, "include_management": scope.include_management}


def earlier_run(folder: Path) -> EarlierRun:
    """A finished run by its summary. Raises AuditError if anything there is not what it must be."""
    with reading(folder / "summary.json"):
        summary, accounts, runs = read_summary(folder), dict[str, EarlierAccount](), []
        organization, scope = summary["organization"], summary.get("scope")
        for entry in [*summary["accounts"], *summary["out_of_scope"]]:
            if not re.fullmatch(r"\d{12}", entry["id"], re.ASCII):
                raise ValueError(f"{entry['id']!r:.40} is not an account ID of 12 digits")
            accounts[sys.intern(entry["id"])] = earlier_account(entry)  # runs share most of them
        started, days = parse_time(summary["started"]), typed(int, summary["max_key_age_days"])
        itself = {**summary, **summary["totals"], **summary["gaps"]["organization"]}
        for run in [*(summary.get("runs") or ()), itself]:
            figures = {name: typed(int, run[name]) for name in ("audited", *RUN_GAPS)}
            if run is itself or parse_time(run["started"]) < started:
                runs.append({"started": iso(parse_time(run["started"])), **figures})
        if scope is None and len(summary["out_of_scope"]) < 2:  # format 1, the whole organization
            included = organization["management_account_included"]
            scope = scope_document(Scope(include_management=included))
        organization_id = typed(str, organization["id"])
        return EarlierRun(folder, started, organization_id, scope, days, runs, accounts)


def earlier_account(entry: Mapping[str, Any]) -> EarlierAccount:
    name, result = sys.intern(entry["name"]), sys.intern(entry.get("result", "out of scope"))
    if result in ("failed", "skipped", "out of scope"):
        return EarlierAccount(name, result)
    if result != "audited":
        raise ValueError(f"{result!r:.40} is not the result of an account")
    levels = tuple(LEVELS.index(entry["maturity"][phase]) for phase in PHASES)
    users = typed(int, entry["users"]) + typed(bool, entry["root"])
    keys, production = typed(int, entry["gaps"]["access_keys"]), typed(bool, entry["production"])
    listed = LISTING not in entry.get("not_checked", ())
    return EarlierAccount(name, result, production, users, keys, levels, listed)


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
    if (len(states), keys) != (counted.users, counted.keys):
        raise AuditError(f"Cannot read the earlier run's {path}: it lacks rows of its summary.json")
    return states


def baseline_of(tracking: Tracking, account_id: str) -> Baseline:
    """The newest run that audited the account and can be read. Without one, its keys' dates tell
    which are new: those created since it first failed, or else since the newest run."""
    history, passed_over = tracking.history, list[str]()
    since = tracking.earlier.started if tracking.earlier else None
    for run in history:
        if isinstance(run, AuditError):
            passed_over.append(str(run))
        elif (account := run.accounts.get(account_id)) is None:
            csvs = (account_csv(folder, account_id) for folder in history.folders)
            if not any(map(may_exist, csvs)):  # it joined later; otherwise it was here before
                break
        elif account.result == "failed":
            since = run.started
        elif account.result == "audited":
            try:
                states = states_before(run, account_id)
            except AuditError as error:
                passed_over.append(str(error))
                continue
            known, others = tables_of(tracking, run.folder)
            unknown = KINDS[1:] if others is None else () if account.listed else KINDS_LISTED
            return Baseline(run, states, run.started, passed_over, known, others, unknown)
    return Baseline(None, {}, since, passed_over)


def tables_of(tracking: Tracking, folder: Path) -> tuple[Any, Any]:
    """`known` and `others` of a Baseline, read once; nothing if one of the tables is damaged."""
    if folder not in tracking.tables:
        tracking.tables[folder] = (None, None)
        known, others, path = set[int](), dict[str, Any](), folder / "credentials.csv"
        whose, of_key = ("account_id", "username"), ("credential_id", "status", "created_date")
        try:
            rows = table_rows(folder / "findings.csv", *whose, "finding", "access_key_id")
            for *about, key_id in rows:
                known.add(hash((*about, "" if key_id in WITHOUT_ID else key_id)))
            if may_exist(path):  # old runs have none
                for row in table_rows(path, *whose, "administrator", "kind", *of_key):
                    account_id, user, is_administrator, kind, key_id, status, created = row
                    if is_administrator == "false":
                        known.add(hash((account_id, user)))
                    if kind in KINDS[1:]:
                        key = (user, key_id, KeyState(status, created, kind))
                        others.setdefault(account_id, []).append(key)
            tracking.tables[folder] = (known, others if may_exist(path) else None)
        except AuditError as error:
            tracking.passed_over[str(error)] = None
    return tracking.tables[folder]


def table_rows(path: Path, *columns: str) -> Iterator[tuple[str, ...]]:
    """These cells of the rows of a table that may be large. Raises AuditError if it is damaged."""
    with reading(path), regular(path).open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        wanted = itemgetter(*map(header.index, columns))
        for number, row in enumerate(rows, 2):
            if len(row) != len(header):
                raise ValueError(f"row {number} has more or fewer cells than the header")
            yield tuple(map(original, wanted(row)))


def track_account(tracking: Tracking, audited: AuditedAccount, findings: Findings) -> Findings:
    """Compare an account with its baseline. Returns its findings, each with whether it is new."""
    account, trail = audited.account, audited.trail
    baseline = tracking.baselines.pop(account.id, None) or baseline_of(tracking, account.id)
    run, since = baseline.run, baseline.since
    tracking.passed_over.update(dict.fromkeys(baseline.passed_over))
    if trail is not None:  # --since may ask for older events, which explain nothing
        events = tuple(event for event in trail.events if since and event.time >= since)
        audited = replace(audited, trail=trail._replace(events=events))
    if LISTING in audited.not_checked:
        baseline = baseline._replace(unknown=(*KINDS_LISTED, *baseline.unknown))
    elif baseline.unknown == KINDS_LISTED:
        baseline = baseline._replace(listed=listed_before(tracking.history, account.id, since))
    changes = list(changes_of(tracking, audited, baseline))
    if run is not None:
        tracking.compared[account.id] = run
        tracking.changes += changes
    else:
        tracking.new_keys_elsewhere += [one for one in changes if one.change in NEW_KEY_CHANGES]
        tracking.blind += [account] if baseline.passed_over else []
    return mark_new(tracking, findings, changes, baseline)


def listed_before(history: History, account_id: str, since: datetime | None) -> Any:
    """When the last run before `since` began that read the account's API keys; None if none did."""
    for run in itertools.islice(history, RUNS_SEARCHED):
        if isinstance(run, AuditError) or not since or run.started >= since:
            continue
        if (account := run.accounts.get(account_id)) and account.listed:
            return run.started
    return None


def changes_of(tracking: Tracking, audited: AuditedAccount, baseline: Baseline) -> Changes:
    """What has changed in an account. Of credentials of `unknown` kinds only their dates tell."""
    account, trail, unknown = audited.account, audited.trail, baseline.unknown
    before, after, found = baseline.states, states_of(rows_of(audited)), list[Change]()
    for user in audited.users:
        for key in user.others:
            if key.kind not in unknown:
                after[user.name].keys[key.id] = KeyState(key.status, iso(key.created), key.kind)
        dated = KINDS if user.name == ROOT and ROOT not in before else unknown
        for key in (*user.keys, *user.others):
            since = (key.kind in KINDS_LISTED and baseline.listed) or baseline.since
            if key.kind in dated and since and key.created >= since:
                what = (user.name, key.id, f"{key.kind}-created", "", key.status)
                found.append(Change(account.id, account.name, *what, since=since))
    for name, key_id, state in (baseline.others or {}).get(account.id, ()):
        if name in before and state.kind not in unknown:
            before[name].keys[key_id] = state
    events = trail.events if trail else ()
    found += came_and_went(account, before, after, events)
    persons = list(persons_of(before, after, events)) if baseline.run else []
    found += changes_between(account, persons)
    administrators = {user.name for user in audited.users if user.administrator == "true"}
    for name, old_name, then, now in persons:
        was_none = then is None or hash((account.id, old_name)) in (baseline.known or ())
        if now and name in administrators and was_none:
            what = (name, "", "administrator-added", "false" if then else "", "true")
            found.append(Change(account.id, account.name, *what))
        lacked, lacks = bool(then and then.lacks_mfa), bool(now and now.lacks_mfa)
        tracking.mfa_fixed += lacked and not lacks
        if lacks and not lacked:
            new = Change(account.id, account.name, name, change="console-without-mfa")
            tracking.mfa_new.append(new)
    for change in found:
        yield with_witness(change, trail)._replace(since=change.since or baseline.since)


def mark_new(tracking: Tracking, found: Findings, changes: Changes, baseline: Baseline) -> Findings:
    """The findings, each with whether the baseline lacked it; None if that is unknown. Those of an
    account that has become production since then are told once more."""
    findings, known, run = list[Finding](), baseline.known, baseline.run
    created = {(one.user, one.key_id) for one in changes if one.change.endswith("-created")}
    old_names = {one.user: one.before for one in changes if one.change == "user-renamed"}
    for finding in found:
        user, key, new = finding.user, finding.key, None
        key_id = key.id if key else ""
        row = (finding.account.id, old_names.get(user, user), finding.finding)
        if known is not None and (user, key_id) in created:
            new = True
        elif known is not None and (key is None or key.kind not in baseline.unknown):
            new = hash((*row, "" if key_id in WITHOUT_ID else key_id)) not in known
        findings.append(finding._replace(new=new))
        risen = run and finding.production and not run.accounts[finding.account.id].production
        told = risen or new is not False
        if told and finding.priority == MOST_URGENT and not finding.exception:
            tracking.urgent_new.append(findings[-1])
    return findings


def persons_of(before: States, after: States, events: Events = ()) -> Iterator[Person]:
    """All users. Renamed users are recognized by their keys, which they retain, or by CloudTrail.
    Root only if both credential reports had it, because it is never created or deleted."""
    same, moved = {name.lower(): name for name in before}, dict[str, str]()
    for event in events:  # IAM's names are not case-sensitive
        if event.new_name or event.name == "DeleteUser":
            name = moved.pop(event.user.lower(), "") or same.pop(event.user.lower(), "")
            moved[event.new_name.lower()] = name
    owners, renamed = dict[str, str](), dict[str, str]()  # by key ID; old names by new ones
    for name, state in before.items():
        owners.update(dict.fromkeys(state.keys.keys() - WITHOUT_ID, name))
    for name, state in after.items():
        had = {owners[key_id] for key_id in state.keys if key_id in owners}
        old_name = min(had) if had and name not in had else moved.get(name.lower(), "")
        if old_name not in ("", name):
            renamed[name] = old_name
    gone = {name: before[name] for name in before.keys() - {*renamed.values()}}
    for name in sorted(before.keys() | after.keys()):
        if name == ROOT and (ROOT not in before or ROOT not in after):
            continue
        if name in after:
            then = before[renamed[name]] if name in renamed else gone.pop(name, None)
            yield name, renamed.get(name, name), then, after[name]
        if name in gone:
            yield name, name, gone[name], None


def changes_between(account: Account, persons: Iterable[Person]) -> Changes:
    for name, old_name, then, now in persons:
        of_user = Change(account.id, account.name, name)
        if then is None or now is None:
            yield of_user._replace(change="user-created" if now else "user-deleted")
        else:
            if old_name != name:
                yield of_user._replace(change="user-renamed", before=old_name, after=name)
            before, after = then.password_status, now.password_status
            if before != after:
                what = "console-enabled" if after == PASSWORD_SET else "console-disabled"
                yield of_user._replace(change=what, before=before, after=after)
            before, after = then.mfa_status, now.mfa_status
            if before != after:
                what = {before: "mfa-added", after: "mfa-removed"}.get(NO_MFA, "mfa-changed")
                yield of_user._replace(change=what, before=before, after=after)
        yield from key_changes(of_user, then.keys if then else {}, now.keys if now else {})


def key_changes(of_user: Change, before: Keys, after: Keys) -> Changes:
    """Keys without an ID are matched by date, because AWS does not guarantee their order."""
    none, sides = ("", KeyState("", "", "")), (dict[str, Any](), dict[str, Any]())
    for side, keys in zip(sides, (before, after)):
        for key_id, key in sorted(keys.items()):
            dated = f"{key.kind} {key.created}"
            side[dated if key_id in WITHOUT_ID and dated not in side else key_id] = key_id, key
    for identity in sorted(sides[0].keys() | sides[1].keys()):
        (old_id, then), (new_id, now) = (side.get(identity, none) for side in sides)
        if not (then.status and now.status):
            what = "created" if now.status else "deleted"
        elif is_active(then.status) != is_active(now.status):
            what = "activated" if is_active(now.status) else "deactivated"
        else:
            continue
        change = of_user._replace(key_id=new_id or old_id, before=then.status, after=now.status)
        yield change._replace(change=f"{now.kind or then.kind}-{what}")


OF_USER, OF_API_KEY = {"CreateUser", "CreateLoginProfile"}, {"CreateServiceSpecificCredential"}
GONE = {  # what only events show: by the last event, those it needs before, and the change
    "DeleteUser": (OF_USER, USER_CAME_AND_WENT),
    "DeleteAccessKey": ({"CreateAccessKey"}, CAME_AND_WENT),
    "DeleteServiceSpecificCredential": (OF_API_KEY, API_KEY_CAME_AND_WENT),
}


def came_and_went(account: Account, before: States, after: States, events: Events) -> Changes:
    """Keys and console users that came and went between the runs."""
    seen = {""}.union(*(state.keys for state in (*before.values(), *after.values())))
    seen.update(name.lower() for name in (*before, *after))
    done: dict[str, set[str]] = {}  # the events by the key's ID or the user's name
    for event in events:
        what = event.user.lower() if event.name in {"DeleteUser", *OF_USER} else event.key_id
        if event.service_name in PASSWORD_SERVICES or what in seen:  # only keys count as new
            continue
        done.setdefault(what, set()).add(event.name)
        needed, change = GONE.get(event.name, (set[str](), ""))
        if change and needed <= done[what]:
            yield Change(account.id, account.name, event.user, event.key_id, change, event=event)


# Changes, each with the CloudTrail event that confirms it; after "=" is the status that it sets.
# The event of the opposite change contradicts it. "-": too many events, which are not asked for
USER_EXPLANATIONS = """
    mfa-added EnableMFADevice           mfa-removed DeactivateMFADevice
    mfa-changed EnableMFADevice+DeactivateMFADevice
    console-enabled CreateLoginProfile  console-disabled DeleteLoginProfile
    user-created CreateUser             user-deleted DeleteUser
    user-renamed UpdateUser             administrator-added -
"""
KEY_EXPLANATIONS = """
    {0}-created Create{1}               {0}-deleted Delete{1}
    {0}-activated Update{1}=Active      {0}-deactivated Update{1}=Inactive
"""
IN_EVENTS = ("AccessKey", *["ServiceSpecificCredential"] * 2, "SigningCertificate")  # the KINDS
EXPLANATIONS = USER_EXPLANATIONS + "".join(map(KEY_EXPLANATIONS.format, KINDS, IN_EVENTS))
EXPLANATIONS = EXPLANATIONS.replace("CreateSigning", "UploadSigning")
EXPLAINED_BY = dict(zip(EXPLANATIONS.split()[::2], EXPLANATIONS.split()[1::2]))
ON, OFF = "created activated added enabled".split(), "deleted deactivated removed disabled".split()
OPPOSITES = dict(zip(ON + OFF, OFF + ON))
EVENT_NAMES = tuple(sorted({*re.findall(r"(?<!=)\b[A-Z]\w+", EXPLANATIONS)}))


def with_witness(change: Change, trail: Trail | None) -> Change:
    """The change with the latest event that explains it, or else the latest that contradicts it."""
    if change.event is not None:
        return change._replace(witness="confirmed")
    confirming, (what, word) = EXPLAINED_BY[change.change], change.change.rsplit("-", 1)
    if trail is None or confirming == "-":
        return change
    if trail.error:
        return change._replace(witness="unavailable")
    contradicting = EXPLAINED_BY.get(f"{what}-{OPPOSITES.get(word)}", "")
    by_id = change.key_id not in WITHOUT_ID
    for witness, names in (("confirmed", confirming), ("contradicted", contradicting)):
        for event in reversed(trail.events):
            user = event.new_name if change.change == "user-renamed" else event.user
            same = event.key_id == change.key_id if by_id else user.lower() == change.user.lower()
            if same and {event.name, f"{event.name}={event.status}"}.intersection(names.split("+")):
                return change._replace(witness=witness, event=event)
    return change._replace(witness="not found")


def accounts_that_came_or_left(run: Run, earlier: EarlierRun) -> Changes:
    """One change for each account that joined or left the organization since the newest run."""
    then, now = earlier.accounts, accounts_now(run)
    for account_id in then.keys() ^ now.keys():
        what = "account-joined" if account_id in now else "account-left"
        name = (now.get(account_id) or then[account_id]).name
        yield Change(account_id, name, change=what, since=earlier.started)


def accounts_now(run: Run) -> dict[str, Account]:
    """All accounts of the organization, in scope or not."""
    everyone: list[Any] = [*run.audited, *run.failed, *run.skipped, *run.out_of_scope]
    return {one.account.id: one.account for one in everyone}


# The order of changes.csv: by its columns, without those of the event
change_order = attrgetter(*Change._fields[:8])


def change_row(change: Change) -> tuple[str, ...]:
    """The change's row in changes.csv."""
    event = change.event
    seen = (event.name, iso(event.time), event.actor, event.source_ip) if event else ("",) * 4
    return (*change_order(change), *seen, iso(change.since) if change.since else "")


def event_rows(run: Run) -> Iterator[tuple[str, ...]]:
    """The rows of events.csv, oldest first."""
    found: list[tuple[Event, str, str]] = []
    for account, trail in run.trails:
        found += [(event, account.id, account.name) for event in trail.events]
    for event, *where in sorted(found):
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
VERDICTS = ENFORCED, NOT_CHECKED, PARTIAL, ABSENT = "enforced", "not checked", "partial", "absent"


@dataclass(frozen=True)
class Control:
    verdict: str  # what a Deny statement does for a control, or what holds in one account
    policies: Mapping[str, str] = field(default_factory=dict)  # what it rests on: names by ID
    exemptions: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()  # one per narrowed statement
    why_not_checked: str | None = None


# `names`: its name by its ID; `targets`: where it is attached; `denials`: by control, a Control and
# the statement if it denies in full; `allowed`: what an Allow without a condition lets everybody do
Policy = namedtuple("Policy", "names targets denials allowed")
# The policies, and why they are not known; the same of root credentials
Enforcement = namedtuple(
    "Enforcement",
    "policies why_not root_credentials_managed root_why_not",
    defaults=((), "", None, ""),
)


async def read_enforcement(aws: Aws, organization: Organization) -> Enforcement:
    policies, why_not = await best_effort(read_policies(aws, organization.id), [])
    root_managed, root_why_not = await best_effort(aws.ask(list_organizations_features), None)
    if organization.feature_set != "ALL":
        why_not = "the organization has consolidated billing only, and policies need all features"
    elif not why_not and not policies:
        why_not = "service control policies are off: none is attached, not even FullAWSAccess"
    return Enforcement(tuple(policies), why_not, root_managed, root_why_not)


async def best_effort(question: Awaitable[T], otherwise: T) -> tuple[T, str]:
    """What was read and "", or `otherwise` and the reason: the audit continues without it."""
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
                denials, allowed = judge_policy(content, aws.caller.partition, organization)
                policies.append(Policy({policy_id: name}, targets, denials, allowed))
        except StepFailed as failure:
            if failure.code != "PolicyNotFoundException":  # deleted since it was listed
                raise
    return policies


def apply_enforcement(run: Run) -> None:
    """Decide the controls of each account, audited or failed."""
    everyone: list[Any] = [*run.audited, *run.failed]
    unknown = None if run.enforcement.why_not else "ListAccounts did not give its place (Paths)"
    for account in map(attrgetter("account"), everyone):
        # No service control policy applies to the management account.
        path = "" if account.id == run.organization.management_account else account.path
        if run.enforcement.why_not or path is None:
            controls = dict.fromkeys(CONTROLS, Control(NOT_CHECKED, why_not_checked=unknown))
        else:
            controls = controls_of_account(path.split("/"), run.enforcement.policies)
        run.controls[account.id] = controls


def controls_of_account(path: Sequence[str], listed: Iterable[Policy]) -> dict[str, Control]:
    applying = [policy for policy in listed if not policy.targets.isdisjoint(path)]
    return {control: judge_together(control, path, applying) for control in CONTROLS}


def judge_together(control: str, path: Sequence[str], policies: Iterable[Policy]) -> Control:
    """What holds where all apply. Full denials of some of the actions may add up to all of them."""
    whole, added_up, in_full = Control(ABSENT), Control(ABSENT), list[Statement]()
    for policy in policies:
        for judgement, statement in policy.denials.get(control, ()):
            denial = replace(judgement, policies=policy.names)
            whole = stronger(whole, denial)
            if statement:
                in_full.append(statement)
                added_up = stronger(added_up, denial)
    if whole.verdict != ENFORCED and not undenied(control, in_full):
        return replace(added_up, verdict=ENFORCED, conditions=())
    closed = without_allow(control, path, policies)
    return whole if whole.verdict == NOT_CHECKED else stronger(whole, closed)


def stronger(one: Control, other: Control) -> Control:
    """What holds where both apply: the first of VERDICTS. A principal is free only if every
    enforcing statement exempts it, so the one with the fewest exemptions tells most."""
    if one.verdict != other.verdict:
        return min(one, other, key=lambda each: VERDICTS.index(each.verdict))
    exemptions, policies = one.exemptions + other.exemptions, {**one.policies, **other.policies}
    if one.verdict == ENFORCED:
        exemptions = min(one.exemptions, other.exemptions, key=len)
    conditions = dict.fromkeys(one.conditions + other.conditions)
    return Control(one.verdict, policies, tuple(dict.fromkeys(exemptions)), tuple(conditions))


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


# What may work without MFA: its setup, reading IAM and signing in. Not iam:* or sts:*, which create
# keys and assume roles. iam:DeleteVirtualMFADevice deletes only devices that nobody has.
MFA_BASICS = (
    *MFA_SETUP, "iam:Get*", "iam:List*", "iam:DeleteVirtualMFADevice", "sts:GetCallerIdentity",
    "signin:AuthorizeOAuth2Access", "signin:CreateOAuth2Token")  # fmt: skip
Known = Mapping[str, str]  # what every request has of a condition's key, as a pattern
# Which of the principals that a control covers meet a condition. NARROWS also if that is unknown.
TESTS_MFA, HOLDS, FAILS, EXEMPTS, NARROWS = "without MFA", "all", "none", "all but", "some"
# operator and key are in lower case, values lack those that match nobody, text is all as written.
Condition = namedtuple("Condition", "operator key values text")
# effect is Deny or Allow, action is Action or NotAction, resource is Resource or NotResource.
Statement = namedtuple("Statement", "effect action actions resource resources conditions")


def judge_policy(content: str, partition: str, organization: str) -> tuple[Any, set[str]]:
    """The `denials` and `allowed` of a Policy with this content."""
    known = {ARN: f"arn:{partition}:iam::*:user/*", ORGANIZATION: organization}
    known[REGION] = IAM_REGIONS.get(partition, "")
    denials, allowed = dict[str, Any](), set[str]()
    try:
        listed = json.loads(content, object_pairs_hook=without_repetition).get("Statement")
        statements = list(map(parse_statement, listed if isinstance(listed, list) else [listed]))
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
    """Its verdict, enforced unless something narrows it; whether its actions are denied in full."""
    effects = {each: effect_of(each, control, known) for each in statement.conditions}
    everywhere, somewhere = reach(statement, ALL if control == MFA_REQUIRED else known[ARN])
    if not somewhere or FAILS in effects.values() or not concerns(statement, control, effects):
        return Control(ABSENT), False
    of_root, _ = reach(statement, known[ARN].replace("user/*", "root"))
    exempt = ["root"] if control == NEW_KEYS_PREVENTED and not of_root else []  # has no API keys
    narrowed = [] if everywhere else [f"{statement.resource} {', '.join(statement.resources)}"]
    for condition, effect in effects.items():
        exempt += condition.values if effect == EXEMPTS else ()
        narrowed += [condition.text] if effect == NARROWS else ()
    in_full = not narrowed
    if left := undenied(control, [statement]):
        element = f"NotAction {', '.join(left)}"
        if control == MFA_REQUIRED and statement.action == "Action":
            element = f"Action {', '.join(statement.actions)}"
        narrowed.insert(0, element)
    conditions = (" and ".join(narrowed),) if narrowed else ()
    return Control(PARTIAL if narrowed else ENFORCED, {}, tuple(exempt), conditions), in_full


def concerns(statement: Statement, control: str, effects: Mapping[Condition, str]) -> bool:
    """Whether the statement names some of the control's actions and, for MFA, depends on MFA."""
    if control != MFA_REQUIRED:
        return undenied(control, [statement]) != [*ACTIONS[control]]
    for condition, effect in effects.items():
        if effect != HOLDS and condition.key.startswith("aws:multifactorauth"):
            if statement.action == "NotAction":
                return not any_covers(statement.actions, "*:*")
            return not all(map(functools.partial(any_covers, MFA_BASICS), statement.actions))
    return False


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
    """Whether a statement covers all resources with these ARNs; whether it may cover some."""
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
    """Whether an IAM pattern matches all that `other` does, * by * and ARNs segment by segment."""
    if other.startswith("arn:"):
        segments = pattern.split(":", 5)
        return len(segments) == 6 and all(map(covers, segments, other.split(":", 5)))
    return fnmatchcase(other, pattern.replace("[", "[[]").replace("?", "[!*]"))


# Where every request has the key, ForAnyValue and IfExists change nothing.
BOOL, UNEQUAL = r"(for\w+:)?bool(ifexists)?", r"stringnot(equals|like)(ifexists)?"
EQUALS = r"(foranyvalue:)?string(equals|like)(ifexists)?"
LIKE_ARN = r"(foranyvalue:)?(arn(like|equals)|stringlike)(ifexists)?"
UNLIKE_ARN = r"(arn|string)not(equals|like)(ifexists)?"
IF_PRESENT = r"(foranyvalue:)?(?!null|for|.*not|.*ifexists)\w+"
FALSE, TRUE, ANYTHING, ALL = "(?ai)false", "(?ai)true", "(?s).*", "*"
MFA_PRESENT, MFA_AGE = "aws:multifactorauthpresent", "aws:multifactorauthage"
ARN, TYPE, REGION = "aws:principalarn", "aws:principaltype", "aws:requestedregion"
ORGANIZATION, BY_AWS = "aws:principalorgid", "aws:principalisawsservice"
# Roles are not console users: any may be exempt from MFA, but only named ones from new keys. A name
# may end in * after -, _ or at least eight characters (AWSAccelerator*), but not include AWS's own
# roles, except those of one permission set (AWSReservedSSO_Admin_*). A variable ($) can be anybody.
ANY_USER, IAM_PRINCIPAL = "arn:*:iam::*:user/*", r"arn:[^:]*:iam::[^:]*:(root|user/[^*?$]+|"
ONE_ROLE = r"role/([^$]*/)?([^*?$/]+|AWSReservedSSO_[^*?$/]+_\*)"
OPEN_END = r"role/(?!aws-|(.*/)?AWSReserved)([^*?$]+[-_]|([^*?$]+/)?[^*?$/]{8,})\*"
NO_USER = r"(?s)arn:[^:]*:(iam::[^:]*:(root|role/.*)|sts::[^:]*:assumed-role/.*)"
NEITHER = r"(?s)arn:[^:]*:(iam::[^:]*:root|sts::[^:]*:assumed-role/.*)"  # user nor role
# Keys that no CreateAccessKey has: of other services, but for those that go with a role's
# credentials to every service; of tags to set; of services that call on behalf of a resource.
NEVER_SENT = (
    r"(?!aws:|iam:|saml:|sts:|ec2:role|glue:|identitystore:|\w+:source\w+arn)[a-z0-9-]+:.*"
    r"|aws:(tagkeys|requesttag/.*|source(arn|account|orgid|orgpaths))")  # fmt: skip
CONDITION_RULES = (
    # operator, key, whether any or all values must fit, value; effect on MFA and on new keys.
    # Null true of aws:MultiFactorAuthPresent narrows: access keys send none, consoles send false.
    (BOOL, MFA_PRESENT, all, FALSE, TESTS_MFA, NARROWS),
    (BOOL, MFA_PRESENT, all, TRUE, FAILS, NARROWS),
    ("null", MFA_PRESENT, all, FALSE, HOLDS, NARROWS),
    ("null", MFA_AGE, all, TRUE, TESTS_MFA, NARROWS),
    ("null", MFA_AGE, all, FALSE, FAILS, NARROWS),
    (r"numeric(less|greater)than(equals)?", MFA_AGE, all, ANYTHING, FAILS, NARROWS),
    (r"numericgreaterthan(equals)?ifexists", MFA_AGE, all, ANYTHING, TESTS_MFA, NARROWS),
    # A service's requests for a caller say MFA false even for a key. The caller's own come first.
    (BOOL, "aws:viaawsservice", all, FALSE, HOLDS, NARROWS),
    (BOOL, BY_AWS, all, FALSE, HOLDS, HOLDS),
    (BOOL, BY_AWS, all, TRUE, FAILS, FAILS),
    (EQUALS, f"{ORGANIZATION}|{ARN}", any, re.escape(ALL), HOLDS, HOLDS),  # a bare * is no ARN
    (UNEQUAL, ORGANIZATION, any, re.escape(ALL), FAILS, FAILS),
    (EQUALS, TYPE, any, "User", HOLDS, NARROWS),
    (EQUALS, TYPE, all, "Account|FederatedUser|Service", FAILS, FAILS),
    (EQUALS, TYPE, all, "Account|FederatedUser|Service|AssumedRole", FAILS, NARROWS),
    (UNEQUAL, TYPE, any, "User", FAILS, NARROWS),
    (UNEQUAL, TYPE, all, "Service", HOLDS, HOLDS),
    (LIKE_ARN, ARN, any, re.escape(ANY_USER), HOLDS, NARROWS),
    (f"{EQUALS}|{LIKE_ARN}", ARN, all, NEITHER, FAILS, FAILS),
    (f"{EQUALS}|{LIKE_ARN}", ARN, all, NO_USER, FAILS, NARROWS),
    (UNLIKE_ARN, ARN, any, re.escape(ANY_USER), FAILS, NARROWS),
    (UNLIKE_ARN, ARN, all, f"{IAM_PRINCIPAL}{ONE_ROLE}|{OPEN_END})", NARROWS, EXEMPTS),
    (UNLIKE_ARN, ARN, all, f"{IAM_PRINCIPAL}role/.+)", EXEMPTS, NARROWS),
    (UNEQUAL, "aws:username", all, r"[^*?$]*", EXEMPTS, EXEMPTS),
    # "IAM calls are always made to the us-east-1 Region", as AWS's guide to global keys has it.
    (EQUALS, REGION, all, r"[^*?$]+\*?", NARROWS, FAILS),
    (UNEQUAL, REGION, any, re.escape(ALL), NARROWS, FAILS),
    (IF_PRESENT, NEVER_SENT, all, ANYTHING, NARROWS, FAILS),
    ("null", NEVER_SENT, all, FALSE, NARROWS, FAILS),
)
# Without Like, * and ? stand for themselves. An assumed role's aws:PrincipalArn is the role's.
MATCHES_NOBODY = re.compile(
    r"(?s)\S*string(not)?equals(ifexists)? \S* [^$]*[*?][^$]*|"
    rf"{UNLIKE_ARN} {ARN} arn:[^:]*:sts::[^:]*:assumed-role/.*")  # fmt: skip
ELEMENTS = {"Sid", "Effect", "Action", "NotAction", "Resource", "NotResource", "Condition"}


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError if a name occurs twice: AWS does not say which one counts."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return dict(pairs)


def parse_statement(members: Mapping[str, Any]) -> Statement:
    """ValueError or AttributeError for anything that is not of a service control policy."""
    if members.keys() - ELEMENTS or members.get("Effect") not in ("Allow", "Deny"):
        raise ValueError("not a statement of a service control policy")
    elements, conditions = list[Any](), list[Condition]()
    for names in (("Action", "NotAction"), ("Resource", "NotResource")):
        [name] = [each for each in names if members.get(each, []) != []]  # ValueError: not just one
        elements += name, texts(members[name])
    for operator, keys in members.get("Condition", {}).items():
        for key, value in keys.items():
            values, about = texts(value), f"{operator} {key}".lower()
            somebody = [each for each in values if not MATCHES_NOBODY.fullmatch(f"{about} {each}")]
            text = f"{operator} {key} {', '.join(values)}"
            conditions.append(Condition(operator.lower(), key.lower(), tuple(somebody), text))
    return Statement._make((members["Effect"], *elements, tuple(conditions)))


def texts(value: Any) -> tuple[str, ...]:
    """A string, boolean or number, or a list of them, as JSON writes them: false is "false"."""
    values = value if isinstance(value, list) else [value]
    if not values or {*map(type, values)} - {str, bool, int, float}:
        raise ValueError("not a string, boolean or number, nor a list of them")
    return tuple(each if isinstance(each, str) else json.dumps(each) for each in values)


# === Terminal: the summary for stdout and for mail, summary.json; values in, text out ============

LINES_SHOWN, ALIKE_SHOWN, ACCOUNTS_SHOWN, RUNS_LISTED = 10, 3, 5, 12
MOST_GAPS = (RUN_GAPS[0], RUN_GAPS[2], "active_api_keys_without_expiry")
ACCESS_DENIED = "AccessDenied|UnauthorizedOperation"
Summary = Mapping[str, Any]  # the content of summary.json, or a part of it
PAINT = {  # the codes of red, yellow and bold on a terminal: for trouble, findings, titles
    31: r"(?m)^([\d,]+ accounts? could not be audited|  1  ).*",
    33: r"(?m)^  [2-7]  .*",
    1: r"(\A|(?<=\n\n)).+",
}
NOT_CHECKED_WORDS = {
    "ListServiceSpecificCredentials": "API keys were not checked",
    "GetAccountAuthorizationDetails": "Owners, administrators and exposed keys were not checked",
}
WITNESSES = {"not found": "has no matching event for", "unavailable": "could not be asked about"}
# What a failed step and its error code match, and what to do about it; the first one counts
NEXT_STEPS = {
    f"^AssumeRole: .*({ACCESS_DENIED})":
        "check that role {role} exists there, that its trust policy allows {arn} and the external "
        "ID, that the profile may assume it, and that no SCP denies it: AWS does not say which.",
    "^profile credentials: |^AssumeRole: .*(Token|Credential|MFA)":
        "sign in again (for example with `aws sso login`), or fix the profile's "
        "credential_process, which must not wait for input; then run the audit again.",
    f"^DescribeOrganizationalUnit: .*({ACCESS_DENIED})":
        "add organizations:DescribeOrganizationalUnit to the profile's policy.",
    ACCESS_DENIED: "add {service}:{step} to the role's policy, and check that no SCP denies it.",
    "RegionDisabled": "set AWS_DEFAULT_REGION to a Region that is enabled there (us-east-1).",
    "ReportTimeout": "run the audit again, or allow more time with --report-timeout.",
    "Throttl|RequestLimitExceeded|TooManyRequests|SlowDown":
        "something else uses up the account's IAM request rate: run the audit again later.",
}  # fmt: skip
# For each phase: its title, what is said if nothing can be counted, the gaps that decide it
OLD_OR_OTHER = "active_(api_)?keys_(older_than_max_age|without_expiry)|active_(service|signing)_.*"
PHASE_WORDS = {
    "phase1": ("Phase 1, multi-factor authentication", "no console users", "console_.*_mfa"),
    "phase2": ("Phase 2, use temporary credentials", "no active keys", OLD_OR_OTHER),
}


def terminal_summary(run: Run, summary: Summary, quiet: bool, width: int, color: bool) -> str:
    """The text for stdout. With `quiet`, only what needs attention: it may be empty."""
    if quiet:
        title = printable(f"Organization {run.organization.id}, {summary['started']}: {run.folder}")
        text = laid_out(quiet_lines(run, summary), width)
        return f"{title}\n{text}" if text else ""
    found = [finding for finding in run.findings if finding.exception is None]
    title = f"What to fix first (all {count(len(found), 'finding')}: findings.csv)"
    to_fix = titled(title, finding_lines(run, found, LINES_SHOWN, ALIKE_SHOWN))
    phases = phase_lines(summary, "phase1") + phase_lines(summary, "phase2")
    blocks: list[Iterable[str]] = [heading_lines(summary), failed_lines(summary)]
    blocks += [not_checked_lines(summary), change_lines(run, summary), new_lines(run)]
    blocks += [witness_lines(summary), phases, priority_lines(run, summary), to_fix]
    blocks += [most_gaps_lines(summary), gap_lines(summary), enforcement_lines(summary)]
    blocks += [run_lines(summary)]
    text = "\n".join(filter(None, (laid_out(block, width) for block in blocks)))
    text += f"\nFiles: {printable(str(run.folder))}\n"  # in full, to be copied
    if summary["page"]:
        text += f"Page: {printable(str(run.folder / summary['page']))}\n"
    for code, pattern in PAINT.items() if color else ():
        text = re.sub(pattern, f"\x1b[{code}m\\g<0>\x1b[0m", text)
    return text


def quiet_lines(run: Run, summary: Summary) -> list[str]:
    """Failed accounts, what is new and urgent since each account's baseline, damaged files."""
    new = run.tracking.urgent_new
    urgent = titled("New findings of priority 1", finding_lines(run, new, len(new), len(new)))
    lines = [*failed_lines(summary, quiet=True), *urgent, *new_lines(run, quiet=True)]
    lines += [*not_checked_lines(summary, quiet=True), *exception_lines(summary, "expired")]
    if lines and (number := summary["findings"][str(MOST_URGENT)] - len(new)):
        lines.append(f"and {count(number, 'finding')} of priority 1, unchanged")
    return lines


def laid_out(lines: Iterable[str], width: int) -> str:
    """The lines, printable and folded at spaces. What is too long, such as an ARN, stays whole."""
    fold, text = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False), ""
    for line in map(printable, lines):
        fold.subsequent_indent = " " * (len(line) - len(line.lstrip()) + 2)
        text += f"{fold.fill(line)}\n"
    return text


def titled(title: str, lines: Iterable[str], most: int | None = None) -> list[str]:
    """At most so many lines, indented below a title, and how many more; without lines, no title."""
    indented = [f"  {line}" for line in lines]
    if most and len(indented) > most:
        indented[most:] = [f"  and {len(indented) - most:,} more, in summary.json"]
    return [title, *indented] if indented else []


def accounts_of(summary: Summary, result: str) -> list[Summary]:
    return [entry for entry in summary["accounts"] if entry["result"] == result]


def heading_lines(summary: Summary) -> Iterator[str]:
    totals, organization = summary["totals"], summary["organization"]
    finished, keys = parse_time(summary["finished"]), summary["gaps"]["organization"]["access_keys"]
    took = clock(finished - parse_time(summary["started"]))
    yield f"Organization {organization['id']}, {summary['started']}, took {took}"
    accounts = f"{count(totals['audited'], 'account')} ({totals['production']:,} production)"
    yield f"Audited: {accounts}, {count(totals['users'], 'user')}, {count(keys, 'access key')}"
    if reports := [one["report_generated"] for one in accounts_of(summary, "audited")]:
        yield f"  password and root data is up to {age(finished - parse_time(min(reports)))} old"
    if left_out := [one["id"] for one in summary["out_of_scope"]]:
        management = organization["management_account"]
        including = f", including the management account {management} (see --include-management)"
        which = including if management in left_out else ""
        yield f"Out of scope: {count(len(left_out), 'account')}{which}"


def failed_lines(summary: Summary, quiet: bool = False) -> Iterator[str]:
    """The failed accounts by cause, with the next steps; skipped accounts; missing roots."""
    failed, causes, lines = accounts_of(summary, "failed"), dict[str, list[str]](), list[str]()
    for one in failed:
        told = causes.setdefault(f"{one['step']}: {one['error']['code']}", [])
        told.append(f"{one['id']} {one['name']}: {one['error']['message']}")
    for cause, told in causes.items():
        lines += titled(cause, told, LINES_SHOWN) + next_step(cause, summary)
    production = f"({sum(map(itemgetter('production'), failed)):,} production)"
    yield from titled(f"{count(len(failed), 'account')} could not be audited {production}", lines)
    if not quiet or summary["scope"]["accounts"]:
        skipped = accounts_of(summary, "skipped")
        title = f"Skipped (not ACTIVE): {count(len(skipped), 'account')}"
        yield from titled(title, map("{id} {name}: {state}".format_map, skipped))
    if rootless := sum(not one["root"] for one in accounts_of(summary, "audited")):
        where = f"the credential report of {count(rootless, 'account')}"
        yield f"Root is missing from {where} and is not covered there"


def next_step(cause: str, summary: Summary) -> list[str]:
    """What to do about a failed step; `cause` has its name and the error code."""
    words = {**summary["caller"], "role": summary["role"], "step": cause.partition(":")[0]}
    words["service"] = "cloudtrail" if words["step"] == "LookupEvents" else "iam"
    for pattern, advice in NEXT_STEPS.items():
        if re.search(pattern, cause):
            return [f"  Next: {advice.format_map(words)}"]
    return []


def not_checked_lines(summary: Summary, quiet: bool = False) -> Iterator[str]:
    """What was denied without failing an account, once for each cause."""
    causes = dict[str, list[str]]()
    for account_id, error in (summary["cloudtrail"] or {}).get("unavailable", {}).items():
        causes.setdefault(": ".join(error.split(": ")[:2]), []).append(account_id)
    for one in () if quiet else accounts_of(summary, "audited"):
        for cause in map(": ".join, one["not_checked"].items()):
            causes.setdefault(cause, []).append(one["id"])
    for cause, ids in causes.items():
        what = NOT_CHECKED_WORDS.get(cause.partition(":")[0], "CloudTrail could not be asked")
        others = ", ..." if len(ids) > ACCOUNTS_SHOWN else ""
        yield f"{what} in {count(len(ids), 'account')}: {cause}"
        yield f"  {', '.join(sorted(ids)[:ACCOUNTS_SHOWN])}{others}"
        yield from next_step(cause, summary)
    if not quiet and (why_not := summary["ous_why_not"]):
        yield f"OU names were not read: {why_not}"
        yield from next_step(why_not, summary)


def change_lines(run: Run, summary: Summary) -> list[str]:
    """What has changed since the accounts' baselines."""
    changes, days = summary["changes"], summary["max_key_age_days"]
    if changes is None and run.tracking.runs:
        return ["No earlier run is as old as --previous requires: nothing was compared."]
    if changes is None:
        return ["No earlier run to compare with: this run is the baseline."]
    mfa = "console users without MFA, root included: {fixed:,} fixed, {new:,} new"
    lines = [mfa.format_map(changes["console_users_without_mfa"])]
    for kind in (*KINDS, "administrator", "account"):
        if told := numbers_in_words(changes["counts"], f"{kind}-"):
            lines.append(f"{in_words(kind)}s: {told}")
    for phase, levels in changes["maturity"].items():
        lines.append(f"Phase {phase[-1]}: {level_in_words(**levels)}")
    compared = run.tracking.compared.values()
    if others := sorted({each.max_key_age_days for each in compared} - {days}):
        was = f"--max-key-age was {' or '.join(map(str, others))} and is {days} now"
        lines.append(f"{was}: phase 2 and the numbers of old keys are not comparable")
    if number := changes["accounts_not_compared"]:
        accounts = count(number, "account")
        lines.append(f"not compared: {accounts} not audited in this run or not before")
    return titled(f"Since the run of {changes['since']}", lines)


def level_in_words(then: str | None, now: str, compared_now: str | None) -> str:
    """A phase's level beside that of the baseline; that of the accounts compared if it differs."""
    words = f"{now} ({f'was {then}' if then else 'not compared'})"
    words = f"unchanged ({now})" if then == now else words
    differs = compared_now not in (None, now)
    return f"{words}; in the accounts compared: {compared_now}" if differs else words


def new_lines(run: Run, quiet: bool = False) -> Iterator[str]:
    """New keys and users without MFA; damaged earlier files; where new keys may go unnoticed."""
    tracking, keys = run.tracking, list[str]()
    for key in new_keys(run):
        where = "" if key.account_id in tracking.compared else " (account not compared)"
        keys.append(change_line(key) + where)
    removed = [change for change in tracking.changes if change.change == "mfa-removed"]
    yield from titled("New keys since the last audit of their account", keys, LINES_SHOWN)
    yield from titled("New console users without MFA", map(change_line, tracking.mfa_new))
    yield from titled("MFA removed", map(change_line, removed))
    messages = dict.fromkeys([*(() if quiet else tracking.unreadable), *tracking.passed_over])
    told = "\n".join(messages).replace(f"{run.folder.parent}{os.sep}", "").splitlines()
    yield from titled("Files of earlier runs that cannot be read and were skipped", told)
    if blind := [f"{account.id} {account.name}" for account in tracking.blind]:
        title = f"New keys cannot be ruled out in {count(len(blind), 'account')}"
        yield from titled(f"{title}: no earlier run can be read", blind, ACCOUNTS_SHOWN)
        yield "  Next: let the user who runs the audit read the earlier runs, or restore the files."


def new_keys(run: Run) -> list[Change]:
    """The access keys and API keys created since, with those that were deleted again."""
    found = [change for change in run.tracking.changes if change.change in NEW_KEY_CHANGES]
    return sorted([*found, *run.tracking.new_keys_elsewhere], key=change_order)


def change_line(change: Change) -> str:
    """Who and what changed and, where CloudTrail confirms it, who made the change."""
    parts = [change.account_id, change.account_name, change.user, change.key_id]
    parts += ["(API key)"] if change.change.startswith(API_KEY) else []
    parts += ["deleted again"] if change.change in NEW_KEY_CHANGES[2:] else []
    if change.event and change.witness == "confirmed":
        parts.append(f"by {change.event.actor.rpartition(':')[2]}")
    parts += ["(contradicted by CloudTrail)"] if change.witness == "contradicted" else []
    return " ".join(filter(None, parts))


def witness_lines(summary: Summary) -> Iterator[str]:
    """What CloudTrail says about the changes."""
    trail, changes = summary["cloudtrail"], summary["changes"]
    if trail is None or trail["since"] is None:
        return
    events = count(trail["events"], "IAM event")
    yield f"CloudTrail since {trail['since']}: {events}, in events.csv"
    if trail["out_of_reach"]:
        kept = f"CloudTrail keeps events for {CLOUDTRAIL_KEEPS.days} days"
        yield f"  {kept}: who made earlier changes is unknown"
    for witness, number in sorted(changes["witnesses"].items()) if changes else ():
        words = WITNESSES.get(witness, f"has {witness}")
        yield f"  CloudTrail {words} {count(number, 'change')}"


def phase_lines(summary: Summary, phase: str) -> list[str]:
    """The level, what decides it (`7 of 15 console users without MFA`), the accounts by level."""
    gaps, told, maturity = summary["gaps"]["organization"], [], summary["maturity"][phase]
    title, nothing, deciding = PHASE_WORDS[phase]
    for gap in filter(re.compile(deciding).fullmatch, GAP_COUNTS):
        whole = re.split("_(?:without|older)_", gap)[0]
        if gaps[whole]:
            number = f"{gaps[gap]:,}" if gap == whole else f"{gaps[gap]:,} of {gaps[whole]:,}"
            words = in_words(gap, summary["max_key_age_days"])
            told.append(f"{number} {words.removesuffix('s') if number == '1' else words}")
    if maturity["level"] == IN_PROGRESS and not maturity["accounts"][IN_PROGRESS]:
        told = [f"{count(summary['totals']['failed'], 'account')} could not be audited"]
    told = told or [nothing if summary["totals"]["audited"] else "no account was audited"]
    if phase == "phase2" and (unread := summary["not_checked"].get(LISTING)):
        told.append(f"API keys were not checked in {count(sum(unread.values()), 'account')}")
    accounts = f"accounts: {numbers_in_words(maturity['accounts']) or 'none'}"
    return titled(f"{title}: {maturity['level']}", [*told, accounts])


def most_gaps_lines(summary: Summary) -> list[str]:
    sized, columns = [], ("without MFA", f"over {summary['max_key_age_days']} days")
    for one in accounts_of(summary, "audited"):
        numbers = itemgetter(*MOST_GAPS)(one["gaps"])
        if any(numbers):
            sized.append((-sum(numbers), label(one), *numbers))
    row = "{:<35}{:>14,}{:>14,}{:>16,}"
    title = row.replace(",", "").format("Accounts with the most gaps", *columns, "API, no expiry")
    most = (cells for _size, *cells in sorted(sized)[:ACCOUNTS_SHOWN])  # of the same size: by ID
    return titled(title, (row.replace("35", "33").format(*cells) for cells in most))


def priority_lines(run: Run, summary: Summary) -> Iterator[str]:
    """How many findings of each priority there are, and the exceptions."""
    numbers = summary["findings"]
    rows = {"Findings by priority": map(int, numbers), "  to fix": numbers.values()}
    if run.tracking.earlier:
        new = Counter(str(one.priority) for one in run.findings if one.new and not one.exception)
        rows["  new since the baseline"] = map(new.__getitem__, numbers)
    if not any(numbers.values()):
        rows = {}
        yield f"No findings in {count(len(run.audited), 'audited account')}."
    for title, cells in rows.items():
        yield f"{title:<24}{''.join(map('{:>8,}'.format, cells))}"
    if covered := summary["exceptions"]["applied"]:
        yield f"{count(covered, 'finding')} covered by exceptions"
    yield from exception_lines(summary, "expired") + exception_lines(summary, "unused")


def exception_lines(summary: Summary, which: str) -> list[str]:
    title = {"expired": "have expired", "unused": "no longer cover anything"}[which]
    who = "line {line}: {account_id} {username} {credential_id} {finding}, until {until}: {reason}"
    told = map(who.format_map, summary["exceptions"][which])
    return titled(f"Exceptions that {title}", told, LINES_SHOWN)


def finding_lines(run: Run, found: Findings, most: int, most_alike: int) -> Iterator[str]:
    """The most urgent findings; a line stands in for more of one kind in a row."""
    for _kind, group in itertools.groupby(found, lambda one: (one.priority, one.finding)):
        alike = list(group)
        shown = alike[: min(most, most_alike)]
        for one in shown:
            yield f"{one.priority}  {one.finding:<24} {label(vars(one.account))} {one.user}"
            key_id = f"{one.key.id}: " if one.key else ""
            yield f"   {key_id}{'; '.join(reasons_of(one, run.plan))}"
        if more := len(alike) - len(shown):
            yield f"   and {more:,} more like it"
        if (most := most - len(shown)) == 0:
            break


def gap_lines(summary: Summary) -> Iterator[str]:
    """The table of gaps: the organization beside its production accounts."""
    days, gaps = summary["max_key_age_days"], summary["gaps"]
    denied = sum(summary["not_checked"].get(LISTING, {}).values())
    unread = denied and denied == summary["totals"]["audited"]  # then 0 would be a claim
    yield f"{'Gaps, root included':<38}{'organization':>18}{'production':>18}"
    for name in (*GAP_COUNTS, "mfa_coverage_percent"):
        line = f"  {in_words(name, days):<36}"
        for each in gaps.values():
            figure = "no console users" if each[name] is None else f"{each[name]:,}"
            if unread and name.startswith(("active_api_keys", "active_service_passwords")):
                figure = "not checked"
            line += f"{figure:>18}"
        yield line
    if oldest := gaps["organization"]["oldest_active_key"]:
        words = "  oldest active key: {age_days:,} days, {access_key_id} of {username} in "
        yield f"{words}{{account_id}} {{account_name}}".format_map(oldest)


def enforcement_lines(summary: Summary) -> list[str]:
    """What service control policies already prevent, and where nothing does."""
    enforcement, lines, bare = summary["enforcement"], list[str](), []
    if why_not := enforcement["why_not_checked"]:
        lines.append(f"not checked: {why_not}")
    for control, verdicts in enforcement["accounts"].items():
        words = f"{CONTROLS[control]:<36}{numbers_in_words(verdicts) or 'no account'}"
        remarks = dict.fromkeys(control_remarks(summary, control))
        lines += titled(words, remarks, LINES_SHOWN) or [words]
    managed = enforcement["root_credentials_managed_centrally"]
    why_not = enforcement["root_credentials_why_not_checked"] or ""
    words = {True: "yes", False: "no", None: f"not checked: {why_not}".rstrip(": ")}[managed]
    lines.append(f"{'root credentials managed centrally':<36}{words}")
    for one in accounts_of(summary, "audited"):
        keys = one["gaps"]["active_keys"]
        if keys and {found["verdict"] for found in one["controls"].values()} == {ABSENT}:
            bare.append((-keys, f"{label(one)} {count(keys, 'active key')}"))
    most = map(itemgetter(1), sorted(bare)[:ACCOUNTS_SHOWN])
    most_keys = titled("Accounts with the most active keys and none of the controls", most)
    return titled("Enforced by service control policies", lines) + most_keys


def control_remarks(summary: Summary, control: str) -> Iterator[str]:
    """The policies behind a control's verdicts, with their exemptions and conditions."""
    for one in [*accounts_of(summary, "audited"), *accounts_of(summary, "failed")]:
        found = one["controls"][control]
        names = ", ".join(map(itemgetter("name"), found["policies"]))
        limits = "; or ".join(map(limit_in_words, found["conditions"]))
        remark = f"{found['verdict']}: {names} {limits}".rstrip(" :")
        remark += f"; exempt: {', '.join(found['exemptions'])}" if found["exemptions"] else ""
        remark += f": {found['why_not_checked']}" if found["why_not_checked"] else ""
        if names or found["why_not_checked"]:
            yield remark


def limit_in_words(text: str) -> str:
    """`NotAction iam:*, sts:* and Bool x false`: does not cover iam:* and sts:*, applies only if"""
    limits, rest = [], text
    while (element := rest.partition(" ")[0]) in ("Action", "NotAction", "Resource", "NotResource"):
        values, _, rest = rest.partition(" ")[2].partition(" and ")
        verb = "does not cover" if element.startswith("Not") else "covers only"
        limits.append(f"{verb} {' and '.join(values.rsplit(', ', 1))}")
    return ", ".join([*limits, f"applies only if {rest}"] if rest else limits)


def run_lines(summary: Summary) -> list[str]:
    """The table of runs; empty for the first one, which has nothing to be compared with."""
    days = f"over {summary['max_key_age_days']} days"
    lines = [f"{'Runs':<28}{'audited':>9}{'without MFA':>13}{'active keys':>13}{days:>14}"]
    for one in summary["runs"][-RUNS_LISTED:]:
        numbers = itemgetter("started", "audited", *RUN_GAPS)(one)
        lines.append("{:<28}{:>9,}{:>13,}{:>13,}{:>14,}".format(*numbers))
    return lines if len(lines) > 2 else []


def outcome_line(outcome: Outcome) -> str:
    """One account's result, for --verbose."""
    result = "out of scope"
    if isinstance(outcome, AuditedAccount):
        result = f"audited, {count(len(outcome.users), 'user')}"
    elif isinstance(outcome, FailedAccount):
        result = f"failed at {outcome.step}: {outcome.code}: {outcome.message}"
    elif isinstance(outcome, SkippedAccount):
        result = f"skipped, {outcome.account.state}"
    return f"{outcome.account.id} {outcome.account.name}: {result}"


def label(account: Summary) -> str:
    """The account's ID and its name, cut before a number or padded, as columns of a table."""
    name = account["name"]
    if len(name) > 20:
        name = re.sub(r"\w*\d\w*$", "", name[:19]) + "\N{HORIZONTAL ELLIPSIS}"
    return f"{account['id']} {name:<20}"


def in_words(key: str, max_key_age_days: int = 0) -> str:
    """A key of summary.json in words: `active_keys` is `active keys`."""
    words = re.sub("[_-]", " ", key).replace("max age", f"{max_key_age_days} days")
    return words.replace("mfa", "MFA").replace("api", "API")


def numbers_in_words(numbers: Mapping[str, int], start: str = "") -> str:
    """`3 enforced, 1 absent`: the numbers whose names start so, without zeros."""
    told = []
    for name, number in numbers.items():
        if number and name.startswith(start):
            told.append(f"{number:,} {name.removeprefix(start)}")
    return ", ".join(told)


def age(span: timedelta) -> str:
    """`12 minutes`, `3 hours`, `5 days`: rounded up, except for a tenth: nightly runs vary."""
    for unit, name in ((timedelta(days=1), "day"), (timedelta(hours=1), "hour")):
        if span >= 2 * unit:
            return count(round(span / unit + 0.4), name)
    return count(max(1, round(span / timedelta(minutes=1) + 0.4)), "minute")


def summary_document(run: Run, finished: datetime) -> dict[str, Any]:
    """The content of summary.json; README.md documents its keys."""
    plan, tracking, included = run.plan, run.tracking, run.plan.scope.include_management
    document: dict[str, Any] = {"format": SUMMARY_FORMAT, "tool": "iam-audit", "version": VERSION}
    document.update(started=iso(run.started), finished=iso(finished), role=plan.role)
    document.update(production_pattern=plan.production.pattern, scope=scope_document(plan.scope))
    document.update(max_key_age_days=plan.max_key_age.days, max_unused_days=plan.max_unused.days)
    document["options"] = {"workers": plan.workers, "owner_tags": plan.owner_tags}
    document["options"].update(cloudtrail=bool(plan.events_since), exceptions=len(plan.exceptions))
    document.update(page="report.html" if plan.page else None, caller=vars(run.caller))
    document["organization"] = {**vars(run.organization), "management_account_included": included}
    document.update(ous_why_not=run.ous_why_not or None, **figures_document(run))
    document.update(changes=changes_document(run), **policies_and_events_document(run))
    document["new_keys_not_ruled_out"] = sorted(map(attrgetter("id"), tracking.blind))
    document["earlier_files_passed_over"] = list(tracking.passed_over)
    document.update(exceptions=exceptions_document(run), accounts=account_entries(run))
    left_out = [{"id": one.account.id, "name": one.account.name} for one in run.out_of_scope]
    return {**document, "out_of_scope": sorted(left_out, key=itemgetter("id"))}


def figures_document(run: Run) -> dict[str, Any]:
    """What is counted over the accounts."""
    not_checked, levels, failed = dict[str, Counter[str]](), dict[str, Any](), len(run.failed)
    production = [figures for figures in run.audited if figures.production]
    totals = {"audited": len(run.audited), "failed": failed, "skipped": len(run.skipped)}
    totals.update(out_of_scope=len(run.out_of_scope), production=len(production))
    totals["users"] = sum(map(attrgetter("users"), run.audited))
    gaps = {"organization": gaps_document(total_gaps(run.audited), run.started)}
    gaps["production"] = gaps_document(total_gaps(production), run.started)
    this_run = {"started": iso(run.started), "audited": len(run.audited)}
    this_run.update(zip(RUN_GAPS, itemgetter(*RUN_GAPS)(gaps["organization"])))
    for figures in run.audited:
        for operation, code in figures.not_checked.items():
            not_checked.setdefault(operation, Counter())[code] += 1
    for phase in PHASES:
        found = list(map(attrgetter(phase), run.audited))
        accounts = {**dict.fromkeys(LEVELS, 0), **Counter(found + [NOT_STARTED] * failed)}
        levels[phase] = {"level": organization_level(found, failed), "accounts": accounts}
    to_fix = Counter(finding.priority for finding in run.findings if finding.exception is None)
    findings = {str(each): to_fix[each] for each in range(MOST_URGENT, LEAST_URGENT + 1)}
    document = {"totals": totals, "not_checked": not_checked, "gaps": gaps, "maturity": levels}
    return {**document, "runs": [*run.tracking.runs, this_run], "findings": findings}


def gaps_document(gaps: Gaps, now: datetime) -> dict[str, Any]:
    document = {**vars(gaps), "mfa_coverage_percent": gaps.mfa_coverage_percent}
    if key := gaps.oldest_active_key:
        dates = {"created": iso(key.created), "age_days": days_between(key.created, now)}
        document["oldest_active_key"] = {**key._asdict(), **dates}
    return document


def changes_document(run: Run) -> dict[str, Any] | None:
    """What has changed since the accounts' baselines; None without an earlier run."""
    tracking, earlier, keys = run.tracking, run.tracking.earlier, []
    if earlier is None:
        return None
    kinds = (*EXPLAINED_BY, *NEW_KEY_CHANGES[2:], USER_CAME_AND_WENT)
    counts = dict.fromkeys((*kinds, "account-joined", "account-left"), 0)
    counts.update(Counter(map(attrgetter("change"), tracking.changes)))
    stayed = earlier.accounts.keys() & accounts_now(run).keys() - tracking.compared.keys()
    stayed -= set(map(attrgetter("account.id"), run.out_of_scope))
    for key in new_keys(run):
        row: dict[str, Any] = dict(zip(CHANGES_COLUMNS, change_row(key)))
        for name in ("event_name", "event_time", "actor", "source_ip", "since"):
            row[name] = row[name] or None
        keys.append({**row, "account_compared": key.account_id in tracking.compared})
    document: dict[str, Any] = {"since": iso(earlier.started), "folder": str(earlier.folder)}
    document.update(accounts_compared=len(tracking.compared), accounts_not_compared=len(stayed))
    mfa = {"fixed": tracking.mfa_fixed, "new": len(tracking.mfa_new)}
    document.update(console_users_without_mfa=mfa, counts=counts, new_access_keys=keys)
    document["witnesses"] = Counter(filter(None, map(attrgetter("witness"), tracking.changes)))
    document["maturity"] = {phase: level_changes(run, phase) for phase in PHASES}
    return {**document, "max_key_age_days_then": earlier.max_key_age_days}


def level_changes(run: Run, phase: str) -> dict[str, Any]:
    """The level of the accounts compared at their baselines, the organization's, and theirs now."""
    then, compared_now = [], []
    for figures in run.audited:
        if earlier := run.tracking.compared.get(figures.account.id):
            level = earlier.accounts[figures.account.id].levels[PHASES.index(phase)]
            then.append(LEVELS[level])
            compared_now.append(getattr(figures, phase))
    now = organization_level(map(attrgetter(phase), run.audited), len(run.failed))
    both = [organization_level(each, failed=0) if then else None for each in (then, compared_now)]
    return {"then": both[0], "now": now, "compared_now": both[1]}


def policies_and_events_document(run: Run) -> dict[str, Any]:
    """Accounts by control and verdict; CloudTrail's events and failures, None if not asked."""
    accounts, found, tracking = {}, run.enforcement, run.tracking
    for control in CONTROLS:
        verdicts = Counter(each[control].verdict for each in run.controls.values())
        accounts[control] = {**dict.fromkeys(VERDICTS, 0), **verdicts}
    enforcement: dict[str, Any] = {"why_not_checked": found.why_not or None, "accounts": accounts}
    enforcement["root_credentials_managed_centrally"] = found.root_credentials_managed
    enforcement["root_credentials_why_not_checked"] = found.root_why_not or None
    if run.plan.events_since is None:
        return {"enforcement": enforcement, "cloudtrail": None}
    events = sum(len(trail.events) for _account, trail in run.trails)
    cloudtrail: dict[str, Any] = {"events": events, "out_of_reach": tracking.events_out_of_reach}
    cloudtrail["since"] = iso(tracking.events_from) if tracking.events_from else None
    cloudtrail["unavailable"] = {one.id: trail.error for one, trail in run.trails if trail.error}
    return {"enforcement": enforcement, "cloudtrail": cloudtrail}


def exceptions_document(run: Run) -> dict[str, Any]:
    """Findings covered; exceptions expired, and unused where all accounts they name were read."""
    covered = [one for one in run.findings if one.exception]
    covering = {one.exception for one in covered}  # of several, the one that lasts longest
    unknown = set(map(attrgetter("account.id"), [*run.failed, *run.out_of_scope]))
    unknown.update(one.account.id for one in run.audited if one.not_checked)
    expired, unused = [], []
    for one in run.plan.exceptions:
        entry = {**one._asdict(), "until": one.until.isoformat()}
        anywhere = one.account_id == "*" and unknown - {run.organization.management_account}
        used_or_unknown = one in covering or one.account_id in unknown or anywhere
        if one.until < run.started.date():
            expired.append(entry)
        elif not (used_or_unknown or any(is_excepted(finding, one) for finding in covered)):
            unused.append(entry)
    return {"applied": len(covered), "expired": expired, "unused": unused}


def account_entries(run: Run) -> list[dict[str, Any]]:
    """The accounts in scope, by ID."""
    entries = list[dict[str, Any]]()
    others: list[Any] = [*run.skipped, *run.failed]
    for other in others:
        entry = {**vars(other.account), "result": "skipped", "not_checked": {}}
        entry["production"] = is_production(other.account, run.plan.production)
        if isinstance(other, FailedAccount):
            error = {"code": other.code, "message": other.message}
            levels = dict.fromkeys(PHASES, NOT_STARTED)
            entry.update(result="failed", step=other.step, error=error, maturity=levels)
        entries.append(entry)
    for one in run.audited:
        earlier = run.tracking.compared.get(one.account.id)
        entry = {**vars(one.account), "result": "audited", "root": one.has_root, "users": one.users}
        entry.update(not_checked=one.not_checked, production=one.production)
        entry["maturity"] = {"phase1": one.phase1, "phase2": one.phase2}
        entry["report_generated"] = iso(one.report_generated)
        entry["since"] = iso(earlier.started) if earlier else None
        entries.append({**entry, "gaps": gaps_document(one.gaps, run.started)})
    for entry in entries[len(run.skipped) :]:
        entry["controls"] = {}
        for name, control in run.controls[entry["id"]].items():
            policies = [{"id": each, "name": policy} for each, policy in control.policies.items()]
            entry["controls"][name] = {**vars(control), "policies": policies}
    return sorted(entries, key=itemgetter("id"))


# === Page: report.html, which loads nothing; values in, text out =================================

FINDINGS_ON_PAGE = 2000
# Headings of tables; a # stands before those of numbers
FINDINGS_HEADINGS = ("#Priority", "Finding", "Account", "User", "#Age in days", "What to do")
ACCOUNTS_HEADINGS = (
    *("Account", "OU", "Phase 1", "Phase 2", "#Console users without MFA", "#Old access keys"),
    *("#API keys without expiry", *CONTROLS.values(), "State"),
)
STATES = {"failed": "failed at {step}: {error[code]}", "skipped": "skipped: {state}"}
OLDEST = "{access_key_id} of {username} in {account_id} {account_name}, {age_days:,} days"
ROUND_NUMBERS = tuple(step * 10**power for power in range(9) for step in (2, 4, 6, 10))
FILTERS = """<div class="filters" hidden><label>Filter <input type="search"></label>{}
<label><input type="checkbox" value="p"> Production only</label>{}<output></output></div>"""
BAR = '<svg class="bar" width="{}%"></svg>'  # the page's policy forbids style attributes
WORDS = """<dl><dt>Phase 1<dd>In Progress: root or users with a password lack MFA. Complete: none.
Advanced: a policy also enforces MFA. <dt>Phase 2<dd>In Progress: active access keys or API keys are
older than the maximum age, or API keys never expire. Complete: none. Advanced: no key, service
password or certificate is active. <dt>Not Started<dd>Could not be audited. <dt>Baseline<dd>The
newest earlier run that audited the account. What it did not have is new. <dt>Enforced, partial,
absent<dd>Denied to all but the exempt; under conditions; not at all.</dl>"""
STYLE = """
:root{color-scheme:light dark;--back:#fff;--soft:#f4f5f7;--ink:#0f141a;--dim:#4a505c;
--line:#d5d8de;--accent:#0062cc;--tint:#e6f0fc}
@media screen and (prefers-color-scheme:dark){:root{--back:#0f151d;--soft:#19212c;--ink:#ebeef2;
--dim:#adb5c1;--line:#38424f;--accent:#5cb3ff;--tint:#15304d}}
*{box-sizing:border-box} [hidden]{display:none!important} h3::first-letter{text-transform:uppercase}
html{background:var(--back);color:var(--ink);font:.875rem/1.45 "Segoe UI",Roboto,Arial,sans-serif}
body{max-width:105rem;margin:0 auto;padding:2rem clamp(1rem,3vw,3rem);overflow-wrap:anywhere}
h1,.big{font-size:1.75rem;line-height:1.2} h2{font-size:1.25rem} h3,dt{font-size:1rem}
h1,h2,h3,p{margin:0 0 .375rem} h1,h2,h3,th,dt,.big,.in0:has(+.in2){font-weight:600}
section{margin-top:2rem;padding-top:1rem;border-top:1px solid var(--line)}
dd{margin:0 0 .5rem} small,dd{color:var(--dim)} .in2{padding-left:1rem} .in4{padding-left:2rem}
small{display:block;font-size:.75rem} code{font:.75rem/1.4 Consolas,monospace}
a,b,p,td,li,small,code{unicode-bidi:isolate} a,summary{color:var(--accent)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.warning{border-left:.25rem solid var(--ink);background:var(--soft);padding:1rem;margin-top:1rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:2rem}
.ladder{display:flex;flex-direction:column-reverse;gap:.25rem;padding:0;list-style:none}
.ladder li{display:flex;justify-content:space-between;padding:.375rem .75rem;
border-left:.25rem solid var(--line);background:var(--soft)}
li.here{border-color:var(--accent);background:var(--tint)} .here b::after{content:" \\25C0  here"}
.chart{overflow:visible;display:block;max-width:36rem;margin:.5rem 0;font-size:11px;fill:var(--dim)}
.chart line{stroke:var(--line)} .chart circle{fill:var(--accent)} polyline{stroke:var(--accent)}
.bar{display:inline-block;height:.5rem;margin-right:.5rem;background:var(--accent)}
.ages td{white-space:nowrap} .ages td+td{padding-right:4rem}
.cards .bar{display:block;height:.25rem;margin:.25rem 0 0 auto}
.table{overflow:auto;max-height:44rem;border:1px solid var(--line);margin:.75rem 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.5rem;vertical-align:top;text-align:left;border-bottom:1px solid var(--line)}
th{position:sticky;top:0;background:var(--soft);vertical-align:bottom;overflow-wrap:break-word}
th.n,td.n{text-align:right} th button{all:unset;cursor:pointer}
[aria-sort] button::after{content:" \\25B2"} [aria-sort=descending] button::after{content:" \\25BC"}
.filters{display:flex;flex-wrap:wrap;align-items:center;gap:.5rem 1.25rem}
input,select{font:inherit;color:inherit;background:var(--back);border:1px solid;padding:.375rem}
.cards :is(table,thead,tbody){display:block} .cards thead{position:sticky;top:0}
.cards tr{display:grid} .cards tr:nth-child(n+31){content-visibility:auto;
contain-intrinsic-size:auto 4rem} .findings tr{grid-template-columns:7fr 20fr 16fr 21fr 6fr 37fr}
.accounts tr{grid-template-columns:15fr 14fr 9fr 9fr repeat(6,8fr) 12fr}
@media print{@page{size:A4;margin:12mm} html{font-size:8pt} body{padding:0}
.filters,.cards tr:nth-child(n+61){display:none} *{print-color-adjust:exact}
.table{overflow:visible;max-height:none;border:0} th,td{position:static;padding:.25rem}
tr,li,.grid{break-inside:avoid} h2,h3,thead,.cards tr:first-child{break-after:avoid}}
@media screen and (max-width:75rem){.cards thead,.cards td:empty{display:none}
.cards tr{grid-template-columns:1fr;padding:.5rem 0;border-bottom:1px solid var(--line)}
.cards td{padding:.125rem .5rem .125rem 9rem;border:0;text-align:left} .cards .bar{margin-left:0}
.cards td::before{float:left;width:8rem;margin-left:-8.5rem;color:var(--dim)}}
@media print,(min-width:75rem){.cards td::before{display:none}}
"""
SCRIPT = """
const order = new Intl.Collator("en", {numeric: true});
for (const box of document.querySelectorAll(".filters")) {
  const table = box.nextElementSibling.firstChild, rows = [...table.tBodies[0].rows];
  const words = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));
  box.hidden = false;
  box.oninput = () => {
    const wanted = box.querySelector("input").value.toLowerCase().split(/\\s+/);
    const marks = [...box.querySelectorAll(":checked")].map(one => one.value).filter(Boolean);
    for (const row of rows)
      row.hidden = !wanted.every(word => words.get(row).includes(word))
        || !marks.every(mark => row.classList.contains(mark));
    box.lastChild.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} shown`;
  };
  box.oninput();
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      for (const other of head.parentNode.cells) other.ariaSort = null;
      head.ariaSort = sign > 0 ? "ascending" : "descending";
      const key = row => row.cells[head.cellIndex].textContent.replaceAll(",", "");
      table.tBodies[0].append(...rows.sort((a, b) => order.compare(key(a), key(b)) * sign));
    };
  }
}
"""


def report_page(run: Run, summary: Summary) -> str:
    """The page. By its policy a browser loads nothing, and runs no style or script but these."""
    style, policy, body = STYLE, "default-src 'none'; base-uri 'none'; form-action 'none'", ""
    for css, headings in (("findings", FINDINGS_HEADINGS), ("accounts", ACCOUNTS_HEADINGS)):
        for number, heading in enumerate(headings, 1):  # on narrow screens each cell has its own
            style += f".{css} td:nth-child({number})::before{{content:{heading.strip('#')!r}}}"
    for kind, content in (("style", style), ("script", SCRIPT)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    audited, nothing = summary["totals"]["audited"], "<p>No account was audited.</p>"
    changes = [*change_lines(run, summary), *new_lines(run), *witness_lines(summary)]
    for title, content in (
        ("Maturity", maturity_part(summary)),
        ("Trend", trend_part(summary) if audited else nothing),
        ("Age of the active access keys", ages_part(summary) if audited else nothing),
        ("What to fix first", findings_part(run, summary)),
        ("Accounts", accounts_part(summary)),
        ("What has changed", outline(changes)),
        ("What policies enforce", outline(enforcement_lines(summary))),
        ("About this page", about_part(summary)),
    ):
        body += f"<section><h2>{title}</h2>{content}</section>\n"
    return f"""<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer"><meta name="viewport" content="width=device-width">
<title>IAM audit {summary["started"]}</title><style>{style}</style>
<header>{heading_part(summary)}</header><main>{body}</main><script>{SCRIPT}</script></html>
"""


def safe(value: Any) -> str:
    """A value as text that is neither markup nor steers the display."""
    return html.escape(printable(str(value)))


def outline(lines: Iterable[str]) -> str:
    """Lines of the terminal, as deep as they are indented there; a column there is a colon here."""
    text = ""
    for line in lines:
        words = safe(re.sub(" {2,}", ": ", line.strip()))
        text += f'<p class="in{len(line) - len(line.lstrip())}">{words}</p>'
    return text


def table(title: str, css: str, headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls, by keyboard too. Rows have their classes, then their cells in HTML."""
    head, starts, body = "", list[str](), list[str]()
    for heading in headings:
        mark, words = ' class="n"' if heading[0] == "#" else "", heading.strip("#")
        head += f'<th scope="col"{mark}>{words[0].upper()}{words[1:]}</th>'
        starts.append(f"<td{mark}>")
    for marks, *cells in rows:
        body.append(f'\n<tr class="{marks}">' if marks else "\n<tr>")
        for start, cell in zip(starts, cells):
            body += (start, cell)
    region = f'<div class="table {css}" tabindex="0" role="region" aria-label="{title}">'
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f"{region}<table>{inside}</table></div>"


def heading_part(summary: Summary) -> str:
    """What was audited, and a warning of what was not."""
    title, *facts = heading_lines(summary)
    name, _, when = title.partition(", ")
    text = f"<h1>{safe(name)}</h1>{outline([f'IAM audit of {when}', *facts])}"
    warnings = [*failed_lines(summary, quiet=True), *not_checked_lines(summary)]
    if why_not := summary["enforcement"]["why_not_checked"]:
        warnings.append(f"Service control policies were not checked: {why_not}")
    title = "<h2>Warning: what is not known</h2>"
    return f'{text}<div class="warning">{title}{outline(warnings)}</div>' if warnings else text


def maturity_part(summary: Summary) -> str:
    """Each phase as a ladder, with what holds the organization on its rung and what has changed."""
    text, then = "", "There is no run to compare with."
    for phase, gap in zip(PHASES, (RUN_GAPS[0], RUN_GAPS[2])):
        (title, reason, *more), maturity = phase_lines(summary, phase), summary["maturity"][phase]
        text += f'<div><h3>{title}</h3><ol class="ladder">'
        for level, number in maturity["accounts"].items():
            here = ' class="here" aria-current="step"' if level == maturity["level"] else ""
            text += f"<li{here}><b>{level}</b>{count(number, 'account')}</li>"
        if changes := summary["changes"]:
            then = f"Since {changes['since'][:10]}: {level_in_words(**changes['maturity'][phase])}"
            days = changes["max_key_age_days_then"]
            for one in summary["runs"]:
                if one["started"] == changes["since"]:
                    then += f"; then {one[gap]:,} {in_words(gap, days)}"
        reason = re.sub(r"^[\d,]+", r'<b class="big">\g<0></b>', safe(reason.strip()))
        text += f"</ol><p>{reason}</p>{outline(map(str.strip, [*more[:-1], then]))}</div>"
    return f'<div class="grid">{text}</div>'


def trend_part(summary: Summary) -> str:
    """Charts of the finished runs of this scope, and their figures as a table."""
    runs, headings, charts, rows = summary["runs"], ["Run", "#Accounts audited"], "", []
    for name in RUN_GAPS:
        title = in_words(name, summary["max_key_age_days"]).replace("active", "active access")
        headings.append(f"#{title}")
        charts += chart(title, sorted((parse_time(one["started"]), one[name]) for one in runs))
    for one in runs:
        numbers = itemgetter("audited", *RUN_GAPS)(one)
        rows.append(("", one["started"], *map("{:,}".format, numbers)))
    figures = table("The figures of the charts", "runs", headings, rows)
    text = f'<div class="grid">{charts}</div>{"" if runs[1:] else "The baseline of this scope."}'
    return f"{text}<details><summary>The figures as a table</summary>{figures}</details>"


def chart(title: str, points: Sequence[tuple[datetime, int]]) -> str:
    """A line through the points over time, from 0 to a round number."""
    (first, before), (last, now), line, dots = points[0], points[-1], "", ""
    top = next(each for each in ROUND_NUMBERS if each >= max(map(itemgetter(1), points)))
    for moment, number in points:
        x = 50 + 300 * ((moment - first) / (last - first) if moment > first else 0)
        y = 140 - 120 * number / top
        line += f"{x:.1f},{y:.1f} "
        dots += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    end, unit = f"{last:%Y-%m-%d}" if last > first else "", re.findall("users|keys", title)[0]
    told = f"now, {before:,} on {first:%Y-%m-%d}" if end else "now"
    return f"""<div><h3>{title}</h3><b class="big">{now:,}</b> {told}
<svg class="chart" viewBox="0 0 360 165" role="img"><title>{title}: {now:,} {told}</title>
<line x1="44" x2="356" y1="20" y2="20"/><line x1="44" x2="356" y1="140" y2="140"/>
<text y="10">{unit}</text><text x="38" y="24" text-anchor="end">{top:,}</text>
<text x="38" y="144" text-anchor="end">0</text><text x="44" y="160">{first:%Y-%m-%d}</text>
<text x="356" y="160" text-anchor="end">{end}</text>{dots}
<polyline points="{line}" fill="none" stroke-width="2"/></svg></div>"""


def ages_part(summary: Summary) -> str:
    """A histogram, with the production accounts apart, and the oldest key."""
    rows, (whole, production) = [], map(itemgetter("active_key_ages"), summary["gaps"].values())
    for name, *numbers in zip(KEY_AGES, whole, production):
        bars = (BAR.format(100 * number // (max(whole) or 1)) + f"{number:,}" for number in numbers)
        rows.append(("", safe(name), *bars))
    text = table("Age of the active access keys", "ages", ("Age", "All", "In production"), rows)
    if oldest := summary["gaps"]["organization"]["oldest_active_key"]:
        text += f"<p>The oldest: {safe(OLDEST.format(**oldest))}</p>"
    return text


def findings_part(run: Run, summary: Summary) -> str:
    """The most urgent findings, and the exceptions that no longer serve."""
    rows = [finding_cells(finding, run) for finding in run.findings[:FINDINGS_ON_PAGE]]
    options = "".join(map("<option>{}</option>".format, summary["findings"]))
    which = f'<label>Priority <select><option value="">all</option>{options}</select></label>'
    new = '<label><input type="checkbox" value="new"> New since the baseline</label>'
    text = FILTERS.format(which, new) + table("Findings", "cards findings", FINDINGS_HEADINGS, rows)
    number = f"{len(rows):,} of {count(len(run.findings), 'finding')}"
    text += f'<p>These are {number}; all are in <a href="findings.csv">findings.csv</a>.</p>'
    return text + outline(exception_lines(summary, "expired") + exception_lines(summary, "unused"))


def finding_cells(finding: Finding, run: Run) -> Sequence[str]:
    """A finding's classes, for the filters, and cells; what belongs together is in one."""
    row = dict(zip(FINDINGS_COLUMNS, map(safe, finding_row(finding, run))))
    marks = [row["priority"], "new" if finding.new else "", "p" if finding.production else ""]
    what = f"{row['finding']}{' <b>(new)</b>' if finding.new else ''}"
    what += "<small>{reasons}</small><small>{controls}</small>".format_map(row)
    if finding.exception:
        what += "<small>Exempt until {until}: {exception}</small>".format_map(row)
    place = f"{row['account_id']}{', production' if finding.production else ''}"
    where = f"{row['account_name']}<small>{place}</small><small>{row['ou']}</small>"
    who = f"{row['username']}{', administrator' if finding.administrator == 'true' else ''}"
    who += f"<small>{row['access_key_id']}</small><small>Owner: {row['owner']}</small>"
    advice = re.sub("`(.*?)`", r"<code>\1</code>", row["recommendation"])
    return (" ".join(marks), row["priority"], what, where, who, row["age_days"], advice)


def accounts_part(summary: Summary) -> str:
    """The accounts that failed, then those with the most gaps, last those that were skipped."""
    entries = accounts_of(summary, "audited")
    entries.sort(key=lambda one: -sum(itemgetter(*MOST_GAPS)(one["gaps"])))
    entries = [*accounts_of(summary, "failed"), *entries, *accounts_of(summary, "skipped")]
    rows = map(account_cells, entries)
    return FILTERS.format("", "") + table("Accounts", "cards accounts", ACCOUNTS_HEADINGS, rows)


def account_cells(one: Summary) -> Sequence[str]:
    """An account's class and cells. Of skipped and failed ones little or nothing is known."""
    name, cells = safe(one["name"] or one["id"]), [*one.get("maturity", {}).values()]
    if gaps := one.get("gaps"):
        name = f'<a href="accounts/{safe(one["id"])}.csv">{name}</a>'
        for gap, whole in zip(MOST_GAPS, ("console_users", "active_keys", "active_api_keys")):
            share = BAR.format(100 * gaps[gap] // (gaps[whole] or 1))
            cells.append(f"{gaps[gap]:,} of {gaps[whole]:,}{share}")
        if LISTING in one["not_checked"]:
            cells[-1] = NOT_CHECKED
    cells += [""] * (len(PHASES) + len(MOST_GAPS) - len(cells))
    cells += [found["verdict"] for found in one.get("controls", {}).values()] or [""] * 3
    state = STATES.get(one["result"], "audited").format_map(one)
    state += "".join(map("; {} was denied".format, one["not_checked"]))
    mark, place = ("p", f"{one['id']}, production") if one.get("production") else ("", one["id"])
    unit = f"{safe(one['ou'])}<small>{safe(one['email'])}</small>"
    return (mark, f"{name}<small>{safe(place)}</small>", unit, *cells, safe(state))


def about_part(summary: Summary) -> str:
    """The files, the options and thresholds, and what each word means."""
    keys = ("version", "role", "max_key_age_days", "max_unused_days", "production_pattern")
    settings = dict(zip(keys, itemgetter(*keys)(summary)), **summary["scope"], **summary["options"])
    lines = [f"{name}: {json.dumps(value)}" for name, value in settings.items() if value]
    files = ("summary.json", "credentials.csv", *(["changes.csv"] if summary["changes"] else ()))
    links = ", ".join(map('<a href="{0}">{0}</a>'.format, files))
    return f"<p>Files: {links}</p>{outline(lines)}{WORDS}"


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
SCPS, OUS = "arn:*:organizations::*:policy/*service_control_policy/*", "arn:*:organizations::*:ou/*"
LIMITED_READS = dict.fromkeys(POLICY_READS, ("ReadPolicies", SCPS))
LIMITED_READS["organizations:DescribeOrganizationalUnit"] = ("ReadOUs", OUS)
NEW_KEYS = (
    "iam:CreateAccessKey", "iam:CreateServiceSpecificCredential",
    "iam:ResetServiceSpecificCredential", "iam:UploadSigningCertificate",
    "iam:UploadSSHPublicKey")  # fmt: skip
NEW_PASSWORDS = ("iam:CreateLoginProfile", "iam:UpdateLoginProfile")


def print_document(name: str, role: str = DEFAULT_ROLE, exempt_roles: Sequence[str] = ()) -> str:
    """The text of one of DOCUMENTS: JSON, valid on its own."""
    callers = dict[str, dict[str, Any]]()
    for read in CALLER_READS:
        sid, arns = LIMITED_READS.get(read, ("ReadOrganization", "*"))
        callers.setdefault(sid, statement_of("Allow", sid, (), arns))["Action"].append(read)
    role_arn = f"arn:*:iam::*:role/{role}"
    assume = statement_of("Allow", "AssumeAuditRole", ["sts:AssumeRole"], role_arn)
    reads = statement_of("Allow", "ReadIAM", ROLE_READS)
    role_policy = policy_of(reads, statement_of("Allow", "ReadCloudTrail", CLOUDTRAIL_READS))
    trust = {"Effect": "Allow", "Principal": {"AWS": "111122223333"}, "Action": "sts:AssumeRole"}
    documents = [policy_of(*callers.values(), assume), role_policy, policy_of(trust)]
    documents += [role_template(role, role_policy), scp_require_mfa()]
    documents += [scp_deny_access_keys(exempt_roles), alert_rule()]
    return json.dumps(dict(zip(DOCUMENTS, documents))[name], indent=2) + "\n"


def role_template(role: str, role_policy: Mapping[str, Any]) -> dict[str, Any]:
    """CloudFormation for a StackSet: the role in every account, to be assumed from one account."""
    path, name = f"/{role}".rsplit("/", 1)
    account = {"AWS": {"Fn::Sub": "arn:${AWS::Partition}:iam::${AuditingAccountId}:root"}}
    external_id = {"StringEquals": {"sts:ExternalId": {"Ref": "ExternalId"}}}
    condition = {"Fn::If": ["HasExternalId", external_id, {"Ref": "AWS::NoValue"}]}
    trust = {"Effect": "Allow", "Principal": account, "Action": "sts:AssumeRole"}
    properties = {
        "RoleName": {"Ref": "RoleName"},
        "Path": f"{path}/",
        "Description": "Read by iam_audit.py: users, their credentials and MFA devices",
        "AssumeRolePolicyDocument": policy_of({**trust, "Condition": condition}),
        "Policies": [{"PolicyName": "iam-audit", "PolicyDocument": role_policy}],
    }
    no_external_id = {"Fn::Equals": [{"Ref": "ExternalId"}, ""]}
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "The role that iam_audit.py assumes, read-only",
        "Parameters": {
            "RoleName": parameter("Name of the role", r"[\w+=,.@-]{1,64}", Default=name),
            "AuditingAccountId": parameter("Account that runs the audit", r"\d{12}"),
            "ExternalId": parameter("If required", r"([\w+=,.@:/-]{2,1224})?", Default=""),
        },
        "Conditions": {"HasExternalId": {"Fn::Not": [no_external_id]}},
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
    events = {"Service": "events.amazonaws.com"}
    publish = {"Effect": "Allow", "Principal": events, "Action": "sns:Publish", "Resource": topic}
    policy = {"Topics": [topic], "PolicyDocument": policy_of(publish)}
    actions = (*NEW_KEYS, *NEW_PASSWORDS, "iam:DeactivateMFADevice")
    names = [action.partition(":")[2] for action in actions]
    iam, succeeded = ["iam.amazonaws.com"], [{"exists": False}]
    detail = {"eventSource": iam, "eventName": names, "errorCode": succeeded}
    kind = ["AWS API Call via CloudTrail"]
    pattern = {"source": ["aws.iam"], "detail-type": kind, "detail": detail}
    rule = {"EventPattern": pattern, "Targets": [{"Id": "Topic", "Arn": topic}]}
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


# === Options: the command line, its validators and help; the progress line =======================

# prod, prd, production or live as a word of its own (prod2 too), but not after no, non, not or pre
DEFAULT_PRODUCTION = (
    r"(?<![a-z0-9])(?<!(?<![a-z0-9])no[-_. ])(?<!(?<![a-z0-9])no[nt][-_. ])"
    r"(?<!(?<![a-z0-9])pre[-_. ])(?:prod|prd|production|live)[0-9]*(?![a-z0-9])"
)
DOCUMENT_LIST = "\n".join(f"  {name:<20}  {what}" for name, what in DOCUMENTS.items())
HELP_EPILOG = f"""\
examples:
  iam_audit.py --profile mgmt-profile --role AWSControlTowerExecution
  iam_audit.py --profile mgmt-profile --role audit/IAMAuditRole --ou ou-ab12-cdefgh34 --quiet

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
# What ends with exit code 4 or 5: findings of `priority` or worse (0: none), new keys
FailOn = namedtuple("FailOn", "priority new_keys", defaults=(0, False))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = (parser := argument_parser()).parse_args(argv)
    exempt, document, deny = options.exempt_role, options.document, "scp-deny-access-keys"
    accounts, since, retry = options.accounts, options.since, options.retry_failed
    pattern = document and re.search(r"[*?$]", "".join([*exempt, options.role or ""]))
    too_long = len(print_document(deny, "", exempt)) > SCP_LONGEST
    both = accounts & options.exclude | options.ou & options.exclude_ou
    for wrong, message in (
        (not options.role and not document, "the following arguments are required: --role"),
        (exempt and document != deny, f"argument --exempt-role: use it with --print {deny}"),
        (pattern, "argument --print: in a policy, *, ? and $ would stand for other roles"),
        (too_long, f"argument --exempt-role: too many; an SCP has {SCP_LONGEST:,} characters"),
        (both, f"cannot be both audited and left out: {', '.join(sorted(both))}"),
        (retry and accounts, "argument --retry-failed: not allowed with argument --accounts"),
        (since and not options.cloudtrail, "argument --since: use it with --cloudtrail"),
        (since and since > utc_now(), f"argument --since: {since} is in the future"),
    ):
        if wrong:
            parser.error(message)
    limits = accounts, options.exclude, options.ou, options.include_management
    options.scope = Scope(*limits, options.exclude_ou, retry)
    return options


def argument_parser() -> argparse.ArgumentParser:
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, width=TERMINAL_WIDTH)
    flag = {"action": "store_true"}
    ids = {"metavar": "ID[,ID...]", "type": parse_ids, "default": frozenset()}
    ous = {"metavar": "OU_ID[,OU_ID...]", "type": parse_ous, "default": frozenset()}
    days = {"metavar": "DAYS", "type": parse_days, "default": "90"}
    # fmt: off
    parser = argparse.ArgumentParser(
        prog="iam_audit.py", epilog=HELP_EPILOG, formatter_class=layout, allow_abbrev=False,
        description="List the users and long-term credentials of an AWS organization.")
    parser.add_argument("--version", action="version", version=f"iam-audit {VERSION}")
    add: Any = parser.add_argument_group("access").add_argument
    add("--profile", metavar="NAME", type=parse_name, help="AWS profile in the management account "
        "or a delegated administrator account (default: the SDK's default credential chain)")
    add("--role", metavar="NAME", type=parse_role, help="role to assume in each account, required "
        "for an audit: a name, or a path and a name, for example audit/IAMAuditRole")
    add("--external-id", metavar="ID", type=parse_external_id, help="external ID, if required")
    add = parser.add_argument_group("accounts").add_argument
    add("--accounts", **ids, help="audit only these; or @FILE, with one ID per line and # comments")
    add("--exclude", **ids, help="leave out these accounts; or @FILE")
    add("--ou", **ous, help="audit only accounts below these organizational units")
    add("--exclude-ou", **ous, help="leave out accounts below these organizational units")
    add("--include-management", **flag, help="also audit the management account: with the "
        "profile's own credentials if the profile belongs to it, otherwise through the role")
    add("--retry-failed", **flag, help="audit only what failed in the newest finished run")
    add = parser.add_argument_group("speed").add_argument
    add("--workers", metavar="N", type=parse_workers, default="auto",
        help="maximum number of API requests at a time, 1 to 256 (default: %(default)s)")
    add("--report-timeout", metavar="SECONDS", type=parse_seconds, default="300",
        help="longest wait for an account's credential report (default: %(default)s)")
    add = parser.add_argument_group("gaps and findings").add_argument
    add("--production", metavar="REGEX", type=parse_pattern, default=DEFAULT_PRODUCTION,
        help="searched in each account's name, ID and organizational units, ignoring case, to find "
             "production (default: prod, prd, production or live as a separate word)")
    add("--max-key-age", **days, help="report active access keys older than this (default: 90)")
    add("--max-unused", **days, help="report passwords and keys unused for longer (default: 90)")
    add("--owner-tag", metavar="KEY[,KEY...]", type=parse_tag_keys, dest="owner_tags",
        default="owner,Owner,team,Team,contact,email",
        help="tags that name a user's owner, the most important first (default: %(default)s)")
    add("--exceptions", metavar="FILE", type=functools.partial(from_file, parse_exceptions),
        default=(), help="CSV file of accepted findings; README.md describes its columns")
    add = parser.add_argument_group("changes").add_argument
    add("--previous", metavar="DIR|AGE", type=parse_previous, help="compare with the run in this "
        "folder, or with each account's newest run of at least this age, for example 30d (default: "
        "with its newest run)")
    add("--cloudtrail", **flag, help="ask CloudTrail in each account who made the changes; the "
        "role then requires cloudtrail:LookupEvents")
    add("--since", metavar="DATE", type=parse_date, help="ask CloudTrail from this date on: "
        "2026-01-31 or 2026-01-31T12:00:00Z (default: since the run compared with, or for 30 days)")
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", metavar="DIR", type=parse_name, default="reports",
        help="folder in which each run creates a folder (default: %(default)s)")
    add("--no-page", action="store_false", dest="page", help="do not write report.html")
    add("--fail-on", metavar="WHAT[,WHAT]", type=parse_fail_on, default=FailOn(),
        help="exit with code 4 (5 if accounts failed too) if there are findings, findings:N of "
             f"priority N ({MOST_URGENT} to {LEAST_URGENT}) or more urgent, or new-keys (access or "
             "API keys) since the account's last audit")
    add("-q", "--quiet", **flag, help="print only what needs attention")
    add("-v", "--verbose", **flag, help="print accounts, their steps and tracebacks to stderr")
    add = parser.add_argument_group("documents").add_argument
    add("--print", metavar="NAME", dest="document", choices=DOCUMENTS,
        help="print a document to deploy (see below) for the role in --role, and exit")
    add("--exempt-role", metavar="NAME[,NAME...]", type=parse_roles, default=(),
        help="roles that may create credentials despite --print scp-deny-access-keys")
    # fmt: on
    return parser


def matching(kind: Callable[[str], T], pattern: str, what: str, text: str) -> T:
    """The text as this kind of value, if it matches."""
    why = ""
    try:
        if re.fullmatch(pattern, text, re.ASCII):
            return kind(text)
    except (ValueError, re.error, OverflowError, RecursionError) as error:
        why = f": {error}"
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}{why}")


def parts_of(kind: Callable[[Iterable[str]], T], parse: Callable[[str], str], text: str) -> T:
    """The parts of a comma-separated list, as a tuple or set."""
    return kind(parse(part.strip()) for part in text.split(","))


def parse_role(text: str) -> str:
    """A role as its ARN ends: docs.aws.amazon.com/IAM/latest/APIReference/API_CreateRole.html"""
    role = r"(?!arn:)([!-.0-~]{1,510}/)*[\w+=,.@-]{1,64}"
    intended = re.sub(r"^(arn:[^/]*:role)?/+", "", text)
    if intended != text and re.fullmatch(role, intended, re.ASCII):
        raise argparse.ArgumentTypeError(f"write {intended} in place of {text!r}")
    return matching(str, role, "a role's name, or path and name", text)


def parse_ids(text: str) -> frozenset[str]:
    """Account IDs, separated by commas or, in @FILE, one per line with `#` comments."""
    pattern, what = r"\d{12}", "an account ID of 12 digits"
    if not text.startswith("@"):
        return parts_of(frozenset, functools.partial(matching, str, pattern, what), text)
    ids = set()
    for number, line in enumerate(from_file(str, text[1:]).split("\n"), 1):
        if entry := line.partition("#")[0].strip():
            ids.add(matching(str, pattern, f"{what} ({text[1:]}, line {number})", entry))
    if not ids:  # an empty set would select every account
        raise argparse.ArgumentTypeError(f"{text!r} has no account IDs")
    return frozenset(ids)


def from_file(parse: Callable[[str], T], path: str) -> T:
    """What `parse` makes of a UTF-8 file, which may begin with a byte order mark."""
    try:
        return parse(Path(path).read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, AuditError) as error:
        why = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{path!r}: {why}") from None


def parse_previous(text: str) -> Path | timedelta:
    """A folder, or an age such as 30d; a folder of that name is ./30d."""
    if re.fullmatch(r"\d+d", text, re.ASCII):
        return parse_days(text[:-1])
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor an age such as 30d")
    return Path(text)


def parse_fail_on(text: str) -> FailOn:
    """Of several priorities, the least urgent one counts."""
    pattern = rf"findings(:[{MOST_URGENT}-{LEAST_URGENT}])?|new-keys"
    what = f"findings, findings:N with N from {MOST_URGENT} to {LEAST_URGENT}, or new-keys"
    words = parts_of(set[str], functools.partial(matching, str, pattern, what), text)
    priorities = [int(word.partition(":")[2] or LEAST_URGENT) for word in words - {"new-keys"}]
    return FailOn(max(priorities, default=0), "new-keys" in words)


# From the API references of STS (AssumeRole) and Organizations (OrganizationalUnit)
AN_EXTERNAL_ID = "an external ID (2 to 1224 of letters, digits and _+=,.@:/-)"
OU = (r"ou-[0-9a-z]{4,32}-[0-9a-z]{8,32}", "the ID of an organizational unit (ou-ab12-cdefgh34)")
WORKERS = (r"auto|[1-9]\d?|1\d\d|2[0-4]\d|25[0-6]", "auto or a number from 1 to 256")
DAYS = (r"(?=.*[1-9])\d{1,4}", "a number of days from 1 to 9999")
SECONDS = (r"(?=.*[1-9])\d{1,6}(\.\d+)?", "a number of seconds above 0")
ANY = r"(?s).+"
parse_name = functools.partial(matching, str, ANY, "a name: it is empty")
ignoring_case = functools.partial(re.compile, flags=re.IGNORECASE)
parse_pattern = functools.partial(matching, ignoring_case, ANY, "a regular expression")
parse_date = functools.partial(matching, parse_time, ANY, "a date such as 2026-01-31")
parse_external_id = functools.partial(matching, str, r"[\w+=,.@:/-]{2,1224}", AN_EXTERNAL_ID)
parse_workers = functools.partial(matching, lambda text: int(text.replace("auto", "0")), *WORKERS)
parse_days = functools.partial(matching, lambda text: timedelta(days=int(text)), *DAYS)
parse_seconds = functools.partial(matching, float, *SECONDS)
parse_roles = functools.partial(parts_of, tuple, parse_role)
parse_ous = functools.partial(parts_of, frozenset, functools.partial(matching, str, *OU))
parse_tag_keys = functools.partial(parts_of, tuple, parse_name)


def complain(text: str, end: str = "\n") -> None:
    """Print to stderr. If that is closed, the run and its exit code are not affected."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)


def columns_of(stream: Any) -> int:
    """The width of the stream's terminal; 0 if there is none or it reports 0."""
    with contextlib.suppress(AttributeError, OSError):
        return os.get_terminal_size(stream.fileno()).columns
    return 0


class Status:
    """stderr: the progress line on a terminal, and --verbose."""

    def __init__(self, run: Run, quiet: bool, verbose: bool) -> None:
        self._run, self._verbose, self._started = run, verbose, time.monotonic()
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._draws = terminal and os.environ.get("TERM", "dumb") != "dumb" and not quiet

    def log(self, line: str) -> None:
        if self._verbose:
            self._write(f"{time.monotonic() - self._started:8.2f}s {printable(line)}\n")

    def warn(self, line: str) -> None:
        self._write(f"iam_audit.py: {printable(line)}; the run goes on.\n")

    async def draw(self) -> None:
        """Keep the progress line up to date until the task is cancelled, and erase it then."""
        try:
            while self._draws:
                self._write(self._progress_line()[: (columns_of(sys.stderr) or 80) - 1])
                await asyncio.sleep(0.2)
        finally:
            self._write("")

    def _progress_line(self) -> str:
        run, elapsed = self._run, time.monotonic() - self._started
        failed, done = len(run.failed), len(run.audited) + len(run.failed)
        line = f"{done:,} of {run.to_audit:,}{'' if run.all_listed else '+'} accounts"
        line += f", {failed:,} failed" if failed else ""
        line += f", {clock(timedelta(seconds=elapsed))}"
        if done and run.all_listed:
            left = elapsed / done * (run.to_audit - done)
            line += f", about {clock(timedelta(seconds=left))} left"
        return line

    def _write(self, text: str) -> None:
        complain("\r\x1b[K" * self._draws + text, end="")  # in place of the progress line


if __name__ == "__main__":
    raise SystemExit(main())

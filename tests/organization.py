"""An AWS organization to audit without AWS: moto's server on a loopback port, filled through boto3.

`MotoServer` runs in this process, so that a program under test can be a process of its own; `fill` builds accounts,
users, keys and MFA devices from plain descriptions (`AccountSpec` and so on) and says what it made. No ID is left to
chance: the same descriptions give the same organization every time.

Where moto differs from AWS in what an audit depends on, the server answers as AWS does (see `_AWS_ANSWERS`);
`MotoServer(like_aws=False)` leaves moto as it is.
"""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import io
import json
import os
import socketserver
import threading
import types
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from unittest import mock
from xml.sax.saxutils import escape

import boto3
import botocore.session
from botocore.config import Config
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.iam.models import AccessKeyLastUsed, get_account_id_from, iam_backends
from moto.moto_api._internal import mock_random
from moto.moto_api._internal.models import moto_api_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.organizations.models import organizations_backends

if TYPE_CHECKING:
    from mypy_boto3_iam import IAMClient
    from mypy_boto3_organizations import OrganizationsClient
    from mypy_boto3_sts import STSClient

MANAGEMENT_ID = (
    DEFAULT_ACCOUNT_ID  # whom moto takes everybody for whose credentials it does not know
)
DEFAULT_ROLE = "OrganizationAccountAccessRole"
REGION = "us-east-1"
ACCESS_KEY_ID = "AKIAIOSFODNN7EXAMPLE"  # the pair of AWS's documentation: a well-known dummy
SECRET_ACCESS_KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
NOWHERE = "/dev/null/none"  # below a file: cannot exist on any machine
LONG_AGO = datetime(2022, 3, 1, 9, 0, tzinfo=timezone.utc)
REPORT_LIFETIME = timedelta(hours=4)

VIRTUAL, HARDWARE, SECURITY_KEY, SMS = "Virtual", "Hardware", "Security key", "SMS"


# --- what to make ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeySpec:
    """An access key; `last_used` None is a key never used."""

    created: datetime = LONG_AGO
    last_used: datetime | None = None
    service: str = "s3"
    status: str = "Active"


@dataclass(frozen=True)
class CredentialSpec:
    """A service-specific credential: an API key, or a password of CodeCommit or Keyspaces."""

    service: str = "bedrock.amazonaws.com"
    created: datetime = LONG_AGO
    expires: datetime | None = None
    status: str = "Active"


@dataclass(frozen=True)
class UserSpec:
    """An IAM user; `mfa` names the kind of each device, in the order of enabling.

    `attached` names policies that AWS manages; a group has the one that it is named after. `certificates` has the
    date of each signing certificate, all of them active.
    """

    name: str
    created: datetime = LONG_AGO
    password: bool = False
    password_last_used: datetime | None = None
    mfa: tuple[str, ...] = ()
    keys: tuple[KeySpec, ...] = ()
    path: str = "/"
    credentials: tuple[CredentialSpec, ...] = ()
    certificates: tuple[datetime, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    attached: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class RootSpec:
    """An account's root user as the credential report shows it; without arguments the one of a new member account."""

    password: bool = False
    password_last_used: datetime | None = None
    mfa: str | None = None
    keys: tuple[KeySpec, ...] = ()


@dataclass(frozen=True)
class AccountSpec:
    """A member account; `ou` is its path of OU names below the root, `role` the role it is created with."""

    name: str
    id: str
    ou: tuple[str, ...] = ()
    users: tuple[UserSpec, ...] = ()
    root: RootSpec = RootSpec()
    suspended: bool = False
    role: str = DEFAULT_ROLE


# --- what was made --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeKey:
    id: str
    spec: KeySpec


@dataclass(frozen=True)
class MadeUser:
    name: str
    arn: str
    spec: UserSpec
    keys: tuple[MadeKey, ...]
    serials: tuple[str, ...]


@dataclass(frozen=True)
class MadeAccount:
    """`path` is the entry of Account.Paths, `parents` the IDs from the root down to the account's own OU."""

    id: str
    name: str
    path: str
    parents: tuple[str, ...]
    spec: AccountSpec
    users: Mapping[str, MadeUser]


@dataclass(frozen=True)
class MadeOrganization:
    """`ous`: paths of OU names (`("Workloads", "Production")`) to OU IDs; `accounts`: IDs to member accounts."""

    id: str
    root_id: str
    management: MadeAccount
    ous: Mapping[tuple[str, ...], str]
    accounts: Mapping[str, MadeAccount]

    def account(self, name: str) -> MadeAccount:
        return next(account for account in self.accounts.values() if account.name == name)


# --- the server -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """An API request; `account` is the one it is about: for AssumeRole that of the role, else the caller's."""

    account: str
    action: str
    parameters: Mapping[str, Any]
    is_json: bool
    caller: str


@dataclass(frozen=True)
class _Answer:
    status: int
    body: str
    content_type: str


@dataclass
class _Failure:
    action: str
    code: str
    status: int
    message: str
    account: str | None
    parameters: Mapping[str, str]
    times: int | None

    def fits(self, request: _Request) -> bool:
        return (
            self.times != 0
            and self.action == request.action
            and self.account in (None, request.account)
            and all(
                request.parameters.get(name) == value for name, value in self.parameters.items()
            )
        )


@dataclass(frozen=True)
class _Report:
    content: str
    generated: datetime


@dataclass
class _State:
    """What AWS keeps and moto does not: roots, credential reports as they were when generated, central root access;
    of users what moto has no place for."""

    roots: dict[str, RootSpec] = field(default_factory=dict)
    reports: dict[str, _Report] = field(default_factory=dict)
    specs: dict[tuple[str, str], UserSpec] = field(default_factory=dict)  # by account and user name
    features: tuple[str, ...] = ()


class MotoServer:
    """moto's server on a free loopback port while the context lasts; requests are counted and can be made to fail.

    moto keeps its accounts in global variables: one server at a time in a process; entering starts from nothing.
    """

    def __init__(self, *, like_aws: bool = True) -> None:
        self._like_aws = like_aws
        self._state = _State()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._failures: list[_Failure] = []
        # moto is not made for concurrent writes; one request at a time costs nothing under the interpreter's lock.
        self._lock = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = _Server(self._answer)

    def __enter__(self) -> MotoServer:
        moto_api_backend.reset()
        # A short poll interval, since shutdown() waits for it.
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def connections(self) -> int:
        """How many connections were opened so far."""
        return self._server.connections

    def counts(self) -> Counter[tuple[str, str]]:
        """How many requests came, by account (for AssumeRole that of the role, else the caller's) and action."""
        with self._lock:
            return Counter(self._counts)

    def clear_counts(self) -> None:
        """Count requests and connections from here on."""
        with self._lock:
            self._counts.clear()
            self._server.connections = 0

    def fail(
        self,
        action: str,
        code: str,
        status: int = 400,
        message: str = "made to fail",
        *,
        account: str | None = None,
        times: int | None = None,
        **parameters: str,
    ) -> None:
        """Answer `action` with an error: in one account or all, `times` times or always.

        `parameters` narrow it to requests that carry these values, like `UserName="ana"`.
        """
        with self._lock:
            self._failures.append(
                _Failure(action, code, status, message, account, parameters, times)
            )

    def heal(self) -> None:
        """Take back every `fail`."""
        with self._lock:
            self._failures.clear()

    def set_root(self, account_id: str, root: RootSpec) -> None:
        """Give the account this root user; a report that was generated before does not show it."""
        with self._lock:
            self._state.roots[account_id] = root

    def set_user(self, account_id: str, user: UserSpec) -> None:
        """Give a user of that name these service-specific credentials and certificates."""
        with self._lock:
            self._state.specs[account_id, user.name] = user

    def set_features(self, *features: str) -> None:
        """What iam:ListOrganizationsFeatures answers, like `RootCredentialsManagement`; nothing to begin with."""
        with self._lock:
            self._state.features = features

    def prepare_reports(self, account_ids: Iterable[str]) -> None:
        """Generate credential reports now: the first GenerateCredentialReport of an audit then answers COMPLETE."""
        with self._lock:
            for account_id in account_ids:
                self._state.reports[account_id] = _take_report(self._state, account_id)

    def expire_reports(self) -> None:
        """Forget all credential reports, as AWS does after four hours."""
        with self._lock:
            self._state.reports.clear()

    def env(self, **variables: str) -> dict[str, str]:
        """The environment for a process that shall find this server for AWS and nothing of the user's own AWS setup."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return {
            **kept,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": NOWHERE,
            "AWS_SHARED_CREDENTIALS_FILE": NOWHERE,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **variables,
        }

    def _answer(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """The WSGI application: count, fail if told to, answer like AWS where moto does not, else leave it to moto."""
        with self._lock:
            request = _read_request(environ)
            self._counts[request.account, request.action] += 1
            answer = self._failure(request)
            if answer is None and self._like_aws and request.action in _AWS_ANSWERS:
                answer = _AWS_ANSWERS[request.action](request, self._state)
            if answer is None:
                try:
                    return list(self._moto(environ, start_response))
                except NotImplementedError:
                    answer = _error(
                        request, 400, "InvalidAction", f"moto does not implement {request.action}"
                    )
        start_response(f"{answer.status} ", [("Content-Type", answer.content_type)])
        return [answer.body.encode()]

    def _failure(self, request: _Request) -> _Answer | None:
        failure = next((failure for failure in self._failures if failure.fits(request)), None)
        if failure is None:
            return None
        if failure.times is not None:
            failure.times -= 1
        return _error(request, failure.status, failure.code, failure.message)


class _Server(ThreadingHTTPServer):
    """A WSGI server that keeps connections open as AWS does (werkzeug's and wsgiref's close after each request)."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application
        self.connections = 0
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own would look up the host's name, which can hang on a machine without DNS.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, as one that is interrupted does, is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one segment: in two, Nagle's algorithm would wait for the client's delayed ACK
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        answer = list(self.server.application(self._environ(body), self._start_response))
        self.send_header("Content-Length", str(sum(map(len, answer))))
        self.end_headers()
        self.wfile.write(b"".join(answer))
        self.wfile.flush()

    def _environ(self, body: bytes) -> dict[str, Any]:
        path, _, query = self.path.partition("?")
        environ: dict[str, Any] = {
            "REQUEST_METHOD": self.command,
            "SCRIPT_NAME": "",
            "PATH_INFO": urllib.parse.unquote(path),
            "QUERY_STRING": query,
            "SERVER_NAME": self.server.server_name,
            "SERVER_PORT": str(self.server.server_port),
            "SERVER_PROTOCOL": self.request_version,
            "REMOTE_ADDR": self.client_address[0],
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        for name, value in self.headers.items():
            if name.lower() not in ("content-type", "content-length"):
                environ["HTTP_" + name.upper().replace("-", "_")] = value
        return environ

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], _exc_info: object = None
    ) -> None:
        self.send_response(int(status.partition(" ")[0]))
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "date", "server"):
                self.send_header(name, value)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """No line a request on stderr."""


def _read_request(environ: dict[str, Any]) -> _Request:
    """Parse the body of a query or JSON request, leaving it readable for moto."""
    body = environ["wsgi.input"].read()
    environ["wsgi.input"] = io.BytesIO(body)
    target = environ.get("HTTP_X_AMZ_TARGET", "")
    parameters = (
        json.loads(body or b"{}") if target else dict(urllib.parse.parse_qsl(body.decode()))
    )
    action = target.rpartition(".")[2] or parameters.get("Action", "")
    credential = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2]
    caller = get_account_id_from(credential.partition("/")[0])
    account = parameters["RoleArn"].split(":")[4] if action == "AssumeRole" else caller
    return _Request(account, action, parameters, bool(target), caller)


def _error(request: _Request, status: int, code: str, message: str) -> _Answer:
    if request.is_json:
        return _json(request, status, {"__type": code, "message": message})
    error = f"<Type>Sender</Type><Code>{escape(code)}</Code><Message>{escape(message)}</Message>"
    body = f"<ErrorResponse><Error>{error}</Error><RequestId>0</RequestId></ErrorResponse>"
    return _Answer(status, body, "text/xml")


def _json(_request: _Request, status: int, body: object) -> _Answer:
    return _Answer(status, json.dumps(body), "application/x-amz-json-1.1")


def _xml(request: _Request, result: str) -> _Answer:
    name = request.action
    body = f"<{name}Response><{name}Result>{result}</{name}Result></{name}Response>"
    return _Answer(200, body, "text/xml")


# --- what AWS answers and moto does not -----------------------------------------------------------------------------


def _assume_role(request: _Request, _state: _State) -> _Answer | None:
    """moto lets anybody assume a role that does not exist; AWS denies it."""
    arn = request.parameters["RoleArn"]
    wanted = arn.partition(":role")[2]
    # The roles that moto makes in new accounts have the path "" where AWS has "/".
    if any(
        (role.path or "/") + role.name == wanted
        for role in iam_backends[request.account]["aws"].roles.values()
    ):
        return None
    caller = f"arn:aws:iam::{request.caller}:user/moto"
    message = f"User: {caller} is not authorized to perform: sts:AssumeRole on resource: "
    return _error(request, 403, "AccessDenied", message + arn)


def _list_accounts(request: _Request, _state: _State) -> _Answer:
    """20 accounts a page (moto: 100) with Paths (moto: none); errors where moto answers with no accounts at all."""
    backend = organizations_backends[request.caller]["aws"]
    if backend.org is None:
        if request.caller not in organizations_backends.master_accounts:
            message = "Your account is not a member of an organization."
            return _error(request, 400, "AWSOrganizationsNotInUseException", message)
        backend = organizations_backends[organizations_backends.master_accounts[request.caller][0]][
            "aws"
        ]
        if all(admin.account.id != request.caller for admin in backend.admins):
            return _error(
                request,
                400,
                "AccessDeniedException",
                "You don't have permissions to access this resource.",
            )
    start = int(request.parameters.get("NextToken", "0"))
    end = start + int(request.parameters.get("MaxResults", "20"))
    page = [
        {**account.describe(), "Paths": [_path(backend, account)]}
        for account in backend.accounts[start:end]
    ]
    more = {"NextToken": str(end)} if end < len(backend.accounts) else {}
    return _json(request, 200, {"Accounts": page, **more})


def _path(backend: Any, account: Any) -> str:
    """The entry of Account.Paths: `o-.../r-.../ou-.../ou-.../111122223333/`."""
    parents: list[str] = []
    parent = account.parent_id
    while parent:
        parents.insert(0, parent)
        parent = next(ou.parent_id for ou in backend.ou if ou.id == parent)
    return "/".join([backend.org.id, *parents, account.id, ""])


def _generate_credential_report(request: _Request, state: _State) -> _Answer:
    """The report shows the account as it was when it was generated, and is handed out for four hours (moto: live)."""
    report = state.reports.get(request.account)
    if report and datetime.now(timezone.utc) - report.generated < REPORT_LIFETIME:
        return _xml(request, "<State>COMPLETE</State>")
    state.reports[request.account] = _take_report(state, request.account)
    return _xml(request, "<State>STARTED</State><Description>No report exists.</Description>")


def _get_credential_report(request: _Request, state: _State) -> _Answer:
    """With root (moto: none), quoted names, AWS's words for what is not there, and the time (moto: always in 2015)."""
    report = state.reports.get(request.account)
    if report is None:
        return _error(request, 410, "ReportNotPresent", "No report has been generated.")
    content = base64.b64encode(report.content.encode()).decode()
    time = f"<GeneratedTime>{_iso(report.generated)}</GeneratedTime>"
    return _xml(request, f"<Content>{content}</Content><ReportFormat>text/csv</ReportFormat>{time}")


def _list_service_specific_credentials(request: _Request, state: _State) -> _Answer:
    """moto does not know it."""
    if request.parameters.get("AllUsers") != "true":
        message = "Must specify userName when calling with non-User credentials"
        return _error(request, 400, "ValidationError", message)
    members = ""
    for user in iam_backends[request.account]["aws"].users.values():
        spec = state.specs.get((request.account, user.name), UserSpec(user.name))
        for number, each in enumerate(spec.credentials, 1):
            expires = (
                f"<ExpirationDate>{_iso(each.expires)}</ExpirationDate>" if each.expires else ""
            )
            members += (
                f"<member><UserName>{escape(user.name)}</UserName><Status>{each.status}</Status>"
                f"<CreateDate>{_iso(each.created)}</CreateDate>{expires}<ServiceName>{each.service}</ServiceName>"
                f"<ServiceSpecificCredentialId>{credential_id(request.account, user.name, number)}"
                "</ServiceSpecificCredentialId></member>"
            )
    found = f"<ServiceSpecificCredentials>{members}</ServiceSpecificCredentials>"
    return _xml(request, f"{found}<IsTruncated>false</IsTruncated>")


def _list_organizations_features(request: _Request, state: _State) -> _Answer:
    """moto does not know it."""
    features = "".join(f"<member>{escape(feature)}</member>" for feature in state.features)
    organization = organizations_backends[request.caller]["aws"].org
    organization_id = f"<OrganizationId>{organization.id}</OrganizationId>" if organization else ""
    return _xml(request, f"{organization_id}<EnabledFeatures>{features}</EnabledFeatures>")


_AWS_ANSWERS: Mapping[str, Callable[[_Request, _State], _Answer | None]] = {
    "AssumeRole": _assume_role,
    "ListAccounts": _list_accounts,
    "GenerateCredentialReport": _generate_credential_report,
    "GetCredentialReport": _get_credential_report,
    "ListServiceSpecificCredentials": _list_service_specific_credentials,
    "ListOrganizationsFeatures": _list_organizations_features,
}

_REPORT_COLUMNS = [
    *(
        "user",
        "arn",
        "user_creation_time",
        "password_enabled",
        "password_last_used",
        "password_last_changed",
    ),
    *("password_next_rotation", "mfa_active"),
    *(
        f"access_key_{slot}_{name}"
        for slot in (1, 2)
        for name in (
            "active",
            "last_rotated",
            "last_used_date",
            "last_used_region",
            "last_used_service",
        )
    ),
    *("cert_1_active", "cert_1_last_rotated", "cert_2_active", "cert_2_last_rotated"),
]


def _take_report(state: _State, account_id: str) -> _Report:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(_REPORT_COLUMNS)
    writer.writerow(_root_row(account_id, state.roots.get(account_id, RootSpec())))
    for user in iam_backends[account_id]["aws"].users.values():
        spec = state.specs.get((account_id, user.name), UserSpec(user.name))
        writer.writerow(_user_row(user, spec.certificates))
    return _Report(lines.getvalue(), datetime.now(timezone.utc).replace(microsecond=0))


def _root_row(account_id: str, root: RootSpec) -> list[str]:
    password = [
        "true",
        _iso(root.password_last_used) if root.password_last_used else "no_information",
        _iso(LONG_AGO),
    ]
    slots = [
        _slot(key.status, key.created, key.last_used, key.service, REGION) for key in root.keys
    ]
    return [
        "<root_account>",
        f"arn:aws:iam::{account_id}:root",
        _iso(LONG_AGO),
        *(password if root.password else ["false", "N/A", "N/A"]),
        "not_supported",
        _bool(root.mfa is not None),
        *_slots(slots),
        *("false", "N/A", "false", "N/A"),
    ]


def _user_row(user: Any, certificates: Iterable[datetime]) -> list[str]:
    created = _iso(user.create_date)
    used = _iso(user.password_last_used) if user.password_last_used else "no_information"
    # By ID, which is neither the order of creation nor that of ListAccessKeys: no reader may lean on the slots' order.
    slots = [
        _slot(
            key.status,
            key.create_date,
            key.last_used and key.last_used.timestamp,
            key.last_used and key.last_used.service,
            key.last_used and key.last_used.region,
        )
        for key in sorted(user.access_keys, key=lambda key: str(key.access_key_id))
    ]
    return [
        user.name,
        user.arn,
        created,
        *(["true", used, created, "N/A"] if user.password else ["false", "N/A", "N/A", "N/A"]),
        _bool(user.mfa_devices),
        *_slots(slots),
        *[
            *(cell for moment in certificates for cell in ("true", _iso(moment))),
            *["false", "N/A"] * 2,
        ][:4],
    ]


def _slot(
    status: str, created: datetime, used: datetime | None, service: str | None, region: str | None
) -> list[str]:
    last_use = [_iso(used), region or "N/A", service or "N/A"] if used else ["N/A", "N/A", "N/A"]
    return [_bool(status == "Active"), _iso(created), *last_use]


def _slots(slots: list[list[str]]) -> list[str]:
    empty = ["false", "N/A", "N/A", "N/A", "N/A"]
    return [cell for slot in [*slots, empty, empty][:2] for cell in slot]


def _bool(value: object) -> str:
    return "true" if value else "false"


def _iso(moment: datetime) -> str:
    """The form of live reports; moto's naive times are UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return aware.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- filling --------------------------------------------------------------------------------------------------------


@dataclass
class _Tree:
    """The organization while it grows."""

    id: str
    root_id: str
    ous: dict[tuple[str, ...], str]


def fill(
    server: MotoServer, accounts: Iterable[AccountSpec], management: AccountSpec | None = None
) -> MadeOrganization:
    """Create an organization of these member accounts, over HTTP as far as AWS's API goes; request counts start anew.

    `management` describes the management account (its ID is always 123456789012, and it lies at the root).
    """
    boss = management or AccountSpec(name="management", id=MANAGEMENT_ID)
    mock_random.seed(0)  # the IDs of organization, root, OUs and policies
    organizations = organizations_client(server)
    organization_id = organizations.create_organization(FeatureSet="ALL")["Organization"]["Id"]
    # The wire API cannot name the management account; moto calls every one "master".
    organizations_backends[MANAGEMENT_ID]["aws"].accounts[0].name = boss.name
    tree = _Tree(organization_id, organizations.list_roots()["Roots"][0]["Id"], {})
    members = [_make_account(server, organizations, tree, account) for account in accounts]
    users = _make_users(server, iam_client(server), MANAGEMENT_ID, boss)
    path = f"{tree.id}/{tree.root_id}/{MANAGEMENT_ID}/"
    manager = MadeAccount(MANAGEMENT_ID, boss.name, path, (tree.root_id,), boss, users)
    server.clear_counts()
    return MadeOrganization(
        tree.id, tree.root_id, manager, tree.ous, {member.id: member for member in members}
    )


def _make_account(
    server: MotoServer, organizations: OrganizationsClient, tree: _Tree, account: AccountSpec
) -> MadeAccount:
    # The API hands out random account IDs; moto draws them in this function, in this process.
    with mock.patch("moto.organizations.utils.make_random_account_id", return_value=account.id):
        email = f"aws+{account.id}@example.com"
        organizations.create_account(Email=email, AccountName=account.name, RoleName=account.role)
    parents = _make_ous(organizations, tree, account.ou)
    if account.ou:
        organizations.move_account(
            AccountId=account.id, SourceParentId=tree.root_id, DestinationParentId=parents[-1]
        )
    users = _make_users(server, iam_client(server, account.id, account.role), account.id, account)
    if account.suspended:
        organizations.close_account(AccountId=account.id)
    path = "/".join([tree.id, *parents, account.id, ""])
    return MadeAccount(account.id, account.name, path, parents, account, users)


def _make_ous(
    organizations: OrganizationsClient, tree: _Tree, names: tuple[str, ...]
) -> tuple[str, ...]:
    """Create what is missing of this path of OUs; the IDs from the root down."""
    ids = [tree.root_id]
    for depth in range(1, len(names) + 1):
        path = names[:depth]
        if path not in tree.ous:
            made = organizations.create_organizational_unit(ParentId=ids[-1], Name=path[-1])
            tree.ous[path] = made["OrganizationalUnit"]["Id"]
        ids.append(tree.ous[path])
    return tuple(ids)


def _make_users(
    server: MotoServer, iam: IAMClient, account_id: str, account: AccountSpec
) -> dict[str, MadeUser]:
    server.set_root(account_id, account.root)
    if account.root.mfa == VIRTUAL:
        _give_root_virtual_mfa(iam, account_id)
    for user in account.users:
        server.set_user(account_id, user)
    return {user.name: make_user(iam, account_id, user) for user in account.users}


def make_user(iam: IAMClient, account_id: str, user: UserSpec) -> MadeUser:
    """Create a user with all that it has; `iam` must be a client of that account."""
    arn = iam.create_user(UserName=user.name, Path=user.path)["User"]["Arn"]
    if user.password:
        iam.create_login_profile(UserName=user.name, Password="correct horse battery staple")
    serials = tuple(
        _add_mfa(iam, account_id, user, kind, number) for number, kind in enumerate(user.mfa, 1)
    )
    backend = iam_backends[account_id]["aws"]
    # AWS sets these dates itself, so there is no call that backdates them; moto's objects are in this process.
    backend.users[user.name].create_date = _naive(user.created)
    if user.password_last_used:
        backend.users[user.name].password_last_used = _naive(user.password_last_used)  # type: ignore[assignment]
    keys = tuple(make_key(iam, account_id, user.name, key) for key in user.keys)
    if user.tags:
        iam.tag_user(
            UserName=user.name, Tags=[{"Key": key, "Value": user.tags[key]} for key in user.tags]
        )
    _attach(backend.users[user.name], user.attached)
    for group in user.groups:
        if group not in backend.groups:
            iam.create_group(GroupName=group)
            _attach(backend.groups[group], [group])
        iam.add_user_to_group(GroupName=group, UserName=user.name)
    return MadeUser(user.name, arn, user, keys, serials)


def _attach(holder: Any, names: Iterable[str]) -> None:
    """Attach policies of AWS's, which moto knows only if it loads all thousand of them."""
    for name in names:
        arn = f"arn:aws:iam::aws:policy/{name}"
        holder.managed_policies[arn] = types.SimpleNamespace(name=name, arn=arn)


def make_key(iam: IAMClient, account_id: str, user_name: str, key: KeySpec) -> MadeKey:
    """Create an access key with this past; its ID depends on account, user and how many keys were made there before."""
    random_id = iam.create_access_key(UserName=user_name)["AccessKey"]["AccessKeyId"]
    backend = iam_backends[account_id]["aws"]
    made = backend.access_keys.pop(random_id)
    number = 1
    while (key_id := _key_id(account_id, user_name, number)) in backend.access_keys:
        number += 1
    # Neither can be asked for over the wire: the ID, the date of creation, the last use.
    made.access_key_id = key_id
    made.create_date = _naive(key.created)
    if key.last_used:
        made.last_used = AccessKeyLastUsed(_naive(key.last_used), key.service, REGION)
    backend.access_keys[key_id] = made
    if key.status != "Active":
        iam.update_access_key(UserName=user_name, AccessKeyId=key_id, Status=key.status)  # type: ignore[arg-type]
    return MadeKey(key_id, key)


def _key_id(account_id: str, user_name: str, number: int) -> str:
    """20 characters that end in EXAMPLE, as in AWS's documentation: scanners for leaked keys know them for dummies."""
    digest = hashlib.sha256(f"{account_id} {user_name} {number}".encode()).digest()
    return f"AKIA{base64.b32encode(digest).decode()[:9]}EXAMPLE"


def credential_id(account_id: str, user_name: str, number: int) -> str:
    """The ID of a user's service-specific credential, counted from 1."""
    return f"ACCA{_key_id(account_id, user_name, number)[4:]}"


def _add_mfa(iam: IAMClient, account_id: str, user: UserSpec, kind: str, number: int) -> str:
    name = user.name if number == 1 else f"{user.name}-{number}"
    serial = {
        HARDWARE: f"GAHT{number}2345678",
        SECURITY_KEY: f"arn:aws:iam::{account_id}:u2f/user/{user.name}/key{number}-HFGHFGHFGHFG",
        SMS: f"arn:aws:iam::{account_id}:sms-mfa/{name}",
    }.get(kind)
    if serial is None:
        device = iam.create_virtual_mfa_device(Path=user.path, VirtualMFADeviceName=name)[
            "VirtualMFADevice"
        ]
        serial = device["SerialNumber"]
    iam.enable_mfa_device(
        UserName=user.name,
        SerialNumber=serial,
        AuthenticationCode1="123456",
        AuthenticationCode2="654321",
    )
    return serial


def _give_root_virtual_mfa(iam: IAMClient, account_id: str) -> None:
    """Only root can enable a device for root, and moto knows no root: put it where ListVirtualMFADevices looks."""
    serial = iam.create_virtual_mfa_device(VirtualMFADeviceName="root-account-mfa-device")[
        "VirtualMFADevice"
    ]
    device = iam_backends[account_id]["aws"].virtual_mfa_devices[serial["SerialNumber"]]
    device.enable_date = _naive(LONG_AGO)
    root = types.SimpleNamespace(
        id=account_id, arn=f"arn:aws:iam::{account_id}:root", create_date=_naive(LONG_AGO)
    )
    device.user = root  # type: ignore[assignment]


def _naive(moment: datetime) -> datetime:
    """moto keeps times without a time zone, in UTC."""
    return moment.astimezone(timezone.utc).replace(tzinfo=None)


def enable_scps(server: MotoServer) -> None:
    """Turn service control policies on for the whole organization."""
    organizations = organizations_client(server)
    root_id = organizations.list_roots()["Roots"][0]["Id"]
    organizations.enable_policy_type(RootId=root_id, PolicyType="SERVICE_CONTROL_POLICY")


def attach_scp(server: MotoServer, name: str, document: object, *targets: str) -> str:
    """Create a service control policy, attach it to roots, OUs or accounts by ID; the policy's ID."""
    organizations = organizations_client(server)
    content = document if isinstance(document, str) else json.dumps(document)
    made = organizations.create_policy(
        Name=name, Description=name, Type="SERVICE_CONTROL_POLICY", Content=content
    )
    policy_id = made["Policy"]["PolicySummary"]["Id"]
    for target in targets:
        organizations.attach_policy(PolicyId=policy_id, TargetId=target)
    return policy_id


# --- clients --------------------------------------------------------------------------------------------------------


def organizations_client(server: MotoServer) -> OrganizationsClient:
    return _session().client("organizations", endpoint_url=server.url, config=_CONFIG)


def iam_client(
    server: MotoServer, account_id: str = MANAGEMENT_ID, role: str = DEFAULT_ROLE
) -> IAMClient:
    """A client of this account, through AssumeRole as an administrator of the organization would."""
    if account_id == MANAGEMENT_ID:
        return _session().client("iam", endpoint_url=server.url, config=_CONFIG)
    sts: STSClient = _session().client("sts", endpoint_url=server.url, config=_CONFIG)
    arn = f"arn:aws:iam::{account_id}:role/{role}"
    credentials = sts.assume_role(RoleArn=arn, RoleSessionName="organization")["Credentials"]
    return _session().client(
        "iam",
        endpoint_url=server.url,
        config=_CONFIG,
        aws_access_key_id=credentials["AccessKeyId"],
        aws_secret_access_key=credentials["SecretAccessKey"],
        aws_session_token=credentials["SessionToken"],
    )


# A test's own trouble shall show at once, and a proxy of the machine must not come between.
_CONFIG = Config(retries={"max_attempts": 0}, proxies={})


@functools.cache  # a new session would parse the service models again
def _session() -> boto3.Session:
    """A session that sees none of the machine's AWS setup: neither profile nor files."""
    nothing = (None, None, NOWHERE, None)
    variables = {
        "profile": (None, None, None, None),
        "config_file": nothing,
        "credentials_file": nothing,
    }
    session = botocore.session.Session(session_vars=variables)
    session.set_credentials(ACCESS_KEY_ID, SECRET_ACCESS_KEY)
    return boto3.Session(botocore_session=session, region_name=REGION)

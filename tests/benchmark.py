"""What the audit costs, and whether it costs more than its API calls: run by hand, `python tests/benchmark.py --help`.

The test endpoint plays an organization of a given size, with latency, with reports that take their time and accounts
that throttle, over TLS with a certificate of its own and a CA bundle as large as the SDK's (loading it is what a
connection costs). iam_audit.py runs against it as a process, and what the kernel says of exactly that process is set
beside the floor, measured in the same run against the same endpoint: the CPU of a bare `client.list_access_keys` in a
loop, without latency, times the number of requests the program made.

Each scenario prints its runs and then its verdicts: what was measured, the target, met or not. The exit code is 1 if
one was not met, except with --quick, whose sizes are too small to judge by.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import trustme
from botocore.httpsession import get_cert_path
from endpoint import Endpoint, Json, World, generate, world

PROGRAM = Path(__file__).resolve().parent.parent / "iam_audit.py"
ROLE = "AWSControlTowerExecution"
LONGEST_RUN = 3600  # seconds; what hangs is killed
POLL = 0.02  # seconds
QUIET_PROGRESS = 3.0  # seconds in which a progress line must have moved
FLOOR_CALLS = 1000
FLOOR_LOOP = """
import sys, time, boto3
arn, user, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
issued = boto3.client("sts").assume_role(RoleArn=arn, RoleSessionName="floor")["Credentials"]
client = boto3.client("iam", aws_access_key_id=issued["AccessKeyId"], aws_secret_access_key=issued["SecretAccessKey"],
                      aws_session_token=issued["SessionToken"])
for _ in range(100):
    client.list_access_keys(UserName=user)
before = time.process_time()
for _ in range(calls):
    client.list_access_keys(UserName=user)
print((time.process_time() - before) / calls)
"""
# What looking back costs, in seconds: before the audit, the same in a scope that no run had, the CSVs of all accounts,
# and all summaries, as for an account that failed in every run.
HISTORY_LOOP = """
import importlib, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
program = importlib.import_module(sys.argv[2])
reports, organization = Path(sys.argv[3]), sys.argv[4]

def opened(scope):
    before = time.monotonic()
    folders = program.finished_runs(reports, program.utc_now())
    tracking = program.open_tracking(
        program.History(folders, organization), None, scope, program.utc_now()
    )
    print(time.monotonic() - before)
    return tracking

tracking = opened(program.Scope())
opened(program.Scope(accounts=frozenset(["1" * 12])))
before = time.monotonic()
for account_id, account in tracking.earlier.accounts.items():
    if account.result == "audited":
        program.baseline_of(tracking, account_id)
print(time.monotonic() - before)
before = time.monotonic()
found = len(list(tracking.history))
print(time.monotonic() - before, found)
"""
# The same job with other means: argv[1] is the role, argv[2] is boto3 (a plain loop) or botocove (20 threads).
PEER = """
import sys, time, boto3
role = sys.argv[1]

def job(session):
    iam = session.client("iam")
    while iam.generate_credential_report()["State"] != "COMPLETE":
        time.sleep(2)
    iam.get_credential_report()
    for page in iam.get_paginator("list_users").paginate():
        for user in page["Users"]:
            iam.list_mfa_devices(UserName=user["UserName"])
            for key in iam.list_access_keys(UserName=user["UserName"])["AccessKeyMetadata"]:
                iam.get_access_key_last_used(AccessKeyId=key["AccessKeyId"])

def loop():
    organizations, sts = boto3.client("organizations"), boto3.client("sts")
    management = organizations.describe_organization()["Organization"]["MasterAccountId"]
    done = 0
    for page in organizations.get_paginator("list_accounts").paginate():
        for account in page["Accounts"]:
            if account["Id"] != management:
                arn = f"arn:aws:iam::{account['Id']}:role/{role}"
                issued = sts.assume_role(RoleArn=arn, RoleSessionName="peer")["Credentials"]
                job(boto3.Session(issued["AccessKeyId"], issued["SecretAccessKey"], issued["SessionToken"]))
                done += 1
    return done

if sys.argv[2] == "boto3":
    print(loop())
else:
    from botocove import cove
    print(len(cove(job, rolename=role)()["Results"]))
"""
VERSIONS = "import sys, boto3, botocore; print(sys.version.split()[0], boto3.__version__, botocore.__version__)"

# --- what is measured -----------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """A figure beside its target."""

    what: str
    figure: str
    target: str
    met: bool


@dataclass(frozen=True)
class Run:
    """One run of the program: times in seconds, memory in MB, what the endpoint saw of it, what it left behind."""

    wall: float
    user: float
    system: float
    memory: float
    exit_code: int
    stats: Json
    summary: Json | None
    folder: Path | None  # the run's own
    csv_times: dict[str, float]  # account -> seconds from the start until its CSV was there
    progress_gap: (
        float | None
    )  # longest time without a change of the progress line, where one was asked for

    @property
    def cpu(self) -> float:
        """CPU time in user and kernel mode."""
        return self.user + self.system

    @property
    def requests(self) -> int:
        """Requests that the endpoint received."""
        return sum(self.stats["requests"].values())

    def last_csv(self, accounts: Iterable[str]) -> float:
        """When the last of these accounts was done; infinite if one was not."""
        return max((self.csv_times.get(one, math.inf) for one in accounts), default=math.inf)


@dataclass(frozen=True)
class Bench:
    """How to run: the command line's options, and the files that all runs share."""

    options: argparse.Namespace
    folder: Path
    certificate: str | None
    private_key: str | None
    ca_bundle: str | None

    def endpoint(self, *plans: Json, **settings: object) -> Endpoint:
        """An endpoint of these generated accounts, with the latency asked for; signatures go unverified, for speed."""
        described = world(
            generate=list(plans), latency=self.options.latency, verify_signatures=False, **settings
        )  # fmt: skip
        return Endpoint(
            described,
            certificate=self.certificate,
            private_key=self.private_key,
            ca_bundle=self.ca_bundle,
        )

    def size(self, full: int, quick: int) -> int:
        """A size, or the small one with --quick."""
        return quick if self.options.quick else full

    def plan(self, accounts: int, users: int, *, rate: float | None = None, **more: object) -> Json:
        """Accounts of so many users, whose reports take the time asked for; `rate` is IAM calls a second of each."""
        return generate(
            accounts,
            users,
            account={"report_delay": self.options.report_delay, "rate": rate},
            **more,
        )


def tls_files(folder: Path) -> tuple[str, str, str]:
    """Certificate chain and key for the loopback interface, and the SDK's own CA bundle with our CA at its end."""
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1", "localhost")
    certificate, private_key, bundle = (
        folder / "cert.pem",
        folder / "key.pem",
        folder / "bundle.pem",
    )
    certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    private_key.write_bytes(made.private_key_pem.bytes())
    bundle.write_bytes(Path(get_cert_path(True) or "").read_bytes() + authority.cert_pem.bytes())
    return str(certificate), str(private_key), str(bundle)


# --- running the program --------------------------------------------------------------------------------------------


def run(
    bench: Bench,
    endpoint: Endpoint,
    *,
    until: Callable[[Path], bool] | None = None,
    terminal: bool = False,
    expected: Iterable[int] = (0,),
) -> Run:
    """Run the program to its end, or until `until(output folder)` holds (SIGTERM then); with `terminal` on a pty."""
    output = Path(tempfile.mkdtemp(dir=bench.folder, prefix="reports-"))
    options = bench.options
    command = [*shlex.split(options.wrap), options.python, str(options.program)]
    command += ["--role", ROLE, "--output-dir", str(output)]
    command += ["--workers", str(options.workers)] if options.workers else []
    command += [] if terminal else ["--quiet"]
    endpoint.reset()
    screen = Screen() if terminal else None
    with open(output / "stdout", "wb") as stdout, open(output / "stderr", "wb") as stderr:
        began, started = time.monotonic(), time.time()
        process = subprocess.Popen(
            command,
            env={**endpoint.env(), "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr if screen is None else screen.slave,
        )
        status, usage = wait(process, began, (lambda: until(output)) if until else None)
        wall = time.monotonic() - began
    gap = screen.close() if screen else None
    finished = sorted(path.parent for path in output.glob("*/summary.json"))
    made = Run(
        wall=wall,
        user=usage.ru_utime,
        system=usage.ru_stime,
        memory=usage.ru_maxrss / 1024,
        exit_code=os.waitstatus_to_exitcode(status),
        stats=endpoint.stats(),
        summary=json.loads((finished[0] / "summary.json").read_text(encoding="utf-8"))
        if finished
        else None,
        folder=finished[0] if finished else None,
        csv_times={
            path.stem: path.stat().st_mtime - started for path in output.glob("*/accounts/*.csv")
        },
        progress_gap=gap,
    )
    if made.exit_code not in expected:
        said = screen.text if screen else (output / "stderr").read_bytes()
        print(
            f"unexpected exit code {made.exit_code}; stderr ends with:\n{said.decode(errors='replace')[-2000:]}"
        )
    return made


def wait(
    process: subprocess.Popen[bytes], began: float, enough: Callable[[], bool] | None
) -> tuple[int, resource.struct_rusage]:
    """Exit status of the process and the resources that it, and nothing else, has used."""
    stopped = False
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return status, usage
        if enough is not None and not stopped and enough():
            process.send_signal(signal.SIGTERM)
            stopped = True
        if time.monotonic() - began > LONGEST_RUN:
            process.kill()
        time.sleep(POLL)


class Screen:
    """A terminal for the program's stderr, that notes when the progress line changes."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.times: list[float] = []
        self.text = b""
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        last = b""
        with contextlib.suppress(OSError):  # EIO: the last writer has closed it
            while data := os.read(self.master, 65536):
                self.text += data
                text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", b"", data).strip()
                if text and text != last:
                    self.times.append(time.monotonic())
                    last = text

    def close(self) -> float:
        """The longest time without a change; infinite if there was no progress line."""
        os.close(self.slave)
        self.thread.join(timeout=5)
        os.close(self.master)
        return max(
            (b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=math.inf
        )


def floor(bench: Bench, endpoint: Endpoint) -> float:
    """CPU seconds of one bare call against the same endpoint, which answers at once for that time."""
    before = endpoint.world.described
    kept = {"latency": before["latency"], "faults": before["faults"]}
    one = next(
        account
        for account in endpoint.world.accounts()
        if account["role"] == "ok" and account["rate"] is None
    )
    arn = f"arn:aws:iam::{one['id']}:role/{ROLE}"
    calls = bench.size(FLOOR_CALLS, FLOOR_CALLS // 4)
    endpoint.update({"latency": 0.0, "faults": {}})
    try:
        found = subprocess.run(
            [bench.options.python, "-c", FLOOR_LOOP, arn, one["users"][0]["name"], str(calls)],
            env=endpoint.env(),
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        endpoint.update(kept)
    return float(found.stdout)


def run_beside_floor(
    bench: Bench, endpoint: Endpoint, *, terminal: bool = False, code: int = 0
) -> tuple[Run, float]:
    """A run, and the mean of the floor before and after it: the machine's speed drifts."""
    before = floor(bench, endpoint)
    made = run(bench, endpoint, terminal=terminal, expected=[code])
    return made, (before + floor(bench, endpoint)) / 2


# --- what is expected -----------------------------------------------------------------------------------------------


def expected_requests(described: World) -> Counter[str]:
    """The requests an audit of this world needs, polls of the reports apart."""
    once = (
        "GetCallerIdentity",
        "DescribeOrganization",
        "ListOrganizationsFeatures",
        "ListPolicies",
    )
    needed = Counter(once)
    # the endpoint's one policy, FullAWSAccess at the root
    needed.update(DescribePolicy=1, ListTargetsForPolicy=1)
    needed["ListAccounts"] = math.ceil(described.total / 20)
    for one in described.accounts():
        if one["id"] == described.management:
            continue
        needed["AssumeRole"] += 1
        if one["role"] != "ok":
            continue
        listed = [user for user in one["users"] if user["in_list"]]
        needed["GetCredentialReport"] += 1
        needed["GetAccountAuthorizationDetails"] += max(1, math.ceil(len(listed) / 1000))
        needed["ListServiceSpecificCredentials"] += 1
        needed["ListAccessKeys"] += len(listed)
        needed["GetAccessKeyLastUsed"] += sum(len(user["keys"]) for user in listed)
        needed["ListMFADevices"] += sum(1 for user in listed if user["password"] or user["mfa"])
        needed["ListVirtualMFADevices"] += bool(one["root"] and one["root"]["mfa"])
    return +needed


def audited_accounts(described: World) -> list[str]:
    """Accounts that must have a CSV."""
    every = (described.at(index) for index in range(described.total))
    return [one["id"] for one in every if one["role"] == "ok" and one["id"] != described.management]


def csv_rows(described: World) -> dict[str, int]:
    """Rows that each account's CSV must have, its header apart: root, and for each user its keys, or one."""
    audited = set(audited_accounts(described))
    return {
        one["id"]: 1 + sum(max(1, len(user["keys"])) for user in one["users"])
        for one in described.accounts()
        if one["id"] in audited
    }


def csvs(made: Run) -> dict[str, bytes]:
    """The CSVs of a run, by account."""
    return (
        {path.stem: path.read_bytes() for path in made.folder.glob("accounts/*.csv")}
        if made.folder
        else {}
    )


# --- printing -------------------------------------------------------------------------------------------------------


def show(title: str, made: Run, floor_call: float | None = None) -> None:
    """Print the figures of a run."""
    stats = made.stats
    actions = ", ".join(f"{action} {count}" for action, count in sorted(stats["requests"].items()))
    connections = ", ".join(
        f"{service} {count} ({stats['connections_peak'][service]} at once)"
        for service, count in sorted(stats["connections"].items())
    )
    rows = [
        ("wall time", f"{made.wall:.1f} s"),
        ("CPU time", f"{made.cpu:.1f} s ({made.user:.1f} user, {made.system:.1f} system)"),
        ("peak memory", f"{made.memory:.0f} MB"),
        ("requests", f"{made.requests}: {actions}"),
        ("connections", connections),
        (
            "throttled, dropped, errored",
            f"{stats['throttled']}, {stats['dropped']}, {stats['errored']}",
        ),
        (
            "in flight",
            f"{stats['in_flight_seconds'] / made.wall:.1f} on average, {stats['in_flight_total']} at most",
        ),
        ("exit code", str(made.exit_code)),
        ("endpoint's CPU", f"{1000 * stats['cpu'] / max(1, made.requests):.3f} ms a request"),
    ]
    if floor_call is not None and made.requests:
        rows.append(
            (
                "floor",
                f"{1000 * floor_call:.3f} ms a call, {floor_call * made.requests:.1f} s for all",
            )
        )
        rows.append(("CPU / floor", f"{made.cpu / (floor_call * made.requests):.2f}"))
    print(f"\n  {title}")
    for name, value in rows:
        print(f"    {name:<28}{value}")
    sys.stdout.flush()


def judge(verdicts: Iterable[Verdict]) -> bool:
    """Print verdicts; whether all targets are met."""
    found = list(verdicts)
    print()
    for one in found:
        print(
            f"  {'met    ' if one.met else 'NOT MET'}  {one.what}: {one.figure}  (target: {one.target})"
        )
    return all(one.met for one in found)


def at_most(what: str, figure: float, limit: float, unit: str = "") -> Verdict:
    """A verdict on a number; one that is not finite comes from a run that failed, and meets nothing."""
    text = f"{figure:.2f}".removesuffix(".00") + unit
    return Verdict(
        what, text, f"at most {limit:g}{unit}", math.isfinite(figure) and figure <= limit
    )


def not_later(what: str, figure: float, reference: float, limit: float) -> Verdict:
    """A verdict on when something was done, beside when it was done in another run."""
    ratio = figure / reference
    text = f"after {figure:.1f} s, there after {reference:.1f} s: {ratio:.2f} times"
    return Verdict(what, text, f"at most {limit:g} times", math.isfinite(ratio) and ratio <= limit)


def exact_requests(endpoint: Endpoint, made: Run) -> Verdict:
    """Requests made against those needed; what differs is named."""
    needed = expected_requests(endpoint.world)
    counts: Counter[str] = Counter(made.stats["requests"])
    polls = counts.pop("GenerateCredentialReport", 0)
    differing = [
        f"{a} {counts[a] - needed[a]:+d}"
        for a in sorted({*counts, *needed})
        if counts[a] != needed[a]
    ]
    figure = f"{counts.total()} and {polls} polls" + (
        f"; {', '.join(differing)}" if differing else ""
    )
    return Verdict("requests", figure, f"exactly {needed.total()}", not differing)


def exit_code(made: Run, code: int) -> Verdict:
    """The exit code against the one that is due."""
    return Verdict("exit code", str(made.exit_code), str(code), made.exit_code == code)


# --- scenarios ------------------------------------------------------------------------------------------------------


def scenario_floor(bench: Bench) -> list[Verdict]:
    """CPU against the floor, wall time against CPU time: 150 accounts of 20 users."""
    accounts = bench.options.accounts or bench.size(150, 15)
    users = bench.options.users or bench.size(20, 10)
    # the first account is left unlimited: the floor is measured in it
    plans = [
        bench.plan(1, users),
        bench.plan(accounts - 1, users, first=2, rate=bench.options.rate),
    ]
    with bench.endpoint(*plans) as endpoint:
        made, call = run_beside_floor(bench, endpoint)
        show(f"{accounts} accounts of {users} users", made, call)
        return [
            exact_requests(endpoint, made),
            at_most("CPU / floor", made.cpu / (call * made.requests), 1.25),
            at_most("wall / CPU", made.wall / made.cpu, 1.25),
            exit_code(made, 0),
        ]


def scenario_connections(bench: Bench) -> list[Verdict]:
    """Connections at 10 accounts and at 1,000."""
    verdicts = []
    for accounts in (10, bench.size(1000, 50)):
        with bench.endpoint(bench.plan(accounts, 3)) as endpoint:
            made = run(bench, endpoint)
            show(f"{accounts} accounts of 3 users", made)
            for service in ("iam", "sts"):
                connections = made.stats["connections"].get(service, 0)
                limit = bench.options.workers or 256  # as many as threads
                what = f"{service} connections, {accounts} accounts"
                verdicts.append(at_most(what, connections, limit))
            verdicts += [exact_requests(endpoint, made), exit_code(made, 0)]
    return verdicts


def scenario_memory(bench: Bench) -> list[Verdict]:
    """Peak memory at 1,000 accounts of 20 users against 100."""
    runs = []
    for accounts in (bench.size(100, 10), bench.size(1000, 60)):
        with bench.endpoint(bench.plan(accounts, bench.size(20, 10))) as endpoint:
            runs.append(run(bench, endpoint))
            show(f"{accounts} accounts", runs[-1])
    few, many = runs
    return [
        at_most("peak memory, many accounts / few", many.memory / few.memory, 1.3),
        at_most("peak memory", many.memory, 150, " MB"),
        *(exit_code(made, 0) for made in runs),
    ]


def ordinary_beside(
    bench: Bench, title: str, users: int, rate: float
) -> tuple[Run, Run, list[str], str]:
    """Runs over ordinary accounts, without and with a special one of `users` users and `rate` calls/s among them.

    Returns both runs, the ordinary accounts, and the special one.
    """
    half = bench.size(50, 5)
    plans = [bench.plan(half, 20), bench.plan(half, 20, first=1001)]
    special = bench.plan(1, users, first=501, name="special", rate=rate)
    with bench.endpoint(*plans) as endpoint:
        without = run(bench, endpoint)
        show(f"{2 * half} ordinary accounts of 20 users", without)
        ordinary = audited_accounts(endpoint.world)
    with bench.endpoint(plans[0], special, plans[1]) as endpoint:
        beside = run(bench, endpoint)
        show(f"the same beside {title}", beside)
        name = next(iter(set(audited_accounts(endpoint.world)) - set(ordinary)))
    return without, beside, ordinary, name


def others_undisturbed(without: Run, beside: Run, ordinary: list[str]) -> Verdict:
    """Whether the ordinary accounts were done when they would be without the special one."""
    return not_later(
        "ordinary accounts beside it, and alone",
        beside.last_csv(ordinary),
        without.last_csv(ordinary),
        1.1,
    )


def scenario_large_account(bench: Bench) -> list[Verdict]:
    """One account of 2,000 users, limited to 20 calls/s, beside 100 ordinary ones."""
    users, rate = bench.size(2000, 150), 20.0
    title = f"one of {users} users at {rate:g} calls/s"
    without, beside, ordinary, large = ordinary_beside(bench, title, users, rate)
    needed = expected_requests(World(world(generate=bench.plan(1, users, first=501))))
    calls = sum(needed[action] for action in IAM_ACTIONS)
    took = beside.last_csv([large])
    return [
        others_undisturbed(without, beside, ordinary),
        at_most(
            f"large account ({took:.0f} s) / its {calls} calls at {rate:g}/s",
            took / (calls / rate),
            1.15,
        ),
        exit_code(beside, 0),
    ]


IAM_ACTIONS = (
    "GetCredentialReport",
    "ListServiceSpecificCredentials",
    "GetAccountAuthorizationDetails",
    "ListAccessKeys",
    "GetAccessKeyLastUsed",
    "ListMFADevices",
    "ListVirtualMFADevices",
)


def scenario_throttled(bench: Bench) -> list[Verdict]:
    """One account throttled at 2 calls/s beside 100 ordinary ones."""
    users = bench.size(20, 5)
    title = f"one of {users} users throttled at 2 calls/s"
    without, beside, ordinary, throttled = ordinary_beside(bench, title, users, 2.0)
    done = f"{len(beside.csv_times)} CSVs, the throttled one after {beside.last_csv([throttled]):.0f} s"
    return [
        others_undisturbed(without, beside, ordinary),
        Verdict(
            "accounts",
            done,
            f"{len(ordinary) + 1} CSVs",
            len(beside.csv_times) == len(ordinary) + 1,
        ),
        exit_code(beside, 0),
    ]


def scenario_faults(bench: Bench) -> list[Verdict]:
    """0.5 % of responses dropped, 0.5 % answered 500: 300 accounts."""
    accounts, users = bench.size(300, 30), bench.size(20, 10)
    with bench.endpoint(bench.plan(accounts, users, keys_per_user=[1, 0, 2])) as endpoint:
        clean = run(bench, endpoint)
        show(f"{accounts} accounts of {users} users", clean)
        faults = {"drop": 0.005, "error500": 0.005, "seed": 1}
        endpoint.update(
            {"faults": faults, "generate": endpoint.world.described["generate"]}
        )  # reports start anew
        faulty = run(bench, endpoint)
        show("the same with 0.5 % dropped and 0.5 % answered 500", faulty)
        rows = {
            name: text.count(b"\r\n") or text.count(b"\n") for name, text in csvs(faulty).items()
        }
        right = sum(rows.get(name) == count + 1 for name, count in csv_rows(endpoint.world).items())
    same = sum(csvs(faulty).get(name) == text for name, text in csvs(clean).items())
    return [
        Verdict("accounts with every row", str(right), str(accounts), right == accounts),
        Verdict("CSVs equal to those without faults", str(same), str(accounts), same == accounts),
        exit_code(faulty, 0),
    ]


def scenario_many(bench: Bench) -> list[Verdict]:
    """5,000 accounts of 3 users, 5 % of the roles missing."""
    accounts = bench.size(5000, 200)
    with bench.endpoint(bench.plan(accounts, 3, missing_roles=0.05)) as endpoint:
        made, call = run_beside_floor(bench, endpoint, terminal=True, code=3)
        show(f"{accounts} accounts of 3 users, 5 % of the roles missing", made, call)
        missing = accounts - len(audited_accounts(endpoint.world))
        listed = (made.summary or {}).get("accounts", [])
        failed = sum(one["result"] == "failed" for one in listed)
        return [
            exit_code(made, 3),
            Verdict(
                "failures listed in summary.json", str(failed), str(missing), failed == missing
            ),
            Verdict(
                "CSVs",
                str(len(made.csv_times)),
                str(accounts - missing),
                len(made.csv_times) == accounts - missing,
            ),
            at_most(
                "longest time without a change of the progress line",
                made.progress_gap or math.inf,
                QUIET_PROGRESS,
                " s",
            ),
            exact_requests(endpoint, made),
            at_most("CPU / floor", made.cpu / (call * made.requests), 1.25),
        ]


def scenario_first_account(bench: Bench) -> list[Verdict]:
    """Start to first account finished: 5,000 accounts against 20. The run is ended then."""
    firsts = []
    many = bench.size(5000, 400)
    for accounts in (20, many):
        with bench.endpoint(bench.plan(accounts, 3)) as endpoint:
            made = run(
                bench,
                endpoint,
                until=lambda output: any(output.glob("*/accounts/*.csv")),
                expected=[0, 143],
            )
            show(f"{accounts} accounts of 3 users, ended after the first", made)
            firsts.append(min(made.csv_times.values(), default=math.inf))
    listing = math.ceil(many / 20) * bench.options.latency
    print(
        f"\n  (the report takes {bench.options.report_delay:g} s, listing {many} accounts {listing:.1f} s)"
    )
    return [not_later(f"first of {many} accounts, and of 20", firsts[1], firsts[0], 1.25)]


def scenario_history(bench: Bench) -> list[Verdict]:
    """365 earlier runs of 1,000 accounts: what is read of them before the first account is entered."""
    accounts, runs = bench.size(1000, 100), bench.size(365, 40)
    with bench.endpoint(bench.plan(accounts, 3)) as endpoint:
        made = run(bench, endpoint)
        show(f"{accounts} accounts of 3 users", made)
    assert made.folder is not None
    assert made.summary is not None
    started = datetime.fromisoformat(made.summary["started"])
    for number in range(1, runs):
        folder = made.folder.with_name(f"{started - timedelta(days=number):%Y%m%dT%H%M%SZ}")
        folder.mkdir()
        shutil.copy(made.folder / "summary.json", folder)
        (folder / "accounts").symlink_to(made.folder / "accounts")
    program, organization = bench.options.program, made.summary["organization"]["id"]
    where = [str(program.parent), program.stem, str(made.folder.parent), organization]
    command = [bench.options.python, "-c", HISTORY_LOOP, *where]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    before, other_scope, csvs_read, the_rest = map(float, printed[:4])
    size = (made.folder / "summary.json").stat().st_size / 2**20
    print(
        f"\n  {runs} runs with summaries of {size:.1f} MB; CSVs of all accounts: {csvs_read:.2f} s"
    )
    print(f"  all summaries, once in a run for an account that always failed: {the_rest:.1f} s")
    return [
        at_most("before the audit", before, 3.0, " s"),
        at_most("the same in a scope that no run had", other_scope, 3.0, " s"),
        Verdict("runs read in the end", printed[4], str(runs), printed[4] == str(runs)),
    ]


def scenario_comparison(bench: Bench) -> list[Verdict]:
    """1,000 accounts of 51 users, compared with an earlier run: no AWS, only files. The least of five."""
    sys.path.append(str(PROGRAM.parent))
    from builders import cost_of_comparison, write_large_run  # it imports the program

    write_large_run(reports := bench.folder / "comparison")
    program = Path(shutil.copy(bench.options.program, bench.folder / "iam_audit.py"))
    costs = [cost_of_comparison(bench.options.python, program, reports) for _ in range(5)]
    seconds, floor = (min(cost[name] for cost in costs) for name in ("seconds", "floor"))
    print(f"\n  {seconds:.2f} s of CPU; reading the same CSVs and no more: {floor:.2f} s")
    return [at_most("CPU against reading the same CSVs", seconds / floor, 12)]


def scenario_latency(bench: Bench) -> list[Verdict]:
    """Wall time, CPU and memory at 20, 50, 100 and 200 ms: 150 accounts of 20 users."""
    verdicts = []
    accounts = bench.options.accounts or bench.size(150, 15)
    users = bench.options.users or bench.size(20, 10)
    with bench.endpoint(bench.plan(accounts, users)) as endpoint:
        plans = endpoint.world.described["generate"]
        for latency, limit in ((0.02, 1.25), (0.05, 1.15), (0.1, 1.25), (0.2, 1.5)):
            endpoint.update({"latency": latency, "generate": plans})  # reports start anew
            made, call = run_beside_floor(bench, endpoint)
            show(f"{accounts} accounts of {users} users, {1000 * latency:g} ms a call", made, call)
            against_floor, where = made.cpu / (call * made.requests), f"at {latency:g} s"
            verdicts.append(at_most(f"wall / CPU {where}", made.wall / made.cpu, limit))
            verdicts.append(at_most(f"CPU / floor {where}", against_floor, 1.10))
            verdicts.append(at_most(f"peak memory {where}, MB", made.memory, 130))
            verdicts.append(exit_code(made, 0))
    return verdicts


def scenario_peers(bench: Bench) -> list[Verdict]:
    """The same job with botocove, if it is installed, and in a plain loop of boto3: 20 accounts of 20 users."""
    verdicts = []
    accounts = bench.options.accounts or bench.size(20, 4)
    users = bench.options.users or bench.size(20, 5)
    with bench.endpoint(bench.plan(accounts, users)) as endpoint:
        plans = endpoint.world.described["generate"]
        made = run(bench, endpoint)
        show(f"{accounts} accounts of {users} users", made)
        for peer in ("botocove", "boto3"):
            endpoint.update({"generate": plans})  # reports start anew
            command = [bench.options.python, "-c", PEER, ROLE, peer]
            began = time.monotonic()
            process = subprocess.Popen(
                command, env=endpoint.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            _, usage = wait(process, began, None)
            wall, cpu = time.monotonic() - began, usage.ru_utime + usage.ru_stime
            printed, said = process.communicate()
            if b"No module named 'botocove'" in said:
                print("\n  botocove is not installed")
                continue
            print(f"\n  {peer}: {wall:.1f} s, {cpu:.1f} s of CPU, {usage.ru_maxrss / 1024:.0f} MB")
            done = int(printed or 0)
            verdicts += [
                Verdict(f"accounts of {peer}", str(done), str(accounts), done == accounts),
                at_most(f"wall / {peer}'s", made.wall / wall, 1),
                at_most(f"CPU / {peer}'s", made.cpu / cpu, 1),
            ]
    return [*verdicts, exit_code(made, 0)]


SCENARIOS: dict[str, Callable[[Bench], list[Verdict]]] = {
    "floor": scenario_floor,
    "latency": scenario_latency,
    "peers": scenario_peers,
    "connections": scenario_connections,
    "memory": scenario_memory,
    "large-account": scenario_large_account,
    "throttled": scenario_throttled,
    "faults": scenario_faults,
    "many": scenario_many,
    "first-account": scenario_first_account,
    "history": scenario_history,
    "comparison": scenario_comparison,
}


# --- command line ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    scenarios = "\n".join(f"  {name:<15}{made.__doc__}" for name, made in SCENARIOS.items())
    made = argparse.ArgumentParser(
        description="Measure iam_audit.py against the test endpoint, beside the floor of bare SDK calls.",
        epilog=f"scenarios:\n{scenarios}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--scenario", choices=[*SCENARIOS, "all"], default="floor", help="default: floor"
    )
    made.add_argument(
        "--quick", action="store_true", help="small sizes, to see that all is in order"
    )
    made.add_argument("--accounts", type=int, metavar="N", help="accounts of floor, latency, peers")
    made.add_argument("--users", type=int, metavar="N", help="users an account of these")
    made.add_argument(
        "--rate",
        type=float,
        metavar="N",
        help="IAM calls/s an account of scenario floor, default: no limit",
    )
    made.add_argument(
        "--latency", type=float, default=0.05, metavar="SECONDS", help="default: 0.05"
    )
    made.add_argument(
        "--report-delay", type=float, default=4.0, metavar="SECONDS", help="default: 4"
    )
    made.add_argument(
        "--workers", type=int, metavar="N", help="of the program, default: its own, which is auto"
    )
    made.add_argument("--http", action="store_true", help="HTTP in place of TLS")
    made.add_argument(
        "--python",
        default=sys.executable,
        metavar="PATH",
        help="runs the program; default: this one",
    )
    made.add_argument(
        "--program", type=Path, default=PROGRAM, metavar="PATH", help="default: ../iam_audit.py"
    )
    made.add_argument(
        "--wrap",
        default="",
        metavar="COMMAND",
        help='put before it: "py-spy record -o out.svg --", say',
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the scenarios that the command line names."""
    options = parser().parse_args(argv)
    versions = subprocess.run(
        [options.python, "-c", VERSIONS], capture_output=True, text=True, check=True
    ).stdout.split()
    print(
        f"Python {versions[0]}, boto3 {versions[1]}, botocore {versions[2]}, {os.cpu_count()} CPUs; "
        f"{'HTTP' if options.http else 'TLS'}, latency {options.latency:g} s, report after {options.report_delay:g} s, "
        f"{options.workers or 'auto'} workers"
    )
    names = list(SCENARIOS) if options.scenario == "all" else [options.scenario]
    all_met = True
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        files = (None, None, None) if options.http else tls_files(folder)
        for scenario in names:
            print(f"\n{scenario}: {SCENARIOS[scenario].__doc__}")
            all_met &= judge(SCENARIOS[scenario](Bench(options, folder, *files)))
    if options.quick:
        print("\n--quick: the sizes are too small to judge by.")
    return 0 if all_met or options.quick else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""The audit of an organization without an AWS account: moto's server on a loopback port plays AWS.

`python tests/demo.py` fills an organization of ten member accounts, the same every time, runs iam_audit.py against it
as a process and prints where the files are. The program gets dummy credentials and talks to 127.0.0.1 only.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

try:
    from organization import (
        DEFAULT_ROLE,
        HARDWARE,
        MANAGEMENT_ID,
        SECURITY_KEY,
        SMS,
        VIRTUAL,
        AccountSpec,
        CredentialSpec,
        KeySpec,
        MadeOrganization,
        MotoServer,
        RootSpec,
        UserSpec,
        attach_scp,
        enable_scps,
        fill,
    )
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; first run: pip install -r tests/requirements.txt") from None

PROGRAM = Path(__file__).resolve().parent.parent / "iam_audit.py"

REQUIRE_MFA = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Deny",
            "NotAction": ["iam:*", "sts:*"],
            "Resource": "*",
            "Condition": {"Bool": {"aws:MultiFactorAuthPresent": "false"}},
        }
    ],
}
DENY_ACCESS_KEYS = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Deny", "Action": "iam:CreateAccessKey", "Resource": "*"}],
}


class Past:
    """Users and keys by age in days: the ages that a report states are the same whenever the demo runs.

    They count from midnight, so that a second run on the same day finds the same keys, with the same dates.
    """

    def __init__(self, today: datetime) -> None:
        self._today = today

    def days_ago(self, days: int) -> datetime:
        return self._today - timedelta(days=days)

    def key(
        self, age: int, used: int | None = None, service: str = "s3", status: str = "Active"
    ) -> KeySpec:
        """A key of `age` days, used last `used` days ago or never."""
        return KeySpec(
            self.days_ago(age), None if used is None else self.days_ago(used), service, status
        )

    def api_key(
        self, age: int, expires_in: int | None = None, service: str = "bedrock"
    ) -> CredentialSpec:
        """An API key of `age` days (a password, of some services) that expires in so many days or never."""
        expires = None if expires_in is None else self.days_ago(-expires_in)
        return CredentialSpec(f"{service}.amazonaws.com", self.days_ago(age), expires)

    def person(
        self,
        name: str,
        age: int,
        *keys: KeySpec,
        login: int | None = None,
        mfa: Iterable[str] = (),
        **more: Any,
    ) -> UserSpec:
        """A console user, who signed in last `login` days ago or never; `more` as in UserSpec."""
        used = None if login is None else self.days_ago(login)
        return UserSpec(name, self.days_ago(age), True, used, tuple(mfa), keys, **more)

    def machine(self, name: str, age: int, *keys: KeySpec, **more: Any) -> UserSpec:
        """A user without a password; `more` as in UserSpec."""
        return UserSpec(name, self.days_ago(age), keys=keys, **more)


def production(past: Past) -> list[AccountSpec]:
    key, person, machine = past.key, past.person, past.machine
    return [
        AccountSpec(
            "payments-prod",
            "111122223333",
            ("Workloads", "Production", "PCI"),
            (
                person(
                    "ana.torres",
                    2900,
                    key(2890, 2, "dynamodb"),
                    login=1,
                    mfa=[VIRTUAL],
                    attached=("AdministratorAccess",),
                    tags={"team": "payments", "contact": "ana.torres@example.com"},
                ),
                person("bruno.diaz", 700, login=12),
                machine(
                    "ci-deploy", 3100, key(3055, 0, "ecr"), key(40, 0, "ecr"), path="/automation/"
                ),
                machine("settlement-export", 1500, key(1490, 400, "s3"), key(1100, 1, "s3")),
                machine(
                    "backup",
                    2600,
                    key(2600, 1800, "glacier", "Inactive"),
                    certificates=(past.days_ago(2590),),
                ),
            ),
            RootSpec(password=True, password_last_used=past.days_ago(900), mfa=HARDWARE),
        ),
        AccountSpec(
            "crm-prd",
            "222233334444",
            ("Workloads", "Production"),
            (
                person("carla.nunez", 1200, login=5, mfa=[SECURITY_KEY, VIRTUAL]),
                person("diego.rios", 1200, key(1190), login=300, groups=("IAMFullAccess",)),
                machine(
                    "mailer", 900, key(880, 3, "ses"), attached=("AWSCompromisedKeyQuarantineV3",)
                ),
                machine(
                    "etl+nightly@example.com",
                    420,
                    key(410, 0, "redshift"),
                    key(411, 200, "redshift", "Inactive"),
                ),
            ),
            RootSpec(password=True, keys=(key(3020, 2100, "ec2"),)),
        ),
        AccountSpec(
            "web-live",
            "333344445555",
            ("Workloads", "Production"),
            (
                person("elena.paz", 800, login=2, mfa=[SECURITY_KEY]),
                machine("cdn-invalidate", 60, key(60, 4, "cloudfront")),
                machine("BedrockAPIKey-k3mq", 130, credentials=(past.api_key(130),)),
            ),
        ),
    ]


def other_workloads(past: Past) -> list[AccountSpec]:
    key, person, machine = past.key, past.person, past.machine
    return [
        AccountSpec(
            "Data Lake, Staging",
            "444455556666",
            ("Workloads", "Staging"),
            (
                person("fabio.leal", 500, key(120, 20, "athena"), login=8, mfa=[HARDWARE]),
                machine("=glue-loader", 380, key(366, 45, "glue")),
                machine("lake,reader", 95, key(91)),
                machine(
                    "old-loader",
                    1700,
                    key(1650, 1300, "glue", "Inactive"),
                    key(1640, status="Inactive"),
                ),
            ),
        ),
        AccountSpec(
            "mobile-nonprod",
            "555566667777",
            ("Workloads", "Staging"),
            (
                person(
                    "gael.mora",
                    210,
                    key(150, 60, "codecommit"),
                    login=30,
                    credentials=(past.api_key(150, service="codecommit"),),
                ),
                person("hugo.vega", 210, mfa=[SMS]),
                machine("device-farm", 210, key(200, 150, "devicefarm"), key(30)),
            ),
        ),
        AccountSpec(
            '=HYPERLINK("http://203.0.113.7","Invoice")',
            "666677778888",
            ("Workloads", "Staging"),
            (machine("=cmd", 100, key(89, 88, "sts")), person("@SUM.1+1", 100)),
        ),
        AccountSpec(
            "sandbox-ines",
            "777788889999",
            ("Sandbox",),
            (
                person(
                    "ines.soto",
                    75,
                    key(70, 69, "ec2"),
                    key(5, 0, "bedrock"),
                    login=0,
                    credentials=(past.api_key(20, expires_in=10),),
                ),
                person("guest", 20),
            ),
        ),
    ]


def foundation(past: Past) -> list[AccountSpec]:
    key, person = past.key, past.person
    return [
        AccountSpec("log-archive", "888899990000", ("Security",)),
        AccountSpec(
            "security-tooling",
            "999900001111",
            ("Security",),
            (person("break-glass", 1000, login=180, mfa=[HARDWARE, SECURITY_KEY]),),
            RootSpec(password=True, password_last_used=past.days_ago(1000), mfa=VIRTUAL),
        ),
        AccountSpec(
            "acquired-2018",
            "101010101010",
            (),
            (person("jose.luna", 3000, key(2950, 2000, "ec2"), login=2000),),
            suspended=True,
        ),
    ]


def management(past: Past) -> AccountSpec:
    """Left out of the audit unless --include-management asks for it."""
    user = past.person(
        "org-admin", 3000, past.key(1200, 0, "organizations"), login=0, mfa=[VIRTUAL]
    )
    root = RootSpec(password=True, password_last_used=past.days_ago(60), mfa=HARDWARE)
    return AccountSpec("management", MANAGEMENT_ID, users=(user,), root=root)


def build(server: MotoServer, today: datetime) -> MadeOrganization:
    past = Past(today)
    made = fill(
        server, [*production(past), *other_workloads(past), *foundation(past)], management(past)
    )
    enable_scps(server)
    attach_scp(
        server,
        "RequireMFA",
        REQUIRE_MFA,
        made.ous["Security",],
        made.ous["Workloads", "Production", "PCI"],
    )
    attach_scp(server, "DenyAccessKeys", DENY_ACCESS_KEYS, made.ous["Security",])
    return made


def write_exceptions(output_dir: Path, today: datetime) -> Path:
    """A file for --exceptions: a row that covers a finding, and one that has run out."""
    rows = (
        ("222233334444", "diego.rios", "*", "console-without-mfa", 60, "leaves the company soon"),
        ("111122223333", "settlement-export", "*", "*", -40, "to be moved to a role by then"),
    )
    output_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = output_dir / "exceptions.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("account_id", "username", "credential_id", "finding", "until", "reason"))
        for *cells, days, reason in rows:
            writer.writerow((*cells, f"{today + timedelta(days=days):%Y-%m-%d}", reason))
    return path


def run(server: MotoServer, output_dir: Path, options: list[str]) -> int:
    """Run the program with the output where it came from; its exit code."""
    command = [
        sys.executable,
        str(PROGRAM),
        "--role",
        DEFAULT_ROLE,
        "--output-dir",
        str(output_dir),
        *options,
    ]
    with subprocess.Popen(command, env=server.env()) as process:
        signal.signal(
            signal.SIGTERM, lambda *_: process.terminate()
        )  # leave no program behind without its server
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                continue  # the terminal sent it to the program as well, which now ends in its own way
            return code if code >= 0 else 128 - code


def new_files(output_dir: Path, known: set[Path]) -> list[Path]:
    """What the run wrote: its tables and summary, in order."""
    return sorted(set(output_dir.glob("*Z*/**/*.*")) - known)


def main(argv: list[str] | None = None) -> int:
    today = datetime.now(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
    parser = argparse.ArgumentParser(
        description="Audit an invented organization, served by moto on a loopback port; no AWS account is touched.",
        epilog="All other options are handed to iam_audit.py.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=Path,
        default=Path(f"reports/demo-{today:%Y-%m-%d}"),
        help="default: %(default)s; another day's keys have other dates, so do not compare them with today's",
    )
    arguments, options = parser.parse_known_args(argv)
    known = set(new_files(arguments.output_dir, set()))
    with MotoServer() as server:
        accounts = len(build(server, today).accounts)
        print(
            f"An invented organization of {accounts} member accounts, played by moto on 127.0.0.1",
            flush=True,
        )
        exceptions = write_exceptions(arguments.output_dir, today)
        code = run(server, arguments.output_dir, ["--exceptions", str(exceptions), *options])
    files = new_files(arguments.output_dir, known)
    if files:
        print("The files of this run:", *files, sep="\n  ")
    return code


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except BrokenPipeError:  # whoever reads stdout has enough; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None

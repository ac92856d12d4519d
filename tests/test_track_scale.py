"""Track where the organization is large: what it costs to read an earlier run and to compare with it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import DAY, audited, edit_summary, key, user, write_run
from conftest import Program
from endpoint import TIMEOUT

from iam_audit import ROOT, Account, User

FIRST = "100000000000"
# A process of its own, so that pytest is not in the figures. It reads the earlier run of 1,000 accounts and compares
# as many with it, in each of which a key has been replaced. It prints what that costs in CPU seconds, and as a multiple
# of the floor: reading the same files with the csv module and nothing else, measured before and after.
COST = """
import csv, resource, sys
from datetime import datetime, timezone
from pathlib import Path
import iam_audit

CREATED = datetime(2026, 11, 22, 20, 50, tzinfo=timezone.utc)  # as in the earlier run

def people():
    yield iam_audit.User(iam_audit.ROOT, False, None, (), ())
    for n in range(50):
        made = [f"AKIA{n:010}{k}{int((n, k) == (7, 0)):05}" for k in range(n % 3)]
        keys = tuple(iam_audit.Credential(key_id, "Active", CREATED, None, "N/A") for key_id in made)
        yield iam_audit.User(f"person-number-{n:03}", n % 2 == 0, None, ("Virtual",) * (n % 4 // 2), keys)

def account(number):
    return iam_audit.AuditedAccount(iam_audit.Account(f"{10**11 + number}", "some name", "ACTIVE"), CREATED, now)

def spent():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def floor():
    before = spent()
    for path in folder.glob("*/accounts/*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            list(csv.reader(file))
    return spent() - before

def peak_memory():
    # in MB; Linux counts into ru_maxrss what the process was before it became this program: that of pytest
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

folder, now = Path(sys.argv[1]), tuple(people())
floors = floor()
before = spent()
history = iam_audit.History(iam_audit.finished_runs(folder, CREATED), "o-test123456")
tracking = iam_audit.open_tracking(history, None, iam_audit.Scope(), CREATED)
for number in range(1000):
    iam_audit.track_account(tracking, account(number), [])
seconds = spent() - before
floors += floor()
print(seconds, 2 * seconds / floors, peak_memory(), len(tracking.compared), len(tracking.changes))
"""


def people() -> Iterator[User]:
    """Root and 50 users, with none to two keys each."""
    yield user(ROOT)
    for n in range(50):
        keys = [key(DAY, key_id=f"AKIA{n:010}{k}00000") for k in range(n % 3)]
        yield user(
            f"person-number-{n:03}", *keys, password=n % 2 == 0, mfa=["Virtual"] * (n % 4 // 2)
        )


@pytest.mark.program
def test_comparing_a_thousand_accounts_is_cheap(program: Program, tmp_path: Path) -> None:
    """At most 12 times the floor in CPU; SDK and all, less than 100 MB."""
    folder = write_run(
        tmp_path, [audited(*people(), account=Account(FIRST, "some name", "ACTIVE"))]
    )
    [entry] = json.loads((folder / "summary.json").read_text("utf-8"))["accounts"]
    text = (folder / "accounts" / f"{FIRST}.csv").read_text("utf-8")
    ids = [str(int(FIRST) + number) for number in range(1000)]
    for one in ids:
        (folder / "accounts" / f"{one}.csv").write_text(text.replace(FIRST, one), "utf-8")
    edit_summary(folder, accounts=[{**entry, "id": one} for one in ids])
    command = [program.python, "-c", COST, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(Path(program.path).parent)}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=TIMEOUT
    )
    seconds, times_the_floor, megabytes, compared, changed = map(float, done.stdout.split())
    assert (compared, changed) == (1000, 2000)
    assert times_the_floor < 12, f"{seconds:.2f} s of CPU"
    assert megabytes < 100

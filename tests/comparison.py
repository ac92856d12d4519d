"""Compare 1,000 accounts with an earlier run, in a process of its own, and print as JSON what that costs.

`python comparison.py REPORTS`, with iam_audit.py on PYTHONPATH; builders.write_large_run writes what REPORTS holds.
Any Python that runs the program can run it.
"""

from __future__ import annotations

import csv
import json
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import iam_audit

CREATED = datetime(2026, 11, 22, 20, 50, tzinfo=timezone.utc)  # as in the earlier run
ACCOUNTS = 1000
TRACED = 100  # of the first and of the last ones
T = TypeVar("T")


def people() -> Iterator[iam_audit.User]:
    """As in the earlier run, but a key of person 7 has been replaced."""
    yield iam_audit.User(iam_audit.ROOT, False, None, (), ())
    for n in range(50):
        made = [f"AKIA{n:010}{k}{int((n, k) == (7, 0)):05}" for k in range(n % 3)]
        keys = tuple(
            iam_audit.Credential(key_id, "Active", CREATED, None, "N/A") for key_id in made
        )
        devices = ("Virtual",) * (n % 4 // 2)
        yield iam_audit.User(f"person-number-{n:03}", n % 2 == 0, None, devices, keys)


def opened(reports: Path) -> iam_audit.Tracking:
    history = iam_audit.History(iam_audit.finished_runs(reports, CREATED), "o-test123456")
    return iam_audit.open_tracking(history, None, iam_audit.Scope(), CREATED)


def compare(
    tracking: iam_audit.Tracking, users: tuple[iam_audit.User, ...], numbers: Iterable[int]
) -> None:
    for number in numbers:
        account = iam_audit.Account(f"{10**11 + number}", "some name", "ACTIVE")
        audited = iam_audit.AuditedAccount(account, CREATED, users)
        iam_audit.track_account(tracking, audited, [])


def lines_run(task: Callable[..., T], *arguments: Any) -> tuple[int, T]:
    """Run a task. Returns how many lines of Python ran, and the task's result."""
    lines = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        result = task(*arguments)
    finally:
        sys.settrace(None)
    return lines, result


def cpu_seconds(task: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    """Run a task. Returns the CPU time, of user and system, and the task's result."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    before = spent()
    result = task(*arguments)
    return spent() - before, result


def read_all(reports: Path) -> None:
    """The floor: read the same CSVs with the csv module and do nothing else."""
    for path in reports.glob("*/accounts/*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            list(csv.reader(file))


def peak_memory() -> float:
    """In MB. Linux counts into ru_maxrss what the process was before it became this program."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def whole_comparison(reports: Path, users: tuple[iam_audit.User, ...]) -> iam_audit.Tracking:
    tracking = opened(reports)
    compare(tracking, users, range(ACCOUNTS))
    return tracking


def main(reports: Path) -> None:
    """Measure the comparison, and the floor before and after; then count the lines of a second one."""
    users = tuple(people())
    floor, _ = cpu_seconds(read_all, reports)
    seconds, tracking = cpu_seconds(whole_comparison, reports, users)
    more, _ = cpu_seconds(read_all, reports)
    cost = {
        "seconds": seconds,
        "floor": (floor + more) / 2,
        "memory": peak_memory(),
        "compared": len(tracking.compared),
        "changed": len(tracking.changes),
    }
    opening, tracking = lines_run(opened, reports)
    first, _ = lines_run(compare, tracking, users, range(TRACED))
    compare(tracking, users, range(TRACED, ACCOUNTS - TRACED))
    last, _ = lines_run(compare, tracking, users, range(ACCOUNTS - TRACED, ACCOUNTS))
    lines = {"opening": opening / ACCOUNTS, "first": first / TRACED, "last": last / TRACED}
    print(json.dumps({**cost, "lines": lines}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

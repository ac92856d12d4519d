"""How the tests run iam_audit.py, as a process against an endpoint on the loopback interface; what holds for every run.

`--program PATH` points all tests to another copy of the program, one that was broken on purpose for example;
`--program-python PATH` is the Python that runs it (`-m program` selects the tests that do).
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import pty
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from endpoint import TIMEOUT, WORLD_DEFAULTS, Endpoint, Json, access_key_id, secret_of, world
from hypothesis import HealthCheck, settings

PROGRAM = Path(__file__).resolve().parent.parent / "iam_audit.py"
SECRETS = re.compile(
    r"IQoJ|AWS4-HMAC-SHA256|x-amz-security-token|x-amz-signature|\b[0-9a-f]{64}\b", re.IGNORECASE
)
TRACEBACK = re.compile(r"^Traceback|^ *File \".*\", line \d+", re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--program", default=str(PROGRAM), help="the copy of iam_audit.py to test")
    parser.addoption(
        "--program-python", default=sys.executable, help="the Python that runs it as a process"
    )


def pytest_configure(config: pytest.Config) -> None:
    """`import iam_audit` in a test is the same copy that runs as a process."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's job in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the program would inherit it
    sys.path.insert(0, str(Path(config.getoption("--program")).resolve().parent))
    # No time limit per example: a loaded machine would exceed any.
    unhurried = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("unhurried", deadline=None, suppress_health_check=unhurried)
    settings.load_profile("unhurried")


@dataclass(frozen=True)
class Result:
    """A run that has ended. `terminal` is what a terminal got of it, where there was one."""

    exit_code: int
    stdout: str
    stderr: str
    output_dir: Path
    terminal: str = ""

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        [folder] = (
            each for each in self.output_dir.iterdir() if each.is_dir() and not each.is_symlink()
        )
        return folder

    @property
    def csvs(self) -> set[str]:
        """The IDs of the accounts that have a CSV; none if there is no run folder."""
        return {file.stem for file in self.output_dir.glob("*Z*/accounts/*.csv")}

    def csv(self, account_id: str) -> Path:
        return self.folder / "accounts" / f"{account_id}.csv"

    def table(self, account_id: str) -> list[list[str]]:
        """An account's CSV as it is, header and all."""
        with self.csv(account_id).open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file, strict=True))

    def rows(self, account_id: str) -> list[dict[str, str]]:
        header, *rows = self.table(account_id)
        return [dict(zip(header, row, strict=True)) for row in rows]

    @property
    def summary(self) -> Json | None:
        """summary.json; None if the run has not come to write it."""
        files = list(self.output_dir.glob("*Z*/summary.json"))
        return json.loads(files[0].read_text(encoding="utf-8")) if files else None

    @property
    def accounts(self) -> dict[str, Json]:
        """The entries of summary.json by account ID."""
        assert self.summary is not None, self
        return {entry["id"]: entry for entry in self.summary["accounts"]}

    @property
    def failures(self) -> dict[str, tuple[str, str]]:
        """Step and error code of each account that failed."""
        failed = {one: entry for one, entry in self.accounts.items() if entry["result"] == "failed"}
        return {one: (entry["step"], entry["error"]["code"]) for one, entry in failed.items()}

    @property
    def files(self) -> list[Path]:
        return [path for path in self.output_dir.rglob("*") if path.is_file()]


def check_what_always_holds(result: Result, env: Mapping[str, str], verbose: bool) -> None:
    """What the program promises of every run, however it ended."""
    assert "\x1b" not in result.stdout + result.stderr, (
        "an escape sequence where there is no terminal"
    )
    if not verbose:
        assert not TRACEBACK.search(result.stderr + result.terminal), result.stderr
    if result.exit_code in (129, 130, 143):
        assert result.stderr.count("\n") <= 1, result.stderr
    outputs = [
        result.stdout,
        result.stderr,
        result.terminal,
        *(file.read_text("utf-8") for file in result.files),
    ]
    check_for_secrets("\n".join(outputs), env)
    for path in result.output_dir.rglob("*"):
        if path.is_symlink():
            assert (path.name, (path / "summary.json").is_file()) == ("latest", True)
            continue
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        assert path.suffix in ("", ".csv", ".json", ".html"), f"a temporary file is left: {path}"
        assert not path.name.startswith("."), f"a temporary file is left: {path}"
    if result.summary is not None:
        audited = {one for one, entry in result.accounts.items() if entry["result"] == "audited"}
        assert result.csvs == audited
        assert (result.exit_code in (3, 5)) == bool(result.failures)
    elif result.exit_code not in (1, 129, 130, 143):
        assert not result.output_dir.exists(), "ended well and wrote no summary"


def check_for_secrets(output: str, env: Mapping[str, str]) -> None:
    """Neither the caller's secrets nor those of the sessions that the endpoint hands out, tokens or signatures."""
    sessions = {
        secret_of(access_key_id(account_id)) for account_id in re.findall(r"\b\d{12}\b", output)
    }
    callers = {env[name] for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN") if name in env}
    found = [
        SECRETS.search(output),
        *(re.search(re.escape(secret), output) for secret in sessions | callers),
    ]
    assert not any(found), found


class Program:
    """iam_audit.py as a process. Each run has an output folder of its own unless it is given one."""

    def __init__(self, path: str, python: str, make_folder: Callable[[], Path]) -> None:
        self.path, self.python, self._make_folder = str(Path(path).resolve()), python, make_folder

    def __call__(
        self, env: Mapping[str, str], *options: str, role: str | None = "Audit", **popen: Any
    ) -> Result:
        """Run it to its end; `role` None leaves --role away."""
        with self.start(env, *options, role=role, **popen) as (process, output_dir):
            return self.finish(process, output_dir, env, *options)

    @contextlib.contextmanager
    def start(
        self,
        env: Mapping[str, str],
        *options: str,
        role: str | None = "Audit",
        output_dir: Path | None = None,
        **popen: Any,
    ) -> Iterator[tuple[subprocess.Popen[str], Path]]:
        """Start it; whatever happens, it does not outlive the block."""
        output_dir = output_dir or self._make_folder() / "reports"
        command = self._command(options, role, output_dir)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(
            command, env=dict(env), text=True, encoding="utf-8", **{**pipes, **popen}
        ) as process:
            try:
                yield process, output_dir
            finally:
                process.kill()

    def finish(
        self,
        process: subprocess.Popen[str],
        output_dir: Path,
        env: Mapping[str, str],
        *options: str,
    ) -> Result:
        """Wait for the end of a process that was started."""
        stdout, stderr = process.communicate(timeout=TIMEOUT)
        return self._checked(
            Result(process.returncode, stdout or "", stderr or "", output_dir), env, options
        )

    def end(
        self,
        process: subprocess.Popen[str],
        output_dir: Path,
        signum: signal.Signals,
        env: Mapping[str, str],
    ) -> tuple[Result, float]:
        """Send a signal; what came of it, and after how many seconds."""
        began = time.monotonic()
        process.send_signal(signum)
        return self.finish(process, output_dir, env), time.monotonic() - began

    def in_terminal(
        self,
        env: Mapping[str, str],
        *options: str,
        answer: Callable[[str], str] = lambda _: "",
        everything: bool = False,
        columns: int = 120,
    ) -> Result:
        """Run it with a controlling terminal for stdin and stderr, for stdout too with `everything`.

        `answer` is asked, at each piece of output, what is typed in reply to what has been seen since the last answer.
        """
        folder = self._make_folder()
        command = self._command(options, "Audit", folder / "reports")
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, ours)
            stdout = stack.enter_context(
                (folder / "stdout").open("w+", encoding="utf-8", newline="")
            )
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env={"TERM": "xterm", **env},
                    stdin=theirs,
                    stdout=theirs if everything else stdout,
                    stderr=theirs,
                    start_new_session=True,
                    preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - there are no threads here
                )
            )
            stack.callback(process.kill)
            os.close(theirs)
            seen = converse(ours, answer)
            process.wait(TIMEOUT)
            stdout.seek(0)
            result = Result(process.returncode, stdout.read(), "", folder / "reports", seen)
        return self._checked(result, env, options)

    def _command(self, options: tuple[str, ...], role: str | None, output_dir: Path) -> list[str]:
        roles = [] if role is None else ["--role", role]
        return [self.python, self.path, *roles, "--output-dir", str(output_dir), *options]

    def _checked(self, result: Result, env: Mapping[str, str], options: tuple[str, ...]) -> Result:
        check_what_always_holds(result, env, bool({"-v", "--verbose"}.intersection(options)))
        return result


def converse(terminal: int, answer: Callable[[str], str]) -> str:
    """Read a terminal until nobody writes to it any more, and type the answers; all that was shown."""
    seen, since, deadline = "", "", time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.5)[0]:
            continue
        try:
            piece = os.read(terminal, 65536).decode("utf-8", "replace")
        except OSError:  # EIO: the other side is closed
            return seen
        if not piece:
            return seen
        seen, since = seen + piece, since + piece
        if typed := answer(since):
            os.write(terminal, typed.encode())
            since = ""
    raise TimeoutError(f"the program does not end; it has shown {seen!r}")


def screen(shown: str) -> list[str]:
    """The lines that a terminal shows in the end; control sequences beyond those of a progress line are refused."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]|\x1b", shown):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token in ("\x1b[K", "\x1b[0K"):
            lines[row] = lines[row][:column]
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token.startswith("\x1b") or not token.isprintable():
            raise AssertionError(f"{token!r} reaches the terminal")
        else:
            lines[row] = lines[row].ljust(column)[:column] + token + lines[row][column + 1 :]
            column += 1
    return lines


@pytest.fixture(autouse=True)
def all_cpus() -> Iterator[None]:
    """Back to all of them where a test has run the program in this process: it binds itself to one."""
    cpus = os.sched_getaffinity(0) if sys.platform == "linux" else set[int]()
    yield
    if sys.platform == "linux":
        os.sched_setaffinity(0, cpus)


@pytest.fixture(scope="session")
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program under test."""
    option = request.config.getoption
    return Program(
        option("--program"), option("--program-python"), lambda: tmp_path_factory.mktemp("run")
    )


@pytest.fixture(scope="session")
def run_program(program: Program) -> Program:
    """`program`, where nothing but a whole run is wanted of it."""
    return program


@pytest.fixture(scope="session")
def program_versions(program: Program) -> dict[str, str]:
    """Versions of botocore and Python (as `3.11`) that the program runs with."""
    code = "import sys, botocore, json; print(json.dumps([botocore.__version__, '%d.%d' % sys.version_info[:2]]))"
    shown = subprocess.run(
        [program.python, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return dict(zip(["botocore", "python"], json.loads(shown), strict=True))


Serve = Callable[..., Endpoint]


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """`serve(account(...), ..., **options)`: the endpoint, with this world and with statistics from nothing.

    One process for all tests, because each would take as long to start as a test takes to run; a test that counts
    connections starts its own.
    """
    with Endpoint(world()) as endpoint:

        def changed(*accounts: Json, **options: Any) -> Endpoint:
            endpoint.update({**WORLD_DEFAULTS, **world(*accounts, **options)})
            endpoint.reset()
            return endpoint

        yield changed

"""README.md tells the truth: its documents, tables and the demo's output are the program's own."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from endpoint import TIMEOUT

import iam_audit

TESTS = Path(__file__).resolve().parent
README = (TESTS.parent / "README.md").read_text(encoding="utf-8")

PRIORITY_ROW = re.compile(r"^\| (\d) \| (.*?) \| .*\|$", re.MULTILINE)
SECTIONS = re.split(r"^(?=## )", README, flags=re.MULTILINE)[1:]


def masked(output: str) -> str:
    """The output without what differs from run to run: when it was and how long it took."""
    output = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "<time>", output)
    output = re.sub(r"until \d{4}-\d\d-\d\d", "until <date>", output)
    return re.sub(r"took \d+:\d\d|\d+ minutes?\b", "<span>", output)


@pytest.mark.program
def test_the_demo_prints_what_the_readme_shows(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    command = [sys.executable, str(TESTS / "demo.py"), "--output-dir", str(tmp_path / "reports")]
    printed = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, check=True
    ).stdout
    summary = printed[printed.index("Organization ") : printed.index("\n\nFiles: ")]
    shown = "\n\n".join(
        re.findall(r"```\n((?:Organization|Gaps, root).*?)\n```", README, re.DOTALL)
    )
    assert masked(shown) == masked(summary)


@pytest.mark.parametrize(
    "name",
    ["caller-policy", "role-policy", "role-trust", "scp-require-mfa", "scp-deny-access-keys"],
)
def test_the_readme_shows_what_print_gives(name: str) -> None:
    shown = re.search(rf"--print {name}[^\n]*\n+```json\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    assert shown[1] == iam_audit.print_document(name, role="IAMAuditRole")
    assert json.loads(shown[1])["Version"] == "2012-10-17"


@pytest.mark.parametrize("name", iam_audit.DOCUMENTS)
def test_the_readme_and_the_help_name_every_document(name: str) -> None:
    assert f"--print {name}" in README or f"`{name}`" in README
    assert re.search(rf"^  {name} ", iam_audit.HELP_EPILOG, re.MULTILINE)


def test_every_action_stands_with_its_reason() -> None:
    reads = {**iam_audit.CALLER_READS, **iam_audit.ROLE_READS, **iam_audit.CLOUDTRAIL_READS}
    missing = [action for action, why in reads.items() if f"| `{action}` | {why} |" not in README]
    assert missing == []


def test_every_exit_code_and_every_word_is_explained() -> None:
    for code in (
        value
        for name, value in vars(iam_audit).items()
        if name.startswith("EXIT_") and name != "EXIT_SIGNAL"
    ):
        assert re.search(rf"^\| {code} \|", README, re.MULTILINE), code
    words = [
        *(f"| `{column}` |" for column in iam_audit.CSV_COLUMNS[2:]),
        *(f"`{word}`" for word in (*iam_audit.FINDINGS_COLUMNS, *iam_audit.GAP_COUNTS)),
        *(
            f"`{change}`"
            for change in (
                *iam_audit.EXPLAINED_BY,
                iam_audit.CAME_AND_WENT,
                "account-joined",
                "account-left",
            )
        ),
        *(
            f"`{word}`"
            for word in (
                "confirmed",
                "contradicted",
                "not found",
                "unavailable",
                *iam_audit.VERDICTS,
            )
        ),
        *(
            f"`{word}`"
            for word in (
                "Configurada",
                "No configurada",
                "Nunca",
                "Nunca utilizada",
                "N/A",
                "None",
                "Unknown",
            )
        ),
        *(f"`{name}`" for name in {rule.name for rule in iam_audit.RULES}),
        *(f"| {level} |" for level in iam_audit.LEVELS),
    ]
    assert [word for word in words if word not in README] == []


def test_the_table_of_findings_is_the_programs() -> None:
    """Each priority with the findings that can have it, as the rules say, in the order of the priorities."""
    section = README[README.index("## Findings\n") : README.index("## Maturity levels\n")]
    told: dict[int, set[str]] = {}
    for number, text in PRIORITY_ROW.findall(section):
        told.setdefault(int(number), set()).update(re.findall(r"`([a-z0-9-]+)`", text))
    findings = {rule.name for rule in iam_audit.RULES}
    expected: dict[int, set[str]] = {}
    for rule in iam_audit.RULES:
        assert iam_audit.MOST_URGENT <= rule.priority <= iam_audit.LEAST_URGENT, rule
        expected.setdefault(rule.priority, set()).add(rule.name)
    assert {number: names & findings for number, names in told.items()} == expected
    assert (
        list(told) == sorted(told) == list(range(iam_audit.MOST_URGENT, iam_audit.LEAST_URGENT + 1))
    )


@pytest.mark.program
def test_every_key_of_the_summary_is_explained(tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "demo.py"), "--output-dir", str(tmp_path / "reports")]
    subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=True)
    (path,) = tmp_path.glob("reports/*Z/summary.json")
    summary = json.loads(path.read_text(encoding="utf-8"))
    account = next(entry for entry in summary["accounts"] if entry["result"] == "audited")
    keys = [*summary, *summary["organization"], *summary["totals"], *account]
    assert [key for key in keys if f"`{key}`" not in README] == []


def test_the_readme_says_what_each_denial_breaks() -> None:
    statements = json.loads(iam_audit.print_document("scp-deny-access-keys"))["Statement"]
    for action in (action for statement in statements for action in statement["Action"]):
        assert re.search(rf"^\| `{action}` \| [^|]{{10,}} \|$", README, re.MULTILINE), action
    assert f"at most {iam_audit.SCP_LONGEST:,} characters" in " ".join(README.split())


def test_the_readme_names_what_the_alert_fires_on_and_the_parameters_of_the_templates() -> None:
    template = json.loads(iam_audit.print_document("alert-rule"))
    detail = template["Resources"]["Rule"]["Properties"]["EventPattern"]["detail"]
    assert [name for name in detail["eventName"] if name not in README] == []
    role = json.loads(iam_audit.print_document("role-template"))
    assert "ParameterKey=AuditingAccountId" in README
    assert "AuditingAccountId" in role["Parameters"]


@pytest.mark.parametrize(
    "sentence",
    [
        "needs the `organizations:` reads in the organization's resource-based delegation policy",
        "`AWSControlTowerExecution` trusts the management account alone",
        "EventBridge gets CloudTrail's events on a best-effort basis",
        "without us-east-1 among them, stops the alert",
        '"not authorized: iam:DeleteVirtualMFADevice", which is meant so',
        "put a Region of theirs in place of us-east-1 in every StackSet command here",
        "only the ARN operators compare part by part",
        "on `*` they would also stop the recovery of root's password",
    ],
)
def test_the_readme_warns_of(sentence: str) -> None:
    assert sentence in " ".join(README.split())


def test_the_contents_lead_to_every_section_in_order() -> None:
    titles = [section.partition("\n")[0].removeprefix("## ") for section in SECTIONS]
    contents = README[: README.index("## ")]
    linked = re.findall(r"\[([^]]+)\]\(#([^)]+)\)", contents)
    assert [title for title, _ in linked] == titles
    for title, anchor in linked:
        assert anchor == re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
               for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}  # fmt: skip
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_no_section_before_enforce_is_longer_than_two_screens() -> None:
    for section in SECTIONS:
        if section.startswith("## Enforce"):
            break
        unfolded = re.sub(r"<details>.*?</details>", "", section, flags=re.DOTALL)
        for part in re.split(r"^(?=### )", unfolded, flags=re.MULTILINE):
            assert part.count("\n") <= 80, part[:60]


def test_python_is_the_virtual_environments() -> None:
    assert not re.findall(r"(?<![\w/.-])python3? (?!-m venv)(?=-|iam_audit|tests)", README)


def reading_commands() -> list[str]:
    section = next(section for section in SECTIONS if section.startswith("## Read the files"))
    return re.findall(r"^    (\.venv/bin/python .*)$", section, re.MULTILINE)


@pytest.mark.program
@pytest.mark.parametrize("number", [0, 1], ids=["pandas", "DuckDB"])
def test_the_commands_that_read_the_files_work(tmp_path: Path, number: int) -> None:
    """On the demo's files, whose oldest key of all is in what both print."""
    command = [sys.executable, str(TESTS / "demo.py"), "--output-dir", str(tmp_path / "reports")]
    subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=True)
    reading = reading_commands()[number].replace(".venv/bin/python", shlex.quote(sys.executable))
    done = subprocess.run(
        reading, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads((tmp_path / "reports/latest/summary.json").read_text(encoding="utf-8"))
    assert summary["gaps"]["organization"]["oldest_active_key"]["created"][:10] in done.stdout


@pytest.mark.parametrize("partition", iam_audit.IAM_REGIONS)
def test_the_readme_names_iams_region_of_each_partition(partition: str) -> None:
    assert iam_audit.IAM_REGIONS[partition] in README[README.index("#### 1. The role") :]

"""report.html as text: its policy, its figures, and names that would be markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import re
from datetime import date, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from builders import (
    DAY,
    FINISHED,
    NOW,
    ONE,
    PAYMENTS,
    SANDBOX,
    TWO,
    audited,
    failed,
    key,
    key_id,
    numbered,
    run_of,
    user,
)
from conftest import Program, Serve
from endpoint import Json, account

from iam_audit import (
    FINDINGS_ON_PAGE,
    PHASES,
    RUN_GAPS,
    Account,
    KnownException,
    Outcome,
    Run,
    SkippedAccount,
    finished_runs,
    iso,
    link_latest,
    maturity_part,
    report_page,
    summary_document,
    table,
)

HOSTILE = [
    "<script>document.title='run'</script>",
    "</script><script>document.title='run'</script>",
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)",
    "evil\u202egnp.exe",
    "${7*7}{{7*7}}%s",
    "]]>--></style><b>",
    "'`$(id)`",
    "\x1b[31m\x00",
]


def hostile_run() -> Run:
    """A run in which every name that AWS or a person gives is hostile."""
    outcomes = []
    for number, name in enumerate(HOSTILE):
        place = Account(numbered(number), name, "ACTIVE", None, name, name)
        person = user(name, key(DAY * 400, DAY, key_id=key_id(str(number))), password=True)
        outcomes.append(audited(person, account=place))
    one = failed(name=HOSTILE[0])
    skipped = SkippedAccount(Account(ONE, HOSTILE[1], HOSTILE[2]))
    return run_of([*outcomes, one, skipped])


def page_of(run: Run) -> tuple[str, Json]:
    summary = summary_document(run, FINISHED)
    return report_page(run, summary), summary


class Elements(HTMLParser):
    """The start tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def plain(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def test_hostile_names_are_text() -> None:
    page, _ = page_of(hostile_run())
    harmless = [*(audited(user("ann"), account=SANDBOX) for _ in ()), audited(user("ann"))]
    known = {tag for tag, _ in Elements(page_of(run_of([*harmless, failed()]))[0]).tags}
    elements = Elements(page)
    assert {tag for tag, _ in elements.tags} <= known | {"a", "i", "code", "small"}
    assert page.count("<script>") == page.count("</script>") == 1
    assert page.count("<style>") == page.count("</style>") == 1
    for _, attributes in elements.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("style", "src")
        ]
    for name in HOSTILE[:-1]:
        assert name.replace("\u202e", "\N{REPLACEMENT CHARACTER}") in elements.text
    assert all(character.isprintable() or character == "\n" for character in page)


def test_links_lead_to_our_own_files_only() -> None:
    page, summary = page_of(hostile_run())
    links = {attributes["href"] for tag, attributes in Elements(page).tags if tag == "a"}
    csvs = {
        f"accounts/{one['id']}.csv" for one in summary["accounts"] if one["result"] == "audited"
    }
    assert links == csvs | {"findings.csv", "summary.json", "credentials.csv"}


@pytest.mark.parametrize("run", [run_of([]), hostile_run()], ids=["empty", "hostile"])
def test_the_policy_lets_nothing_load_and_our_style_and_script_alone_run(run: Run) -> None:
    page, _ = page_of(run)
    [policy] = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    parts = dict(part.split(" ", 1) for part in policy.split("; "))
    assert parts["default-src"] == parts["base-uri"] == parts["form-action"] == "'none'"
    for kind in ("style", "script"):
        [content] = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert parts[f"{kind}-src"] == f"'sha256-{digest}'"
    assert set(parts) == {"default-src", "base-uri", "form-action", "style-src", "script-src"}
    assert '<meta name="referrer" content="no-referrer">' in page
    assert '<html lang="en">' in page


def test_figures_are_those_of_summary_json() -> None:
    people = [
        user("ann", key(DAY * 3000, DAY, key_id=key_id("1")), password=True),
        user("bob", key(DAY * 50, key_id=key_id("2")), password=True, mfa=["Virtual"]),
    ]
    run = run_of([audited(*people, account=PAYMENTS), audited(people[1]), failed()])
    page, summary = page_of(run)
    text, gaps = plain(page), summary["gaps"]["organization"]
    assert f"{gaps['console_users_without_mfa']} of {gaps['console_users']} console users" in text
    assert f"{gaps['active_keys_older_than_max_age']} of {gaps['active_keys']} active" in text
    for phase in ("phase1", "phase2"):
        for level, number in summary["maturity"][phase]["accounts"].items():
            assert f"{level} {number} account" in text
        here = summary["maturity"][phase]["level"]
        assert f'<li class="here" aria-current="step"><b>{here}</b>' in page
    for one in summary["accounts"]:
        assert one["id"] in text
        assert one["name"] in text
    assert f"{len(run.findings)} of {len(run.findings)} findings" in text
    assert "1 account could not be audited" in text
    assert "The baseline of this scope." in text
    assert f"The oldest: {key_id('1')} of ann in {PAYMENTS.id} {PAYMENTS.name}, 3,000 days" in text


def test_ages_of_keys_in_all_and_in_production() -> None:
    keys = [key(DAY * old, key_id=key_id(str(old))) for old in (1, 29, 30, 100, 4000)]
    run = run_of(
        [audited(user("ann", *keys[:2]), account=PAYMENTS), audited(user("bob", *keys[2:]))]
    )
    page, summary = page_of(run)
    both = [summary["gaps"][name]["active_key_ages"] for name in ("organization", "production")]
    [ages] = re.findall(r'class="table ages".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    rows = [plain(row).split(" ")[-2:] for row in ages.split("<tr>")[1:]]
    assert [tuple(map(int, row)) for row in rows] == list(zip(*both, strict=True))
    assert (sum(both[0]), sum(both[1])) == (5, 2)


def test_the_trend_has_a_point_and_a_row_per_run() -> None:
    run = run_of([audited(user("ann", password=True))])
    for days in range(59, 0, -1):
        figures = dict.fromkeys(RUN_GAPS, days * 100)
        run.tracking.runs.append({"started": iso(NOW - days * DAY), "audited": 1, **figures})
    page, summary = page_of(run)
    assert page.count("<circle ") == 3 * 60
    [rows] = re.findall(r'class="table runs".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert rows.count("<tr>") == len(summary["runs"]) == 60
    assert "5,900" in rows
    for points in re.findall(r'<polyline points="([^"]*)"', page):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert 44 <= x <= 356
            assert 20 <= y <= 140


def test_what_failed_was_not_checked_or_lacks_root_is_a_warning() -> None:
    run = run_of([audited(user("ann")), failed()])
    run.enforcement = run.enforcement._replace(why_not="AccessDenied: no")
    run.ous_why_not = "AccessDeniedException: not authorized"
    page, _ = page_of(run)
    [warning] = re.findall(r'<div class="warning">(.*?)</div>', page, re.DOTALL)
    for words in (
        "1 account could not be audited",
        "AssumeRole: AccessDenied",
        "Next: ",
        "Root is missing from the credential report of 1 account",
        "AccessDeniedException: not authorized",
        "Service control policies were not checked: AccessDenied: no",
    ):
        assert words in plain(warning)
    assert 'class="warning"' not in page_of(run_of([audited(user("<root_account>"))]))[0]


def test_what_could_not_be_read_of_an_account_is_not_a_zero() -> None:
    read_in_part = dataclasses.replace(
        audited(user("ann")), not_checked={"ListServiceSpecificCredentials": "AccessDenied"}
    )
    page, _ = page_of(run_of([read_in_part]))
    [rows] = re.findall(r'class="table cards accounts".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert "0 of 0 0 of 0 not checked absent absent absent" in plain(rows)
    assert plain(rows).endswith("audited; ListServiceSpecificCredentials was denied")


def test_accounts_that_failed_come_first_then_those_with_the_most_gaps() -> None:
    fine, worst = audited(user("ann")), audited(user("bob", password=True), account=PAYMENTS)
    skipped = SkippedAccount(Account(ONE[::-1], "left", "SUSPENDED"))
    page, _ = page_of(run_of([skipped, fine, worst, failed()]))
    [rows] = re.findall(r'class="table cards accounts".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    states = [plain(row) for row in rows.split("\n<tr")[1:]]
    for row, words in zip(states, ("AssumeRole", "payments", "sandbox", "SUSPENDED"), strict=True):
        assert words in row


def test_the_baseline_gives_each_phase_its_level_and_number_then() -> None:
    run = run_of([audited(user("ann", key(DAY * 500), password=True))])
    figures = dict.fromkeys(RUN_GAPS, 7)
    run.tracking.runs.append({"started": iso(NOW - DAY), "audited": 1, **figures})
    summary = summary_document(run, FINISHED)
    levels = {"then": "In Progress", "now": "In Progress", "compared_now": "In Progress"}
    changes = {"since": iso(NOW - DAY), "max_key_age_days_then": 45}
    summary["changes"] = {**changes, "maturity": dict.fromkeys(PHASES, levels)}
    text = plain(maturity_part(summary))
    since = f"Since {NOW - DAY:%Y-%m-%d}: unchanged (In Progress); then 7"
    assert f"{since} console users without MFA" in text
    assert f"{since} active keys older than 45 days" in text


def test_where_no_account_was_audited_nothing_is_counted() -> None:
    skipped = SkippedAccount(Account(TWO, "left-prod", "SUSPENDED"))
    cases: list[list[Outcome]] = [[failed()], [skipped], [failed(), skipped]]
    for outcomes in cases:
        page, _ = page_of(run_of(outcomes))
        text = plain(page)
        assert text.count("No account was audited.") == 2
        assert "now" not in text.partition("What to fix first")[0].partition("Trend")[2]
        assert "no console users" not in text
        assert "no active keys" not in text


def test_a_phase_says_that_api_keys_were_not_checked() -> None:
    denied = {"ListServiceSpecificCredentials": "AccessDenied"}
    read_in_part = dataclasses.replace(audited(user("ann")), not_checked=denied)
    page, _ = page_of(run_of([read_in_part]))
    assert "no active keys API keys were not checked in 1 account" in plain(page)


def test_failed_and_skipped_accounts_have_what_is_known_of_them() -> None:
    """Whether they are production and, of failed ones, what policies enforce there."""
    skipped = SkippedAccount(Account(TWO, "left-prod", "SUSPENDED"))
    page, _ = page_of(run_of([skipped, failed()]))
    [rows] = re.findall(r'class="table cards accounts".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    of_failed, of_skipped = rows.split("\n<tr")[1:]
    assert plain(of_failed).count("absent") == 3
    assert f"{TWO}, production" in of_skipped
    assert of_skipped.startswith(' class="p"')


def test_runs_later_than_this_one_do_not_stop_the_page() -> None:
    """The clock was set back, or somebody has edited a summary."""
    run = run_of([audited(user("ann"))])
    for days in (-3, 0):
        run.tracking.runs.append(
            {"started": iso(NOW - days * DAY), "audited": 1, **dict.fromkeys(RUN_GAPS, 7)}
        )
    page, _ = page_of(run)
    assert "<polyline" in page


def test_an_exception_stands_with_its_finding() -> None:
    known = KnownException(ONE, "*", "*", "*", date(2027, 1, 31), "leaves <soon>", 2)
    run = run_of([audited(user("ann", password=True))])
    run.findings = [one._replace(exception=known) for one in run.findings]
    assert "Exempt until 2027-01-31: leaves <soon>" in plain(page_of(run)[0])


def test_findings_beyond_the_limit_are_counted_and_linked() -> None:
    people = [user(f"user{n}", password=True) for n in range(FINDINGS_ON_PAGE + 5)]
    page, _ = page_of(run_of([audited(*people)]))
    assert f"{FINDINGS_ON_PAGE:,} of {FINDINGS_ON_PAGE + 5:,} findings" in plain(page)
    [rows] = re.findall(r'class="table cards findings".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert rows.count("<tr ") == FINDINGS_ON_PAGE


def test_the_page_of_a_large_organization_is_small() -> None:
    outcomes = []
    for number in range(5000):
        name = f"workload-{number}-prod" if number % 3 else f"workload-{number}-dev"
        place = Account(
            numbered(number), name, "ACTIVE", None, f"aws+{number}@example.com", "Workloads/Europe"
        )
        old = key(DAY * (400 + number % 999), DAY, key_id=key_id(str(number)))
        people = [user(f"person{n}.{number}", old) for n in range(20)]
        outcomes.append(audited(*people, account=place))
    run = run_of(outcomes)
    assert len(run.findings) == 100_000
    summary = summary_document(run, FINISHED)
    page = report_page(run, summary)
    assert len(page.encode()) < 4_000_000


def test_a_table_has_headings_with_scope_and_numbers_to_the_right() -> None:
    made = table("Title", "css", ["name", "#count"], [("mark", "a", "1")])
    assert '<th scope="col">Name</th><th scope="col" class="n">Count</th>' in made
    assert '\n<tr class="mark"><td>a<td class="n">1</tbody>' in made


def folder_of(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    return folder


def test_latest_is_a_relative_link_to_the_newest_run_and_no_run_itself(tmp_path: Path) -> None:
    now = NOW + timedelta(days=1)
    for name in ("20261123T205000Z", "20261123T205001Z"):
        folder = folder_of(tmp_path, name)
        assert link_latest(folder) == ""
        link = tmp_path / "latest"
        assert link.is_symlink()
        assert str(link.readlink()) == name
    assert [each.name for each in finished_runs(tmp_path, now)] == [
        "20261123T205001Z",
        "20261123T205000Z",
    ]
    assert sorted(each.name for each in tmp_path.iterdir())[-1] == "latest"
    assert not list(tmp_path.glob(".*"))


def test_where_there_can_be_no_link_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, "20261123T205000Z")
    (tmp_path / "latest").mkdir()
    assert "no link" in link_latest(folder)
    assert not list(tmp_path.glob(".*"))

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.symlink", refuse)
    assert link_latest(folder).endswith("Operation not permitted")


def test_a_run_writes_the_page_unless_told_not_to(serve: Serve, program: Program) -> None:
    endpoint = serve(account(ONE, "sandbox"))
    result = program(endpoint.env())
    page = result.output_dir / "latest" / "report.html"
    assert page.resolve().parent.name == result.folder.name
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert page.stat().st_mtime_ns <= (result.folder / "summary.json").stat().st_mtime_ns
    without = program(endpoint.env(), "--no-page")
    assert not (without.folder / "report.html").exists()
    assert (without.output_dir / "latest" / "summary.json").exists()


def test_a_word_under_verbose_where_there_is_no_link(serve: Serve, program: Program) -> None:
    endpoint = serve(account(ONE, "sandbox"))
    for options, expected in ((("--verbose",), True), ((), False)):
        with program.start(endpoint.env(), *options) as (process, output_dir):
            (output_dir / "latest").mkdir(parents=True, mode=0o700)
            _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        assert ("There is no link" in stderr) == expected

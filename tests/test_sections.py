"""The order of iam_audit.py: its sections, what each of them may use, and where the network is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import iam_audit

SOURCE = Path(iam_audit.__file__).read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
MAY_USE = {
    "run": {
        "data",
        "AWS",
        "audit",
        "files",
        "assess",
        "track",
        "enforce",
        "terminal",
        "page",
        "documents",
        "options",
    },
    "data": set[str](),
    "AWS": {"data"},
    "audit": {"data", "AWS"},
    "files": {"data"},
    "assess": {"data", "files"},
    "track": {"data", "files", "assess"},
    "enforce": {"data", "AWS"},
    "terminal": {"data", "files", "assess", "track", "enforce"},
    "page": {"data", "files", "assess", "track", "enforce", "terminal"},
    "documents": {"data", "AWS"},
    "options": {"data", "assess", "documents"},
}
NETWORK = {"boto3", "botocore", "socket", "ssl", "urllib", "urllib3", "http"}


def sections() -> dict[str, int]:
    """The line of each section's banner by the section's name."""
    found = {}
    for number, line in enumerate(LINES, 1):
        if line.startswith("# === "):
            found[line.removeprefix("# === ").partition(":")[0]] = number
    return {name if name == "AWS" else name.lower(): number for name, number in found.items()}


def section_of(line: int) -> str:
    """The section that a line is in; `contract` before the first."""
    current = "contract"
    for name, begins in sections().items():
        if begins <= line:
            current = name
    return current


def defined_names(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {
            name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
        }
    return set()


def imported_names() -> dict[str, str]:
    """The package that each imported name comes from."""
    found = {}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[(alias.asname or alias.name).partition(".")[0]] = alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = (node.module or "").partition(".")[0]
    return found


class Used(ast.NodeVisitor):
    """The names that code uses when it runs: annotations and a function's own names do not count."""

    def __init__(self) -> None:
        self.names = set[str]()

    def visit_Name(self, node: ast.Name) -> None:
        self.names.add(node.id)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        pass

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        own = {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                own.add(each.id)
        outside, self.names = self.names, set()
        for part in (*node.decorator_list, node.args, *node.body):
            self.visit(part)
        self.names = outside | self.names - own

    visit_FunctionDef = visit_AsyncFunctionDef = _function


def test_the_sections_stand_in_the_order_of_the_contract() -> None:
    contract = ast.get_docstring(TREE, clean=False) or ""
    listed = re.findall(r"^  (\w+) {2,}\w.*$", contract[contract.index("Sections") :], re.MULTILINE)
    assert list(sections()) == listed == list(MAY_USE)


def test_the_contract_names_the_reading_path_and_its_length() -> None:
    contract = " ".join((iam_audit.__doc__ or "").split())
    assert "Nothing else opens a connection." in contract
    told = re.search(r"read the run, AWS and audit: about ([0-9,]+) lines\.", contract)
    assert told
    begins = list(sections().values())
    ends = dict(zip(sections(), [*begins[1:], len(LINES)], strict=True))
    length = sum(ends[name] - sections()[name] for name in ("run", "AWS", "audit"))
    assert abs(length - int(told[1].replace(",", ""))) <= 75


@pytest.mark.parametrize("section", MAY_USE)
def test_a_section_uses_only_what_it_may(section: str) -> None:
    home = {name: section_of(node.lineno) for node in TREE.body for name in defined_names(node)}
    forbidden = set()
    for node in TREE.body:
        if section_of(node.lineno) == section and not isinstance(node, ast.If):
            used = Used()
            used.visit(node)
            for name in used.names & home.keys():
                if home[name] not in MAY_USE[section] | {section}:
                    forbidden.add(f"{name} of {home[name]}")
    assert home["main"] == "run"
    assert home["assume_role"] == "AWS"
    assert not forbidden


def test_only_the_aws_section_names_the_sdk_or_a_socket() -> None:
    origin = imported_names()
    found = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Name) and {node.id, origin.get(node.id)} & NETWORK:
            found.add(section_of(node.lineno))
    assert found == {"AWS"}


def test_the_story_comes_first() -> None:
    names = [name for node in TREE.body for name in sorted(defined_names(node))]
    story = [name for name in names if name in ("main", "run_audit", "audit_into")]
    assert story == ["main", "run_audit", "audit_into"]
    assert next(node.lineno for node in TREE.body if "main" in defined_names(node)) < 130


def test_no_line_is_wider_than_100_columns() -> None:
    assert not [number for number, line in enumerate(LINES, 1) if len(line) > 100]


def test_the_file_stays_below_its_ceiling() -> None:
    assert len(LINES) <= 4500

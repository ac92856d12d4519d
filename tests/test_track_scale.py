"""Track where the organization is large: what it costs to read an earlier run and to compare with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import cost_of_comparison, write_large_run
from conftest import Program


@pytest.mark.program
def test_comparing_a_thousand_accounts_is_cheap(program: Program, tmp_path: Path) -> None:
    """All accounts cost the same, however many came before them. SDK and all, it takes less than 100 MB.

    What is counted are lines of Python that run, because no other process changes them: 6,800 per account of 51 users
    and 50 keys, with Python 3.9 to 3.13. For times see the benchmark's `comparison`.
    """
    write_large_run(tmp_path)
    cost = cost_of_comparison(program.python, Path(program.path), tmp_path)
    assert (cost["compared"], cost["changed"]) == (1000, 2000)
    lines = cost["lines"]
    assert lines["opening"] < 40  # per account of the earlier run
    assert lines["first"] < 7500
    assert lines["last"] == pytest.approx(lines["first"], rel=0.01)
    assert cost["memory"] < 100

"""Times and names as AWS writes them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

import iam_audit

NOON = datetime(2024, 1, 31, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2024-01-31T12:00:00Z", NOON),
        ("2024-01-31T12:00:00+00:00", NOON),
        ("2024-01-31T13:30:00+01:30", NOON),
        ("2024-01-31T07:00:00-05:00", NOON),
        ("2024-01-31T12:00:00", NOON),
        ("2024-01-31T12:00:00.250000Z", NOON + timedelta(milliseconds=250)),
    ],
)
def test_times_as_aws_writes_them_are_read_as_utc(text: str, moment: datetime) -> None:
    found = iam_audit.parse_time(text)
    assert (found, found.utcoffset()) == (moment, timedelta(0))


@pytest.mark.parametrize(
    "text", ["", "N/A", "no_information", "2024-13-01T00:00:00Z", "yesterday", "Z"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        iam_audit.parse_time(text)


offsets = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.datetimes(datetime(1990, 1, 1), datetime(2090, 1, 1), timezones=offsets)


@given(moments)
def test_cells_hold_utc_with_seconds(moment: datetime) -> None:
    written = iam_audit.iso(moment)
    assert len(written) == len("2024-01-31T12:00:00+00:00")
    assert written.endswith("+00:00")
    assert timedelta(0) <= moment - iam_audit.parse_time(written) < timedelta(seconds=1)

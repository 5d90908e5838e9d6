"""Events and progress as rows: sent as one JSON document, which is cheaper than an array for each column."""

import re
from collections.abc import Iterable
from dataclasses import fields
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson

from exportd.counting.intervals import Intervals
from exportd.counting.progress import Progress, Resume, Tail
from exportd.db.pool import ValueRefused
from exportd.db.rows import read
from exportd.domain.delivery import DownloadEvent, Method, Outcome

# The fields of ``DownloadEvent``, for json_to_recordset.
EVENT_COLUMNS = """
    event_id uuid, job_id uuid, user_id text, started_at timestamptz, duration_seconds double precision,
    outcome text, http_status smallint, requested int8multirange, received int8multirange, bytes_sent bigint,
    package_size_bytes bigint, request_id text, bytes_acknowledged bigint, reason text, method text,
    daemon_id uuid, package_sha256 text
"""
EVENT_NAMES = ", ".join(column.split()[0] for column in EVENT_COLUMNS.split(","))


def to_row(record: DownloadEvent | Progress) -> dict[str, object]:
    """The record's columns as JSON values."""
    columns = {field.name: getattr(record, field.name) for field in fields(record)}
    for name in ("requested", "received"):
        if name in columns:
            columns[name] = "{" + ",".join(f"[{start},{stop})" for start, stop in columns[name]) + "}"
    return columns


def to_json(rows: Iterable[dict[str, object]]) -> str:
    """Raises ValueRefused if a text is not valid Unicode."""
    try:
        return orjson.dumps(list(rows)).decode()
    except TypeError as error:
        raise ValueRefused(str(error)) from error


def event_of_row(row: Any) -> DownloadEvent:
    """The event of a row of ``download_events``."""
    return read(
        DownloadEvent,
        row,
        outcome=Outcome(row.outcome),
        requested=parse_multirange(row.requested),
        received=parse_multirange(row.received),
        method=row.method and Method(row.method),
    )


def progress_of_row(row: Any) -> Progress:
    """The progress of a row of ``download_progress``."""
    return Progress(
        parse_multirange(row.received),
        tuple(
            Tail(
                tail["known"],
                tail["reach"],
                datetime.fromisoformat(tail["after"]),
                tail["daemon_id"] and UUID(tail["daemon_id"]),
            )
            for tail in row.tails
        ),
        tuple(
            Resume(resume["start"], datetime.fromisoformat(resume["began_at"]), UUID(resume["daemon_id"]))
            for resume in row.resumes
        ),
    )


def parse_multirange(text: str) -> Intervals:
    """The pairs of an int8multirange, which psycopg2 returns as text."""
    return tuple((int(start), int(stop)) for start, stop in re.findall(r"\[(\d+),(\d+)\)", text))

"""The plan of a response to a request for a package: a pure function of the request's fields and the package.

The order is that of RFC 9110, section 13.2.2: If-Match or If-Unmodified-Since, If-None-Match or
If-Modified-Since, then Range, if If-Range allows it.
"""

from dataclasses import dataclass
from datetime import datetime

from exportd.http.conditions import (
    check_if_match,
    check_if_modified_since,
    check_if_none_match,
    check_if_range,
    check_if_unmodified_since,
)
from exportd.http.ranges import ByteRange, parse_range


@dataclass(frozen=True, slots=True)
class Representation:
    """The package. ``etag`` is quoted; ``last_modified`` is in whole seconds, UTC."""

    size: int
    etag: str
    last_modified: datetime


@dataclass(frozen=True, slots=True)
class RequestFields:
    """The relevant fields of the request; None: absent. Several fields of a name are joined with a comma
    (section 5.3), so two Range fields, or two dates, are invalid."""

    range: str | None = None
    if_range: str | None = None
    if_match: str | None = None
    if_none_match: str | None = None
    if_modified_since: str | None = None
    if_unmodified_since: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The status (200, 206, 304, 412 or 416) and the parts of the package that make up the body."""

    status: int
    parts: tuple[ByteRange, ...] = ()

    @property
    def body_length(self) -> int:
        """The bytes of the package in the body, without framing."""
        return sum(part.length for part in self.parts)


def plan_response(method: str, fields: RequestFields, package: Representation, max_ranges: int) -> Plan:
    """Plans the response to a GET or HEAD."""
    if failed := _failed_precondition(fields, package):
        return Plan(failed)
    whole = Plan(200, (ByteRange(0, package.size),))
    # Range is defined for GET only (section 14.2); an empty package has no byte to range over.
    if method != "GET" or fields.range is None or not package.size:
        return whole
    if check_if_range(fields.if_range, package.etag, package.last_modified) is False:
        return whole
    ranges = parse_range(fields.range, package.size, max_ranges)
    if ranges is None:
        return whole
    return Plan(206, tuple(ranges)) if ranges else Plan(416)


def _failed_precondition(fields: RequestFields, package: Representation) -> int | None:
    """Returns 412, 304, or None if every precondition is true."""
    matches = check_if_match(fields.if_match, package.etag)
    if matches is None:
        matches = check_if_unmodified_since(fields.if_unmodified_since, package.last_modified)
    if matches is False:
        return 412
    differs = check_if_none_match(fields.if_none_match, package.etag)
    if differs is None:
        differs = check_if_modified_since(fields.if_modified_since, package.last_modified)
    if differs is False:
        return 304
    return None

"""Conditional requests (RFC 9110, section 13) as pure functions.

Each check is named after its field. It returns None if the field is absent or a malformed date, so that these
never count as false.
"""

import re
from datetime import UTC, datetime

_ENTITY_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_ENTITY_TAGS = re.compile(rf"[ \t,]*{_ENTITY_TAG}(?:[ \t]*,[ \t,]*{_ENTITY_TAG})*[ \t,]*", re.ASCII)
_ONE_TAG = re.compile(_ENTITY_TAG, re.ASCII)
# Section 5.6.7: IMF-fixdate, and the two obsolete forms that a recipient must accept.
_DATE_FORMATS = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")


def strong_match(one: str, other: str) -> bool:
    """Strong comparison (section 8.8.3.2): equal, and neither is weak."""
    return one == other and not one.startswith("W/")


def weak_match(one: str, other: str) -> bool:
    """Weak comparison (section 8.8.3.2): equal, without regard to ``W/``."""
    return one.removeprefix("W/") == other.removeprefix("W/")


def check_if_match(value: str | None, etag: str) -> bool | None:
    """Whether If-Match is true. A malformed list matches nothing."""
    if value is None:
        return None
    return value.strip(" \t") == "*" or any(strong_match(tag, etag) for tag in _parse_entity_tags(value))


def check_if_none_match(value: str | None, etag: str) -> bool | None:
    """Whether If-None-Match is true: none of its tags is the package's. A malformed list holds none."""
    if value is None:
        return None
    return value.strip(" \t") != "*" and not any(weak_match(tag, etag) for tag in _parse_entity_tags(value))


def check_if_unmodified_since(value: str | None, last_modified: datetime) -> bool | None:
    """Whether the package is no newer than the date."""
    date = parse_http_date(value)
    return None if date is None else last_modified <= date


def check_if_modified_since(value: str | None, last_modified: datetime) -> bool | None:
    """Whether the package is newer than the date."""
    date = parse_http_date(value)
    return None if date is None else last_modified > date


def check_if_range(value: str | None, etag: str, last_modified: datetime) -> bool | None:
    """Whether the range may be sent: the validator is exactly the package's (section 13.1.5).

    A date must be equal, not later. It counts as strong, because a package never changes.
    """
    if value is None:
        return None
    tag = value.strip(" \t")
    return strong_match(tag, etag) or parse_http_date(tag) == last_modified


def parse_http_date(value: str | None) -> datetime | None:
    """Parses an HTTP date (section 5.6.7). None: it is malformed."""
    # strptime() accepts digits of other scripts.
    if value is None or not value.isascii():
        return None
    for form in _DATE_FORMATS:
        try:
            return datetime.strptime(value.strip(" \t"), form).replace(tzinfo=UTC)
        except ValueError:
            continue
    return None


def _parse_entity_tags(value: str) -> list[str]:
    return _ONE_TAG.findall(value) if _ENTITY_TAGS.fullmatch(value) else []

"""Validators and digests, by which a client knows that it resumes the same bytes (RFC 9110, section 8.8)."""

import base64
import functools
import hashlib
import re
from datetime import UTC, datetime
from email.utils import format_datetime

_SHA_256_WEIGHT = re.compile(r"sha-256=([0-9]{1,2})(?:;.*)?", re.ASCII)


def entity_tag(sha256_hex: str) -> str:
    """Returns the strong ETag of a package with a SHA-256. It is the same on every node, for ever."""
    return f'"{sha256_hex}"'


def sample_tag(size_bytes: int, sample: bytes) -> str:
    """Returns a strong ETag for a package without a digest, from parts of its content.

    It is the same for a copy of the file, and on every node.
    """
    return f'"file-{hashlib.sha256(b"%d:" % size_bytes + sample).hexdigest()[:32]}"'


def last_modified(modified: datetime, now: datetime) -> datetime:
    """Returns a time for Last-Modified: in UTC, rounded down to the second, and never later than Date, which
    a client could not use (section 8.8.2.1)."""
    return _whole_seconds(min(modified, now))


@functools.lru_cache(maxsize=4096)
def http_date(moment: datetime) -> str:
    """An HTTP date (section 5.6.7)."""
    return format_datetime(_whole_seconds(moment), usegmt=True)


def _whole_seconds(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(microsecond=0)


@functools.lru_cache(maxsize=4096)
def repr_digest(sha256_hex: str) -> str:
    """The value of Repr-Digest (RFC 9530): the digest of the whole package, on a 206 too."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256_hex)).decode()}:"


def wants_digest(field: str | None) -> bool:
    """Whether Want-Repr-Digest (RFC 9530, section 4) allows SHA-256. A weight of 0 forbids it.

    The field is a dictionary of algorithms and weights (RFC 8941). A malformed one forbids nothing.
    """
    if field is None:
        return True
    weights = [_SHA_256_WEIGHT.fullmatch(member.strip(" \t")) for member in field.split(",")]
    given = [weight[1] for weight in weights if weight]
    return not given or int(given[-1]) > 0

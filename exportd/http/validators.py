"""Validators and digests: what lets a client know that it resumes the same bytes (RFC 9110, section 8.8)."""

import base64
import hashlib
from datetime import UTC, datetime
from email.utils import format_datetime


def entity_tag(sha256_hex: str) -> str:
    """The strong ETag of a package whose content's SHA-256 is known: the same on every node, for ever."""
    return f'"{sha256_hex}"'


def identity_tag(device: int, inode: int, size_bytes: int, modified_ns: int) -> str:
    """A strong ETag for a package without a digest, from what changes when the file is replaced."""
    identity = f"{device}:{inode}:{size_bytes}:{modified_ns}".encode()
    return f'"file-{hashlib.sha256(identity).hexdigest()[:32]}"'


def last_modified(moment: datetime) -> str:
    """The value of Last-Modified: an HTTP date, rounded down to the second."""
    return format_datetime(moment.astimezone(UTC).replace(microsecond=0), usegmt=True)


def repr_digest(sha256_hex: str) -> str:
    """The value of Repr-Digest (RFC 9530): the digest of the whole package, on a 206 too."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256_hex)).decode()}:"

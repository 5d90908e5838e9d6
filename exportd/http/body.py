"""The body of a response: the whole package, one range, or several as ``multipart/byteranges`` (RFC 9110,
section 14.6)."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from exportd.http.ranges import ByteRange

# Framing bytes, or a range of the package.
Segment = bytes | ByteRange


@dataclass(frozen=True, slots=True)
class Body:
    """The segments in order, and the header fields that describe them."""

    segments: tuple[Segment, ...]
    headers: dict[str, str]


def frame_body(status: int, parts: Sequence[ByteRange], size: int, content_type: str) -> Body:
    """Returns the body of a 200 or 206 with ``parts`` of a package of ``size`` bytes."""
    if len(parts) > 1:
        # The boundary must not be guessable by the maker of a package.
        return _frame_parts(parts, size, content_type, boundary=secrets.token_hex(16))
    (part,) = parts
    headers = {"Content-Type": content_type, "Content-Length": str(part.length)}
    if status == 206:
        headers["Content-Range"] = part.content_range(size)
    return Body((part,), headers)


def _frame_parts(parts: Sequence[ByteRange], size: int, content_type: str, boundary: str) -> Body:
    segments: list[Segment] = []
    line_break = ""
    for part in parts:
        frame = (
            f"{line_break}--{boundary}\r\n"
            f"Content-Type: {content_type}\r\n"
            f"Content-Range: {part.content_range(size)}\r\n\r\n"
        )
        segments += [frame.encode("ascii"), part]
        line_break = "\r\n"
    segments.append(f"\r\n--{boundary}--\r\n".encode("ascii"))
    length = sum(len(segment) if isinstance(segment, bytes) else segment.length for segment in segments)
    headers = {
        "Content-Type": f"multipart/byteranges; boundary={boundary}",
        "Content-Length": str(length),
    }
    return Body(tuple(segments), headers)

"""What to answer to a request for a package: a pure function of the request's headers and the package.

The order is RFC 9110's, section 13.2.2.
"""

from dataclasses import dataclass

from exportd.http.ranges import ByteRange, parse_range


@dataclass(frozen=True, slots=True)
class Plan:
    """The status, the parts of the package that make up the body, and the headers that follow from them."""

    status: int
    parts: tuple[ByteRange, ...]
    headers: dict[str, str]

    @property
    def body_length(self) -> int:
        return sum(part.length for part in self.parts)


def plan_response(method: str, range_fields: list[str], size: int) -> Plan:
    """Plans the answer to ``method`` on a package of ``size`` bytes.

    ``range_fields`` holds the values of every Range field of the request: two are as invalid as a broken one.
    """
    whole = Plan(200, (ByteRange(0, size),), {"Content-Length": str(size)})
    # Range is defined for GET only; an empty package has no byte to range over.
    if method != "GET" or len(range_fields) != 1 or size == 0:
        return whole
    ranges = parse_range(range_fields[0], size)
    if ranges is None or len(ranges) > 1:
        return whole
    if not ranges:
        return Plan(416, (), {"Content-Range": f"bytes */{size}"})
    part = ranges[0]
    return Plan(206, (part,), {"Content-Length": str(part.length), "Content-Range": part.content_range(size)})

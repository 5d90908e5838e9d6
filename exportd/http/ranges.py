"""Range requests (RFC 9110, section 14) as pure functions.

A range is kept as a start and a length; the inclusive last position exists only in the header.
"""

import re
from dataclasses import dataclass

# OWS is space and tab only, and digits are ASCII only: int() and str.isdigit() would take more.
_RANGES_SPECIFIER = re.compile(r"[ \t]*bytes[ \t]*=(.*)", re.IGNORECASE | re.ASCII | re.DOTALL)
_RANGE_SPEC = re.compile(r"([0-9]+)-([0-9]*)|-([0-9]+)", re.ASCII)
# No package is that large, and int() takes quadratic time for long numbers.
_LONGEST_POSITION = 19
_BEYOND = 10**_LONGEST_POSITION


@dataclass(frozen=True, slots=True)
class ByteRange:
    """``length`` bytes from ``start`` on."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    def content_range(self, size: int) -> str:
        """The value of Content-Range for this part of ``size`` bytes."""
        return f"bytes {self.start}-{self.stop - 1}/{size}"


def parse_range(value: str, size: int) -> list[ByteRange] | None:
    """What a Range header asks of a representation of ``size`` bytes.

    None: the header is invalid or of another unit, and to be ignored (section 14.2). An empty list: valid,
    but no part of it can be satisfied, which is 416. Otherwise the satisfiable ranges in the order asked.
    """
    specifier = _RANGES_SPECIFIER.fullmatch(value)
    if specifier is None:
        return None
    ranges: list[ByteRange] = []
    is_empty = True
    for element in specifier[1].split(","):
        spec_text = element.strip(" \t")
        if not spec_text:
            continue
        is_empty = False
        spec = _RANGE_SPEC.fullmatch(spec_text)
        if spec is None:
            return None
        if spec[3] is not None:
            start, stop = max(0, size - _position(spec[3])), size
        else:
            start = _position(spec[1])
            last = _position(spec[2]) if spec[2] else _BEYOND
            if last < start:
                return None
            stop = min(last + 1, size)
        if start < stop:
            ranges.append(ByteRange(start, stop - start))
    return None if is_empty else ranges


def _position(digits: str) -> int:
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) <= _LONGEST_POSITION else _BEYOND

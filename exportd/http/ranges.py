"""Range requests (RFC 9110, section 14) as pure functions.

A range is a start and a length. The inclusive last position exists only in the header.
"""

import re
from dataclasses import dataclass

# OWS is space and tab only, and digits are ASCII only: int() and str.isdigit() accept more.
_RANGES_SPECIFIER = re.compile(r"[ \t]*bytes[ \t]*=(.*)", re.IGNORECASE | re.ASCII | re.DOTALL)
_RANGE_SPEC = re.compile(r"([0-9]+)-([0-9]*)|-([0-9]+)", re.ASCII)
# No package is that large, and int() takes quadratic time for long numbers.
_MAX_POSITION_DIGITS = 19
_BEYOND = 10**_MAX_POSITION_DIGITS


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


def parse_range(value: str, size: int, max_ranges: int) -> list[ByteRange] | None:
    """Parses a Range header for a representation of ``size`` bytes.

    None: send the whole. The header is invalid, has another unit, or requests more than ``max_ranges`` ranges
    or more bytes than there are (section 14.2 lets a server ignore costly headers). An empty list: valid, but
    not satisfiable (416). Otherwise the ranges to send, in the requested order, with overlapping and adjacent
    ones merged.
    """
    specifier = _RANGES_SPECIFIER.fullmatch(value)
    if specifier is None:
        return None
    ranges: list[ByteRange] = []
    asked = 0
    for element in specifier[1].split(","):
        text = element.strip(" \t")
        if not text:
            continue
        asked += 1
        spec = _RANGE_SPEC.fullmatch(text)
        if spec is None or asked > max_ranges:
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
    if not asked or sum(part.length for part in ranges) > size:
        return None
    return _coalesce(ranges)


def _coalesce(ranges: list[ByteRange]) -> list[ByteRange]:
    """Merges overlapping and adjacent ranges, at the place of the first requested one."""
    if len(ranges) < 2:
        return ranges
    merged: list[tuple[int, ByteRange]] = []
    for place, part in sorted(enumerate(ranges), key=lambda item: item[1].start):
        if merged and part.start <= merged[-1][1].stop:
            first, before = merged[-1]
            stop = max(before.stop, part.stop)
            merged[-1] = min(first, place), ByteRange(before.start, stop - before.start)
        else:
            merged.append((place, part))
    return [part for _, part in sorted(merged, key=lambda item: item[0])]


def _position(digits: str) -> int:
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) <= _MAX_POSITION_DIGITS else _BEYOND

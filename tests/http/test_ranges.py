import pytest

from exportd.http.ranges import ByteRange, parse_range

SIZE = 1000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # RFC 9110, section 14.1.2: int-range and suffix-range, positions from 0, the last one inclusive.
        ("bytes=0-0", [(0, 1)]),
        ("bytes=0-499", [(0, 500)]),
        ("bytes=500-", [(500, 500)]),
        ("bytes=-100", [(900, 100)]),
        ("bytes=-1", [(999, 1)]),
        ("bytes=999-", [(999, 1)]),
        ("bytes=999-999", [(999, 1)]),
        ("bytes=0-", [(0, 1000)]),
        ("bytes=0-999", [(0, 1000)]),
        # A last position beyond the end means the end; an over-long suffix means the whole.
        ("bytes=0-1000", [(0, 1000)]),
        ("bytes=900-5000", [(900, 100)]),
        ("bytes=0-18446744073709551615", [(0, 1000)]),
        ("bytes=0-" + "9" * 40, [(0, 1000)]),
        ("bytes=0-" + "9" * 100_000, [(0, 1000)]),
        ("bytes=-5000", [(0, 1000)]),
        ("bytes=-" + "9" * 40, [(0, 1000)]),
        ("bytes=" + "0" * 40 + "1-" + "0" * 40 + "2", [(1, 2)]),
        # Section 14.1: range units are case-insensitive; section 5.6.1: OWS and empty list elements.
        ("Bytes=0-9", [(0, 10)]),
        ("BYTES=0-9", [(0, 10)]),
        ("bytes= 0-9", [(0, 10)]),
        ("bytes=0-9 , 20-29", [(0, 10), (20, 10)]),
        ("bytes=\t0-9", [(0, 10)]),
        ("bytes=,0-9,", [(0, 10)]),
        ("bytes=0-0,2-2", [(0, 1), (2, 1)]),
        ("bytes=2-2,0-0", [(2, 1), (0, 1)]),
        # Section 15.3.7.2: ranges that overlap or touch may be made one.
        ("bytes=0-99,50-149", [(0, 150)]),
        ("bytes=0-99,100-199", [(0, 200)]),
        ("bytes=100-199,0-99", [(0, 200)]),
        ("bytes=0-99,101-199", [(0, 100), (101, 99)]),
        ("bytes=0-99,10-19", [(0, 100)]),
        ("bytes=500-599,0-99,50-149", [(500, 100), (0, 150)]),
        ("bytes=0-9,500-509,5-14,505-514", [(0, 15), (500, 15)]),
        # Section 14.2: more bytes than there are, or too many ranges: the whole.
        ("bytes=0-,0-", None),
        ("bytes=0-499,500-999", [(0, 1000)]),
        ("bytes=0-499,499-999", None),
        ("bytes=0-0,2-2,4-4,6-6", [(0, 1), (2, 1), (4, 1), (6, 1)]),
        ("bytes=0-0,2-2,4-4,6-6,8-8", None),
        ("bytes=2000-,2000-,2000-,2000-,2000-", None),
        ("bytes=" + "0-0," * 10_000, None),
        # Section 14.1.1: satisfiable if at least one member is; the others are dropped.
        ("bytes=0-99,2000-", [(0, 100)]),
        ("bytes=-0,5-5", [(5, 1)]),
        # Valid, and not satisfiable.
        ("bytes=-0", []),
        ("bytes=1000-", []),
        ("bytes=1000-2000", []),
        ("bytes=" + "9" * 40 + "-", []),
        ("bytes=2000-,-0", []),
        # Section 14.2: an unknown unit, or what is no ranges-specifier, is ignored.
        ("items=0-9", None),
        ("bytes", None),
        ("bytes=", None),
        ("bytes=,", None),
        ("", None),
        ("abc", None),
        ("-", None),
        ("bytes=-", None),
        ("bytes=abc", None),
        ("bytes=5-4", None),
        ("bytes=5-4,0-9", None),
        ("bytes=0-9,abc", None),
        ("bytes=--5", None),
        ("bytes=0--10", None),
        ("bytes=1_0-2_0", None),
        ("bytes=+1-5", None),
        ("bytes=0x1-2", None),
        ("bytes=1-2-3", None),
        ("bytes=0 - 9", None),
        ("bytes=0.0-9", None),
        ("bytes=0-9;q=1", None),
        ("bytes=\u0660-\u0669", None),
        ("bytes=\u00b2-9", None),
        ("bytes=0-9\u00a0", None),
        ("bytes=0-9\n", None),
        ("bytes:0-9", None),
    ],
)
def test_parse_range(value: str, expected: list[tuple[int, int]] | None) -> None:
    found = parse_range(value, SIZE, max_ranges=4)
    assert found == (None if expected is None else [ByteRange(start, length) for start, length in expected])


def test_content_range_has_an_inclusive_last_position() -> None:
    assert ByteRange(0, 1).content_range(1000) == "bytes 0-0/1000"
    assert ByteRange(900, 100).content_range(1000) == "bytes 900-999/1000"

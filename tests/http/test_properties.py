"""What holds whatever a client sends."""

import itertools
from datetime import UTC, datetime

from hypothesis import assume, given
from hypothesis import strategies as st

from exportd.http.body import frame_body
from exportd.http.plan import Plan, Representation, RequestFields, plan_response
from exportd.http.ranges import parse_range

sizes = st.integers(0, 200)
# What a Range header is made of, so that nonsense is near to sense.
scraps = st.sampled_from(
    ["bytes", "=", "-", ",", " ", "0", "1", "5", "99", "100", "9" * 30, "x", "\t", "+", "\u0661"]
)
range_values = st.one_of(
    st.text(max_size=40),
    st.lists(scraps, max_size=12).map("".join),
    st.lists(scraps, max_size=12).map(lambda parts: "bytes=" + "".join(parts)),
)
tags = st.sampled_from(['"e"', 'W/"e"', '"x"', "*", "", "e", '"e", "x"', "Fri, 24 Oct 2025 12:00:00 GMT"])
fields = st.builds(
    RequestFields,
    range=st.none() | range_values,
    if_range=st.none() | tags | st.text(max_size=20),
    if_match=st.none() | tags | st.text(max_size=20),
    if_none_match=st.none() | tags | st.text(max_size=20),
    if_modified_since=st.none() | tags | st.text(max_size=20),
    if_unmodified_since=st.none() | tags | st.text(max_size=20),
)
specs = st.one_of(
    st.tuples(st.integers(0, 220), st.integers(0, 220)).map(lambda pair: f"{min(pair)}-{max(pair)}"),
    st.integers(0, 220).map(lambda start: f"{start}-"),
    st.integers(0, 220).map(lambda length: f"-{length}"),
)
MODIFIED = datetime(2025, 10, 24, 12, tzinfo=UTC)


def bytes_asked(spec: str, size: int) -> set[int]:
    """The positions a range-spec names, by RFC 9110's words and not by our code."""
    first, _, last = spec.partition("-")
    if not first:
        return {position for position in range(size) if position >= size - int(last)}
    return {
        position for position in range(size) if position >= int(first) and (not last or position <= int(last))
    }


def plan(method: str, request: RequestFields, size: int) -> Plan:
    return plan_response(method, request, Representation(size, '"e"', MODIFIED), 16)


@given(st.sampled_from(["GET", "HEAD"]), fields, sizes)
def test_the_planner_never_raises_and_never_leaves_the_file(
    method: str, request: RequestFields, size: int
) -> None:
    found = plan(method, request, size)
    assert found.status in (200, 206, 304, 412, 416)
    assert all(0 <= part.start <= part.stop <= size for part in found.parts)
    assert bool(found.parts) == (found.status in (200, 206))


@given(st.sampled_from(["GET", "HEAD"]), fields, sizes)
def test_a_request_never_costs_more_than_the_package(method: str, request: RequestFields, size: int) -> None:
    found = plan(method, request, size)
    assert found.body_length <= size
    assert len(found.parts) <= 16


@given(st.lists(specs, min_size=1, max_size=16), st.integers(1, 200))
def test_the_parts_hold_exactly_the_bytes_that_were_asked_for(asked: list[str], size: int) -> None:
    positions = [bytes_asked(spec, size) for spec in asked]
    assume(sum(map(len, positions)) <= size)
    ranges = parse_range("bytes=" + ",".join(asked), size, 16)
    assert ranges is not None
    sent = [position for part in ranges for position in range(part.start, part.stop)]
    assert len(sent) == len(set(sent)), "a byte is sent twice"
    assert set(sent) == set().union(*positions)


@given(st.lists(specs, min_size=1, max_size=16), st.integers(1, 200))
def test_parts_neither_overlap_nor_touch_and_keep_the_order_asked(asked: list[str], size: int) -> None:
    ranges = parse_range("bytes=" + ",".join(asked), size, 16) or []
    ordered = sorted(ranges, key=lambda part: part.start)
    assert all(one.stop < other.start for one, other in itertools.pairwise(ordered))
    first_asked = [
        min(
            place
            for place, spec in enumerate(asked)
            if bytes_asked(spec, size) & set(range(part.start, part.stop))
        )
        for part in ranges
    ]
    assert first_asked == sorted(first_asked)


@given(st.data(), st.binary(min_size=1, max_size=200))
def test_any_covering_set_of_ranges_reassembles_the_package(data: st.DataObject, content: bytes) -> None:
    size = len(content)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, size - 1)), max_size=10)) | {0, size})
    pieces = [(first, stop) for first, stop in itertools.pairwise(cuts) if first < stop]
    rebuilt = bytearray(size)
    for first, stop in data.draw(st.permutations(pieces)):
        found = plan("GET", RequestFields(range=f"bytes={first}-{stop - 1}"), size)
        assert found.status == 206
        (part,) = found.parts
        rebuilt[part.start : part.stop] = content[part.start : part.stop]
    assert bytes(rebuilt) == content


@given(st.lists(specs, min_size=1, max_size=16), st.integers(1, 200))
def test_a_framed_body_is_as_long_as_it_says(asked: list[str], size: int) -> None:
    found = plan("GET", RequestFields(range="bytes=" + ",".join(asked)), size)
    assume(found.parts)
    body = frame_body(found.status, found.parts, size, "application/gzip")
    length = sum(len(segment) if isinstance(segment, bytes) else segment.length for segment in body.segments)
    assert body.headers["Content-Length"] == str(length)
    assert ("Content-Range" in body.headers) == (found.status == 206 and len(found.parts) == 1)

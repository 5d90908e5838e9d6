"""The order of RFC 9110, section 13.2.2. docs/http.md holds the single rows, over the wire."""

from datetime import UTC, datetime
from typing import Any

import pytest

from exportd.http.plan import Plan, Representation, RequestFields, plan_response
from exportd.http.ranges import ByteRange

ETAG = '"e"'
MODIFIED = datetime(2025, 10, 24, 12, 0, 0, tzinfo=UTC)
EXACT, EARLIER = "Fri, 24 Oct 2025 12:00:00 GMT", "Fri, 24 Oct 2025 11:59:59 GMT"
RANGE = "bytes=5-9"


def plan(method: str = "GET", size: int = 1000, **fields: Any) -> Plan:
    return plan_response(method, RequestFields(**fields), Representation(size, ETAG, MODIFIED), 16)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        ({"range": RANGE}, 206),
        ({"range": "bytes=1000-"}, 416),
        # Step 1 before step 3, and instead of step 2.
        ({"if_match": '"x"', "if_none_match": ETAG}, 412),
        ({"if_match": ETAG, "if_unmodified_since": EARLIER}, 200),
        ({"if_match": '"x"', "if_unmodified_since": EXACT}, 412),
        # Step 2 before step 3.
        ({"if_unmodified_since": EARLIER, "if_none_match": ETAG}, 412),
        # Step 3 instead of step 4.
        ({"if_none_match": '"x"', "if_modified_since": EXACT}, 200),
        ({"if_none_match": ETAG, "if_modified_since": EARLIER}, 304),
        # Steps 1 to 4 before step 5.
        ({"if_none_match": ETAG, "range": RANGE}, 304),
        ({"if_none_match": ETAG, "range": "bytes=1000-"}, 304),
        ({"if_modified_since": EXACT, "range": RANGE}, 304),
        ({"if_match": '"x"', "range": RANGE}, 412),
        ({"if_range": '"x"', "range": "bytes=1000-"}, 200),
        ({"if_range": ETAG, "range": "bytes=1000-"}, 416),
    ],
)
def test_conditions_are_judged_in_order(fields: dict[str, Any], status: int) -> None:
    assert plan(**fields).status == status


@pytest.mark.parametrize(
    "fields", [{"range": RANGE}, {"range": "bytes=1000-"}, {"range": RANGE, "if_range": ETAG}]
)
def test_head_knows_no_range(fields: dict[str, Any]) -> None:
    assert plan("HEAD", **fields) == Plan(200, (ByteRange(0, 1000),))


def test_head_is_conditional() -> None:
    assert plan("HEAD", if_none_match=ETAG).status == 304
    assert plan("HEAD", if_match='"x"').status == 412


@pytest.mark.parametrize("value", ["bytes=0-0", "bytes=-1", "bytes=5-", "nonsense"])
def test_an_empty_package_has_no_range(value: str) -> None:
    assert plan(size=0, range=value) == Plan(200, (ByteRange(0, 0),))


def test_the_length_of_a_plan_is_that_of_its_parts() -> None:
    assert plan(range="bytes=0-9,20-29").body_length == 20
    assert plan().body_length == 1000
    assert plan(range="bytes=1000-").body_length == 0

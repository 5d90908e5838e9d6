from datetime import UTC, datetime, timedelta

import pytest

from exportd.http.conditions import (
    check_if_match,
    check_if_modified_since,
    check_if_none_match,
    check_if_range,
    check_if_unmodified_since,
    parse_http_date,
    strong_match,
    weak_match,
)

ETAG = '"e"'
MODIFIED = datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)


@pytest.mark.parametrize(
    ("one", "other", "strong", "weak"),
    [
        # RFC 9110, section 8.8.3.2, the table of examples.
        ('W/"1"', 'W/"1"', False, True),
        ('W/"1"', 'W/"2"', False, False),
        ('W/"1"', '"1"', False, True),
        ('"1"', '"1"', True, True),
    ],
)
def test_comparison(one: str, other: str, strong: bool, weak: bool) -> None:
    assert (strong_match(one, other), weak_match(one, other)) == (strong, weak)
    assert (strong_match(other, one), weak_match(other, one)) == (strong, weak)


@pytest.mark.parametrize(
    "value", ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]
)
def test_the_three_forms_of_a_date(value: str) -> None:
    # RFC 9110, section 5.6.7, its own examples.
    assert parse_http_date(value) == MODIFIED


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "garbage",
        "Sun, 06 Nov 1994 08:49:37",
        "Sun, 06 Nov 1994 08:49:37 UTC",
        "Sun, 06 Nov 1994 08:49:37 +0000",
        "Sun, 31 Feb 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 25:49:37 GMT",
        "1994-11-06T08:49:37Z",
        "784111777",
        "Sun, 06 Nov 1994 08:49:37 GMT, Sun, 06 Nov 1994 08:49:37 GMT",
        "Sun, \u0660\u0666 Nov 1994 08:49:37 GMT",
    ],
)
def test_invalid_dates(value: str | None) -> None:
    assert parse_http_date(value) is None


@pytest.mark.parametrize(
    ("value", "is_listed"),
    [
        ('"e"', True),
        (' "e"\t', True),
        ('"x","e"', True),
        ('"x" , , "e",', True),
        ('"x,y", "e"', True),
        ('"E"', False),
        ('"x"', False),
        ('"x,\\"e\\""', False),
        ("e", False),
        ("", False),
        ("'e'", False),
        ('"e', False),
        ('"e" "x"', False),
        ('"e", junk', False),
        ('*, "e"', False),
        ('w/"e"', False),
        ('W/ "e"', False),
    ],
)
def test_lists_of_tags(value: str, is_listed: bool) -> None:
    assert check_if_match(value, ETAG) is is_listed
    assert check_if_none_match(value, ETAG) is not is_listed


def test_a_star_stands_for_any_and_stands_alone() -> None:
    assert check_if_match("*", ETAG) is True
    assert check_if_none_match("*", ETAG) is False
    assert check_if_range("*", ETAG, MODIFIED) is False


def test_an_absent_field_says_nothing() -> None:
    assert check_if_match(None, ETAG) is None
    assert check_if_none_match(None, ETAG) is None
    assert check_if_range(None, ETAG, MODIFIED) is None
    assert check_if_modified_since(None, MODIFIED) is None
    assert check_if_unmodified_since(None, MODIFIED) is None


def test_a_malformed_date_says_nothing_either() -> None:
    assert check_if_modified_since("garbage", MODIFIED) is None
    assert check_if_unmodified_since("garbage", MODIFIED) is None
    assert check_if_range("garbage", ETAG, MODIFIED) is False


@pytest.mark.parametrize("seconds", [-1, 0, 1])
def test_both_sides_of_a_date(seconds: int) -> None:
    date = "Sun, 06 Nov 1994 08:49:37 GMT"
    modified = MODIFIED + timedelta(seconds=seconds)
    assert check_if_modified_since(date, modified) is (seconds > 0)
    assert check_if_unmodified_since(date, modified) is (seconds <= 0)
    assert check_if_range(date, ETAG, modified) is (seconds == 0)


def test_a_weak_tag_matches_if_none_match_only() -> None:
    assert check_if_none_match('W/"e"', ETAG) is False
    assert check_if_match('W/"e"', ETAG) is False
    assert check_if_range('W/"e"', ETAG, MODIFIED) is False

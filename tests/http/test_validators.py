from datetime import UTC, datetime, timedelta, timezone

import pytest

from exportd.http.validators import entity_tag, http_date, repr_digest, sample_tag, wants_digest

# The SHA-256 of the empty string.
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_entity_tag_is_strong_and_quoted() -> None:
    assert entity_tag(EMPTY) == f'"{EMPTY}"'


def test_sample_tag_changes_with_the_size_and_the_content() -> None:
    tags = {sample_tag(*parts) for parts in [(1, b"a"), (2, b"a"), (1, b"b")]}
    assert len(tags) == 3
    assert all(tag.startswith('"') and tag.endswith('"') for tag in tags)


def test_last_modified_is_rounded_down_and_in_gmt() -> None:
    moment = datetime(2025, 10, 24, 12, 0, 59, 999_999, tzinfo=UTC)
    assert http_date(moment) == "Fri, 24 Oct 2025 12:00:59 GMT"
    elsewhere = moment.astimezone(timezone(timedelta(hours=-7)))
    assert http_date(elsewhere) == "Fri, 24 Oct 2025 12:00:59 GMT"


def test_repr_digest_is_base64_of_the_bytes() -> None:
    assert repr_digest(EMPTY) == "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"


@pytest.mark.parametrize(
    ("field", "is_wanted"),
    [
        (None, True),
        ("sha-256=10", True),
        ("sha-256=1", True),
        ("sha-256=0", False),
        ("sha-512=10, sha-256=0", False),
        ("sha-512=10", True),
        ("sha-256=0;q=1", False),
        # RFC 8941, section 3.2: of a key that comes twice, the last value counts.
        ("sha-256=0, sha-256=5", True),
        ("sha-256", True),
        ("sha-256=", True),
        ("", True),
        (",,", True),
        ("sha-256=x", True),
    ],
)
def test_want_repr_digest(field: str | None, is_wanted: bool) -> None:
    assert wants_digest(field) is is_wanted

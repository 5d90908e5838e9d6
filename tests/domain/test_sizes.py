import pytest

from exportd.domain.sizes import SIZE_RANGES, format_size, size_range


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KB"),
        (1536, "1.5 KB"),
        (13107200, "12.5 MB"),
        (1024**2 - 1, "1.0 MB"),
        (1024**3 - 1, "1.0 GB"),
        (1024**3, "1.0 GB"),
        (250 * 1024**3, "250.0 GB"),
        (3 * 1024**4, "3.0 TB"),
        (2**63 - 1, "8.0 EB"),
        (2**73, "8192.0 EB"),
    ],
)
def test_size_for_people(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (0, "under_1MB"),
        (10**6 - 1, "under_1MB"),
        (10**6, "1MB_to_10MB"),
        (10**7 - 1, "1MB_to_10MB"),
        (10**7, "10MB_to_100MB"),
        (10**8 - 1, "10MB_to_100MB"),
        (10**8, "100MB_to_1GB"),
        (10**9 - 1, "100MB_to_1GB"),
        (10**9, "over_1GB"),
        (2**63 - 1, "over_1GB"),
    ],
)
def test_range_of_a_size(size_bytes: int, expected: str) -> None:
    assert size_range(size_bytes) == expected
    assert expected in SIZE_RANGES

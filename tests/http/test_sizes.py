import pytest

from exportd.http.sizes import format_size


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

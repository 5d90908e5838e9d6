from datetime import date
from email.message import Message
from urllib.parse import unquote

import pytest

from exportd.http.content_disposition import content_disposition

DAY = date(2025, 10, 24)


def filenames(tool_name: str) -> tuple[str, str | None]:
    """filename and the decoded filename* of the header, taken apart by the standard library."""
    value = content_disposition(tool_name, DAY)
    assert value.isascii()
    assert value.isprintable()
    message = Message()
    message["Content-Disposition"] = value.split("; filename*=")[0]
    plain = message.get_param("filename", header="Content-Disposition")
    assert isinstance(plain, str)
    extended = value.partition("; filename*=UTF-8''")[2]
    return plain, unquote(extended, errors="strict") if extended else None


def test_plain_name_is_lower_cased_and_hyphenated() -> None:
    value = content_disposition("Customer Form", DAY)
    assert value == 'attachment; filename="export-customer-form-2025-10-24.tar.gz"'


def test_accents_are_folded_and_kept_in_the_extended_name() -> None:
    value = content_disposition("Résumé", DAY)
    assert value == (
        'attachment; filename="export-resume-2025-10-24.tar.gz"; '
        "filename*=UTF-8''export-r%C3%A9sum%C3%A9-2025-10-24.tar.gz"
    )


@pytest.mark.parametrize(
    ("tool_name", "plain", "extended"),
    [
        ("你好", "export-package-2025-10-24.tar.gz", "export-你好-2025-10-24.tar.gz"),
        ("🚀", "export-package-2025-10-24.tar.gz", "export-🚀-2025-10-24.tar.gz"),
        ("", "export-package-2025-10-24.tar.gz", None),
        ("...", "export-package-2025-10-24.tar.gz", None),
        ("../../etc/passwd", "export-etc-passwd-2025-10-24.tar.gz", None),
        ("a/b\\c", "export-a-b-c-2025-10-24.tar.gz", None),
        ('say "hi"', "export-say-hi-2025-10-24.tar.gz", None),
        ("a\r\nSet-Cookie: x", "export-a-set-cookie-x-2025-10-24.tar.gz", None),
        ("a\x00\x1f\x7fb", "export-a-b-2025-10-24.tar.gz", None),
        ("a\u202eb\u2028c", "export-abc-2025-10-24.tar.gz", "export-a-b-c-2025-10-24.tar.gz"),
        ("v1.2_beta", "export-v1.2_beta-2025-10-24.tar.gz", None),
        ("100%;x=y", "export-100-x-y-2025-10-24.tar.gz", None),
    ],
)
def test_name_is_safe(tool_name: str, plain: str, extended: str | None) -> None:
    assert filenames(tool_name) == (plain, extended)


@pytest.mark.parametrize("tool_name", ["x" * 300, "é" * 300, "你" * 300, "🚀" * 300])
def test_long_name_is_cut_and_keeps_its_ending(tool_name: str) -> None:
    for name in filenames(tool_name):
        if name is not None:
            assert len(name.encode()) <= 255
            assert name.endswith("-2025-10-24.tar.gz")


def test_only_the_start_of_a_very_long_name_is_processed() -> None:
    # Each character costs time, and a user may choose the name.
    assert filenames(" " * 1_000_000 + "tool") == ("export-package-2025-10-24.tar.gz", None)

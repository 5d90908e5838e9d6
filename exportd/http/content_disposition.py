"""The file name of a download (RFC 6266, RFC 8187)."""

import functools
import re
import unicodedata
from datetime import date
from urllib.parse import quote

_FALLBACK = "package"
# Most file systems allow 255 bytes. The rest of the name takes about 25.
_MAX_TOOL_BYTES = 150
# The rest of a longer name is ignored, because each character costs time.
_MAX_TOOL_CHARACTERS = 1000
# RFC 8187's attr-char, without the characters that quote() always keeps.
_ATTR_CHARS = "!#$&+-.^_`|~"


def package_filename(tool_name: str, day: date) -> str:
    """``export-{tool}-{YYYY-MM-DD}.tar.gz``, the tool's name lower-cased, safe as one path component."""
    tool = _slug(tool_name[:_MAX_TOOL_CHARACTERS]) or _FALLBACK
    return f"export-{tool}-{day.isoformat()}.tar.gz"


def content_disposition(tool_name: str, day: date) -> str:
    """The value of Content-Disposition for a package.

    ``filename`` is plain ASCII. If that changes the name, ``filename*`` follows with the real name.
    """
    return _content_disposition(tool_name[:_MAX_TOOL_CHARACTERS], day)


@functools.lru_cache(maxsize=4096)
def _content_disposition(tool_name: str, day: date) -> str:
    name = package_filename(tool_name, day)
    ascii_tool = _slug(unicodedata.normalize("NFKD", tool_name).encode("ascii", "ignore").decode())
    ascii_name = f"export-{ascii_tool or _FALLBACK}-{day.isoformat()}.tar.gz"
    value = f'attachment; filename="{ascii_name}"'
    if name != ascii_name:
        value += f"; filename*=UTF-8''{quote(name, safe=_ATTR_CHARS)}"
    return value


def _slug(tool_name: str) -> str:
    """Keeps letters, digits and symbols of any script, dots and underscores. Replaces other runs by a
    hyphen."""
    text = unicodedata.normalize("NFC", tool_name).lower()
    words = re.sub(r"-+", "-", "".join(char if _is_kept(char) else "-" for char in text))
    words = re.sub(r"\.{2,}", ".", words)
    cut = words.encode("utf-8", "ignore")[:_MAX_TOOL_BYTES].decode("utf-8", "ignore")
    return cut.strip("-.")


def _is_kept(char: str) -> bool:
    if char.isascii():
        return char.isalnum() or char in "._"
    return unicodedata.category(char)[0] in "LMNS"

"""Sizes for people."""

_UNITS = ("KB", "MB", "GB", "TB", "PB", "EB")


def format_size(size_bytes: int) -> str:
    """``12.5 MB``: 1024-based, one decimal; below 1 KB in whole bytes."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    value, unit = size_bytes / 1024, 0
    # 1023.95 would be shown as 1024.0 of its unit.
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}"

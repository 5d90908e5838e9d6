"""Sizes for people, and the ranges of sizes in statistics and metrics."""

from bisect import bisect_right

SIZE_RANGES = ("under_1MB", "1MB_to_10MB", "10MB_to_100MB", "100MB_to_1GB", "over_1GB")

# Of every range but the first, in bytes.
LOWER_BOUNDS = (10**6, 10**7, 10**8, 10**9)
_UNITS = ("KB", "MB", "GB", "TB", "PB", "EB")


def format_size(size_bytes: int) -> str:
    """``12.5 MB``: 1024-based, one decimal; below 1 KB in whole bytes."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    value, unit = size_bytes / 1024, 0
    # 1023.95 would be shown as 1024.0.
    while value >= 1023.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}"


def size_range(size_bytes: int) -> str:
    """Returns one of ``SIZE_RANGES``, in decimal units. A bound belongs to the range above it."""
    return SIZE_RANGES[bisect_right(LOWER_BOUNDS, size_bytes)]

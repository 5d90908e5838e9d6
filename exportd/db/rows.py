"""Rows as dataclasses, and sums that fit into them."""

from dataclasses import fields
from typing import Any, TypeVar

Read = TypeVar("Read")

MAX_BIGINT = 2**63 - 1


def sum_of(column: str) -> str:
    """SQL: the sum of a column as bigint. A larger sum is the largest bigint."""
    return f"least(coalesce(sum({column}), 0), {MAX_BIGINT})::bigint"


def read(kind: type[Read], row: Any, **given: object) -> Read:
    """Makes a dataclass from the row's columns that are named as its fields, and the given fields."""
    names = [field.name for field in fields(kind) if field.name not in given]  # type: ignore[arg-type]
    return kind(**{name: getattr(row, name) for name in names}, **given)

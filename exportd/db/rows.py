"""Rows as dataclasses."""

from dataclasses import fields
from typing import Any, TypeVar

Read = TypeVar("Read")


def read(kind: type[Read], row: Any, **given: object) -> Read:
    """Makes a dataclass from the row's columns that are named as its fields, and the given fields."""
    names = [field.name for field in fields(kind) if field.name not in given]  # type: ignore[arg-type]
    return kind(**{name: getattr(row, name) for name in names}, **given)

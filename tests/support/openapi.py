"""What an OpenAPI document says of a request's answer, and whether the answer keeps to it."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from openapi_schema_validator import OAS30Validator, oas30_format_checker

# Of the message or the connection, and so of no operation.
_OF_THE_MESSAGE = {"content-type", "date", "connection", "transfer-encoding"}


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method in upper case, path and description of each."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def find_operation(document: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    """The one operation that a request is for."""
    (found,) = (
        operation
        for its_method, template, operation in operations(document)
        if its_method == method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path)
    )
    return found


def validate(document: dict[str, Any], schema: dict[str, Any], value: object) -> None:
    """Raises what is wrong with a value."""
    rooted = {**schema, "components": document["components"]}
    OAS30Validator(rooted, format_checker=oas30_format_checker).validate(value)


def check_answer(
    document: dict[str, Any], method: str, path: str, status: int, headers: Mapping[str, str], body: bytes
) -> None:
    """Asserts that a request may be answered like that."""
    responses = find_operation(document, method, path)["responses"]
    assert str(status) in responses, f"{status} is not documented"
    described = responses[str(status)]
    undocumented = {name.lower() for name in headers} - {name.lower() for name in described["headers"]}
    assert undocumented <= _OF_THE_MESSAGE, undocumented
    if not body:
        assert method == "HEAD" or "content" not in described
        return
    media_type = headers["Content-Type"].partition(";")[0]
    assert media_type in described["content"]
    if media_type == "application/json":
        validate(document, described["content"][media_type]["schema"], json.loads(body))

"""The OpenAPI document, made from the descriptions that handlers are decorated with.

aiohttp-apispec keeps each description with its handler and joins it to the routes. This module adds what
operations have in common: errors and their examples, common header fields, curl commands, and HEAD beside
GET. ``operations.py`` describes each operation.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp_apispec
import orjson
from aiohttp import web
from aiohttp_apispec import AiohttpApiSpec, docs
from apispec import APISpec
from apispec.ext.marshmallow.field_converter import FieldConverterMixin

from exportd import __version__
from exportd.web.edge.errors import (
    ApiError,
    BadRequest,
    DatabaseIsUnavailable,
    ExpectationFailed,
    HeadersTooLarge,
    HttpVersionNotSupported,
    InternalError,
    MethodNotAllowed,
    RouteNotFound,
    error_response,
)
from exportd.web.openapi.operations import (
    COMMON_HEADERS,
    DESCRIPTION,
    HEADERS,
    JSON,
    SECURITY_SCHEMES,
    TAGS,
    Answer,
    Operation,
)
from exportd.web.openapi.schemas import JobState, error_shape

Handler = TypeVar("Handler", bound=Callable[..., Any])

_REQUEST_ID = "4aaa15a5" * 4
# A constant, so that the document's ETag is the same in every process.
_TIMESTAMP = "2026-12-24T08:00:00.000Z"
# The files of Swagger UI that the library contains.
SWAGGER_FOLDER = Path(aiohttp_apispec.__file__).parent / "static"
_CURL = "x-curl"
_HTML = "text/html"
# The middleware makes pages of errors that handlers raise, but not of these.
_NEVER_A_PAGE = {
    error.code
    for error in (
        BadRequest,
        HeadersTooLarge,
        HttpVersionNotSupported,
        ExpectationFailed,
        InternalError,
        DatabaseIsUnavailable,
    )
}
_SHAPES = {
    error: error_shape(error.__name__, error.code, error().message, error.example_extra)
    for error in ApiError.__subclasses__()
}
# HEAD ignores ranges.
_OF_GET_ONLY = {"206", "416"}
_OF_RANGES = {"Range", "If-Range"}
# Responses of every other address and of every other method.
_BEYOND_THE_ROUTES = (RouteNotFound, MethodNotAllowed)


def documented(operation: Operation) -> Callable[[Handler], Handler]:
    """Decorates a handler with its description."""

    def decorate(handler: Handler) -> Handler:
        described: Handler = docs(
            operationId=handler.__name__,
            tags=[operation.tag],
            summary=operation.summary,
            description=operation.description,
            parameters=list(operation.parameters),
            responses={
                **{str(status): _describe_answer(answer) for status, answer in operation.answers.items()},
                **_describe_errors(operation.errors),
            },
            security=[{name: []} for name in operation.security],
            **{_CURL: operation.curl, "x-try-it-out": operation.may_be_tried},
        )(handler)
        return described

    return decorate


def describe_api(router: web.UrlDispatcher) -> dict[str, Any]:
    """Returns the OpenAPI document of the routes whose handlers are documented."""
    document = _Document()
    # GET comes before HEAD, whose description is derived from it.
    for route in sorted(router.routes(), key=lambda route: route.method == "HEAD"):
        document.add(route)
    described: dict[str, Any] = document.swagger_dict()
    return described


class _Document(AiohttpApiSpec):  # type: ignore[misc]  # it has no types
    """Turns aiohttp-apispec's descriptions into OpenAPI 3.0. The library writes 2.0, which has neither
    several examples for a status nor bearer tokens."""

    def __init__(self) -> None:
        super().__init__(url=None, title="", version="")
        self.spec = APISpec(
            title="exportd",
            version=__version__,
            openapi_version="3.0.3",
            plugins=[self.plugin],
            info={"description": DESCRIPTION, "license": {"name": "MIT"}},
            tags=TAGS,
        )
        self.plugin.converter.add_attribute_function(_null_or_nested)
        components = self.spec.components
        for name, scheme in SECURITY_SCHEMES.items():
            components.security_scheme(name, scheme)
        for name, (says, example) in HEADERS.items():
            schema = {"type": "integer" if isinstance(example, int) else "string"}
            components.header(name, {"description": says, "schema": schema, "example": example})
        components.schema("JobState", schema=JobState)
        for error in _BEYOND_THE_ROUTES:
            components.response(error.code, _describe_errors([error])[str(error.status.value)])

    def add(self, route: web.AbstractRoute) -> None:
        """Adds a route, if its handler is documented."""
        self._register_route(route, route.method.lower(), route.handler)

    def _update_paths(self, data: dict[str, Any], method: str, url_path: str) -> None:
        # The library empties its argument, and one handler serves GET and HEAD.
        described = copy.deepcopy(data)
        del described["produces"]  # of OpenAPI 2.0
        curl = described.pop(_CURL)
        if method == "get":
            _add_pages(described)
        if method == "head":
            curl = "-I"
            described["operationId"] += "_head"
            described["summary"] += ": the header"
            _remove_bodies(described)
        token = ' -H "Authorization: Bearer $TOKEN"' if described["security"] else ""
        path = url_path.replace("{job_id}", "$JOB_ID")
        described["description"] += f'\n\n```sh\ncurl {curl}{token} "$EXPORTD{path}"\n```'
        super()._update_paths(described, method, url_path)


def _describe_answer(answer: Answer) -> dict[str, Any]:
    described = {"description": answer.says, "headers": _headers(answer.headers)}
    return described | ({"content": dict(answer.content)} if answer.content else {})


def _describe_errors(errors: Iterable[type[ApiError]]) -> dict[str, Any]:
    """Returns a response for each status, with an example of each error."""
    by_status: dict[str, list[type[ApiError]]] = {}
    for error in sorted(errors, key=lambda error: error.status):
        by_status.setdefault(str(error.status.value), []).append(error)
    return {status: _describe_status(rows) for status, rows in by_status.items()}


def _describe_status(errors: Sequence[type[ApiError]]) -> dict[str, Any]:
    names = ["Content-Length"]
    shapes, examples, words = [], {}, []
    for kind in errors:
        error = kind(extra=dict(kind.example_extra), headers=dict(kind.example_headers))
        response = error_response(error, _REQUEST_ID)
        assert isinstance(response.body, bytes)
        names += map(str, response.headers)
        shapes.append(_SHAPES[kind])
        body = orjson.loads(response.body) | {"timestamp": _TIMESTAMP}
        examples[kind.code] = {"summary": error.message, "value": body}
        words.append(f"`{kind.code}`: {error.message}")
    schema = shapes[0] if len(shapes) == 1 else {"oneOf": shapes}
    return {
        "description": "  \n".join(words),
        "headers": _headers(name for name in names if name != "Content-Type"),
        "content": {JSON: {"schema": schema, "examples": examples}},
    }


def _headers(names: Iterable[str]) -> dict[str, str]:
    """Returns references to components, by name."""
    return {name: name for name in (*names, *COMMON_HEADERS)}


def _add_pages(operation: dict[str, Any]) -> None:
    """Adds the error pages that browsers get."""
    for response in operation["responses"].values():
        rows = response.get("content", {}).get(JSON, {}).get("examples", {})
        if rows.keys() - _NEVER_A_PAGE:
            response["content"][_HTML] = {"schema": {"type": "string"}}


def _remove_bodies(operation: dict[str, Any]) -> None:
    """Removes what HEAD does not have: ranges and bodies."""
    operation["parameters"] = [item for item in operation["parameters"] if item["name"] not in _OF_RANGES]
    for status in _OF_GET_ONLY & operation["responses"].keys():
        del operation["responses"][status]
    for response in operation["responses"].values():
        response.pop("content", None)


def _null_or_nested(
    _: FieldConverterMixin, __: object, *, ret: dict[str, Any], **___: object
) -> dict[str, Any]:
    """Describes a nested object that may be null; apispec alone allows any object there."""
    if "anyOf" in ret:
        return {"anyOf": [ret["anyOf"][0], {"type": "object", "nullable": True, "enum": [None]}]}
    return {}

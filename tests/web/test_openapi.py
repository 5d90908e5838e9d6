"""The OpenAPI document: valid, complete, and true of what the application really answers."""

import asyncio
import json
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openapi_spec_validator
import orjson
import pytest
from aiohttp.test_utils import TestClient
from jsonschema.exceptions import ValidationError

from exportd import __version__
from exportd.auth.tokens import KeysUnavailable, Tokens
from exportd.db.pool import Database, DatabaseUnavailable
from exportd.web.edge.errors import ApiError, error_response
from exportd.web.openapi.document import describe_api
from exportd.web.services import SERVICES
from tests.support.application import ADMIN, ANN, BASE, EVE, Jobs, Start, ask_once, noise, until_idle
from tests.support.openapi import check_answer, find_operation, operations, validate
from tests.support.postgres import query

Client = TestClient[Any, Any]
Document = dict[str, Any]

API = Path(__file__).parent.parent.parent / "exportd" / "web"
TABLE = ApiError.__subclasses__()
# Not the API: the document itself, and the page that shows it.
NOT_DOCUMENTED = {"/", "/page/{name}", "/api-docs", "/api-docs/{name}"}
# Fields that every request may have, and OpenAPI has its own words for, or none.
GENERAL_FIELDS = {
    "Accept", "Access-Control-Request-Method", "Authorization", "Expect", "Host", "Origin",
    "Transfer-Encoding", "User-Agent",
}  # fmt: skip
LONG_AGO = datetime.now(UTC) - timedelta(days=3)


async def read_document(client: Client) -> Document:
    async with client.get("/api-docs/swagger.json") as response:
        assert (response.status, response.content_type) == (200, "application/json")
        document: Document = await response.json()
        return document


@pytest.fixture(scope="module")
def document(server_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Document:
    async def ask(client: Client, _: Jobs) -> str:
        return json.dumps(await read_document(client))

    found: Document = json.loads(ask_once(server_dsn, tmp_path_factory.mktemp("packages"), ask))
    return found


def test_the_document_is_valid(document: Document) -> None:
    openapi_spec_validator.validate(document)
    assert (document["openapi"], document["info"]["version"]) == ("3.0.3", __version__)


async def test_every_route_is_documented_and_nothing_else(start: Start) -> None:
    client = await start()
    assert client.app is not None
    routes = {(route.method, route.resource.canonical) for route in client.app.router.routes()}
    expected = {(method, path) for method, path in routes if path not in NOT_DOCUMENTED}
    document = await read_document(client)
    assert {(method, path) for method, path, _ in operations(document)} == expected
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)


async def test_the_document_is_the_same_in_every_process(start: Start) -> None:
    client = await start()
    assert client.app is not None
    first = describe_api(client.app.router)
    await asyncio.sleep(0.002)
    assert describe_api(client.app.router) == first


def error_examples(document: Document) -> dict[str, list[tuple[str, Any, Any]]]:
    """Each code's statuses, responses and example bodies, wherever they are."""
    found: dict[str, list[tuple[str, Any, Any]]] = {}
    beyond = document["components"]["responses"]
    everywhere = [
        (status, response)
        for _, _, operation in operations(document)
        for status, response in operation["responses"].items()
    ] + [("404", beyond["NOT_FOUND"]), ("405", beyond["METHOD_NOT_ALLOWED"])]
    for status, response in everywhere:
        content = response.get("content", {}).get("application/json", {})
        for code, example in content.get("examples", {}).items():
            found.setdefault(code, []).append((status, response, example["value"]))
    return found


def test_every_error_of_the_table_has_its_example(document: Document) -> None:
    found = error_examples(document)
    assert found.keys() == {error.code for error in TABLE}
    for kind in TABLE:
        error = kind(extra=dict(kind.example_extra), headers=dict(kind.example_headers))
        sent = error_response(error, "r")
        assert isinstance(sent.body, bytes)
        expected = orjson.loads(sent.body)
        for status, response, example in found[kind.code]:
            assert int(status) == kind.status
            assert example == expected | {name: example[name] for name in ("timestamp", "requestId")}
            assert set(sent.headers) - {"Content-Type"} <= set(response["headers"])
            validate(document, response["content"]["application/json"]["schema"], example)
            assert f"`{kind.code}`: {error.message}" in response["description"]


def test_other_examples_keep_to_their_schemas_too(document: Document) -> None:
    schemas = document["components"]["schemas"]
    examined = 0
    for schema in schemas.values():
        for described in schema["properties"].values():
            if "example" in described:
                validate(document, described, described["example"])
                examined += 1
    for _, _, operation in operations(document):
        for parameter in operation["parameters"]:
            if "example" in parameter:
                validate(document, parameter["schema"], parameter["example"])
                examined += 1
    assert examined > 100


def test_every_schema_rejects_additional_fields(document: Document) -> None:
    for name, schema in document["components"]["schemas"].items():
        assert schema["additionalProperties"] is False, name
        assert set(schema["required"]) == set(schema["properties"]), name
    job = {name: described["example"] for name, described in schema_of(document, "Job").items()}
    package = {name: described["example"] for name, described in schema_of(document, "Package").items()}
    reference = {"$ref": "#/components/schemas/Job"}
    for good in (None, package):
        validate(document, reference, job | {"package": good})
    for bad in ({}, package | {"more": 1}, "text"):
        with pytest.raises(ValidationError):
            validate(document, reference, job | {"package": bad})


def schema_of(document: Document, name: str) -> dict[str, Any]:
    """Its properties but ``package``, which refers to another schema."""
    properties = document["components"]["schemas"][name]["properties"]
    return {name: described for name, described in properties.items() if name != "package"}


def names_read(pattern: str) -> set[str]:
    """What the modules of the API read, by a pattern over their text."""
    return {name for path in API.rglob("*.py") for name in re.findall(pattern, path.read_text())}


def test_every_parameter_that_a_handler_reads_is_documented(document: Document) -> None:
    documented = {
        (parameter["in"], parameter["name"])
        for _, _, operation in operations(document)
        for parameter in operation["parameters"]
    }
    schemes = document["components"]["securitySchemes"].values()
    in_query = {name for place, name in documented if place == "query"}
    in_query |= {scheme["name"] for scheme in schemes if scheme["type"] == "apiKey"}
    assert in_query == names_read(r'request\.query(?:\.get|\.getall)?[(\[]"([^"]+)"')
    fields = names_read(r'request\.headers(?:\.get|\.getall)?[(\[]"([^"]+)"')
    fields |= names_read(r'_field\(request, "([^"]+)"') | names_read(r'"([\w-]+)" in request\.headers')
    assert {name for place, name in documented if place == "header"} == fields - GENERAL_FIELDS


def test_every_operation_has_a_curl_line_and_says_who_may(document: Document) -> None:
    for method, path, operation in operations(document):
        (line,) = re.findall(r"```sh\n(curl .*)\n```", operation["description"])
        assert line.endswith(f'"$EXPORTD{path.replace("{job_id}", "$JOB_ID")}"')
        assert ("$TOKEN" in line) == path.startswith(BASE) == bool(operation["security"])
        assert {"GET": "curl -", "HEAD": "curl -I ", "POST": "-X POST", "DELETE": "-X DELETE"}[method] in line
        assert operation["x-try-it-out"] == (not path.endswith(("/download", "/events")))
    tickets = [
        (method, path)
        for method, path, operation in operations(document)
        if {"ticket": []} in operation["security"]
    ]
    assert tickets == [(method, f"{BASE}/{{job_id}}/download") for method in ("GET", "HEAD")]


# What is answered, beside what is documented.

RANGE = {**ANN, "Range": "bytes=0-9"}
PAGE = {**ANN, "Accept": "text/html"}
# Method, what follows the base path or a whole path, fields, status, code of the error.
REQUESTS: list[tuple[str, str, Mapping[str, str], int, str | None]] = [
    ("GET", "", ANN, 200, None),
    ("HEAD", "", ANN, 200, None),
    ("GET", "?limit=1&status=completed", ADMIN, 200, None),
    ("GET", "?limit=0", ANN, 400, "INVALID_PARAMETER"),
    ("GET", "?limit=0", PAGE, 400, None),
    ("HEAD", "?status=x", ANN, 400, None),
    ("GET", "", {}, 401, "UNAUTHENTICATED"),
    ("GET", "", {"Authorization": "Bearer x"}, 401, "UNAUTHENTICATED"),
    ("GET", "", {"Accept": "text/html"}, 401, None),
    ("GET", "/{ready}", ANN, 200, None),
    ("HEAD", "/{ready}", ANN, 200, None),
    ("GET", "/{pending}", ANN, 200, None),
    ("GET", "/{expired}", ANN, 200, None),
    ("GET", "/x", ANN, 400, "INVALID_JOB_ID"),
    ("GET", "/{none}", ANN, 404, "JOB_NOT_FOUND"),
    ("GET", "/{ready}", EVE, 403, "DOWNLOAD_UNAUTHORIZED"),
    ("GET", "/{ready}", {**EVE, "Accept": "text/html"}, 403, None),
    ("GET", "/{ready}/download", ANN, 200, None),
    ("HEAD", "/{ready}/download", ANN, 200, None),
    ("GET", "/{ready}/download", RANGE, 206, None),
    ("HEAD", "/{ready}/download", RANGE, 200, None),
    ("GET", "/{ready}/download", {**ANN, "Range": "bytes=0-9,20-29"}, 206, None),
    ("GET", "/{ready}/download", {**ANN, "If-None-Match": "*"}, 304, None),
    ("HEAD", "/{ready}/download", {**ANN, "If-None-Match": "*"}, 304, None),
    ("GET", "/{ready}/download", {**ANN, "If-Match": '"x"'}, 412, "PRECONDITION_FAILED"),
    ("HEAD", "/{ready}/download", {**ANN, "If-Match": '"x"'}, 412, None),
    ("GET", "/{ready}/download", {**ANN, "Range": "bytes=999999-"}, 416, "RANGE_NOT_SATISFIABLE"),
    ("GET", "/{ready}/download", {}, 401, "UNAUTHENTICATED"),
    ("HEAD", "/{ready}/download", {}, 401, None),
    ("GET", "/{ready}/download", EVE, 403, "DOWNLOAD_UNAUTHORIZED"),
    ("GET", "/{none}/download", ANN, 404, "JOB_NOT_FOUND"),
    ("GET", "/{pending}/download", ANN, 404, "PACKAGE_NOT_READY"),
    ("GET", "/{pending}/download", PAGE, 404, None),
    ("GET", "/{lost}/download", ANN, 404, "FILE_NOT_FOUND"),
    ("GET", "/{expired}/download", ANN, 410, "PACKAGE_EXPIRED"),
    ("GET", "/{deleted}/download", ANN, 410, "PACKAGE_EXPIRED"),
    ("GET", "/{ready}/download?ticket=x", {}, 410, "LINK_EXPIRED"),
    ("GET", "/{ready}/download?ticket=x", {"Accept": "text/html"}, 410, None),
    ("GET", "/{suspect}/download", ANN, 500, "STORAGE_ERROR"),
    ("GET", "/{suspect}/download", PAGE, 500, None),
    ("GET", "/{undigested}/download", ANN, 200, None),
    ("GET", "/{ready}/download-stats", ANN, 200, None),
    ("HEAD", "/{ready}/download-stats", ANN, 200, None),
    ("GET", "/{pending}/download-stats", ANN, 200, None),
    ("GET", "/{none}/download-stats", ANN, 404, "JOB_NOT_FOUND"),
    ("POST", "/{ready}/download-link", ANN, 201, None),
    ("POST", "/{pending}/download-link", ANN, 404, "PACKAGE_NOT_READY"),
    ("POST", "/{lost}/download-link", ANN, 404, "FILE_NOT_FOUND"),
    ("POST", "/{expired}/download-link", ANN, 410, "PACKAGE_EXPIRED"),
    ("POST", "/{suspect}/download-link", ANN, 500, "STORAGE_ERROR"),
    ("POST", "/{ready}/download-link", {}, 401, "UNAUTHENTICATED"),
    ("DELETE", "/{ready}/download-link", ANN, 204, None),
    ("DELETE", "/{none}/download-link", ANN, 404, "JOB_NOT_FOUND"),
    ("DELETE", "/{ready}/download-link", EVE, 403, "DOWNLOAD_UNAUTHORIZED"),
    ("POST", "/{ready}/re-export", ANN, 409, "PACKAGE_AVAILABLE"),
    ("POST", "/{pending}/re-export", ANN, 409, "EXPORT_IN_PROGRESS"),
    ("POST", "/{expired}/re-export", ANN, 202, None),
    ("GET", "/{expired}", ADMIN, 200, None),
    ("GET", "/{pending}/events", {}, 401, "UNAUTHENTICATED"),
    ("GET", "/{none}/events", ANN, 404, "JOB_NOT_FOUND"),
    ("GET", "", {**ANN, "Expect": "x"}, 417, "EXPECTATION_FAILED"),
    ("DELETE", "/{ready}/download-link", {**ANN, "Expect": "x"}, 417, "EXPECTATION_FAILED"),
    ("GET", "/healthz", {}, 200, None),
    ("HEAD", "/healthz", {}, 200, None),
    ("GET", "/healthz", {"Accept": "text/html"}, 200, None),
    ("GET", "/healthz", {"Expect": "x"}, 417, "EXPECTATION_FAILED"),
    ("GET", "/readyz", {}, 200, None),
    ("HEAD", "/readyz", {}, 200, None),
    ("GET", "/metrics", {}, 200, None),
    ("HEAD", "/metrics", {}, 200, None),
]


PROBES = ("/healthz", "/readyz", "/metrics")


async def check(
    client: Client, document: Document, method: str, path: str, fields: Mapping[str, str], expected: int
) -> str | None:
    """Sends a request, holds the answer against the document, and gives the error's code."""
    async with client.request(method, path, headers=fields) as response:
        body = await response.read()
        try:
            assert response.status == expected, body
            check_answer(document, method, response.url.path, response.status, response.headers, body)
        except (AssertionError, ValidationError) as error:
            raise AssertionError(f"{method} {path} {fields}: {error}") from error
        is_error = response.content_type == "application/json" and body and response.status >= 400
        return json.loads(body).get("code") if is_error else None


def add_jobs(jobs: Jobs) -> dict[str, str]:
    """Ids of jobs in every state."""
    lost = jobs.add()
    lost.file.unlink()
    nothing = {"package_path": None, "completed_at": None, "package_expires_at": None}
    return {
        "ready": jobs.add(noise(1000)).job_id,
        "undigested": jobs.add(package_sha256=None, package_expires_at=None).job_id,
        "pending": jobs.add(status="pending", **nothing).job_id,
        "expired": jobs.add(package_expires_at=LONG_AGO).job_id,
        "deleted": jobs.add(package_path=None).job_id,
        "suspect": jobs.add(package_suspect_since=LONG_AGO).job_id,
        "lost": lost.job_id,
        "none": str(uuid.uuid4()),
    }


async def test_every_answer_is_documented(start: Start, jobs: Jobs, document: Document) -> None:
    client = await start()
    ids = add_jobs(jobs)
    seen = set()
    for method, template, fields, status, code in REQUESTS:
        path = (template if template.startswith(PROBES) else BASE + template).format_map(ids)
        assert await check(client, document, method, path, fields, status) == code
        operation = find_operation(document, method, path.partition("?")[0])
        seen.add((operation["operationId"], str(status)))
    good = {
        (operation["operationId"], status)
        for _, _, operation in operations(document)
        for status in operation["responses"]
        if status < "400"
    }
    # The stream has a test of its own.
    assert good - seen == {("job_events", "200")}


async def test_an_event_is_the_documented_state(start: Start, jobs: Jobs, document: Document) -> None:
    client = await start()
    path = f"{BASE}/{jobs.add().job_id}/events"
    async with client.get(path, headers=ANN) as response:
        line = b""
        while not line.startswith(b"data: "):
            line = await response.content.readline()
        check_answer(document, "GET", path, response.status, response.headers, line)
    state = json.loads(line.removeprefix(b"data: "))
    # A download under way is told only later.
    state["downloads"] = [
        {name: item["example"] for name, item in schema_of(document, "RunningDownload").items()}
    ]
    validate(document, {"$ref": "#/components/schemas/JobState"}, state)


async def test_statistics_of_every_kind_are_documented(start: Start, jobs: Jobs, document: Document) -> None:
    client = await start()
    package = jobs.add(noise(2000))
    for fields in ({}, {"Range": "bytes=0-9"}, {"Range": "bytes=0-9,20-29"}):
        async with client.get(package.url, headers=ANN | fields) as response:
            await response.read()
    await until_idle(client)
    query(
        jobs.dsn,
        "UPDATE download_events SET outcome = 'aborted', method = NULL WHERE bytes_sent = 20",
    )
    assert await check(client, document, "GET", package.stats_url, ANN, 200) is None
    async with client.get(package.stats_url, headers=ANN) as response:
        statistics = await response.json()
        assert all(statistics[name] for name in ("bySize", "failures", "recentEvents"))


async def test_responses_of_limits_are_documented(start: Start, jobs: Jobs, document: Document) -> None:
    package = jobs.add()
    page = {**ANN, "Accept": "text/html"}
    for limit in ("requests_per_minute_per_address", "requests_per_minute_per_user"):
        client = await start(limits={limit: 1})
        await check(client, document, "GET", BASE, ANN, 200)
        for method, path in (("GET", BASE), ("GET", package.url), ("POST", f"{package.url}-link")):
            assert await check(client, document, method, path, ANN, 429) == "RATE_LIMITED"
        assert await check(client, document, "GET", package.url, page, 429) is None
    client = await start(limits={"bytes_per_user_per_day": 1})
    await check(client, document, "GET", package.url, ANN, 200)
    await until_idle(client)
    for method, path in (("GET", package.url), ("POST", f"{package.url}-link")):
        assert await check(client, document, method, path, ANN, 429) == "QUOTA_EXCEEDED"


async def test_responses_of_the_edge_are_documented(start: Start, jobs: Jobs, document: Document) -> None:
    client = await start(server={"allowed_hosts": ["127.0.0.1"], "cors_origins": ["https://app.example.com"]})
    package = jobs.add()
    for path in (BASE, package.url, package.stats_url):
        wrong = {**ANN, "Host": "elsewhere"}
        assert await check(client, document, "GET", path, wrong, 421) == "MISDIRECTED_REQUEST"
        assert await check(client, document, "GET", path, wrong | {"Accept": "text/html"}, 421) is None
        assert await check(client, document, "HEAD", path, wrong | {"Host": "["}, 400) is None
        page = {**ANN, "Origin": "https://app.example.com"}
        assert await check(client, document, "GET", path, page, 200) is None
    assert client.app is not None
    client.app[SERVICES].lifecycle.is_draining = True
    assert await check(client, document, "GET", package.url, ANN, 503) == "SHUTTING_DOWN"
    assert await check(client, document, "GET", "/readyz", {}, 503) is None
    assert await check(client, document, "GET", "/healthz", {}, 200) is None


@pytest.mark.fresh_database
async def test_responses_during_an_outage_are_documented(
    start: Start, jobs: Jobs, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start()
    package = jobs.add()
    paths = [
        ("GET", BASE),
        ("GET", package.url),
        ("DELETE", f"{package.url}-link"),
        ("GET", package.stats_url),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(Database, "fetch_all", raising(DatabaseUnavailable("away")))
        patched.setattr(Database, "fetch_one", raising(DatabaseUnavailable("away")))
        for method, path in paths:
            assert await check(client, document, method, path, ANN, 503) == "DATABASE_UNAVAILABLE"
        assert await check(client, document, "GET", "/readyz", {}, 503) is None
    with monkeypatch.context() as patched:
        patched.setattr(Tokens, "verify", raising(KeysUnavailable("away")))
        for method, path in paths:
            assert await check(client, document, method, path, ANN, 503) == "IDENTITY_PROVIDER_UNAVAILABLE"
    with monkeypatch.context() as patched:
        patched.setattr(Tokens, "verify", raising(RuntimeError("a defect")))
        for method, path in paths:
            assert await check(client, document, method, path, ANN, 500) == "INTERNAL_ERROR"
    query(jobs.dsn, "ALTER TABLE export_jobs ADD tenant text")
    query(jobs.dsn, "ALTER TABLE export_jobs ADD CHECK (tenant IS NOT NULL) NOT VALID")
    again = f"{BASE}/{jobs.add(package_path=None, tenant='x').job_id}/re-export"
    assert await check(client, document, "POST", again, ANN, 501) == "RE_EXPORT_UNSUPPORTED"


def raising(error: Exception) -> Any:
    async def fail(*_: object, **__: object) -> None:
        raise error

    return fail


async def test_the_document_follows_the_base_path(start: Start) -> None:
    client = await start(server={"base_path": "/a/b"})
    document = await read_document(client)
    assert "/a/b/export-jobs/{job_id}/download" in document["paths"]
    operation = document["paths"]["/a/b/export-jobs/{job_id}/download"]["get"]
    assert '"$EXPORTD/a/b/export-jobs/$JOB_ID/download"' in operation["description"]


# How it is served.


async def test_the_page_and_all_it_is_made_of_are_served_to_anybody(start: Start) -> None:
    client = await start()
    async with client.get("/api-docs", headers={"Accept": "text/html"}) as response:
        assert (response.status, response.content_type) == (200, "text/html")
        policy = response.headers["Content-Security-Policy"]
        page = await response.text()
    assert "'unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'self'")
    assert not re.search(r"<style|<script>|style=|http", page)
    names = re.findall(r'(?:src|href)="api-docs/([^"]+)"', page)
    assert len(names) == 5
    for name in [*names, "swagger.json"]:
        async with client.get(f"/api-docs/{name}") as response:
            assert response.status == 200, name
            body = await response.read()
            tag = response.headers["ETag"]
            assert response.headers["Cache-Control"] == "no-cache"
        async with client.head(f"/api-docs/{name}") as response:
            assert response.status == 200
            assert response.headers["Content-Length"] == str(len(body))
        for known in (tag, f'"x", W/{tag}', "*"):
            async with client.get(f"/api-docs/{name}", headers={"If-None-Match": known}) as response:
                assert (response.status, response.headers["ETag"]) == (304, tag)
        async with client.get(f"/api-docs/{name}", headers={"If-None-Match": '"x"'}) as response:
            assert response.status == 200


@pytest.mark.parametrize(
    "name", ["nothing", "swagger-ui.js", "..%2Fapp.py", "%2Fetc%2Fpasswd", "index.html%00"]
)
async def test_nothing_else_is_served_there(start: Start, name: str) -> None:
    client = await start()
    async with client.get(f"/api-docs/{name}") as response:
        assert (response.status, (await response.json())["code"]) == (404, "NOT_FOUND")


async def test_the_page_is_for_allowed_hosts_only(start: Start) -> None:
    client = await start(server={"allowed_hosts": ["docs.example.com"]})
    for path in ("/api-docs", "/api-docs/swagger.json"):
        for host, status in (("docs.example.com", 200), ("elsewhere", 421)):
            async with client.get(path, headers={"Host": host}) as response:
                assert response.status == status

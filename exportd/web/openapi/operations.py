"""The description of each operation: its texts, its responses, and its errors (``web/edge/errors.py``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exportd.domain.job import JobStatus
from exportd.telemetry.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE
from exportd.web.edge.errors import (
    ApiError,
    BadRequest,
    DatabaseIsUnavailable,
    DownloadUnauthorized,
    ExpectationFailed,
    ExportInProgress,
    FileNotFound,
    HeadersTooLarge,
    HttpVersionNotSupported,
    IdentityProviderUnavailable,
    InternalError,
    InvalidJobId,
    InvalidParameter,
    JobNotFound,
    LinkExpired,
    MisdirectedRequest,
    PackageAvailable,
    PackageExpired,
    PackageNotReady,
    PreconditionFailed,
    QuotaExceeded,
    RangeNotSatisfiable,
    RateLimited,
    ReExportUnsupported,
    ShuttingDown,
    StorageError,
    Unauthenticated,
)
from exportd.web.openapi.schemas import Health, Job, JobEvent, JobPage, Link, Readiness, Shape, Statistics

JSON = "application/json"

DESCRIPTION = """\
exportd serves finished export packages (`.tar.gz`) to the users who may download them. Any client can
resume, and every whole download is counted exactly once.

**Authenticate** with a JWT as `Authorization: Bearer …` (*Authorize* keeps it for this page). It names the
user in `userId`; with `"role": "admin"` it may see and download everything. The curl commands here use:

```sh
EXPORTD=http://127.0.0.1:8080
TOKEN=$(exportd token --user alice)
JOB_ID=25395ef1-daf8-4ea1-a532-c61e57b1134f
```

**Download** the package of a completed job, or make a *download link*, which needs no token, for a browser's
own download manager.

**Resume** with `Range: bytes=N-` and `If-Range` with the `ETag` of the first response: 206 is the rest of
the same package, 200 is another package. A job's package never changes, so `Range` alone is safe too.

**Errors** are JSON with a stable `code`, and a `requestId` that is also in the log; a browser that asks for
`text/html` gets them as a page. Any other address answers 404 `NOT_FOUND`, any other method 405
`METHOD_NOT_ALLOWED`. Malformed or too large requests are rejected before they reach an operation.
"""

TAGS = [
    {"name": "Download", "description": "Packages, and links to them"},
    {"name": "Jobs", "description": "Export jobs, for their creators and admins"},
    {"name": "Operation", "description": "For operators"},
]

SECURITY_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "Signed with a key of `[auth]`; `exp` and the user's claim are required",
    },
    "ticket": {
        "type": "apiKey",
        "in": "query",
        "name": "ticket",
        "description": "The ticket of a download link. It gives access to one package",
    },
}

# Every header field of a response, with an example, except Content-Type.
HEADERS: Mapping[str, tuple[str, str | int]] = {
    "X-Request-ID": ("The caller's id if it is plain text, or a new one; also in the log", "4aaa15a5" * 4),
    "X-Content-Type-Options": ("Always", "nosniff"),
    "Referrer-Policy": ("URLs may contain a ticket", "no-referrer"),
    "Content-Security-Policy": ("What a page with this response may load", "default-src 'none'"),
    "Server": ("Without a version", "exportd"),
    "Vary": ("The request fields that the response depends on", "Authorization"),
    "Access-Control-Allow-Origin": ("For pages of listed `cors_origins`", "https://app.example.com"),
    "Access-Control-Expose-Headers": ("For pages of listed `cors_origins`", "Content-Disposition, ETag"),
    "Cache-Control": ("A package may be cached privately for an hour, other responses not", "no-store"),
    "Content-Length": ("Bytes of the body, or of the body of a GET", 300025450),
    "Content-Disposition": (
        "The file name; `filename*` if it is not ASCII",
        'attachment; filename="export-customer-form-2026-11-23.tar.gz"',
    ),
    "Content-Range": ("The bytes of the range; with several ranges in each part", "bytes 0-499/1000"),
    "Accept-Ranges": ("Always", "bytes"),
    "ETag": ("Strong: the SHA-256 of the package, if it is known", '"' + "08034f71" * 8 + '"'),
    "Last-Modified": ("When the job was completed", "Mon, 23 Nov 2026 23:30:31 GMT"),
    "Repr-Digest": (
        "The SHA-256 of the whole package (RFC 9530), if it is known",
        "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:",
    ),
    "X-Package-Size": ("For people: 1024-based, one decimal", "286.1 MB"),
    "Sunset": ("Until when the package is available (RFC 8594)", "Wed, 23 Dec 2026 23:30:31 GMT"),
    "X-Accel-Buffering": ("Tells nginx not to spool the body", "no"),
    "Location": ("The new job", "/api/tool-registry/export-jobs/25395ef1-daf8-4ea1-a532-c61e57b1134f"),
    "WWW-Authenticate": ("RFC 6750; with `error` if the request had a token", 'Bearer realm="exportd"'),
    "Retry-After": ("In seconds", 7),
    "Allow": ("The supported methods", "GET, HEAD"),
}  # fmt: skip

# Headers that every response may have.
COMMON_HEADERS = (
    "X-Request-ID",
    "X-Content-Type-Options",
    "Referrer-Policy",
    "Content-Security-Policy",
    "Server",
    "Vary",
    "Access-Control-Allow-Origin",
    "Access-Control-Expose-Headers",
)

Parameter = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response that is no error. ``content`` holds OpenAPI's media types, ``headers`` names of HEADERS."""

    says: str
    content: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    headers: Sequence[str] = ("Cache-Control", "Content-Length")


@dataclass(frozen=True, slots=True)
class Operation:
    """The description of a handler. ``curl`` holds the options of its curl command.

    ``may_be_tried``: Swagger UI may call it, although it keeps the whole response in memory.
    """

    tag: str
    summary: str
    description: str
    answers: Mapping[int, Answer]
    errors: Sequence[type[ApiError]]
    parameters: Sequence[Parameter] = ()
    security: Sequence[str] = ("bearer",)
    curl: str = "-s"
    may_be_tried: bool = True


def _json(says: str, shape: type[Shape], *headers: str) -> Answer:
    return Answer(says, {JSON: {"schema": shape}}, ("Cache-Control", "Content-Length", *headers))


def _parameter(place: str, name: str, says: str, example: object = None, **schema: Any) -> Parameter:
    described: Parameter = {
        "in": place,
        "name": name,
        "description": says,
        "schema": {"type": "string", **schema},
    }
    if example is not None:
        described["example"] = example
    return described | ({"required": True} if place == "path" else {})


_REQUEST_ID = _parameter("header", "X-Request-ID", "An id of this request, for the log", "my-request-1")
_TRACE = _parameter(
    "header",
    "traceparent",
    "W3C Trace Context: the trace id is logged",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
)
_COMMON = (_REQUEST_ID, _TRACE)
_JOB_ID = _parameter(
    "path", "job_id", "Of the export job", "25395ef1-daf8-4ea1-a532-c61e57b1134f", format="uuid"
)

_ANYWHERE = (BadRequest, HeadersTooLarge, HttpVersionNotSupported, ExpectationFailed, InternalError)
_UNDER_A_HOST = (*_ANYWHERE, MisdirectedRequest, RateLimited, ShuttingDown)
_WITH_A_TOKEN = (*_UNDER_A_HOST, Unauthenticated, IdentityProviderUnavailable, DatabaseIsUnavailable)
_OF_A_JOB = (InvalidJobId, *_WITH_A_TOKEN, JobNotFound, DownloadUnauthorized)
_OF_A_PACKAGE = (*_OF_A_JOB, PackageNotReady, PackageExpired, FileNotFound, StorageError)

_VALIDATORS = ("ETag", "Cache-Control", "Sunset")
_PACKAGE_HEADERS = (
    "Content-Disposition",
    "Content-Length",
    "Accept-Ranges",
    *_VALIDATORS,
    "Last-Modified",
    "Repr-Digest",
    "X-Package-Size",
    "X-Accel-Buffering",
)
_BINARY = {"schema": {"type": "string", "format": "binary"}}

DOWNLOAD = Operation(
    "Download",
    "Download a package",
    """\
Sends the package of a completed job to its creator, to an admin, or by a download link; a link's `ticket`
overrides a token. `Range` requests one or several ranges. HEAD ignores `Range` and is not counted. The
strong `ETag` and the `Repr-Digest` come from the package's SHA-256, so a resume never joins two versions.
Preconditions are evaluated in the order of RFC 9110, section 13.2.2.

No download starts after the package's expiry (`Sunset`). An unfinished one may be resumed for the grace
time. If a body cannot be finished, the connection is aborted.""",
    {
        200: Answer("The whole package", {"application/gzip": _BINARY}, _PACKAGE_HEADERS),
        206: Answer(
            "The requested ranges; overlapping and adjacent ones are merged",
            {"application/gzip": _BINARY, "multipart/byteranges": _BINARY},
            (*_PACKAGE_HEADERS, "Content-Range"),
        ),
        304: Answer("The client already has this package", headers=_VALIDATORS),
    },
    (*_OF_A_PACKAGE, LinkExpired, QuotaExceeded, PreconditionFailed, RangeNotSatisfiable),
    (
        _JOB_ID,
        _parameter(
            "header", "Range", "The bytes that a GET requests; an invalid field is ignored", "bytes=0-499"
        ),
        _parameter("header", "If-Range", "`Range` applies only if the package has this ETag or date"),
        _parameter("header", "If-Match", "412 unless the package has one of these ETags"),
        _parameter("header", "If-None-Match", "304 if the package has one of these ETags"),
        _parameter("header", "If-Modified-Since", "304 unless the package is newer"),
        _parameter("header", "If-Unmodified-Since", "412 if the package is newer"),
        _parameter("header", "Want-Repr-Digest", "`sha-256=0` omits `Repr-Digest`", "sha-256=1"),
        *_COMMON,
    ),
    security=("bearer", "ticket"),
    curl="-OJ",
    may_be_tried=False,
)

MAKE_LINK = Operation(
    "Download",
    "Make a download link",
    """\
Makes a URL that downloads the package as the caller, without a token. It starts downloads for an hour and
resumes them for a day (`[links]`), as long as the caller may download. Anybody with the URL can download
the package.""",
    {201: _json("The link, which is shown only once", Link)},
    (*_OF_A_PACKAGE, QuotaExceeded),
    (_JOB_ID, *_COMMON),
    curl="-X POST",
)

REVOKE_LINKS = Operation(
    "Download",
    "Revoke the download links to a package",
    """\
The package's creator and admins revoke all links, other users those that they made. Running downloads
continue.""",
    {204: Answer("The links are revoked", headers=("Cache-Control",))},
    _OF_A_JOB,
    (_JOB_ID, *_COMMON),
    curl="-X DELETE",
)

STATISTICS = Operation(
    "Download",
    "Show how often a package was downloaded",
    "Counts, times, bytes and recent deliveries. Up to date as soon as a download has ended.",
    {200: _json("The job's statistics", Statistics)},
    _OF_A_JOB,
    (_JOB_ID, *_COMMON),
)

LIST_JOBS = Operation(
    "Jobs",
    "List export jobs",
    "The caller's jobs, or every user's for an admin, newest first. New jobs do not shift later pages.",
    {200: _json("A page of jobs", JobPage)},
    (InvalidParameter, *_WITH_A_TOKEN),
    (
        _parameter("query", "status", "Only jobs of this status", enum=list(JobStatus)),
        _parameter(
            "query",
            "limit",
            "The number of jobs on a page",
            type="integer",
            minimum=1,
            maximum=100,
            default=20,
        ),
        _parameter("query", "cursor", "The `nextCursor` of the previous page"),
        *_COMMON,
    ),
)

SHOW_JOB = Operation(
    "Jobs",
    "Show an export job",
    "The job's status, its progress, and the state of its package.",
    {200: _json("The job", Job)},
    _OF_A_JOB,
    (_JOB_ID, *_COMMON),
)

JOB_EVENTS = Operation(
    "Jobs",
    "Follow an export job",
    """\
Server-sent events: a `job` event with the whole state, now and at each change. Its data is a `JobState`
(see the schemas), its id a digest of the data: a client that reconnects with `Last-Event-ID` does not get
the same state again. The stream ends when the token expires, when the job is deleted, and when the daemon
stops.""",
    {
        200: Answer(
            "The events, until the client disconnects",
            {
                # Of each event, as OpenAPI 3.2 says it too.
                "text/event-stream": {"schema": JobEvent}
            },
            ("Cache-Control", "X-Accel-Buffering"),
        )
    },
    _OF_A_JOB,
    (_JOB_ID, _parameter("header", "Last-Event-ID", "The id of the last received event"), *_COMMON),
    curl="-N",
    may_be_tried=False,
)

RE_EXPORT = Operation(
    "Jobs",
    "Export again",
    "Requests the export of a job whose package is gone again. The new job refers to the old one.",
    {202: _json("The new job", Job, "Location")},
    (*_OF_A_JOB, PackageAvailable, ExportInProgress, ReExportUnsupported),
    (_JOB_ID, *_COMMON),
    curl="-X POST",
)

HEALTH = Operation(
    "Operation",
    "Check that the process runs",
    "Returns 200 while the process runs, also during a drain.",
    {200: _json("The process runs", Health)},
    _ANYWHERE,
    _COMMON,
    security=(),
)

READINESS = Operation(
    "Operation",
    "Check that downloads can be served",
    "Checks the database and the storage.",
    {
        200: _json("Both respond", Readiness),
        503: _json("One does not respond, or the daemon is draining", Readiness),
    },
    _ANYWHERE,
    _COMMON,
    security=(),
)

METRICS = Operation(
    "Operation",
    "Show metrics",
    "The metrics of all processes, for Prometheus. Not for the internet.",
    {
        200: Answer(
            "In Prometheus' text format",
            {METRICS_CONTENT_TYPE.partition(";")[0]: {"schema": {"type": "string"}}},
        )
    },
    _ANYWHERE,
    _COMMON,
    security=(),
)

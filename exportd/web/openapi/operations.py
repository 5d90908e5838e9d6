"""What the document says of each operation: its words, what it answers, and which errors of the table it can
meet. The errors themselves are told by ``errors.py``."""

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
exportd hands finished export packages (`.tar.gz`) to the people allowed to have them. Any client can resume,
and every whole download is counted exactly once.

**Authenticate** with a JWT as `Authorization: Bearer …` (*Authorize* keeps it for this page). It names the
user in `userId`; with `"role": "admin"` it may see and download everything. For the curl lines here:

```sh
EXPORTD=http://127.0.0.1:8080
TOKEN=$(exportd token --user alice)
JOB_ID=25395ef1-daf8-4ea1-a532-c61e57b1134f
```

**Download** the package of a completed job, or make a *download link*, which needs no token, for a browser's
own download manager.

**Resume** with `Range: bytes=N-` and `If-Range` with the `ETag` of the first answer: 206 is the rest of the
same package, 200 another one whole. A job's package never changes, so a bare `Range` is safe too.

**Errors** are JSON with a stable `code`, and a `requestId` that is also in the log; a browser that asks for
`text/html` gets them as a page. Any other address answers 404 `NOT_FOUND`, any other method 405
`METHOD_NOT_ALLOWED`. What is no valid HTTP, or too large, is told so before it reaches an operation.
"""

TAGS = [
    {"name": "Download", "description": "A package, and links to it"},
    {"name": "Jobs", "description": "Export jobs, as their creators and admins see them"},
    {"name": "Operation", "description": "For whoever runs the daemon"},
]

SECURITY_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "Signed with one of the keys of `[auth]`; `exp` and the user's claim are needed",
    },
    "ticket": {
        "type": "apiKey",
        "in": "query",
        "name": "ticket",
        "description": "Of a download link; it opens one package and nothing else",
    },
}

# Every header field of an answer, with an example. Content-Type stands with the content.
HEADERS: Mapping[str, tuple[str, str | int]] = {
    "X-Request-ID": ("The caller's, if it was sane, or a new one; also in the log", "4aaa15a5" * 4),
    "X-Content-Type-Options": ("Always", "nosniff"),
    "Referrer-Policy": ("An address may hold a ticket", "no-referrer"),
    "Content-Security-Policy": ("What a page of this answer may load", "default-src 'none'"),
    "Server": ("Without a version", "exportd"),
    "Vary": ("What else the answer depends on", "Authorization"),
    "Access-Control-Allow-Origin": ("For pages of listed `cors_origins`", "https://app.example.com"),
    "Access-Control-Expose-Headers": ("For pages of listed `cors_origins`", "Content-Disposition, ETag"),
    "Cache-Control": ("A package may be kept privately for an hour, nothing else at all", "no-store"),
    "Content-Length": ("Bytes of the body, or of what GET would send", 300025450),
    "Content-Disposition": (
        "The name to save under; `filename*` where it is not ASCII",
        'attachment; filename="export-customer-form-2026-11-23.tar.gz"',
    ),
    "Content-Range": ("Which bytes of how many; of several ranges each part has it", "bytes 0-499/1000"),
    "Accept-Ranges": ("Always", "bytes"),
    "ETag": ("Strong: the SHA-256 of the package, where that is known", '"' + "08034f71" * 8 + '"'),
    "Last-Modified": ("When the job was completed", "Mon, 23 Nov 2026 23:30:31 GMT"),
    "Repr-Digest": (
        "Of the whole package (RFC 9530), where it is known",
        "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:",
    ),
    "X-Package-Size": ("For people: 1024-based, one decimal", "286.1 MB"),
    "Sunset": ("Until when the package is to be had (RFC 8594)", "Wed, 23 Dec 2026 23:30:31 GMT"),
    "X-Accel-Buffering": ("Tells nginx not to spool the body", "no"),
    "Location": ("The new job", "/api/tool-registry/export-jobs/25395ef1-daf8-4ea1-a532-c61e57b1134f"),
    "WWW-Authenticate": ("RFC 6750; with `error` where a token came", 'Bearer realm="exportd"'),
    "Retry-After": ("In seconds", 7),
    "Allow": ("Which methods there are", "GET, HEAD"),
}  # fmt: skip

# What every answer may carry.
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
    """An answer that is no error. ``content`` holds OpenAPI's media types, ``headers`` names of HEADERS."""

    says: str
    content: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    headers: Sequence[str] = ("Cache-Control", "Content-Length")


@dataclass(frozen=True, slots=True)
class Operation:
    """What is documented of a handler. ``curl`` are the options that its curl line needs.

    ``may_be_tried``: by a page that keeps the whole answer in memory.
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


_REQUEST_ID = _parameter(
    "header", "X-Request-ID", "An id to find this request by, in the log", "my-request-1"
)
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
Sends the package of a completed job to its creator, an admin, or whoever has a download link to it; a link's
`ticket` goes before a token. With `Range`, one range or several of it. HEAD ignores `Range` and counts as
nothing. The strong `ETag` and the `Repr-Digest` are of the package's SHA-256, so a resume never joins two
versions. Preconditions are judged in the order of RFC 9110, section 13.2.2.

From its expiry on (`Sunset`) nobody starts a download; who began one before may resume it for the grace time.
A body that cannot be finished ends in an aborted connection.""",
    {
        200: Answer("The whole package", {"application/gzip": _BINARY}, _PACKAGE_HEADERS),
        206: Answer(
            "The ranges that were asked for, those that overlap or touch made one",
            {"application/gzip": _BINARY, "multipart/byteranges": _BINARY},
            (*_PACKAGE_HEADERS, "Content-Range"),
        ),
        304: Answer("The client has this package already", headers=_VALIDATORS),
    },
    (*_OF_A_PACKAGE, LinkExpired, QuotaExceeded, PreconditionFailed, RangeNotSatisfiable),
    (
        _JOB_ID,
        _parameter(
            "header", "Range", "Which bytes to send, of GET; an invalid one is ignored", "bytes=0-499"
        ),
        _parameter("header", "If-Range", "`Range` counts only for this very ETag or date"),
        _parameter("header", "If-Match", "Only if the package has one of these ETags; else 412"),
        _parameter("header", "If-None-Match", "Only if the package has none of these ETags; else 304"),
        _parameter("header", "If-Modified-Since", "Only if the package is newer; else 304"),
        _parameter("header", "If-Unmodified-Since", "Only if the package is no newer; else 412"),
        _parameter("header", "Want-Repr-Digest", "`sha-256=0` leaves out `Repr-Digest`", "sha-256=1"),
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
Makes an address that downloads the package as the caller, without a token. It starts downloads for an hour
and resumes them for a day (`[links]`), while the caller may download. Whoever has it has the package.""",
    {201: _json("The link; it is told this once", Link)},
    (*_OF_A_PACKAGE, QuotaExceeded),
    (_JOB_ID, *_COMMON),
    curl="-X POST",
)

REVOKE_LINKS = Operation(
    "Download",
    "Revoke the download links to a package",
    """\
Ends all of them for the package's creator and for admins; who was that once ends those that they made.
Running downloads go on.""",
    {204: Answer("There are none any more", headers=("Cache-Control",))},
    _OF_A_JOB,
    (_JOB_ID, *_COMMON),
    curl="-X DELETE",
)

STATISTICS = Operation(
    "Download",
    "Show how often a package was downloaded",
    "Counts, times, bytes and recent deliveries, right as soon as a download has ended.",
    {200: _json("The job's statistics", Statistics)},
    _OF_A_JOB,
    (_JOB_ID, *_COMMON),
)

LIST_JOBS = Operation(
    "Jobs",
    "List export jobs",
    "The caller's jobs, everybody's for an admin, newest first. A job that is made meanwhile shifts no page.",
    {200: _json("A page of jobs", JobPage)},
    (InvalidParameter, *_WITH_A_TOKEN),
    (
        _parameter("query", "status", "Only jobs of this status", enum=list(JobStatus)),
        _parameter(
            "query", "limit", "How many a page holds", type="integer", minimum=1, maximum=100, default=20
        ),
        _parameter("query", "cursor", "The `nextCursor` of the page before"),
        *_COMMON,
    ),
)

SHOW_JOB = Operation(
    "Jobs",
    "Show an export job",
    "Its status, how far it is, and what became of its package.",
    {200: _json("The job", Job)},
    _OF_A_JOB,
    (_JOB_ID, *_COMMON),
)

JOB_EVENTS = Operation(
    "Jobs",
    "Follow an export job",
    """\
Server-sent events: a `job` event with the whole present state, now and at each change. Its data is a
`JobState` (among the schemas), its id a digest of that: who comes again with `Last-Event-ID` is not told what
they know. The stream ends with the token, when the job is gone, and when the daemon stops.""",
    {
        200: Answer(
            "The events, for as long as the client stays",
            {
                # Of each event, as OpenAPI 3.2 says it too.
                "text/event-stream": {"schema": JobEvent}
            },
            ("Cache-Control", "X-Accel-Buffering"),
        )
    },
    _OF_A_JOB,
    (_JOB_ID, _parameter("header", "Last-Event-ID", "The id of the last event that came"), *_COMMON),
    curl="-N",
    may_be_tried=False,
)

RE_EXPORT = Operation(
    "Jobs",
    "Export again",
    "Asks for the export of a job whose package is gone once more, as a new job that names the old one.",
    {202: _json("The new job", Job, "Location")},
    (*_OF_A_JOB, PackageAvailable, ExportInProgress, ReExportUnsupported),
    (_JOB_ID, *_COMMON),
    curl="-X POST",
)

HEALTH = Operation(
    "Operation",
    "Tell whether the process lives",
    "Answers as long as the process does, also while it drains.",
    {200: _json("It lives", Health)},
    _ANYWHERE,
    _COMMON,
    security=(),
)

READINESS = Operation(
    "Operation",
    "Tell whether downloads can be served",
    "Asks the database and the storage.",
    {
        200: _json("Both answer", Readiness),
        503: _json("One does not, or the daemon is draining", Readiness),
    },
    _ANYWHERE,
    _COMMON,
    security=(),
)

METRICS = Operation(
    "Operation",
    "Show metrics",
    "Those of all processes, for Prometheus. Not for the internet.",
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

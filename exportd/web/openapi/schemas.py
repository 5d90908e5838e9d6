"""The schemas of the API's responses, for the documentation. Every field is always present, and no other.

Nothing is validated by them while serving; the tests hold real answers against them.
"""

from collections.abc import Collection
from typing import Any

from marshmallow import RAISE, Schema, fields, validate

from exportd.domain.delivery import Method
from exportd.domain.sizes import SIZE_RANGES

_JOB_ID = "25395ef1-daf8-4ea1-a532-c61e57b1134f"
_OTHER_JOB_ID = "7d9f2b64-0d3f-4e0e-9a55-3f1f6a3f0b11"
_SIZE_BYTES = 300025450
_CREATED = "2026-11-23T22:58:02.114532+00:00"
_COMPLETED = "2026-11-23T23:30:31+00:00"
_DOWNLOADED = "2026-11-24T09:12:44.902117+00:00"


class Shape(Schema):
    """Base class. Unknown fields are errors."""

    class Meta:
        unknown = RAISE


def _field(kind: type[fields.Field], says: str, example: object, **options: Any) -> fields.Field:
    metadata = {"example": example, **({"description": says} if says else {})}
    return kind(required=True, metadata=metadata, **options)


def _or_null(kind: type[fields.Field], says: str, example: object, **options: Any) -> fields.Field:
    return _field(kind, says, example, allow_none=True, **options)


def _list_of(shape: type[Schema], says: str) -> fields.Field:
    return fields.List(fields.Nested(shape), required=True, metadata={"description": says})


class Package(Shape):
    state = _field(
        fields.String,
        "Whether it can be downloaded; suspect: its file was written to after completion",
        "available",
        validate=validate.OneOf(["available", "expired", "deleted", "suspect"]),
    )
    sizeBytes = _or_null(fields.Integer, "", _SIZE_BYTES)
    size = _or_null(fields.String, "For people: 1024-based, one decimal", "286.1 MB")
    sha256 = _or_null(fields.String, "Hexadecimal; null: not known", "08034f71" * 8)
    fileName = _or_null(
        fields.String, "The file name of a download", "export-customer-form-2026-11-23.tar.gz"
    )
    expiresAt = _or_null(fields.AwareDateTime, "Null: never", "2026-12-23T23:30:31+00:00")


class Job(Shape):
    jobId = _field(fields.UUID, "", _JOB_ID)
    userId = _field(fields.String, "Its creator", "alice")
    tool = _field(fields.String, "The exported tool; may be empty", "Customer Form")
    status = _field(
        fields.String,
        "pending, processing, completed, failed, or an application's own",
        "completed",
    )
    percent = _or_null(fields.Integer, "Progress of the packing", 100)
    failureReason = _or_null(fields.String, "", None)
    createdAt = _or_null(fields.AwareDateTime, "", _CREATED)
    completedAt = _or_null(fields.AwareDateTime, "", _COMPLETED)
    downloadCount = _field(fields.Integer, "Whole downloads, each counted once", 3)
    lastDownloadedAt = _or_null(fields.AwareDateTime, "", _DOWNLOADED)
    reExportOf = _or_null(fields.UUID, "The job that this one exports again", None)
    reExportedAs = _or_null(fields.UUID, "The newest job that exports this one again", None)
    package = fields.Nested(
        Package,
        required=True,
        allow_none=True,
        metadata={"description": "Null until the job is completed"},
    )


class JobPage(Shape):
    jobs = _list_of(Job, "Newest first")
    nextCursor = _or_null(
        fields.String,
        "The `cursor` of the next page; null: this is the last",
        "MjAyNi0xMS0yM1QyMjo1ODow",
    )


class RunningDownload(Shape):
    downloadId = _field(fields.UUID, "", "0b1f6f5e-54a1-4c9b-b0b5-5c7d3d2a9f10")
    startedAt = _field(fields.AwareDateTime, "", _DOWNLOADED)
    bytesRequested = _field(fields.Integer, "", _SIZE_BYTES)
    bytesAcknowledged = _field(fields.Integer, "Confirmed by the client's kernel", 104857600)


class JobState(Job):
    bytesReceived = _field(
        fields.Integer, "Bytes of the package that the caller has, from deliveries that ended", 104857600
    )
    downloads = _list_of(RunningDownload, "The caller's running downloads")


class JobEvent(Shape):
    """An event of the stream."""

    event = _field(fields.String, "", "job", validate=validate.OneOf(["job"]))
    id = _field(fields.String, "A digest of the data", "5f3a09bd1c27e846")
    data = _field(fields.String, "A JobState as JSON", '{"jobId":"25395ef1-…"}')


class Link(Shape):
    url = _field(
        fields.String,
        "Relative to the API's own address",
        f"/api/tool-registry/export-jobs/{_JOB_ID}/download?ticket=mB9cK2hQ7xW0vYtR3nEoLpZsD5aJfUgI8bTkXe1MqHc",
    )
    expiresAt = _field(fields.AwareDateTime, "Until when it starts downloads", "2026-11-23T13:00:00+00:00")
    resumeUntil = _field(fields.AwareDateTime, "Until when it resumes downloads", "2026-11-24T12:00:00+00:00")


class SizeSummary(Shape):
    size = _field(fields.String, "", "100MB_to_1GB", validate=validate.OneOf(SIZE_RANGES))
    downloads = _field(fields.Integer, "", 3)
    averageDurationSeconds = _field(fields.Float, "", 4.218)
    averageBytesPerSecond = _field(fields.Integer, "", 71129789)


class FailureCount(Shape):
    outcome = _field(fields.String, "aborted, failed, changed or lost", "aborted")
    reason = _field(fields.String, "May be empty", "client disconnected")
    count = _field(fields.Integer, "", 1)


class Delivery(Shape):
    jobId = _field(fields.UUID, "", _JOB_ID)
    userId = _field(fields.String, "", "alice")
    startedAt = _field(fields.AwareDateTime, "", _DOWNLOADED)
    outcome = _field(fields.String, "completed, aborted, failed, changed, lost or running", "completed")
    reason = _or_null(fields.String, "", None)
    status = _field(fields.Integer, "", 206, validate=validate.OneOf([200, 206]))
    method = _or_null(fields.String, "The way of sending", "sendfile", validate=validate.OneOf(list(Method)))
    bytesSent = _field(fields.Integer, "Handed to the kernel", 300025450)
    bytesAcknowledged = _field(fields.Integer, "Confirmed by the client's kernel", 300025450)
    durationSeconds = _field(fields.Float, "", 4.311)


class Statistics(Shape):
    jobId = _field(fields.UUID, "", _JOB_ID)
    downloadCount = _field(fields.Integer, "Whole downloads, each counted once", 3)
    lastDownloadedAt = _or_null(fields.AwareDateTime, "", _DOWNLOADED)
    bytesServed = _field(fields.Integer, "", 904933978)
    uniqueUsers = _field(fields.Integer, "Number of users who completed a delivery", 2)
    bySize = _list_of(SizeSummary, "Downloads in one delivery, by the size of the package")
    failures = _list_of(FailureCount, "Deliveries that were not completed, by kind")
    recentEvents = _list_of(Delivery, "The last twenty deliveries, newest first")


class Health(Shape):
    status = _field(fields.String, "", "ok", validate=validate.OneOf(["ok"]))


class Readiness(Shape):
    status = _field(fields.String, "", "ok", validate=validate.OneOf(["ok", "draining", "unavailable"]))
    database = _field(fields.String, "", "ok", validate=validate.OneOf(["ok", "unavailable"]))
    storage = _field(fields.String, "", "ok", validate=validate.OneOf(["ok", "unavailable"]))


class Envelope(Shape):
    status = _field(fields.String, "", "error", validate=validate.OneOf(["error"]))
    timestamp = _field(fields.AwareDateTime, "", "2026-12-24T08:00:00.000Z")
    requestId = _field(fields.String, "Also in `X-Request-ID` and in the log", "4aaa15a5" * 4)


# What rows of the error table add.
_EXTRA = {
    "parameter": fields.String(required=True, metadata={"description": "The invalid parameter"}),
    "jobStatus": fields.String(required=True),
    "expiresAt": fields.AwareDateTime(required=True, allow_none=True),
    "jobId": fields.UUID(
        required=True, metadata={"description": "The job that has the package, or will have it"}
    ),
    "limit": fields.String(
        required=True,
        metadata={
            "description": "A key of `[limits]`, `re_export_after_failure` or `small_ranges_per_minute`"
        },
    ),
    "retryAfterSeconds": fields.Integer(required=True, metadata={"description": "As Retry-After"}),
}


def error_shape(name: str, code: str, message: str, extra: Collection[str]) -> type[Shape]:
    """The response of one error, with its extra fields."""
    own = {
        "code": _field(fields.String, "Stable; for programs", code, validate=validate.OneOf([code])),
        "message": _field(fields.String, "For people", message),
    }
    return type(name, (Envelope,), {**own, **{key: _EXTRA[key] for key in extra}})

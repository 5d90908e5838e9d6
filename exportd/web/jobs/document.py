"""JSON documents of jobs."""

import orjson
from aiohttp import web

from exportd.db.job_details import JobDetails
from exportd.domain.sizes import format_size
from exportd.http.content_disposition import package_filename
from exportd.http.validators import last_modified


def describe_job(details: JobDetails) -> dict[str, object]:
    """Returns a job's document."""
    job = details.job
    state = job.package_state
    return {
        "jobId": job.job_id,
        "userId": job.user_id,
        "tool": job.tool_name,
        "status": job.status,
        "percent": details.percent,
        "failureReason": details.failure_reason,
        "createdAt": details.created_at,
        "completedAt": job.completed_at,
        "downloadCount": details.download_count,
        "lastDownloadedAt": details.last_downloaded_at,
        "reExportOf": details.re_export_of,
        "reExportedAs": details.re_exported_as,
        "package": state
        and {
            "state": state,
            "sizeBytes": job.package_size_bytes,
            "size": None if job.package_size_bytes is None else format_size(job.package_size_bytes),
            "sha256": job.package_sha256,
            "fileName": job.completed_at
            and package_filename(job.tool_name, last_modified(job.completed_at, job.read_at).date()),
            "expiresAt": job.package_expires_at,
        },
    }


def job_response(
    document: dict[str, object], *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """A response with a job's document, or a page of them."""
    return web.Response(
        status=status,
        body=orjson.dumps(document),
        content_type="application/json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )

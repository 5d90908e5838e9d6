"""Headers of a package's response."""

from datetime import timedelta

from exportd.domain.job import Job
from exportd.domain.principal import Principal
from exportd.domain.sizes import format_size
from exportd.http.content_disposition import content_disposition
from exportd.http.plan import Representation
from exportd.http.validators import http_date, repr_digest, wants_digest


def caching_headers(package: Representation, principal: Principal) -> dict[str, str]:
    """The headers that a 304 repeats from the 200 (RFC 9110, section 15.4.5)."""
    if principal.by_link:
        # A cache must ask each time: the link may be revoked.
        return {"ETag": package.etag, "Cache-Control": "private, no-cache"}
    # A browser may serve several people. Without Vary its cache gives the package to any of them.
    return {"ETag": package.etag, "Cache-Control": "private, max-age=3600", "Vary": "Authorization"}


def package_headers(
    job: Job,
    package: Representation,
    principal: Principal,
    resume_grace: timedelta,
    want_repr_digest: str | None,
) -> dict[str, str]:
    """The headers of a 200 or 206, but for those that frame the body."""
    headers = {
        "Content-Disposition": content_disposition(job.tool_name, package.last_modified.date()),
        "Accept-Ranges": "bytes",
        "Last-Modified": http_date(package.last_modified),
        "X-Package-Size": format_size(package.size),
        # Without it, nginx in front spools the body to disk and cuts it at 1 GB.
        "X-Accel-Buffering": "no",
    }
    headers |= caching_headers(package, principal) | sunset_header(job, resume_grace)
    if job.package_sha256 is not None and wants_digest(want_repr_digest):
        headers["Repr-Digest"] = repr_digest(job.package_sha256)
    return headers


def sunset_header(job: Job, resume_grace: timedelta) -> dict[str, str]:
    """Until when the package is available (RFC 8594)."""
    expires_at = job.package_expires_at
    if expires_at is None:
        return {}
    if job.read_at >= expires_at:
        expires_at += resume_grace
    return {"Sunset": http_date(expires_at)}

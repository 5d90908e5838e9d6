"""Authentication and the requested job: the first steps of every handler under the base path."""

import hashlib
import re
from uuid import UUID

import structlog
from aiohttp import web

from exportd.auth.tokens import InvalidToken, KeysUnavailable
from exportd.db.links import Link, find_link
from exportd.domain.principal import Principal
from exportd.web.edge.errors import (
    DownloadUnauthorized,
    IdentityProviderUnavailable,
    InvalidJobId,
    LinkExpired,
    Unauthenticated,
)
from exportd.web.services import SERVICES

log = structlog.get_logger()

# UUID() also accepts braces, "urn:uuid:" and hyphens anywhere.
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
_CHALLENGE = 'Bearer realm="exportd"'


def requested_job_id(request: web.Request) -> UUID:
    """Returns the job id of the path. Raises InvalidJobId."""
    text = request.match_info["job_id"]
    if not _UUID.fullmatch(text):
        raise InvalidJobId
    structlog.contextvars.bind_contextvars(job_id=text.lower())
    return UUID(text)


async def authenticate(request: web.Request) -> Principal:
    """Returns the principal of the request's bearer token (RFC 6750).

    Raises Unauthenticated, LimitExceeded, and IdentityProviderUnavailable if the token cannot be verified
    now."""
    fields = request.headers.getall("Authorization", [])
    if not fields:
        raise _unauthenticated(request, None, _CHALLENGE)
    scheme, _, token = fields[0].partition(" ")
    try:
        if len(fields) > 1 or scheme.lower() != "bearer":
            raise InvalidToken("not one bearer token")
        principal = await request.app[SERVICES].tokens.verify(token.strip(" "))
    except InvalidToken as error:
        challenge = f'{_CHALLENGE}, error="invalid_token"'
        raise _unauthenticated(request, str(error), challenge) from error
    except KeysUnavailable as error:
        if request.app[SERVICES].limiter.may_log("identity provider", ""):
            log.error("identity_provider_unavailable", error=str(error))
        raise IdentityProviderUnavailable from error
    if request.app[SERVICES].has_uuid_users:
        principal = principal.with_uuid()
    structlog.contextvars.bind_contextvars(user_id=principal.user_id)
    request.app[SERVICES].limiter.check_user(principal)
    return principal


def ticket_digest(ticket: str) -> bytes:
    """The digest that the database holds. A ticket is random, so it needs no salt."""
    return hashlib.sha256(ticket.encode("utf-8", "surrogatepass")).digest()


async def find_requested_link(request: web.Request, job_id: UUID) -> Link | None:
    """Returns the link of the request's ``ticket``, or None without a ticket. The link is for this job and
    not revoked.

    The caller checks its times. Raises LinkExpired and LimitExceeded.
    """
    tickets = request.query.getall("ticket", [])
    if not tickets:
        return None
    link = (
        await find_link(request.app[SERVICES].database, ticket_digest(tickets[0]))
        if len(tickets) == 1
        else None
    )
    if link is None or link.job_id != job_id:
        raise refuse_link(request, "unknown")
    structlog.contextvars.bind_contextvars(user_id=link.user_id, by="link")
    request.app[SERVICES].limiter.check_user(link_principal(link))
    if link.is_revoked:
        raise refuse_link(request, "revoked")
    return link


def link_principal(link: Link) -> Principal:
    """The principal that a link downloads as."""
    return Principal(link.user_id, link.is_admin, by_link=True)


def refuse_link(request: web.Request, reason: str) -> LinkExpired:
    """Logs a rejected link and returns the error to raise."""
    request.app[SERVICES].metrics.access_refused("bad_link")
    log.warning("download_link_refused", reason=reason)
    return LinkExpired()


def _unauthenticated(request: web.Request, reason: str | None, challenge: str) -> Unauthenticated:
    request.app[SERVICES].metrics.access_refused("no_token" if reason is None else "bad_token")
    if reason is not None:
        log.warning("authentication_failed", reason=reason)
    return Unauthenticated(headers={"WWW-Authenticate": challenge})


def refuse(request: web.Request, creator: str) -> DownloadUnauthorized:
    """Logs an attempt on another user's job and returns the error to raise."""
    request.app[SERVICES].metrics.access_refused("not_permitted")
    log.warning("download_denied", reason="neither creator nor admin", creator=creator)
    return DownloadUnauthorized()

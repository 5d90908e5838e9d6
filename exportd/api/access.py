"""Who is asking for which job: the first steps of every handler under the base path."""

import re
from uuid import UUID

import structlog
from aiohttp import web

from exportd.api.errors import DownloadUnauthorized, InvalidJobId, Unauthenticated
from exportd.auth.principal import Principal
from exportd.auth.tokens import InvalidToken, Tokens

log = structlog.get_logger()

TOKENS = web.AppKey("tokens", Tokens)

# UUID() alone would also take braces, "urn:uuid:" and hyphens anywhere.
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
_CHALLENGE = 'Bearer realm="exportd"'


def requested_job_id(request: web.Request) -> UUID:
    """The job id of the path. Raises InvalidJobId."""
    text = request.match_info["job_id"]
    if not _UUID.fullmatch(text):
        raise InvalidJobId
    structlog.contextvars.bind_contextvars(job_id=text.lower())
    return UUID(text)


def authenticate(request: web.Request) -> Principal:
    """The principal of the request's bearer token (RFC 6750). Raises Unauthenticated."""
    fields = request.headers.getall("Authorization", [])
    if not fields:
        raise Unauthenticated(headers={"WWW-Authenticate": _CHALLENGE})
    scheme, _, token = fields[0].partition(" ")
    try:
        if len(fields) > 1 or scheme.lower() != "bearer":
            raise InvalidToken("not one bearer token")
        principal = request.app[TOKENS].verify(token.strip(" "))
    except InvalidToken as error:
        log.warning("authentication_failed", reason=str(error))
        challenge = f'{_CHALLENGE}, error="invalid_token"'
        raise Unauthenticated(headers={"WWW-Authenticate": challenge}) from error
    structlog.contextvars.bind_contextvars(user_id=principal.user_id)
    return principal


def refuse(creator: str) -> DownloadUnauthorized:
    """Logs an attempt on somebody else's job; the error to raise."""
    log.warning("download_denied", reason="neither creator nor admin", creator=creator)
    return DownloadUnauthorized()

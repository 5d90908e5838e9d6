"""aiohttp's ``FileResponse`` on uvloop, with exportd's own libraries: aiopg, PyJWT, the same SQL for each
download (one SELECT, one UPDATE). The next request on a connection waits for the count, as in exportd."""

import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import aiopg
import jwt
import uvloop
from aiohttp import web

SECRET = os.environ["SECRET"]
STORAGE = Path(os.environ["STORAGE"])
POOL = web.AppKey("pool", aiopg.Pool)

FIND = "SELECT user_id, status, package_path, package_expires_at FROM export_jobs WHERE job_id = %s"
COUNT = """
UPDATE export_jobs SET download_count = download_count + 1, last_downloaded_at = now() WHERE job_id = %s
"""


async def pool(app: web.Application) -> AsyncIterator[None]:
    # Where to is in PGHOST and its like.
    async with aiopg.create_pool("", minsize=1, maxsize=10) as app[POOL]:
        yield


async def download(request: web.Request) -> web.StreamResponse:
    try:
        _, _, token = request.headers.get("Authorization", "").partition(" ")
        claims = jwt.decode(token, SECRET, algorithms=["HS256"])
    except jwt.InvalidTokenError:
        return web.json_response({"status": "error"}, status=401)
    job_id = request.match_info["job_id"]
    with await request.app[POOL].cursor() as cursor:
        await cursor.execute(FIND, (job_id,))
        job = await cursor.fetchone()
    if job is None or job[1] != "completed":
        return web.json_response({"status": "error"}, status=404)
    if job[0] != claims["userId"] and claims.get("role") != "admin":
        return web.json_response({"status": "error"}, status=403)
    if job[3] and job[3] <= datetime.now(UTC):
        return web.json_response({"status": "error"}, status=410)
    response = web.FileResponse(
        STORAGE / job[2],
        headers={
            "Content-Type": "application/gzip",
            "Content-Disposition": 'attachment; filename="export.tar.gz"',
        },
    )
    await response.prepare(request)
    with await request.app[POOL].cursor() as cursor:
        await cursor.execute(COUNT, (job_id,))
    return response


if __name__ == "__main__":
    uvloop.install()
    app = web.Application()
    app.cleanup_ctx.append(pool)
    app.router.add_get("/api/tool-registry/export-jobs/{job_id}/download", download)
    web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]), print=None)

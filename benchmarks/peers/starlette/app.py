"""Starlette's ``FileResponse`` behind the same token check and SQL as exportd, counted in a background task.

asyncpg is what its users usually take.
"""

import contextlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import jwt
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

SECRET = os.environ["SECRET"]
STORAGE = Path(os.environ["STORAGE"])

FIND = "SELECT user_id, status, package_path, package_expires_at FROM export_jobs WHERE job_id = $1"
COUNT = """
UPDATE export_jobs SET download_count = download_count + 1, last_downloaded_at = now() WHERE job_id = $1
"""


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with asyncpg.create_pool(min_size=1, max_size=10) as pool:  # where to is in PGHOST and its like
        app.state.pool = pool
        yield


async def download(request: Request) -> Response:
    try:
        _, _, token = request.headers.get("Authorization", "").partition(" ")
        claims = jwt.decode(token, SECRET, algorithms=["HS256"])
    except jwt.InvalidTokenError:
        return JSONResponse({"status": "error"}, 401)
    pool = request.app.state.pool
    job_id = request.path_params["job_id"]
    job = await pool.fetchrow(FIND, job_id)
    if job is None or job["status"] != "completed":
        return JSONResponse({"status": "error"}, 404)
    if job["user_id"] != claims["userId"] and claims.get("role") != "admin":
        return JSONResponse({"status": "error"}, 403)
    if job["package_expires_at"] and job["package_expires_at"] <= datetime.now(UTC):
        return JSONResponse({"status": "error"}, 410)
    return FileResponse(
        STORAGE / job["package_path"],
        media_type="application/gzip",
        filename="export.tar.gz",
        background=BackgroundTask(pool.execute, COUNT, job_id),
    )


app = Starlette(
    routes=[Route("/api/tool-registry/export-jobs/{job_id:uuid}/download", download)], lifespan=lifespan
)

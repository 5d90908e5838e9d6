"""The table of routes."""

import functools

from aiohttp import web

from exportd.web.downloads.handler import download_package
from exportd.web.downloads.links import make_download_link, revoke_download_links
from exportd.web.edge.boundary import expect
from exportd.web.jobs.events import job_events
from exportd.web.jobs.list import list_export_jobs
from exportd.web.jobs.re_export import export_job_again
from exportd.web.jobs.show import show_export_job
from exportd.web.jobs.statistics import download_statistics
from exportd.web.openapi.pages import show_api_docs, show_api_docs_asset
from exportd.web.ops.health import healthz, readyz
from exportd.web.ops.metrics import metrics
from exportd.web.pages.page import show_page, show_page_file


def routes(base_path: str) -> list[web.RouteDef]:
    """Every route. Metrics name a route by its ``name``.

    The pattern of a job id takes any text, so that one that is no UUID gets an error that says so.
    """
    get, post, delete = (
        functools.partial(verb, expect_handler=expect) for verb in (web.get, web.post, web.delete)
    )
    jobs = f"{base_path}/export-jobs"
    job = f"{jobs}/{{job_id:[^/]+}}"
    return [
        get(jobs, list_export_jobs, name="jobs"),
        get(job, show_export_job, name="job"),
        get(f"{job}/events", job_events, name="events", allow_head=False),
        post(f"{job}/re-export", export_job_again, name="re_export"),
        get(f"{job}/download", download_package, name="download"),
        post(f"{job}/download-link", make_download_link, name="make_link"),
        delete(f"{job}/download-link", revoke_download_links, name="revoke_links"),
        get(f"{job}/download-stats", download_statistics, name="statistics"),
        get("/", show_page, name="page"),
        get("/page/{name:.+}", show_page_file, name="page_file"),
        get("/healthz", healthz, name="healthz"),
        get("/readyz", readyz, name="readyz"),
        get("/metrics", metrics, name="metrics"),
        get("/api-docs", show_api_docs, name="api_docs"),
        get("/api-docs/{name}", show_api_docs_asset, name="api_docs_asset"),
    ]

"""Swagger UI in a real browser, the document's curl lines in a real shell, and what is no request."""

import json
import os
import re
import socket
import subprocess
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.application import ANN, BASE, Jobs, noise
from tests.support.daemon import Daemon, Exportd
from tests.support.openapi import check_answer, operations
from tests.support.programs import require

pytestmark = pytest.mark.slow

TOKEN = ANN["Authorization"].removeprefix("Bearer ")


@pytest.fixture
def jobs(exportd: Exportd) -> Jobs:
    exportd.storage.mkdir(parents=True)
    return Jobs(exportd.dsn, exportd.storage)


def read_document(daemon: Daemon) -> dict[str, Any]:
    with urllib.request.urlopen(f"{daemon.url}/api-docs/swagger.json") as response:
        document: dict[str, Any] = json.loads(response.read())
        return document


@pytest.fixture
async def browser() -> AsyncIterator[Any]:
    from playwright.async_api import async_playwright

    chromium = require("chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        await browser.close()


class Reader:
    """Somebody who reads ``/api-docs``, and whatever the browser had to say of it."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._note(request.url, address))

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((f"{address}/", "data:")):
            self.elsewhere.append(url)

    async def open(self, url: str) -> None:
        await self.page.goto(url)
        await self.page.wait_for_selector(".opblock")

    async def unfold(self, operation_id: str) -> Any:
        operation = self.page.locator(f"[id$='-{operation_id}']")
        await operation.locator(".opblock-summary").click()
        await operation.locator(".responses-wrapper").wait_for()
        return operation


async def test_swagger_ui_shows_every_operation_and_asks_nobody_else(
    exportd: Exportd, jobs: Jobs, browser: Any
) -> None:
    daemon = exportd.serve()
    reader = Reader(await browser.new_page(), daemon.url)
    await reader.open(f"{daemon.url}/api-docs")
    documented = {item["operationId"]: item for _, _, item in operations(read_document(daemon))}
    assert await reader.page.locator(".opblock").count() == len(documented)
    may_be_tried = {}
    for name in documented:
        operation = await reader.unfold(name)
        may_be_tried[name] = await operation.locator(".try-out__btn").count() == 1
        await operation.locator(".opblock-summary").click()
    assert may_be_tried == {name: item["x-try-it-out"] for name, item in documented.items()}
    assert [name for name, may in may_be_tried.items() if not may] == [
        "job_events", "download_package", "download_package_head",
    ]  # fmt: skip
    assert (reader.complaints, reader.elsewhere) == ([], [])


async def test_a_token_is_put_in_once_and_the_list_is_tried(
    exportd: Exportd, jobs: Jobs, browser: Any
) -> None:
    package = jobs.add()
    daemon = exportd.serve()
    reader = Reader(await browser.new_page(), daemon.url)
    page = reader.page
    await reader.open(f"{daemon.url}/api-docs")
    await page.locator(".btn.authorize").click()
    await page.locator(".auth-container input").first.fill(TOKEN)
    await page.locator(".auth-btn-wrapper .authorize").first.click()
    await page.locator(".btn-done").first.click()
    operation = await reader.unfold("list_export_jobs")
    await operation.locator(".try-out__btn").click()
    async with page.expect_response(f"{daemon.url}{BASE}*") as waiting:
        await operation.locator(".execute").click()
    response = await waiting.value
    assert response.status == 200
    answer = operation.locator(".live-responses-table tbody .response-col_description")
    assert package.job_id in await answer.first.text_content()
    assert (reader.complaints, reader.elsewhere) == ([], [])


async def test_an_address_puts_no_other_document_on_the_page(exportd: Exportd, browser: Any) -> None:
    daemon = exportd.serve()
    reader = Reader(await browser.new_page(), daemon.url)
    for query in ("url=/healthz", "url=https://example.com/x.json", "configUrl=/healthz", "spec=%7B%7D"):
        await reader.open(f"{daemon.url}/api-docs?{query}")
        assert "exportd" in await reader.page.locator(".info .title").text_content()
        assert reader.page.url == f"{daemon.url}/api-docs"
    assert (reader.complaints, reader.elsewhere) == ([], [])


def test_every_curl_line_works_as_it_stands(exportd: Exportd, jobs: Jobs, tmp_path: Path) -> None:
    require("curl")
    daemon = exportd.serve()
    ready, expired = jobs.add(noise(1000)), jobs.add(package_path=None)
    document = read_document(daemon)
    failed = {}
    for _, path, operation in operations(document):
        (line,) = re.findall(r"```sh\n(curl .*)\n```", operation["description"])
        job = expired if path.endswith("/re-export") else ready
        environ = os.environ | {"EXPORTD": daemon.url, "TOKEN": TOKEN, "JOB_ID": job.job_id}
        # A stream of events has no end.
        options = "--max-time 2" if path.endswith("/events") else ""
        done = subprocess.run(
            ["/bin/sh", "-c", line.replace("curl", f"curl --fail -sS {options}", 1)],
            env=environ,
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        is_cut_off = done.returncode == 28 and b"event: job" in done.stdout
        if done.returncode and not (options and is_cut_off):
            failed[line] = done.stderr
    assert failed == {}
    (saved,) = tmp_path.glob("export-*.tar.gz")
    assert saved.read_bytes() == ready.content


@pytest.mark.parametrize(("field", "status"), [(b"X-Long: " + b"x" * 9000, 431), (b"nonsense", 400)])
def test_responses_to_malformed_requests_are_documented(exportd: Exportd, field: bytes, status: int) -> None:
    daemon = exportd.serve()
    document = read_document(daemon)
    for method, path in (("GET", BASE), ("GET", f"{BASE}/x/download"), ("POST", f"{BASE}/x/re-export"),
                         ("GET", "/healthz"), ("GET", "/metrics")):  # fmt: skip
        with socket.create_connection(("127.0.0.1", daemon.port), timeout=20) as client:
            line = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
            client.sendall(line + field + b"\r\n\r\n")
            answer = b""
            while received := client.recv(65536):
                answer += received
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        assert int(first.split()[1]) == status
        check_answer(document, method, path, status, headers, body)

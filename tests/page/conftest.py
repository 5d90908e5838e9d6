"""The page in a real browser: Chromium, driven by Playwright, against a running daemon."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.support.application import Jobs, bearer
from tests.support.daemon import Daemon, Exportd
from tests.support.postgres import ReusedDatabase
from tests.support.programs import require

expect.set_options(timeout=45_000)

# A file that a script chooses in place of a person; all that follows is the real thing.
CHOOSE_FILE = """
window.showSaveFilePicker = async ({ suggestedName }) => {
  const folder = await navigator.storage.getDirectory();
  return folder.getFileHandle(suggestedName, { create: true });
};
"""
READ_FILE = """
async (name) => {
  const folder = await navigator.storage.getDirectory();
  const names = [];
  for await (const key of folder.keys()) names.push(key);
  if (!names.includes(name)) return null;
  const file = await (await folder.getFileHandle(name)).getFile();
  const digest = await crypto.subtle.digest("SHA-256", await file.arrayBuffer());
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
"""


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """Chromium; without what only a screen needs, where there is one and it does: it takes half the time."""
    slim = (
        None if getattr(request.module, "WHOLE_CHROMIUM", False) else shutil.which("chromium-headless-shell")
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=slim or require("chromium"), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


class Daemons:
    """Daemons on one database and data folder, one for each configuration."""

    def __init__(self, exportd: Exportd) -> None:
        exportd.storage.mkdir(parents=True, exist_ok=True)
        exportd.leave_uncovered()
        self.exportd = exportd
        self._running: dict[tuple[object, ...], Daemon] = {}

    def start(self, options: tuple[object, ...], environ: dict[str, str]) -> Daemon:
        """A daemon that runs already, or a new one."""
        key = (*options, *sorted(environ.items()))
        daemon = self._running.get(key)
        if daemon is None or daemon.process.poll() is not None:
            daemon = self._running[key] = self.exportd.serve(*options, **environ)
        daemon.skip_log()
        return daemon


@pytest.fixture(scope="module")
def shared_daemons(
    server_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Daemons, ReusedDatabase]]:
    database = ReusedDatabase(server_dsn)
    exportd = Exportd(tmp_path_factory.mktemp("site"), database.dsn)
    yield Daemons(exportd), database
    exportd.close()


class Site:
    """A daemon, its jobs, and visitors. What no page may do is looked at when a test ends."""

    def __init__(self, daemons: Daemons, browser: Browser) -> None:
        self._daemons = daemons
        exportd = self.exportd = daemons.exportd
        self.jobs = Jobs(exportd.dsn, exportd.storage)
        self.daemon: Daemon | None = None
        self.expected_errors: list[str] = []
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self._errors: list[str] = []
        self._addresses: list[str] = []

    def start(self, *options: object, **environ: str) -> Daemon:
        self.daemon = self._daemons.start(options, environ)
        self.origin = self.daemon.url
        return self.daemon

    def visit(self, address: str | None = None, **options: Any) -> Page:
        """A page of a new visitor, who is ann and signed in unless the address says otherwise."""
        if address is None and self.daemon is None:
            self.start()
        context = self._browser.new_context(**options)
        context.add_init_script(CHOOSE_FILE)
        self._contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: self._errors.append(f"{error}"))
        page.on("console", self._listen)
        page.on("request", lambda request: self._addresses.append(request.url))
        page.goto(address or f"{self.origin}/#token={token('ann')}")
        return page

    def _listen(self, message: Any) -> None:
        # The browser itself notes each answer that is an error.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self._errors.append(message.text)

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        unexpected = [
            error
            for error in self._errors
            if not any(re.search(known, error) for known in self.expected_errors)
        ]
        assert unexpected == []
        foreign = [
            url
            for url in self._addresses
            if not re.match(r"(http://(127\.0\.0\.1|localhost):|blob:|data:)", url)
        ]
        assert foreign == []


@pytest.fixture
def site(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Site]:
    """Its daemons go on for the module's next test, unless the test is marked ``fresh_database``."""
    if request.node.get_closest_marker("fresh_database"):
        site = Site(Daemons(request.getfixturevalue("exportd")), browser)
        yield site
        site.close()
    else:
        daemons, database = request.getfixturevalue("shared_daemons")
        site = Site(daemons, browser)
        yield site
        site.close()
        database.empty(terminate=False)


def token(user: str, role: str | None = None, ttl_seconds: int = 600) -> str:
    return bearer(user, role, ttl_seconds)["Authorization"].removeprefix("Bearer ")


def row(page: Page, tool: str) -> Locator:
    """The export of that tool in the list."""
    return page.get_by_role("listitem").filter(has=page.get_by_role("heading", name=tool, exact=True))


def open_dialog(page: Page, tool: str = "Customer Form") -> Locator:
    row(page, tool).get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    return dialog


def saved_digest(page: Page, name: str) -> str | None:
    """The SHA-256 of the file that a download in the page wrote; None: there is none."""
    digest: str | None = page.evaluate(READ_FILE, name)
    return digest


def digest_of(content: bytes | Path) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()

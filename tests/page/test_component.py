"""The component in a page of another origin."""

import functools
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.page.conftest import Site, digest_of, saved_digest, token
from tests.support.application import noise
from tests.support.postgres import query

pytestmark = pytest.mark.slow

# The tab that becomes a download is to close by itself.
WHOLE_CHROMIUM = True
ROOT = Path(__file__).parent.parent.parent
DOCUMENTATION = ROOT / "docs" / "component.md"
SCRIPTS = ROOT / "exportd" / "web" / "pages" / "static"


class Host:
    """An application's own web server, at ``localhost``, which is another origin than 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        handler = functools.partial(_Quiet, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.origin = f"http://localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def write(self, page: str) -> None:
        (self.folder / "index.html").write_text(f"<!doctype html><title>An application</title>{page}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path / "host")
    yield host
    host.close()


def embed(site: Site, host: Host, job_id: str, given: str | None = None, attributes: str = "") -> Page:
    """A page of the host application with the component in it, whose events are noted in ``seen``.

    ``given`` is what it gives as the token, in JavaScript.
    """
    host.write(f"""
      <style>export-download {{ --export-download-accent: rgb(120, 0, 80); }}
             export-download::part(download) {{ border-radius: 0; }}</style>
      <h1>Orders</h1>
      <export-download job-id="{job_id}" {attributes}></export-download>
      <script>
        window.seen = [];
        for (const name of ["started", "progress", "completed", "failed", "again"])
          document.addEventListener(`export-${{name}}`, ({{ detail }}) => seen.push([name, detail]));
        window.element = document.querySelector("export-download");
        element.token = {given or f'"{token("ann")}"'};
      </script>
      <script type="module" src="{site.origin}/page/export-download.js"></script>
    """)
    return site.visit(f"{host.origin}/index.html")


def names_seen(page: Page) -> list[str]:
    """The kinds of events in the order of their first ones."""
    names: list[str] = page.evaluate("[...new Set(seen.map(([name]) => name))]")
    return names


def test_one_script_tag_brings_the_button(site: Site, host: Host) -> None:
    package = site.jobs.add(noise(10_000_000))
    site.start(
        EXPORTD_SERVER__CORS_ORIGINS=f'["{host.origin}"]',
        EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND="4000000",
    )
    page = embed(site, host, package.job_id)
    button = page.get_by_role("button", name="Download package")
    with page.expect_download() as waiting:
        button.click()
    expect(page.get_by_text("Downloaded.", exact=True)).to_be_visible()
    assert digest_of(waiting.value.path()) == digest_of(package.content)
    assert names_seen(page) == ["started", "progress", "completed"]
    assert page.evaluate("seen.find(([name]) => name === 'started')[1]") == {
        "jobId": package.job_id,
        "by": "browser",
    }
    assert page.evaluate("seen.find(([name]) => name === 'progress')[1].total") == 10_000_000
    # The host's page stays, and the tab that became a download is gone.
    assert [open_page.url for open_page in page.context.pages] == [f"{host.origin}/index.html"]
    style = "element => [getComputedStyle(element).backgroundColor, getComputedStyle(element).borderRadius]"
    assert button.evaluate(style) == ["rgb(120, 0, 80)", "0px"]


def test_the_component_downloads_in_a_host_page(site: Site, host: Host) -> None:
    package = site.jobs.add(noise(3_000_000))
    site.start(EXPORTD_SERVER__CORS_ORIGINS=f'["{host.origin}"]')
    page = embed(site, host, package.job_id)
    page.get_by_role("button", name="Download in this page").click()
    expect(page.get_by_text("Downloaded and checked: its SHA-256 is right.")).to_be_visible()
    assert saved_digest(page, "export-customer-form-2025-10-24.tar.gz") == digest_of(package.content)
    assert names_seen(page) == ["started", "progress", "completed"]
    assert page.evaluate("seen.at(-1)[1].isVerified") is True


def test_a_token_is_asked_for_and_again_when_it_is_refused(site: Site, host: Host) -> None:
    package = site.jobs.add(noise(1000))
    site.start(EXPORTD_SERVER__CORS_ORIGINS=f'["{host.origin}"]')
    give = f"""async ({{ isRefused }}) => {{
      (window.asked ??= []).push(isRefused);
      return isRefused ? "{token("ann")}" : "an old one";
    }}"""
    page = embed(site, host, package.job_id, give)
    expect(page.get_by_text("Ready: 1000 B")).to_be_visible()
    assert page.evaluate("asked") == [False, True]


def test_without_a_token_it_says_so_and_goes_on_with_one(site: Site, host: Host) -> None:
    package = site.jobs.add(noise(1000))
    site.start(EXPORTD_SERVER__CORS_ORIGINS=f'["{host.origin}"]')
    page = embed(site, host, package.job_id, "null")
    expect(page.get_by_text("You are signed out.")).to_be_visible()
    page.evaluate("(token) => { element.token = token; }", token("ann"))
    expect(page.get_by_text("Ready: 1000 B")).to_be_visible()
    page.evaluate("element.jobId = 'nonsense'")
    expect(page.get_by_text("There is no such export: its number is not valid.")).to_be_visible()
    assert page.evaluate("seen.at(-1)") == [
        "failed",
        {
            "jobId": "nonsense",
            "code": "INVALID_JOB_ID",
            "message": "There is no such export: its number is not valid.",
        },
    ]


def test_the_component_uses_its_base_attribute(site: Site, host: Host) -> None:
    package = site.jobs.add(noise(1000))
    site.start(EXPORTD_SERVER__CORS_ORIGINS=f'["{host.origin}"]', EXPORTD_SERVER__BASE_PATH="/elsewhere")
    page = embed(site, host, package.job_id, attributes=f'base="{site.origin}/elsewhere"')
    expect(page.get_by_text("Ready: 1000 B")).to_be_visible()


def test_an_origin_that_is_not_listed_gets_nothing(site: Site, host: Host) -> None:
    package = site.jobs.add(noise(1000))
    site.expected_errors = ["blocked by CORS policy"]
    site.start(EXPORTD_SERVER__CORS_ORIGINS='["https://app.example.com"]')
    page = embed(site, host, package.job_id)
    expect(page.get_by_text("The connection is lost. Trying again…")).to_be_visible()


def test_the_component_works_under_a_strict_content_security_policy(site: Site, host: Host) -> None:
    package = site.jobs.add(noise(1000))
    site.start(EXPORTD_SERVER__CORS_ORIGINS=f'["{host.origin}"]')
    (host.folder / "app.js").write_text(
        f"document.querySelector('export-download').token = '{token('ann')}';"
    )
    host.write(f"""
      <meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'self' {site.origin};
        connect-src {site.origin}; require-trusted-types-for 'script'">
      <export-download job-id="{package.job_id}"></export-download>
      <script src="app.js"></script>
      <script type="module" src="{site.origin}/page/export-download.js"></script>
    """)
    page = site.visit(f"{host.origin}/index.html")
    expect(page.get_by_text("Ready: 1000 B")).to_be_visible()
    button = page.get_by_role("button", name="Download package")
    assert button.evaluate("element => getComputedStyle(element).fontWeight") == "600"


def test_many_on_one_page_leave_room_for_each_other(site: Site, host: Host) -> None:
    """A browser opens six connections to a host: streams must not take them all."""
    packages = [site.jobs.add(b"", status="pending", package_path=None, completed_at=None) for _ in range(9)]
    site.start(EXPORTD_SERVER__CORS_ORIGINS=f'["{host.origin}"]')
    elements = "".join(
        f'<export-download job-id="{package.job_id}"></export-download>' for package in packages
    )
    host.write(f"""{elements}
      <script>
        for (const element of document.querySelectorAll("export-download")) element.token = "{token("ann")}";
      </script>
      <script type="module" src="{site.origin}/page/export-download.js"></script>""")
    page = site.visit(f"{host.origin}/index.html")
    expect(page.get_by_text("Waiting to be made")).to_have_count(9)
    query(site.exportd.dsn, "UPDATE export_jobs SET status = 'failed'")
    expect(page.get_by_text("The export failed.")).to_have_count(9)


def test_the_documented_example_works(site: Site, host: Host) -> None:
    package = site.jobs.add(noise(1000))
    site.start(EXPORTD_SERVER__CORS_ORIGINS=f'["{host.origin}"]')
    (example,) = re.findall(r"```html\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    (host.folder / "exportd-token").write_text(token("ann"))
    example = example.replace("https://downloads.example.com", site.origin)
    host.write(re.sub(r'(?<=job-id=")[^"]+', package.job_id, example))
    page = site.visit(f"{host.origin}/index.html")
    page.get_by_role("button", name="Download in this page").click()
    expect(page).to_have_title(f"Downloaded {package.job_id}")


def test_the_documentation_names_all_that_there_is() -> None:
    documented = set(re.findall(r"`([\w-]+)`", DOCUMENTATION.read_text()))
    script = (SCRIPTS / "export-download.js").read_text()
    style = (SCRIPTS / "export-download-style.js").read_text()
    states = set(re.findall(r'name: "([\w-]+)"', script))
    events = set(re.findall(r'#tell\(\s*"([\w-]+)"', script))
    parts = set(re.findall(r'button\(\s*"(\w+)"', script)) | set(re.findall(r'\[part="(\w+)"\]', style))
    properties = {f"-{name}" for name in re.findall(r"var\(--export-download-([\w-]+)", style)}
    assert (len(states) > 12, len(events), len(parts) > 10, len(properties)) == (True, 6, True, 9)
    assert states | events | parts <= documented
    assert properties - documented == {"-accent"}
    assert "--export-download-accent" in documented

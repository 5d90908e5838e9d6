"""Signing in and out, and what the page may and may not do."""

import json

import pytest
from playwright.sync_api import Dialog, expect

from exportd.domain.sizes import format_size
from tests.page.conftest import Site, row, token
from tests.support.application import noise
from tests.support.daemon import wait_for
from tests.support.postgres import query

pytestmark = pytest.mark.slow


def test_the_token_leaves_the_address_and_lives_with_the_tab(site: Site) -> None:
    site.jobs.add(noise(10))
    page = site.visit()
    expect(row(page, "Customer Form")).to_be_visible()
    assert page.url == f"{site.origin}/"
    assert page.evaluate("history.length") == 2
    assert page.evaluate("Object.keys(localStorage).length") == 0
    page.reload()
    expect(row(page, "Customer Form")).to_be_visible()
    other = page.context.new_page()
    other.goto(f"{site.origin}/")
    expect(other.get_by_role("heading", name="You are signed out")).to_be_visible()


def test_an_address_replaces_nobody_without_a_word(site: Site) -> None:
    site.jobs.add(noise(10))
    page = site.visit()
    questions: list[str] = []
    answer = "dismiss"

    def decide(dialog: Dialog) -> None:
        questions.append(dialog.message)
        getattr(dialog, answer)()

    page.on("dialog", decide)
    expect(row(page, "Customer Form")).to_be_visible()
    # A newer token of the same user, then another user's.
    page.goto(f"{site.origin}/#token={token('ann', ttl_seconds=500)}")
    expect(row(page, "Customer Form")).to_be_visible()
    assert questions == []
    page.goto(f"{site.origin}/#token={token('mallory')}")
    expect(row(page, "Customer Form")).to_be_visible()
    assert len(questions) == 1
    assert page.url == f"{site.origin}/"
    answer = "accept"
    page.goto(f"{site.origin}/#token={token('mallory')}")
    expect(page.get_by_role("heading", name="No exports yet")).to_be_visible()
    # One that cannot be read may be anybody's.
    page.goto(f"{site.origin}/#token=nonsense")
    expect(page.get_by_text("That token is not valid, or no longer.")).to_be_visible()
    assert len(questions) == 3


def test_the_cache_hands_a_package_to_nobody_else(site: Site) -> None:
    package = site.jobs.add(noise(50_000))
    site.start()
    page = site.visit(f"{site.origin}/")
    ask = """async ([url, token]) => {
      const answer = await fetch(url, token ? { headers: { Authorization: `Bearer ${token}` } } : {});
      await answer.arrayBuffer();
      return answer.status;
    }"""
    asked: list[str] = []
    page.on("response", lambda response: asked.append(response.url))

    def status(url: str, bearer: str | None) -> int:
        found: int = page.evaluate(ask, [url, bearer])
        return found

    url = f"{site.origin}{package.url}"
    ann = token("ann")
    assert [status(url, ann), status(url, ann)] == [200, 200]
    assert status(url, token("mallory")) == 403
    assert status(url, None) == 401
    link_url = f"{url}-link"
    link = page.evaluate(
        """async ([url, token]) => {
          const answer = await fetch(url, { method: "POST", headers: { Authorization: `Bearer ${token}` } });
          return (await answer.json()).url;
        }""",
        [link_url, ann],
    )
    link = link if link.startswith("http") else f"{site.origin}{link}"
    assert [status(link, None), status(link, None)] == [200, 200]
    page.evaluate(
        """async ([url, token]) => {
          await fetch(url, { method: "DELETE", headers: { Authorization: `Bearer ${token}` } });
        }""",
        [link_url, ann],
    )
    assert status(link, None) == 410
    # The cache answered the second request of each address. An event may come a moment after its answer.
    delivered = "SELECT count(*) FROM download_events WHERE http_status = 200"
    wait_for("two events", lambda: query(site.jobs.dsn, delivered) >= [(2,)])
    assert query(site.jobs.dsn, delivered) == [(2,)]


def test_signing_out_forgets(site: Site) -> None:
    site.jobs.add(noise(10))
    page = site.visit()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="You are signed out")).to_be_visible()
    expect(page.get_by_role("listitem")).to_have_count(0)
    assert page.evaluate("sessionStorage.length") == 0
    page.reload()
    expect(page.get_by_role("heading", name="You are signed out")).to_be_visible()


def test_a_token_can_be_pasted(site: Site) -> None:
    site.jobs.add(noise(10))
    site.start()
    page = site.visit(f"{site.origin}/")
    page.get_by_label("Access token").fill("nonsense")
    page.keyboard.press("Enter")
    expect(page.get_by_text("That token is not valid, or no longer.")).to_be_visible()
    page.get_by_label("Access token").fill(f"Bearer {token('ann')}")
    page.get_by_role("button", name="Sign in").click()
    expect(row(page, "Customer Form")).to_be_visible()
    expect(page.get_by_label("Access token")).to_be_hidden()


def test_a_token_that_is_over_signs_out_and_says_so(site: Site) -> None:
    site.jobs.add(noise(10), status="processing", package_path=None)
    site.start()
    page = site.visit(f"{site.origin}/#token={token('ann', ttl_seconds=3)}")
    expect(row(page, "Customer Form")).to_be_visible()
    expect(page.get_by_text("You were signed out: the token is over.")).to_be_visible()


def test_no_text_becomes_a_script_and_nobody_frames_the_page(site: Site) -> None:
    site.expected_errors = ["Content Security Policy", "TrustedHTML", "violates", "chrome-error"]
    page = site.visit()
    policy = page.evaluate("fetch('/').then((answer) => answer.headers.get('Content-Security-Policy'))")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert page.evaluate(
        "() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } }"
    ) == ("TypeError")
    with page.expect_event("framenavigated"):
        page.evaluate(
            """(address) => {
              const frame = document.createElement("iframe");
              frame.src = address;
              document.body.append(frame);
            }""",
            site.origin,
        )
    # Whatever shows in it, it is not the page.
    title = page.evaluate(
        "() => { try { return frames[0].document.title; } catch (error) { return error.name; } }"
    )
    assert title in ("", "SecurityError")


def test_the_files_are_answered_with_validators_and_for_every_origin(site: Site) -> None:
    hidden = ["page/vendor/README.md", "page/x.js", "page/..%2fapp.py", "page/%2e%2e/app.py", "page/"]
    page = site.visit()
    answers = page.evaluate(
        """async (names) => {
          const seen = {};
          for (const name of names) {
            const answer = await fetch(name);
            const { status, headers } = answer;
            seen[name] = [status, headers.get("Content-Type"), headers.get("Cache-Control"),
                          headers.get("Access-Control-Allow-Origin"), Boolean(headers.get("ETag"))];
          }
          return seen;
        }""",
        ["page/main.js", "page/style.css", "page/icon.svg", *hidden],
    )
    assert answers["page/main.js"] == [200, "text/javascript; charset=utf-8", "no-cache", "*", True]
    assert answers["page/style.css"][:2] == [200, "text/css; charset=utf-8"]
    assert answers["page/icon.svg"][:2] == [200, "image/svg+xml"]
    for name in hidden:
        assert answers[name][0] == 404, name


def test_the_page_writes_sizes_as_the_server_does(site: Site) -> None:
    sizes = [0, 1, 1023, 1024, 1025, 1536, 1_048_524, 1_048_525, 1_048_576, 12_345_678, 2**30, 10**12, 2**53]
    page = site.visit()
    said = page.evaluate(
        "async (sizes) => sizes.map((await import('/page/words.js')).formatBytes)",
        sizes,
    )
    assert dict(zip(sizes, said, strict=True)) == {size: format_size(size) for size in sizes}


def test_the_page_writes_times_for_people(site: Site) -> None:
    page = site.visit()
    said = page.evaluate(
        """async () => {
          const { formatDuration, describeExpiry } = await import('/page/words.js');
          const now = Date.parse("2026-01-01T00:00:00Z");
          const after = (hours) => describeExpiry(new Date(now + hours * 3_600_000).toISOString(), now);
          return [[0.2, 1, 59, 60, 3599, 3600, 7500].map(formatDuration),
                  [73, 71, 24, 23, 1, 0.5, 0].map(after)
                    .map(({ text, isSoon }) => [text.split(/,| on/)[0], isSoon])];
        }"""
    )
    assert json.loads(json.dumps(said)) == [
        ["1 s", "1 s", "59 s", "1 min", "1 h", "1 h", "2 h 5 min"],
        [
            ["Expires", False], ["Expires in 2 days", True], ["Expires in 1 day", True],
            ["Expires in 23 hours", True], ["Expires in 1 hour", True], ["Expires in 30 minutes", True],
            ["Expired", False],
        ],
    ]  # fmt: skip

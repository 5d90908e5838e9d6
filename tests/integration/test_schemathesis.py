"""Requests that schemathesis makes up from the OpenAPI document: no 5xx, no answer that is not documented."""

import hashlib
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.support.application import ANN, Jobs, noise
from tests.support.daemon import Exportd
from tests.support.scrape import samples_of

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent.parent


def test_generated_requests_get_documented_responses(exportd: Exportd, tmp_path: Path) -> None:
    exportd.leave_uncovered()
    exportd.storage.mkdir(parents=True)
    jobs = Jobs(exportd.dsn, exportd.storage)
    ready = jobs.add(noise(1000))
    states = [
        ready,
        jobs.add(noise(1000), package_sha256=None),
        jobs.add(status="pending", package_path=None, completed_at=None, package_expires_at=None),
        jobs.add(package_path=None),
        jobs.add(user_id="eve"),
    ]
    daemon = exportd.serve()
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "--config-file", TESTS / "support" / "schemathesis.toml",
         "run", f"{daemon.url}/api-docs/swagger.json", "--header", f"Authorization: {ANN['Authorization']}",
         "--no-color"],
        env=exportd.environ | {
            "PYTHONPATH": str(TESTS.parent),
            # Twice, so that most cases reach a package.
            "EXPORTD_TESTS_JOB_IDS": " ".join(job.job_id for job in [ready, *states]),
            "EXPORTD_TESTS_ETAG": f'"{hashlib.sha256(ready.content).hexdigest()}"',
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with urllib.request.urlopen(f"{daemon.url}/metrics") as response:
        answered = set(samples_of(response.read().decode()))
    # What was made up reaches as far as it should.
    expected = {
        "download": (200, 206, 304, 400, 403, 404, 410, 412, 416),
        "make_link": (201, 400, 401, 403, 404, 410),
        "revoke_links": (204,),
        "re_export": (202, 409),
        "jobs": (200, 400, 401),
        "events": (200,),
        "statistics": (200,),
    }
    missing = [
        (route, status)
        for route, statuses in expected.items()
        for status in statuses
        if f'exportd_requests_total{{route="{route}",status="{status}"}}' not in answered
    ]
    assert not missing, missing
    assert not daemon.events("request_failed")

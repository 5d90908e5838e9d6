"""The cleanup and the verification with the real commands: killed half-way, run twice, by a wrong clock."""

import http.client
import json
import subprocess
import sys
import uuid
from datetime import datetime, timedelta

import jwt
import psycopg2
import pytest

from tests.support.application import BASE, SECRET
from tests.support.daemon import Exportd, wait_for
from tests.support.postgres import query
from tests.support.programs import require

EXPIRED = "UPDATE export_jobs SET package_expires_at = now() - interval '3 days'"


def publish(exportd: Exportd, source: object, count: int = 1) -> list[dict[str, object]]:
    return [exportd.publish(source) for _ in range(count)]  # type: ignore[arg-type]


def test_a_cleanup_that_is_killed_before_the_row_is_changed_deletes_nothing(
    exportd: Exportd, source: object
) -> None:
    publish(exportd, source, 2)
    query(exportd.dsn, EXPIRED)
    blocker = psycopg2.connect(exportd.dsn)
    with blocker, blocker.cursor() as cursor:
        # Rows may be locked, and not be written.
        cursor.execute("LOCK TABLE export_jobs IN SHARE MODE")
        process = subprocess.Popen(
            [sys.executable, "-m", "exportd", "cleanup"],
            env=exportd.environ,
            cwd=exportd.folder,
            stdout=subprocess.DEVNULL,
        )
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_for("the update to wait", lambda: query(exportd.dsn, waiting) != [(0,)])
        process.kill()
        process.wait()
    blocker.close()
    assert query(exportd.dsn, "SELECT count(*) FROM export_jobs WHERE package_path IS NOT NULL") == [(2,)]
    assert len(list(exportd.storage.glob("*.tar.gz"))) == 2

    def run() -> subprocess.CompletedProcess[str] | None:
        # The killed one's session holds the lock until the server notices.
        done = exportd.call("cleanup")
        return None if "another cleanup" in done.stderr else done

    done = wait_for("the lock of the killed cleanup", run)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["packagesDeleted"], said["packagesFailed"]) == (2, 0)
    assert said["bytesFreed"] > 0
    assert query(exportd.dsn, "SELECT count(*) FROM export_jobs WHERE package_path IS NOT NULL") == [(0,)]


def test_the_command_tells_what_it_would_do_and_then_what_it_did(exportd: Exportd, source: object) -> None:
    (published,) = publish(exportd, source)
    query(exportd.dsn, EXPIRED)
    size = published["packageSizeBytes"]
    for options, dry in ((["--dry-run"], True), ([], False)):
        done = exportd.call("cleanup", *options)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["dryRun"] is dry
        assert (said["packagesDeleted"], said["packagesWaiting"], said["bytesFreed"]) == (1, 0, size)
        assert said["orphans"] == {"count": 0, "bytes": 0, "removed": 0, "names": []}
        assert bool(list(exportd.storage.glob("*.tar.gz"))) is dry


def test_orphans_are_removed_only_with_an_age(exportd: Exportd, source: object) -> None:
    publish(exportd, source)
    done = exportd.call("cleanup", "--orphans")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--older-than" in done.stderr
    done = exportd.call("cleanup", "--orphans", "--older-than", "0")
    assert done.returncode == 2


def test_a_storage_that_is_not_mounted_is_refused_in_one_line(exportd: Exportd, source: object) -> None:
    publish(exportd, source)
    query(exportd.dsn, EXPIRED)
    exportd.storage.rename(exportd.storage.with_name("unmounted"))
    daemon = exportd.serve()
    assert daemon.url
    assert daemon.wait_for_event("storage_not_recognised")["level"] == "error"
    assert "mounted" in daemon.wait_for_event("cleanup_refused")["reason"]
    done = exportd.call("cleanup")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert ".exportd-storage" in done.stderr
    assert query(exportd.dsn, "SELECT count(*) FROM export_jobs WHERE package_path IS NOT NULL") == [(1,)]


def status_of(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    # Without a time of issue: the daemon's clock may be behind.
    token = jwt.encode({"userId": "ann", "exp": 2**40}, SECRET, algorithm="HS256")
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("offset", ["+2h", "-2h"])
def test_the_databases_clock_decides_and_not_the_daemons(
    exportd: Exportd, source: object, offset: str
) -> None:
    program = require("faketime")
    live, expired = publish(exportd, source, 2)
    query(exportd.dsn, "UPDATE export_jobs SET package_expires_at = now() + interval '1 hour'")
    query(exportd.dsn, f"{EXPIRED} WHERE job_id = %s", (expired["jobId"],))
    daemon = exportd.serve(under=(program, "-f", offset), FAKETIME_DONT_FAKE_MONOTONIC="1")
    told = datetime.fromisoformat(daemon.wait_for_event("server_started")["timestamp"])
    assert abs(told - datetime.now(told.tzinfo)) > timedelta(hours=1)
    assert status_of(daemon.port, f"{BASE}/{live['jobId']}/download") == 200
    assert status_of(daemon.port, f"{BASE}/{expired['jobId']}/download") == 410
    wait_for(
        "the missed cleanup",
        lambda: query(exportd.dsn, "SELECT packages_deleted FROM exportd_cleanup_runs") == [(1,)],
    )
    assert len(list(exportd.storage.glob("*.tar.gz"))) == 1


def test_verify_finds_damage_and_clears_what_proves_sound(exportd: Exportd, source: object) -> None:
    sound, damaged, missing, unknown = publish(exportd, source, 4)
    files = [exportd.storage / str(job["packagePath"]) for job in (sound, damaged, missing, unknown)]
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    files[2].unlink()
    query(
        exportd.dsn,
        "UPDATE export_jobs SET package_sha256 = NULL WHERE job_id = %s",
        (unknown["jobId"],),
    )
    query(
        exportd.dsn,
        "UPDATE export_jobs SET package_suspect_since = now() WHERE job_id = %s",
        (sound["jobId"],),
    )
    done = exportd.run("verify", "--all")
    assert done.returncode == 1
    said = json.loads(done.stdout.splitlines()[-1])
    assert {name: said[name] for name in ("sound", "damaged", "missing", "unreadable", "unknown")} == {
        "sound": 1, "damaged": 1, "missing": 1, "unreadable": 0, "unknown": 1,
    }  # fmt: skip
    assert said["bytesRead"] == sum(int(str(job["packageSizeBytes"])) for job in (sound, damaged, unknown))
    assert "package_damaged" in done.stderr
    assert "package_cleared" in done.stderr
    daemon = exportd.serve()
    assert status_of(daemon.port, f"{BASE}/{damaged['jobId']}/download") == 500
    assert status_of(daemon.port, f"{BASE}/{sound['jobId']}/download") == 200
    files[1].write_bytes(content)
    done = exportd.run("verify", damaged["jobId"])
    assert done.returncode == 0, done.stderr
    assert status_of(daemon.port, f"{BASE}/{damaged['jobId']}/download") == 200
    files[1].write_bytes(content[:-1])
    assert exportd.run("verify", damaged["jobId"]).returncode == 1


def test_verify_does_not_condemn_a_package_for_the_spelling_of_its_digest(
    exportd: Exportd, source: object
) -> None:
    upper, prefixed, empty = publish(exportd, source, 3)
    spellings = ("upper(package_sha256)", "'sha256:' || package_sha256", "''")
    for job, spelling in zip((upper, prefixed, empty), spellings, strict=True):
        change = f"UPDATE export_jobs SET package_sha256 = {spelling} WHERE job_id = %s"
        query(exportd.dsn, change, (job["jobId"],))
    suspect = "UPDATE export_jobs SET package_suspect_since = now() WHERE job_id = %s"
    query(exportd.dsn, suspect, (upper["jobId"],))
    done = exportd.run("verify", "--all")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert {name: said[name] for name in ("sound", "damaged", "unknown")} == {
        "sound": 1, "damaged": 0, "unknown": 2,
    }  # fmt: skip
    assert done.stderr.count("package_digest_unusable") == 2
    assert query(exportd.dsn, "SELECT count(package_suspect_since) FROM export_jobs") == [(0,)]


def test_verify_wants_one_job_or_all(exportd: Exportd) -> None:
    for arguments in ((), ("--all", str(uuid.uuid4())), (str(uuid.uuid4()),)):
        done = exportd.run("verify", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Error: " in done.stderr

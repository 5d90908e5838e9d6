from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from exportd.domain.job import Job
from exportd.domain.permission import Decision, decide_download, may_see
from exportd.domain.principal import Principal

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GRACE = timedelta(hours=24)
CREATOR, STRANGER, ADMIN = Principal("ann", False), Principal("eve", False), Principal("root", True)


def job(**changes: object) -> Job:
    values: dict[str, object] = {
        "job_id": uuid4(),
        "user_id": "ann",
        "status": "completed",
        "tool_name": "tool",
        "completed_at": NOW,
        "package_path": "x.tar.gz",
        "package_size_bytes": 1,
        "package_sha256": None,
        "package_expires_at": NOW + timedelta(days=1),
        "is_suspect": False,
        "read_at": NOW,
    }
    return Job(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("principal", "changes", "decision"),
    [
        (CREATOR, {}, Decision.ALLOWED),
        (ADMIN, {}, Decision.ALLOWED),
        (STRANGER, {}, Decision.UNAUTHORIZED),
        (CREATOR, {"package_expires_at": None}, Decision.ALLOWED),
        (CREATOR, {"package_expires_at": NOW + timedelta(microseconds=1)}, Decision.ALLOWED),
        # Expired means now >= package_expires_at.
        (CREATOR, {"package_expires_at": NOW}, Decision.RESUMABLE),
        (ADMIN, {"package_expires_at": NOW - GRACE + timedelta(microseconds=1)}, Decision.RESUMABLE),
        (ADMIN, {"package_expires_at": NOW - GRACE}, Decision.EXPIRED),
        (CREATOR, {"package_path": None}, Decision.EXPIRED),
        (CREATOR, {"status": "pending", "package_path": None}, Decision.NOT_READY),
        (CREATOR, {"status": "failed"}, Decision.NOT_READY),
        (CREATOR, {"status": "COMPLETED"}, Decision.NOT_READY),
        (CREATOR, {"is_suspect": True}, Decision.SUSPECT),
        (CREATOR, {"is_suspect": True, "package_expires_at": NOW}, Decision.EXPIRED),
        (STRANGER, {"is_suspect": True}, Decision.UNAUTHORIZED),
        # Permission comes first: a stranger learns nothing of readiness or expiry.
        (STRANGER, {"status": "pending"}, Decision.UNAUTHORIZED),
        (STRANGER, {"package_expires_at": NOW}, Decision.UNAUTHORIZED),
        (STRANGER, {"package_path": None}, Decision.UNAUTHORIZED),
    ],
)
def test_decision(principal: Principal, changes: dict[str, object], decision: Decision) -> None:
    assert decide_download(principal, job(**changes), GRACE) is decision


def test_without_grace_nothing_is_resumed() -> None:
    assert decide_download(CREATOR, job(package_expires_at=NOW), timedelta()) is Decision.EXPIRED


def test_may_see_compares_ids_exactly() -> None:
    assert may_see(CREATOR, "ann")
    assert not may_see(CREATOR, "Ann")
    assert not may_see(CREATOR, "ann ")

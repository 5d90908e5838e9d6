"""What a user installs holds what it needs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parent.parent


def test_the_wheel_holds_schema_configuration_and_migrations(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, REPOSITORY],
        check=True,
    )
    (wheel,) = tmp_path.glob("exportd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in ("schema.sql", "config.toml"):
            assert archive.read(f"exportd/{name}") == (REPOSITORY / name).read_bytes()
    migrations = (REPOSITORY / "exportd" / "db" / "migrations").glob("*.sql")
    assert {f"exportd/db/migrations/{path.name}" for path in migrations} <= names
    pages = [path.name for path in (REPOSITORY / "exportd" / "web" / "openapi" / "swagger").iterdir()]
    assert {f"exportd/web/openapi/swagger/{name}" for name in pages} <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)

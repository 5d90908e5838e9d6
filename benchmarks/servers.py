"""exportd and its peers, each started on loopback over the bench's packages and database.

A peer that cannot be had raises PeerMissing, which says why; it is then reported as not measured.
"""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.harness import (
    CACHE,
    PEERS,
    REPOSITORY,
    Bench,
    BenchmarkBroken,
    Counted,
    Package,
    clean_environ,
    free_port,
    running,
    wait_until,
)
from benchmarks.load import Target, is_listening

_INSTALL_SECONDS = 300
_JOBS = "/api/tool-registry/export-jobs"


class PeerMissing(Exception):
    """The peer is not here and cannot be installed. The message says why."""


@dataclass(frozen=True)
class Server:
    """A server that runs. ``counts``: it checks tokens and counts downloads in the database."""

    name: str
    port: int
    process: psutil.Process
    folder: Path
    authorization: str
    counts: bool = True
    tls_authority: Path | None = None

    def target(self, package: Package) -> Target:
        path = f"{_JOBS}/{package.job_id}/download" if self.counts else f"/{package.file.name}"
        return Target(self.port, path, self.authorization, package.size_bytes, self.tls_authority)

    @contextlib.contextmanager
    def counting(self, bench: Bench) -> Iterator[Counted]:
        """As ``Bench.counted``, for a server that counts; another must leave the counts alone."""
        said = Counted()
        wrong = bench.faults if self.name.startswith("exportd") else bench.oddities
        with bench.counted(self.name, wrong) as counted:
            yield said
            if self.counts:
                counted.completed, counted.cut = said.completed, said.cut


Start = Callable[[Bench], AbstractContextManager[Server]]


@contextlib.contextmanager
def exportd(
    bench: Bench,
    *options: str,
    name: str = "exportd",
    tls: bool = False,
    probe: Path | None = None,
    **settings: object,
) -> Iterator[Server]:
    """``exportd serve`` with its defaults, and ``settings`` such as ``download__sendfile=False``.

    ``probe``: the file that the event loop's probe writes to (see ``benchmarks.probe``).
    """
    folder = bench.subfolder("exportd")
    environ = {
        **clean_environ(),
        "EXPORTD_DATA_DIR": str(folder),
        "EXPORTD_DATABASE__DSN": bench.dsn,
        "EXPORTD_STORAGE__ROOT": str(bench.storage),
        "EXPORTD_AUTH__SECRET": bench.secret,
        "EXPORTD_SERVER__PORT": "0",
        "PYTHONPATH": str(REPOSITORY),
    }
    if tls:
        environ["EXPORTD_SERVER__TLS_CERT"] = str(bench.certificate.chain)
        environ["EXPORTD_SERVER__TLS_KEY"] = str(bench.certificate.key)
    for key, value in settings.items():
        environ[f"EXPORTD_{key.upper()}"] = str(value).lower()
    module = "exportd"
    if probe is not None:
        module, environ["PROBE"] = "benchmarks.probe", str(probe)
    with running([sys.executable, "-m", module, "serve", *options], environ, folder) as process:

        def address() -> str | None:
            for line in (folder / "output").read_text().splitlines():
                if '"server_started"' in line:
                    url: str = json.loads(line)["url"]
                    return url
            _check_alive(process, name, folder)
            return None

        url = wait_until(address)
        if url is None:
            raise BenchmarkBroken(f"{name} did not start")
        yield Server(
            name,
            int(url.rpartition(":")[2]),
            psutil.Process(process.pid),
            folder,
            bench.authorization(),
            tls_authority=bench.certificate.authority if tls else None,
        )


@contextlib.contextmanager
def nginx(bench: Bench, *, tls: bool = False) -> Iterator[Server]:
    """Debian's or any other: static files by sendfile, one worker, no token, nothing counted."""
    program = _program("nginx", "apt install nginx-light")
    folder = bench.subfolder("nginx")
    ports = {"port": free_port(), "tls_port": free_port()}
    configuration = (PEERS / "nginx.conf").read_text()
    (folder / "nginx.conf").write_text(
        configuration.format(
            folder=folder,
            storage=bench.storage,
            certificate=bench.certificate.chain,
            key=bench.certificate.key,
            **ports,
        )
    )
    port = ports["tls_port" if tls else "port"]
    command = [program, "-p", folder, "-e", folder / "error.log", "-c", folder / "nginx.conf"]
    with running(command, clean_environ(), folder) as process:
        yield _listening(
            "nginx", port, process, folder, bench, bench.certificate.authority if tls else None, counts=False
        )


@contextlib.contextmanager
def aiohttp(bench: Bench) -> Iterator[Server]:
    """aiohttp's FileResponse, on uvloop, in the project's own environment."""
    with _peer(bench, "aiohttp", [sys.executable, PEERS / "aiohttp_app.py"]) as server:
        yield server


@contextlib.contextmanager
def starlette(bench: Bench) -> Iterator[Server]:
    """Starlette's FileResponse on uvicorn, with uvloop and httptools."""
    recipe = PEERS / "starlette" / "requirements.txt"
    modules = _installed("starlette", recipe, _pip_install)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--app-dir", recipe.parent, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--loop", "uvloop", "--http", "httptools", "app:app"]
    with _peer(bench, "Starlette", command, port, PYTHONPATH=str(modules)) as server:
        yield server


@contextlib.contextmanager
def express(bench: Bench) -> Iterator[Server]:
    """Express, jsonwebtoken and pg on Node."""
    node = _program("node", "install Node.js 18 or newer")
    modules = _installed("express", PEERS / "express" / "package.json", _npm_install)
    command = [node, PEERS / "express" / "server.js"]
    with _peer(bench, "Express", command, MODULES=str(modules), NODE_ENV="production") as server:
        yield server


def start_all(
    stack: contextlib.ExitStack, bench: Bench, starts: dict[str, Start], missing: dict[str, str]
) -> dict[str, Server]:
    """Starts those that can be had, until the stack is closed; ``missing`` is told why others cannot."""
    servers: dict[str, Server] = {}
    for name, start in starts.items():
        try:
            servers[name] = stack.enter_context(start(bench))
        except PeerMissing as error:
            missing[name] = str(error)
    return servers


@contextlib.contextmanager
def _peer(
    bench: Bench, name: str, command: list[object], port: int | None = None, **environ: str
) -> Iterator[Server]:
    folder = bench.subfolder("peer")
    port = port or free_port()
    environ = {
        **clean_environ(),
        **bench.postgres_environ,
        "SECRET": bench.secret,
        "STORAGE": str(bench.storage),
        "PORT": str(port),
        **environ,
    }
    with running(command, environ, folder) as process:
        yield _listening(name, port, process, folder, bench)


def _listening(
    name: str,
    port: int,
    process: subprocess.Popen[bytes],
    folder: Path,
    bench: Bench,
    tls_authority: Path | None = None,
    counts: bool = True,
) -> Server:
    def listening() -> bool:
        _check_alive(process, name, folder)
        return is_listening(port)

    if not wait_until(listening):
        raise BenchmarkBroken(f"{name} did not start")
    authorization = bench.authorization()
    return Server(name, port, psutil.Process(process.pid), folder, authorization, counts, tls_authority)


def _check_alive(process: subprocess.Popen[bytes], name: str, folder: Path) -> None:
    if process.poll() is not None:
        raise BenchmarkBroken(f"{name} ended with {process.returncode}: {(folder / 'output').read_text()}")


def _program(name: str, advice: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise PeerMissing(f"{name} is not installed ({advice})")
    return path


def _installed(name: str, recipe: Path, install: Callable[[Path, Path], None]) -> Path:
    """The folder with the peer's modules, installed the first time. Its name tells the recipe and Python."""
    version = hashlib.sha256(recipe.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{version}"
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        print(f"  installing {name} …", flush=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as draft:
            try:
                install(recipe, Path(draft))
            except (subprocess.SubprocessError, OSError) as error:
                raise PeerMissing(f"its installation failed: {error}") from error
            shutil.copytree(draft, folder, symlinks=True)
    return folder


def _pip_install(recipe: Path, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", folder, "-r", recipe], check=True, timeout=_INSTALL_SECONDS)


def _npm_install(recipe: Path, folder: Path) -> None:
    npm = _program("npm", "it comes with Node.js")
    shutil.copy(recipe, folder)
    command = [npm, "install", "--silent", "--no-audit", "--no-fund"]
    subprocess.run(command, cwd=folder, check=True, timeout=_INSTALL_SECONDS)

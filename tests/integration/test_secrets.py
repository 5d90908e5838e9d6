"""Where secrets come from, and who gets to see them."""

import json
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.support.application import ANN, BASE, SECRET
from tests.support.daemon import Daemon, Exportd, wait_for


def environment(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(line.decode().split("=", 1) for line in lines if line)


def status(daemon: Daemon, headers: dict[str, str]) -> int:
    with urllib.request.urlopen(urllib.request.Request(f"{daemon.url}{BASE}", headers=headers)) as response:
        found: int = response.status
        return found


def packer_of(daemon: Daemon) -> psutil.Process:
    def find() -> list[psutil.Process]:
        children = psutil.Process(daemon.process.pid).children()
        return [child for child in children if "packer" in child.cmdline()]

    wait_for("the packer", find)
    (packer,) = find()
    return packer


def test_child_processes_inherit_no_secret(exportd: Exportd) -> None:
    former = "a former secret for the tests, 32 bytes"
    daemon = exportd.serve(
        EXPORTD_DATABASE__DSN="",
        EXPORTD_PACKER__ENABLED="true",
        EXPORTD_AUTH__FORMER_SECRETS=json.dumps([former]),
    )
    assert daemon.url
    folder = exportd.folder / "data" / "postgres"
    postmaster = int((folder / "postmaster.pid").read_text().splitlines()[0])
    server = environment(postmaster)
    assert not [name for name in server if name.startswith("EXPORTD_")]
    packer = environment(packer_of(daemon).pid)
    assert "EXPORTD_DATA_DIR" in packer
    for environ in (server, packer):
        assert SECRET not in str(environ)
        assert former not in str(environ)
    assert daemon.stop() == 0


def test_the_packer_still_gets_the_database(exportd: Exportd) -> None:
    daemon = exportd.serve(EXPORTD_PACKER__ENABLED="true")
    packer = environment(packer_of(daemon).pid)
    assert packer["EXPORTD_DATABASE__DSN"] == exportd.dsn
    assert "EXPORTD_AUTH__SECRET" not in packer


def test_secrets_may_lie_in_files(exportd: Exportd) -> None:
    secret, dsn = exportd.folder / "secret", exportd.folder / "dsn"
    secret.write_text(f"{SECRET}\n")
    dsn.write_text(f"{exportd.dsn}\n")
    files = {
        "EXPORTD_AUTH__SECRET": "",
        "EXPORTD_AUTH__SECRET_FILE": str(secret),
        "EXPORTD_DATABASE__DSN": "",
        "EXPORTD_DATABASE__DSN_FILE": str(dsn),
    }
    daemon = exportd.serve(**files)
    assert status(daemon, ANN) == 200
    assert not (exportd.folder / "data" / "postgres").exists()
    done = exportd.call("token", "--user", "ann", **files)
    assert status(daemon, {"Authorization": f"Bearer {done.stdout.strip()}"}) == 200


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read: No such file or directory"), (b"", "is empty"),
     (b"short\n", "at least 32 bytes"), (b"\xff" * 40, "is not text in UTF-8")],
    ids=["missing", "empty", "short", "binary"],
)  # fmt: skip
def test_a_file_without_a_usable_secret_is_named(
    exportd: Exportd, content: bytes | None, problem: str
) -> None:
    file = exportd.folder / "secret"
    if content is not None:
        file.write_bytes(content)
    done = exportd.call(
        "token", "--user", "ann", EXPORTD_AUTH__SECRET="", EXPORTD_AUTH__SECRET_FILE=str(file)
    )
    assert done.returncode != 0
    assert "auth.secret_file: " in done.stderr
    assert problem in done.stderr
    assert "short" not in done.stderr


def test_a_secret_is_given_once(exportd: Exportd) -> None:
    done = exportd.call("token", "--user", "ann", EXPORTD_AUTH__SECRET_FILE="/nowhere")
    assert done.returncode != 0
    assert "auth: secret and secret_file must not both be given" in done.stderr


@pytest.mark.parametrize(
    ("host", "environ", "is_warned"),
    [
        ("0.0.0.0", {}, True),
        ("127.0.0.1", {}, False),
        ("0.0.0.0", {"EXPORTD_SERVER__TRUSTED_PROXIES": '["10.0.0.1"]'}, False),
    ],
)
def test_tokens_that_would_travel_unencrypted_are_warned_of(
    exportd: Exportd, host: str, environ: dict[str, str], is_warned: bool
) -> None:
    daemon = exportd.serve("--host", host, **environ)
    daemon.wait_for_event("server_started")
    warnings = [line for line in daemon.log if line["event"] == "tokens_travel_unencrypted"]
    assert len(warnings) == int(is_warned)
    assert all("trusted_proxies" in line["advice"] for line in warnings)

"""Whose tokens the real command believes."""

import http.client
from pathlib import Path

import jwt

from tests.auth.test_attacks import OTHER_RSA, RSA, claims, pem
from tests.support.daemon import Exportd


def status_of(port: int, path: str, token: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    status = connection.getresponse().status
    connection.close()
    return status


def test_tokens_signed_by_a_provider_are_verified_with_its_public_key(exportd: Exportd, source: Path) -> None:
    key_file = exportd.folder / "provider.pem"
    key_file.write_bytes(pem(RSA))
    published = exportd.publish(source)
    settings = {
        "EXPORTD_AUTH__SECRET": "",
        "EXPORTD_AUTH__PUBLIC_KEY_FILES": f'["{key_file}"]',
        "EXPORTD_AUTH__USER_CLAIM": "sub",
        "EXPORTD_AUTH__AUDIENCE": '["exports"]',
    }
    daemon = exportd.serve(**settings)
    path = f"/api/tool-registry/export-jobs/{published['jobId']}/download"
    good = {"sub": "ann", "aud": ["exports", "others"]}
    assert status_of(daemon.port, path, jwt.encode(claims(**good), RSA, algorithm="RS256")) == 200
    assert status_of(daemon.port, path, jwt.encode(claims(**good), OTHER_RSA, algorithm="RS256")) == 401
    # Nobody can sign by the data folder's secret: none is made.
    assert not (exportd.folder / "data" / "secret").exists()
    done = exportd.call("token", "--user", "ann", **settings)
    assert done.returncode == 1
    assert "no secret is configured" in done.stderr


def test_a_key_that_cannot_be_used_is_told_in_one_line_before_anything_starts(exportd: Exportd) -> None:
    key_file = exportd.folder / "provider.pem"
    key_file.write_text("nonsense")
    for workers in ("1", "2"):
        done = exportd.call("serve", "--workers", workers, EXPORTD_AUTH__PUBLIC_KEY_FILES=f'["{key_file}"]')
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"exportd: {key_file}: no public key or certificate in PEM form\n"

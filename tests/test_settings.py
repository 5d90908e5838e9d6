import os
from pathlib import Path

import pytest

from exportd.settings import Settings, SettingsError, load_settings

REPOSITORY = Path(__file__).parent.parent
NOTHING = Path(os.devnull)


def problems_of(environ: dict[str, str], text: str = "", tmp_path: Path | None = None) -> list[str]:
    config = NOTHING
    if tmp_path is not None:
        config = tmp_path / "config.toml"
        config.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(config, environ)
    return caught.value.problems


def test_config_toml_in_the_repository_holds_every_key_at_its_default() -> None:
    import tomllib

    document = tomllib.loads((REPOSITORY / "config.toml").read_text())
    assert load_settings(REPOSITORY / "config.toml", {}) == load_settings(NOTHING, {})
    for name, field in Settings.model_fields.items():
        keys = getattr(field.annotation, "model_fields", None)
        if keys is None:
            assert name in document
        else:
            assert list(document[name]) == list(keys), f"[{name}] of config.toml differs from the settings"


def test_environment_wins_over_file_and_options_win_over_both(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[server]\nhost = '127.0.0.2'\nport = 1\nbase_path = '/file'\n")
    environ = {"EXPORTD_SERVER__PORT": "2", "EXPORTD_SERVER__HOST": "127.0.0.3"}
    server = load_settings(config, environ, {("server", "port"): 3}).server
    assert (server.base_path, server.host, server.port) == ("/file", "127.0.0.3", 3)


def test_config_is_looked_up_by_option_then_variable_then_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, port in (("config.toml", 1), ("by-variable.toml", 2), ("by-option.toml", 3)):
        (tmp_path / name).write_text(f"[server]\nport = {port}\n")
    monkeypatch.chdir(tmp_path)
    by_variable = {"EXPORTD_CONFIG": "by-variable.toml"}
    assert load_settings(None, {}).server.port == 1
    assert load_settings(None, by_variable).server.port == 2
    assert load_settings(Path("by-option.toml"), by_variable).server.port == 3


def test_no_config_file_at_all_means_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(None, {})
    assert settings.server.port == 8080
    assert settings.data_dir == tmp_path / "exportd-data"
    assert settings.storage_root == tmp_path / "exportd-data" / "packages"


def test_paths_come_out_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(None, {"EXPORTD_DATA_DIR": "data", "EXPORTD_STORAGE__ROOT": "store"})
    assert (settings.data_dir, settings.storage_root) == (tmp_path / "data", tmp_path / "store")


def test_every_problem_is_reported_at_once_by_key_and_origin(tmp_path: Path) -> None:
    found = problems_of(
        {"EXPORTD_DOWNLOAD__CHUNK_SIZE": "many", "EXPORTD_NOWHERE__KEY": "1", "EXPORTD_SERVER_HOST": "x"},
        "[server]\nport = 70000\nprot = 1\n[retention]\ndays = 0\n[logging]\nlevel = 'loud'\n",
        tmp_path,
    )
    starts = {problem.split(":")[0] for problem in found}
    assert starts == {
        "server.port", "server.prot", "retention.days", "logging.level", "download.chunk_size", "nowhere",
        "EXPORTD_SERVER_HOST",
    }  # fmt: skip
    text = "\n".join(found)
    assert f"server.prot: unknown key (from {tmp_path / 'config.toml'})" in text
    assert "(from EXPORTD_DOWNLOAD__CHUNK_SIZE)" in text
    assert "nowhere: unknown key (from EXPORTD_NOWHERE__KEY)" in text
    assert "did you mean EXPORTD_SERVER__HOST?" in text


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[server]\nport = '8080'", "server.port"),
        ("[server]\nport = true", "server.port"),
        ("[server]\nport = 80.5", "server.port"),
        ("[server]\nport = -1", "server.port"),
        ("[server]\nhost = ''", "server.host"),
        ("[server]\nbase_path = 'api'", "server.base_path"),
        ("[server]\nbase_path = '/api/'", "server.base_path"),
        ("[server]\nbase_path = '/a{b}'", "server.base_path"),
        ("[server]\ntls_cert = '/a.pem'", "server"),
        ("[server]\ndrain_timeout_seconds = -1", "server.drain_timeout_seconds"),
        ("[database]\npool_min_size = 20", "database"),
        ("[database]\nstatement_timeout_seconds = 0", "database.statement_timeout_seconds"),
        ("[auth]\nsecret = '12345678'", "auth.secret"),
        ("[auth]\nuser_claim = ''", "auth.user_claim"),
        ("[download]\nsendfile = 'yes'", "download.sendfile"),
        ("[download]\nchunk_size = 0", "download.chunk_size"),
        ("[download]\nmax_rate_bytes_per_second = 999", "download"),
        ("[download]\ntotal_rate_bytes_per_second = 999", "download"),
        ("[database]\ndsn = 'x'\ndsn_file = '/x'", "database"),
        ("[logging]\nformat = 'xml'", "logging.format"),
        ("server = 1", "server"),
        ("[nothing]", "nothing"),
    ],
)
def test_wrong_values_are_refused_by_key(text: str, key: str, tmp_path: Path) -> None:
    assert [problem.split(":")[0] for problem in problems_of({}, text, tmp_path)] == [key]


def test_values_are_never_shown_since_they_may_be_secret(tmp_path: Path) -> None:
    found = problems_of({}, "[auth]\nsecret = 'hunter2'\n[database]\ndsn = 7\n", tmp_path)
    assert "hunter2" not in "".join(found)
    settings = load_settings(NOTHING, {"EXPORTD_DATABASE__DSN": "postgresql://u:hunter2@h/d"})
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("[server\n", "not valid TOML"), ("\xff", "not valid TOML")],
)
def test_broken_file_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    config = tmp_path / "broken.toml"
    config.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError, match=f"broken.toml is {sentence}"):
        load_settings(config, {})


def test_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml does not exist"):
        load_settings(tmp_path / "nowhere.toml", {})
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path, {})


def test_variables_of_a_kubernetes_service_of_our_name_are_ignored() -> None:
    environ = {"EXPORTD_PORT": "tcp://10.0.0.1:80", "EXPORTD_SERVICE_HOST": "10.0.0.1"}
    assert load_settings(NOTHING, environ) == load_settings(NOTHING, {})
    environ = {"EXPORTD_SERVER_PORT": "tcp://10.0.0.1:80", "EXPORTD_SERVER_SERVICE_HOST": "10.0.0.1"}
    assert load_settings(NOTHING, environ) == load_settings(NOTHING, {})
    with pytest.raises(SettingsError, match="did you mean EXPORTD_SERVER__PORT"):
        load_settings(NOTHING, {"EXPORTD_SERVER_PORT": "80"})


def test_settings_cannot_be_changed() -> None:
    settings = load_settings(NOTHING, {})
    with pytest.raises(ValueError, match="frozen"):
        settings.server.port = 1

"""The configuration: config.toml and the environment, as one validated, frozen object.

Later sources win: built-in defaults, the configuration file, ``EXPORTD_<SECTION>__<KEY>``, command-line
options. Everything is checked before the daemon starts. All problems are reported together, by key, without
the value, which may be a secret.
"""

import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, SecretStr, ValidationError

from exportd.settings.sections import Section, Settings, SettingsError

ENVIRONMENT_PREFIX = "EXPORTD_"
# The value of a variable that Kubernetes sets for a service.
_SERVICE_LINK = re.compile("(tcp|udp|sctp)://")

Key = tuple[str, ...]


def load_settings(
    config_file: Path | None, environ: Mapping[str, str], options: Mapping[Key, object] | None = None
) -> Settings:
    """Reads the configuration.

    ``config_file`` must exist. Without it, reads ``$EXPORTD_CONFIG``, or else ``./config.toml`` if it exists.
    ``options`` holds command-line values by key, such as ``("server", "port")``. Raises SettingsError.
    """
    document, source = _read_config_file(config_file, environ)
    origins: dict[Key, str] = {}
    problems: list[str] = []
    for variable, key in _environment_keys(environ, problems):
        _put(document, key, _parse_environment_value(environ[variable], key))
        origins[key] = variable
    for key, value in (options or {}).items():
        _put(document, key, value)
        origins[key] = f"--{key[-1].replace('_', '-')}"
    try:
        settings = Settings.model_validate_json(json.dumps(document, default=str), strict=True)
    except ValidationError as error:
        problems.extend(
            _describe(tuple(str(part) for part in item["loc"]), item["type"], item["msg"], origins, source)
            for item in error.errors(include_url=False, include_context=False, include_input=False)
        )
    if problems:
        raise SettingsError(problems)
    return settings.model_copy(update={"data_dir": settings.data_dir.absolute()})


def child_environment(environ: Mapping[str, str], *, keep_settings: bool = False) -> dict[str, str]:
    """Returns the environment of a child process, without settings and their secrets.

    ``keep_settings`` is for exportd's own processes: they get all settings but ``[auth]``, because only the
    daemon verifies tokens.
    """
    withheld = f"{ENVIRONMENT_PREFIX}AUTH__" if keep_settings else ENVIRONMENT_PREFIX
    return {name: value for name, value in environ.items() if not name.upper().startswith(withheld)}


def _read_config_file(config_file: Path | None, environ: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    named = config_file or (Path(environ["EXPORTD_CONFIG"]) if environ.get("EXPORTD_CONFIG") else None)
    path = named or Path("config.toml")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), str(path)
    except FileNotFoundError:
        if named is None:
            return {}, "built-in defaults"
        raise SettingsError([f"configuration file {path} does not exist"]) from None
    except OSError as error:
        raise SettingsError([f"configuration file {path} cannot be read: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError([f"configuration file {path} is not valid TOML: {error}"]) from error


def _environment_keys(environ: Mapping[str, str], problems: list[str]) -> list[tuple[str, Key]]:
    """Returns the variables that set a key. Other variables with the prefix are ignored, except near misses
    of a real key: Kubernetes sets ``EXPORTD_PORT`` and similar ones for a service of that name, and
    ``EXPORTD_SERVER_PORT`` for one called exportd-server."""
    near_misses = {"_".join(key).upper(): "__".join(key).upper() for key in _known_keys() if len(key) == 2}
    found: list[tuple[str, Key]] = []
    for variable in sorted(environ):
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if name == variable:
            continue
        if name == "DATA_DIR":
            found.append((variable, ("data_dir",)))
        elif "__" in name:
            found.append((variable, tuple(name.lower().split("__"))))
        elif name in near_misses and not _SERVICE_LINK.match(environ[variable]):
            problems.append(
                f"{variable}: unknown variable, did you mean {ENVIRONMENT_PREFIX}{near_misses[name]}?"
            )
    return found


def _known_keys() -> list[Key]:
    keys: list[Key] = []
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys.extend((name, key) for key in section.model_fields)
        else:
            keys.append((name,))
    return keys


def _parse_environment_value(text: str, key: Key) -> object:
    """Returns text as it is, and parses other types as TOML. The validation rejects what does not parse."""
    if _is_text(key):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _is_text(key: Key) -> bool:
    annotation: object = Settings
    for name in key:
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return True
        field = annotation.model_fields.get(name)
        if field is None:
            return True
        annotation = field.annotation
    if isinstance(annotation, types.UnionType):
        annotation = next(arm for arm in typing.get_args(annotation) if arm is not type(None))
    return annotation in (str, Path, SecretStr) or typing.get_origin(annotation) is Literal


def _put(document: dict[str, Any], key: Key, value: object) -> None:
    for name in key[:-1]:
        inner = document.get(name)
        if not isinstance(inner, dict):
            inner = document[name] = {}
        document = inner
    document[key[-1]] = value


def _describe(key: Key, kind: str, message: str, origins: Mapping[Key, str], source: str) -> str:
    # An unknown section is reported once, by its own name.
    origin = next((name for set_key, name in origins.items() if set_key[: len(key)] == key), source)
    sentence = "unknown key" if kind == "extra_forbidden" else message.removeprefix("Value error, ")
    return f"{'.'.join(key) or 'configuration'}: {sentence} (from {origin})"

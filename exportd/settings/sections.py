"""The sections of the configuration, each a frozen model that checks its values."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

from exportd.errors import OperatorError

MINIMUM_SECRET_BYTES = 32


class SettingsError(OperatorError):
    """The configuration cannot be used. ``problems`` holds one line for each key."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self._problems = problems

    @property
    def problems(self) -> list[str]:
        return self._problems


def _check_base_path(value: str) -> str:
    if value and (not value.startswith("/") or value.endswith("/") or "//" in value):
        raise ValueError("must begin with a slash and not end with one, such as /api/tool-registry")
    if set(value) & set("{}?#% \\"):
        raise ValueError("must be a plain path, without spaces, braces, '?', '#' or '%'")
    return value


def _check_schedule(value: str) -> str:
    try:
        CronSim(value, datetime.now(UTC))
    except CronSimError as error:
        raise ValueError(f"must be a crontab line, such as 0 3 * * *: {error}") from error
    return value


def _check_timezone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ValueError, OSError, ZoneInfoNotFoundError) as error:
        raise ValueError("must be a time zone, such as UTC or Europe/Berlin") from error
    return value


def _check_secret(value: SecretStr | None) -> SecretStr | None:
    if value is not None and len(value.get_secret_value().encode()) < MINIMUM_SECRET_BYTES:
        raise ValueError(f"must be at least {MINIMUM_SECRET_BYTES} bytes long")
    return value


def _check_jwks_url(value: str | None) -> str | None:
    if value is not None:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an address, such as https://login.example.com/keys")
    return value


def _check_host(value: str) -> str:
    if urlsplit(f"//{value}").netloc != value or urlsplit(f"//{value}").port is not None or not value:
        raise ValueError("must be a host without a port, such as downloads.example.com")
    return (urlsplit(f"//{value}").hostname or "").lower()


def _check_origin(value: str) -> str:
    parts = urlsplit(value)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or value != f"{parts.scheme}://{parts.netloc}"
    ):
        raise ValueError("must be an origin, such as https://app.example.com")
    if "*" in value or "@" in value or value != value.lower():
        raise ValueError("must be one origin in lower case, such as https://app.example.com")
    return value


def _check_network(value: str) -> str:
    try:
        return str(ip_network(value))
    except ValueError as error:
        raise ValueError("must be an address or a network, such as 10.0.0.0/8") from error


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


# TOML has no null, so an empty string stands for "not set".
OptionalPath = Annotated[Path | None, BeforeValidator(_empty_is_none)]
OptionalSecret = Annotated[SecretStr | None, BeforeValidator(_empty_is_none)]
Seconds = Annotated[float, Field(gt=0, le=86400 * 365)]


class Section(BaseModel):
    """Base class. Unknown keys are errors, and types are strict."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _refuse_both(section: "Section", name: str) -> None:
    """Raises ValueError if a secret and the file that holds it are both given."""
    if getattr(section, name) is not None and getattr(section, f"{name}_file") is not None:
        raise ValueError(f"{name} and {name}_file must not both be given")


def _read_secret(secret: SecretStr | None, path: Path | None, key: str) -> str | None:
    """Returns the secret, or that of the file. ``key`` is the file's setting. Raises SettingsError."""
    return secret.get_secret_value() if secret else _read_file(path, key)


def _read_file(path: Path | None, key: str) -> str | None:
    """Returns the file's text, without surrounding white space. Raises SettingsError."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError([f"{key}: {path} cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise SettingsError([f"{key}: {path} is not text in UTF-8"]) from error
    if not text:
        raise SettingsError([f"{key}: {path} is empty"])
    return text


class ServerSettings(Section):
    """Listening, connections and draining."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    base_path: Annotated[str, AfterValidator(_check_base_path)] = "/api/tool-registry"
    drain_timeout_seconds: Annotated[float, Field(ge=0, le=86400 * 7)] = 60.0
    max_connections: Annotated[int, Field(ge=0)] = 0
    head_timeout_seconds: Seconds = 10.0
    keepalive_timeout_seconds: Seconds = 75.0
    allowed_hosts: tuple[Annotated[str, AfterValidator(_check_host)], ...] = ()
    cors_origins: tuple[Annotated[str, AfterValidator(_check_origin)], ...] = ()
    trusted_proxies: tuple[Annotated[str, AfterValidator(_check_network)], ...] = ()
    forwarded_field: Literal["X-Forwarded-For", "Forwarded"] = "X-Forwarded-For"
    metrics_from: tuple[Annotated[str, AfterValidator(_check_network)], ...] = ("127.0.0.0/8", "::1/128")
    tls_cert: OptionalPath = None
    tls_key: OptionalPath = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")
        return self


class DatabaseSettings(Section):
    """The database, its pool and its time limits."""

    dsn: OptionalSecret = None
    dsn_file: OptionalPath = None
    direct_dsn: OptionalSecret = None
    direct_dsn_file: OptionalPath = None
    pool_min_size: Annotated[int, Field(ge=0, le=1000)] = 1
    pool_max_size: Annotated[int, Field(ge=1, le=1000)] = 10
    connect_timeout_seconds: Seconds = 5.0
    statement_timeout_seconds: Seconds = 10.0
    startup_timeout_seconds: Seconds = 30.0

    @model_validator(mode="after")
    def _sizes_in_order(self) -> Self:
        if self.pool_min_size > self.pool_max_size:
            raise ValueError("pool_min_size must not be larger than pool_max_size")
        return self

    @model_validator(mode="after")
    def _one_dsn(self) -> Self:
        _refuse_both(self, "dsn")
        _refuse_both(self, "direct_dsn")
        if self.is_embedded and (self.direct_dsn is not None or self.direct_dsn_file is not None):
            raise ValueError("direct_dsn needs dsn or dsn_file")
        return self

    @property
    def is_embedded(self) -> bool:
        return self.dsn is None and self.dsn_file is None

    def read_dsn(self) -> str | None:
        """Returns the libpq connection string, or None for the embedded database. Raises SettingsError."""
        return _read_secret(self.dsn, self.dsn_file, "database.dsn_file")

    def read_direct_dsn(self) -> str | None:
        """Returns the connection string past a pooler, or None. Raises SettingsError."""
        return _read_secret(self.direct_dsn, self.direct_dsn_file, "database.direct_dsn_file")


class StorageSettings(Section):
    """The folder of the packages. Empty: ``<data_dir>/packages``."""

    root: OptionalPath = None


Algorithm = Literal[
    "HS256", "HS384", "HS512",
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512",
    "ES256", "ES384", "ES512", "EdDSA",
]  # fmt: skip
Secret = Annotated[OptionalSecret, AfterValidator(_check_secret)]


class AuthSettings(Section):
    """The verification of tokens. Without any key, a secret is made in the data folder."""

    secret: Secret = None
    secret_file: OptionalPath = None
    former_secrets: tuple[Annotated[SecretStr, AfterValidator(_check_secret)], ...] = ()
    public_key_files: tuple[Path, ...] = ()
    jwks_url: Annotated[str | None, BeforeValidator(_empty_is_none), AfterValidator(_check_jwks_url)] = None
    jwks_refresh_seconds: Annotated[Seconds, Field(ge=30)] = 600.0
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = (
        "HS256", "RS256", "PS256", "ES256", "EdDSA",
    )  # fmt: skip
    issuer: Annotated[str | None, BeforeValidator(_empty_is_none)] = None
    audience: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    leeway_seconds: Annotated[float, Field(ge=0, le=300)] = 0.0
    user_claim: Annotated[str, Field(min_length=1)] = "userId"
    role_claim: Annotated[str, Field(min_length=1)] = "role"
    admin_role: Annotated[str, Field(min_length=1)] = "admin"

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        _refuse_both(self, "secret")
        return self

    @property
    def makes_own_secret(self) -> bool:
        is_secret_given = self.secret is not None or self.secret_file is not None
        return not is_secret_given and not self.public_key_files and self.jwks_url is None

    def read_secret(self) -> str | None:
        """Returns the configured secret, or None. Raises SettingsError."""
        if self.secret is not None:
            return self.secret.get_secret_value()
        secret = _read_file(self.secret_file, "auth.secret_file")
        if secret is not None and len(secret.encode()) < MINIMUM_SECRET_BYTES:
            raise SettingsError([f"auth.secret_file: must hold at least {MINIMUM_SECRET_BYTES} bytes"])
        return secret


class DownloadSettings(Section):
    """Sending packages."""

    chunk_size: Annotated[int, Field(ge=1024, le=16 * 1024 * 1024)] = 65536
    sendfile: bool = True
    slice_bytes: Annotated[int, Field(ge=4096, le=64 * 1024 * 1024)] = 524288
    max_ranges: Annotated[int, Field(ge=1, le=1000)] = 16
    max_rate_bytes_per_second: Annotated[int, Field(ge=0)] = 0
    total_rate_bytes_per_second: Annotated[int, Field(ge=0)] = 0
    stall_timeout_seconds: Seconds = 60.0
    min_rate_bytes_per_second: Annotated[int, Field(ge=0)] = 1000
    min_rate_window_seconds: Seconds = 60.0

    @model_validator(mode="after")
    def _rates_in_order(self) -> Self:
        for name in ("max_rate_bytes_per_second", "total_rate_bytes_per_second"):
            if 0 < getattr(self, name) < self.min_rate_bytes_per_second:
                raise ValueError(f"{name} must not be less than min_rate_bytes_per_second")
        return self


class LinkSettings(Section):
    """The lifetime of download links."""

    start_seconds: Seconds = 3600.0
    resume_seconds: Seconds = 86400.0

    @model_validator(mode="after")
    def _resume_outlasts_start(self) -> Self:
        if self.resume_seconds < self.start_seconds:
            raise ValueError("resume_seconds must not be less than start_seconds")
        return self


class LimitSettings(Section):
    """Limits of a user, of an address, or of all. 0 disables a limit."""

    connections_per_address: Annotated[int, Field(ge=0)] = 256
    requests_per_minute_per_address: Annotated[int, Field(ge=0)] = 1200
    requests_per_minute_per_user: Annotated[int, Field(ge=0)] = 0
    downloads_per_user: Annotated[int, Field(ge=0)] = 0
    downloads_total: Annotated[int, Field(ge=0)] = 0
    connections_per_download: Annotated[int, Field(ge=0)] = 0
    event_streams_per_user: Annotated[int, Field(ge=0)] = 20
    bytes_per_user_per_day: Annotated[int, Field(ge=0)] = 0
    re_exports_per_user: Annotated[int, Field(ge=0)] = 10
    admins_exempt: bool = True


class RetentionSettings(Section):
    """The retention of packages and events, and the cleanup's schedule."""

    days: Annotated[int, Field(ge=1, le=36500)] = 30
    resume_grace_hours: Annotated[float, Field(ge=0, le=24 * 365)] = 24.0
    event_days: Annotated[int, Field(ge=0, le=36500)] = 365
    cleanup_schedule: Annotated[str, AfterValidator(_check_schedule)] = "0 3 * * *"
    timezone: Annotated[str, AfterValidator(_check_timezone)] = "UTC"

    @property
    def resume_grace(self) -> timedelta:
        """How long after its expiry a package's unfinished downloads may be resumed."""
        return timedelta(hours=self.resume_grace_hours)


class PackerSettings(Section):
    """The packer, which makes packages of jobs that name a source."""

    enabled: bool = False
    source_roots: tuple[Path, ...] = ()
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    poll_seconds: Seconds = 5.0


class LoggingSettings(Section):
    """The level and format of logs."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "json"
    download_log: OptionalPath = None


class Settings(Section):
    """The whole configuration. Relative paths are resolved from the working directory."""

    data_dir: Path = Path("exportd-data")
    server: ServerSettings = ServerSettings()
    database: DatabaseSettings = DatabaseSettings()
    storage: StorageSettings = StorageSettings()
    auth: AuthSettings = AuthSettings()
    download: DownloadSettings = DownloadSettings()
    links: LinkSettings = LinkSettings()
    limits: LimitSettings = LimitSettings()
    retention: RetentionSettings = RetentionSettings()
    packer: PackerSettings = PackerSettings()
    logging: LoggingSettings = LoggingSettings()

    @property
    def storage_root(self) -> Path:
        return (self.storage.root or self.data_dir / "packages").absolute()

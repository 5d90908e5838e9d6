"""The configuration: ``sections.py`` has its keys, ``loading.py`` reads it."""

from exportd.settings.loading import ENVIRONMENT_PREFIX, Key, child_environment, load_settings
from exportd.settings.sections import (
    AuthSettings,
    DatabaseSettings,
    DownloadSettings,
    LimitSettings,
    LinkSettings,
    ServerSettings,
    Settings,
    SettingsError,
)

__all__ = [
    "ENVIRONMENT_PREFIX",
    "AuthSettings",
    "DatabaseSettings",
    "DownloadSettings",
    "Key",
    "LimitSettings",
    "LinkSettings",
    "ServerSettings",
    "Settings",
    "SettingsError",
    "child_environment",
    "load_settings",
]

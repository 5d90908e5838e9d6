"""Notifications to systemd (sd_notify(3))."""

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Sends a state such as ``READY=1``, if systemd asked for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)

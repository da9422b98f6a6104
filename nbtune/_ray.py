"""Where a Ray is, and what every process of ours that speaks with one is told."""

from __future__ import annotations

import os
import secrets
import socket

PROBE_SECONDS = 3.0  # for an address to take a connection; Ray itself would try for a minute

# No word of this run to anybody, no copy of the working folder to the workers, and no long wait for a lost head.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}  # on 127.0.0.1, as Ray does on a Mac


def resolved(address: str) -> str:
    """What `address` means: "auto" is what `RAY_ADDRESS` says, where that is set."""
    return os.environ.get("RAY_ADDRESS", address) if address == "auto" else address


def probe(address: str) -> None:
    """Raise ValueError where this is no address of a Ray, OSError where nobody listens there.

    Of "local", and of an "auto" that only Ray can find, nothing can be said.
    """
    where = resolved(address)
    if where in ("local", "auto"):
        return
    host, colon, port = where.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 2**16):
        raise ValueError(f"{where} is no address of a Ray")
    socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()


def environment(address: str) -> dict[str, str]:
    """The environment of a process that speaks with the Ray at an address; with "local", of one that starts it."""
    if address != "local":
        return {**os.environ, **QUIET}
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32), **own, **QUIET, **ALONE}

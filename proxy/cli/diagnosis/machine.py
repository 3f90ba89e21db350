"""Checks of this machine: the units of systemd, the ports, and the disk of the store."""

import http.client
import os
import shutil
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from proxy.cli.diagnosis.finding import Finding
from proxy.cli.display.text import format_bytes
from proxy.config import Config
from proxy.config.values import Address
from proxy.storage.permissions import user_name

# Seconds that a program may take to answer.
TIMEOUT = 5.0
# Share of the store's limit above which pins leave too little space for other images.
PINNED_RATIO = 0.9
_UNIT = "pullcache.service"


def check_units() -> Iterator[Finding]:
    """Check the service, if systemd runs this machine and has the unit."""
    if not Path("/run/systemd/system").exists() or not shutil.which("systemctl"):
        yield Finding("units", "skip", "systemd does not run this machine")
        return
    properties = "LoadState,ActiveState,Result"
    command = ["systemctl", "show", _UNIT, f"--property={properties}"]
    try:
        done = subprocess.run(  # noqa: S603 (a constant command)
            command, capture_output=True, text=True, check=True, timeout=TIMEOUT
        )
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("units", "warn", f"systemctl does not answer: {error}")
        return
    yield describe_unit(
        dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    )


def describe_unit(shown: Mapping[str, str]) -> Finding:
    """Return the finding for the properties of the service, as `systemctl show` has them."""
    state = shown.get("ActiveState", "")
    if shown.get("LoadState") != "loaded":
        return Finding("units", "skip", f"{_UNIT} is not installed")
    if state == "failed":
        return Finding(
            "units",
            "fail",
            f"{_UNIT} has failed ({shown.get('Result', '')})",
            f"see why: journalctl -u {_UNIT} -p warning -e; then: systemctl restart {_UNIT}",
        )
    if state not in ("active", "activating", "reloading"):
        return Finding(
            "units", "warn", f"{_UNIT} is {state}", f"start it: systemctl enable --now {_UNIT}"
        )
    return Finding("units", "ok", f"{_UNIT} is {state}")


def check_free_ports(addresses: Iterable[Address]) -> Iterator[Finding]:
    """Check whether the daemon, which does not run, could listen."""
    for address in addresses:
        if address.port and _is_connectable(address.local_address):
            yield Finding(
                "port",
                "fail",
                f"another program listens on {address}",
                f"find it (ss -ltnp | grep :{address.port}) and stop it, or change server.listen",
            )


def _is_connectable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT).close()
    except OSError:
        return False
    return True


def check_listeners(addresses: Iterable[str], *, is_tls: bool) -> Iterator[Finding]:
    """Check whether the daemon answers on the addresses that it listens on."""
    for text in addresses:
        if text.startswith("unix:"):
            continue
        address = Address(text).local_address
        try:
            status = _get_status(address, is_tls=is_tls)
        except OSError as error:
            yield Finding(
                "port",
                "fail",
                f"the daemon does not answer on {address}: {error.strerror or error}",
                "look for a firewall of this machine (nft list ruleset), and restart the daemon",
            )
            continue
        if status == 200:
            yield Finding("port", "ok", f"{address} answers")
        else:
            yield Finding(
                "port",
                "fail",
                f"{address} is not ready (status {status})",
                "see /readyz and the log: journalctl -u pullcache -p warning -e",
            )


def _get_status(address: str, *, is_tls: bool) -> int:
    with closing(open_connection(address, is_tls=is_tls)) as connection:
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP: {error}") from error


def local_address(text: str) -> str:
    """Return the address for clients on this machine."""
    return str(Address(text).local_address)


def is_local(text: str) -> bool:
    """Tell whether no other machine can connect to the address."""
    return Address(text).is_loopback


def is_own_address(host: str) -> bool:
    """Tell whether an IP address is one of this machine, on whichever interface."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def open_connection(address: str, *, is_tls: bool) -> http.client.HTTPConnection:
    """Return a connection to the daemon, which is not opened yet.

    It is on this machine, so its certificate need not be valid for the address.
    """
    if is_tls:
        context = ssl._create_unverified_context()  # noqa: S323, SLF001 (see above)
        return http.client.HTTPSConnection(address, timeout=TIMEOUT, context=context)
    return http.client.HTTPConnection(address, timeout=TIMEOUT)


def check_disk(config: Config, status: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Check the file system of the store and, if the daemon runs, what it says of the store.

    Without a daemon, this is the user that it is to run as, unless this is root.
    """
    path = config.store.path
    while not os.path.exists(path):  # noqa: PTH110 (Path.exists raises without permission)
        path = path.parent
    if status is None and (finding := _check_permissions(path, is_store=path == config.store.path)):
        yield finding
        return
    usage = os.statvfs(path)
    free = usage.f_bavail * usage.f_frsize
    store = status["store"] if status else None
    if store and store["problem"]:
        yield Finding("disk", "fail", store["problem"], "see the chapter Disk in Troubleshooting")
    elif store and store["pinned"] > PINNED_RATIO * store["limit"]:
        pinned, limit = format_bytes(store["pinned"]), format_bytes(store["limit"])
        yield Finding(
            "disk",
            "fail",
            f"pinned images take {pinned} of {limit}; others are hardly stored",
            "unpin some (pullcache images --sort size), or raise store.max_size",
        )
    elif free < config.store.min_free:
        yield Finding(
            "disk",
            "fail",
            f"{format_bytes(free)} free at {path}, less than store.min_free",
            "free space on this file system, or move the store (store.path)",
        )
    elif usage.f_files and not usage.f_favail:
        yield Finding("disk", "fail", f"no inode is free at {path}", "remove files there")
    else:
        yield Finding("disk", "ok", f"{format_bytes(free)} free at {path}")


def _check_permissions(path: Path, *, is_store: bool) -> Finding | None:
    """Return why this user cannot keep a store in the directory `path`, or above if it `is_store`."""
    state, user = path.stat(), os.geteuid()
    if is_store and user not in (0, state.st_uid):
        owner, name = user_name(state.st_uid), user_name(user)
        return Finding(
            "disk",
            "fail",
            f"{path} belongs to {owner}, and this is {name}",
            f"if the daemon is to run as {name}: chown -R {name}: {path}; otherwise run it, and "
            f"this, as {owner}",
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        return Finding(
            "disk",
            "fail",
            f"{user_name(user)} may not write to {path} (mode {stat.S_IMODE(state.st_mode):04o})",
            f"chmod u+rwx {path}"
            if is_store
            else "make the directory of the store, and give it to the daemon's user with chown",
        )
    return None

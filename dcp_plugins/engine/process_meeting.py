"""How the checkpoint processes of several ranks find each other: a store at a port that the system chose.

The first rank's process opens it; where it is travels between the training processes, which are connected already.
"""

from __future__ import annotations

import contextlib
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

__all__ = ["Meeting", "join", "leave", "open_meeting"]

# Long enough for thousands of ranks to connect, short enough to notice one that never will.
_MEETING_TIMEOUT = timedelta(seconds=300)
_CONNECT_TIMEOUT_SECONDS = 5.0
_TOKEN_KEY = "token"  # noqa: S105 - a key, not a secret


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where and under which name one group of checkpoint processes is formed."""

    token: str
    """Names the group; the same on all of its ranks, and no other group's."""
    port: int
    addresses: tuple[str, ...]
    """Names and numbers under which other hosts may reach the store, the likeliest first."""
    host: str
    """Identifies the store's host, to processes on the same one."""


# The first rank keeps the store's server alive by this.
_open: list[dist.Store] = []


def open_meeting(known_address: str | None) -> Meeting:
    """Open a store; called in the first rank's checkpoint process.

    Args:
        known_address: One that the other ranks are known to reach this host by.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=_MEETING_TIMEOUT)
    token = uuid.uuid4().hex
    store.set(_TOKEN_KEY, token)
    _open[:] = [store]
    addresses = dict.fromkeys([known_address] if known_address else [])
    addresses.update(dict.fromkeys(_own_addresses()))
    return Meeting(token, store.port, tuple(addresses), _host_identity())


def join(meeting: Meeting | None, rank: int, world_size: int, timeout_seconds: float) -> None:
    """Make the group of the meeting this process's default group, in place of the one it had.

    Args:
        meeting: None for a group of one.
        timeout_seconds: Of the group's collectives.
    """
    leave()
    store: dist.Store
    if meeting is None:
        store = dist.HashStore()
    elif _open and rank == 0:
        store = _open[0]
    else:
        store = _connect(meeting)
    if meeting is not None:
        store = dist.PrefixStore(meeting.token, store)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds)
    )


def leave() -> None:
    """End the group: its other processes, should they wait for this one, find the connection closed."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _connect(meeting: Meeting) -> dist.Store:
    addresses = ("localhost",) if meeting.host == _host_identity() else meeting.addresses
    failures = []
    for address in addresses:
        try:
            socket.create_connection((address, meeting.port), timeout=_CONNECT_TIMEOUT_SECONDS).close()
            store = dist.TCPStore(address, meeting.port, is_master=False, timeout=_MEETING_TIMEOUT)
            # An address may lead to another host than the one that gave it.
            if store.get(_TOKEN_KEY).decode() == meeting.token:
                return store
            failures.append(f"{address}: somebody else answers")
        except (OSError, RuntimeError) as exc:
            failures.append(f"{address}: {exc}")
    raise ConnectionError(
        f"cannot reach the first rank's checkpoint process at port {meeting.port} ({'; '.join(failures)}). The ranks' "
        "hosts must reach each other on ports that the system chooses"
    )


def _own_addresses() -> Iterator[str]:
    name = socket.gethostname()
    yield name
    yield socket.getfqdn()
    with contextlib.suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
            if family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1")):
                yield str(address[0])
    # Nothing is sent: the system is asked which of its addresses it would send from.
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))
        yield str(probe.getsockname()[0])


def _host_identity() -> str:
    """Return what only processes that share a host, and its network, have in common."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts.append(str(Path("/proc/self/ns/net").stat().st_ino))
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    return "/".join(facts)

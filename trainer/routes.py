"""Which address and which network interface a host reaches another host by."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Route:
    """How this host reaches another one."""

    address: str  # the other host's, as resolved
    local_address: str  # this host's, on the way there
    interface: str  # name of the interface that holds `local_address`; empty if none does

    @property
    def is_local(self) -> bool:
        """Whether the other host is this one."""
        return self.address == self.local_address or ipaddress.ip_address(self.address).is_loopback

    @property
    def is_loopback(self) -> bool:
        """Whether the other host's address can be reached from this host alone."""
        return ipaddress.ip_address(self.address).is_loopback


def route_to(host: str) -> Route:
    """The route to a host name or address, as the kernel's table has it; nothing is sent.

    Raises ValueError if the name is unknown or no route leads there.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"host {host!r} is unknown here ({error.strerror}); give its address") from error
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)
        except OSError as error:
            raise ValueError(f"no route leads to {host} ({target[0]}): {error.strerror}") from error
        local = probe.getsockname()[0]
    return Route(str(target[0]), local, interface_of(local))


def interface_of(address: str) -> str:
    """Name of the interface that holds an address of this host; empty if none does."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.is_loopback:
        return loopback()
    for name, held in psutil.net_if_addrs().items():
        for one in held:
            if (
                one.family in (socket.AF_INET, socket.AF_INET6)
                and ipaddress.ip_address(one.address.partition("%")[0]) == wanted
            ):
                return name
    return ""


def loopback() -> str:
    """Name of the loopback interface."""
    for name, held in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address.startswith("127.") for one in held):
            return name
    return "lo"


def has_infiniband() -> bool:
    """Whether this host has InfiniBand, RoCE or a like fabric, which NCCL finds and prefers by itself."""
    fabric = Path("/sys/class/infiniband")
    return fabric.is_dir() and any(fabric.iterdir())


def interface_environment(interface: str, *, infiniband: bool) -> dict[str, str]:
    """The variables that have gloo and NCCL use an interface; none for NCCL beside InfiniBand, which it then ignores.

    `=` is NCCL's sign for an exact name: `eth1` alone would be a prefix, of `eth10` too.
    """
    if not interface:
        return {}
    return {"GLOO_SOCKET_IFNAME": interface} | ({} if infiniband else {"NCCL_SOCKET_IFNAME": f"={interface}"})

"""How is HOST:PORT written? An IPv6 address has brackets there, and none where a host stands alone."""

from __future__ import annotations

import socket


def joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    return address.rpartition(":")[0].removeprefix("[").removesuffix("]")


def resolved(host: str) -> str:
    """An address of that name, IPv4 if there is one. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda entry: entry[0] is not socket.AF_INET)[4][0])

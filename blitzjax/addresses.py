"""How is HOST:PORT written, and can one listen there? An IPv6 address has brackets in it, and none where a host stands
alone.
"""

from __future__ import annotations

import argparse
import socket

from blitzjax.errors import BlitzError


def joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    return address.rpartition(":")[0].removeprefix("[").removesuffix("]")


def address(text: str) -> str:
    """`text`, the type of an argument, if it is HOST:PORT. Raises ArgumentTypeError."""
    if not is_address(text):
        raise argparse.ArgumentTypeError(f"wants HOST:PORT, got {text!r}")
    return text


def is_address(text: str) -> bool:
    port = text.rpartition(":")[2]
    return ":" in text and port.isdecimal() and int(port) < 1 << 16


def check_free(address: str) -> None:
    """Raises BlitzError with the reason why nobody can listen there; gRPC would keep it to itself, or crash."""
    host, port = host_of(address), address.rpartition(":")[2]
    if not is_address(address):
        raise BlitzError(f"cannot listen on {address}: a port must be 0-65535")
    try:
        family, kind, protocol, _, found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found)
    except OSError as e:
        raise BlitzError(f"cannot listen on {address}: {e.strerror}") from e


def is_here(host: str) -> bool:
    """Whether it is, or is the name of, an address that this machine has. Raises OSError for a name that has none."""
    found = resolved(host)
    with socket.socket(socket.AF_INET6 if ":" in found else socket.AF_INET) as probe:
        try:
            probe.bind((found, 0))
        except OSError:
            return False
    return True


def resolved(host: str) -> str:
    """An address of that name, IPv4 if there is one. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda entry: entry[0] is not socket.AF_INET)[4][0])

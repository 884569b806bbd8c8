"""Hosts on one machine: network namespaces on a bridge, each with a rate-limited link. Needs root, iproute2 and tbf.

Names carry the id of the process that made them, so what a crashed run left behind is recognised and removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"\bbz(\d+)(?:-\d+h?|br)\b")
_BURST_BYTES = 256 << 10  # above the 64 KiB that a veth hands over at once
_LATENCY_MS = 20  # of queue; deeper only adds delay


@dataclass(frozen=True, slots=True)
class Host:
    namespace: str
    ip: str

    def command(self, argv: list[str]) -> list[str]:
        """`argv` as run on this host."""
        return ["ip", "netns", "exec", self.namespace, *argv]


def missing() -> str:
    """Why namespaces cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "not root"
    if absent := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"no {' and no '.join(absent)} command"
    try:
        with hosts(1, rate_mbit=1000):
            return ""
    except subprocess.CalledProcessError as e:
        return f"{' '.join(e.cmd)}: {e.stderr.strip()}"


@contextlib.contextmanager
def hosts(count: int, rate_mbit: int) -> Iterator[list[Host]]:
    """`count` hosts that reach each other at `rate_mbit` in each direction. Raises CalledProcessError; cleans up."""
    clean_up_after_dead()
    pid = os.getpid()
    made = [Host(f"bz{pid}-{i}", f"10.77.0.{i + 1}") for i in range(count)]
    try:
        _run(f"ip link add bz{pid}br type bridge")
        _run(f"ip link set bz{pid}br up")
        for host in made:
            _add(host, f"bz{pid}br", rate_mbit)
        yield made
    finally:
        _remove(pid)


def join(one: Host, other: Host) -> None:
    """An unlimited link of their own between two hosts, which carries all that they send to each other."""
    _run(f"ip link add fast0 netns {one.namespace} type veth peer name fast0 netns {other.namespace}")
    for here, there in ((one, other), (other, one)):
        _run(f"ip netns exec {here.namespace} ip link set fast0 up")
        _run(f"ip netns exec {here.namespace} ip route add {there.ip}/32 dev fast0")


def steer(made: Sequence[Host], core: int) -> None:
    """Lets `core` do the kernel's work on packets that any of these hosts receives, their switch's work included.

    Without it the work lands on whichever core sent last, an engine's pinned core say, where on real hosts a network
    card, a switch and other cores do it.
    """
    mask = f"{1 << core:x}"
    for host in made:
        Path(f"/sys/class/net/{host.namespace}h/queues/rx-0/rps_cpus").write_text(mask)
        subprocess.run(host.command(["sh", "-c", f"echo {mask} > /sys/class/net/eth0/queues/rx-0/rps_cpus"]), check=True)


def clean_up_after_dead() -> None:
    """Removes the namespaces, links and bridges of runs whose process is gone."""
    listing = _run("ip netns list") + _run("ip -o link show")
    for pid in {int(match) for match in _NAME.findall(listing)}:
        if not _alive(pid):
            _remove(pid)


def _alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty: a zombie that nobody has waited for
    except OSError:
        return False


def _add(host: Host, bridge: str, rate_mbit: int) -> None:
    outside = f"{host.namespace}h"
    limit = f"root tbf rate {rate_mbit}mbit burst {_BURST_BYTES} latency {_LATENCY_MS}ms"
    inside = f"ip netns exec {host.namespace}"
    _run(f"ip netns add {host.namespace}")
    _run(f"ip link add {outside} type veth peer name eth0 netns {host.namespace}")
    _run(f"ip link set {outside} master {bridge} up")
    _run(f"{inside} ip link set lo up")
    _run(f"{inside} ip addr add {host.ip}/24 dev eth0")
    _run(f"{inside} ip link set eth0 up")
    _run(f"{inside} tc qdisc add dev eth0 {limit}")
    _run(f"tc qdisc add dev {outside} {limit}")


def _remove(pid: int) -> None:
    """Ends what still runs inside, then deletes: a namespace with processes would keep its links."""
    links = {match.group(0) for match in _NAME.finditer(_run("ip -o link show")) if int(match.group(1)) == pid}
    names = {match.group(0) for match in _NAME.finditer(_run("ip netns list")) if int(match.group(1)) == pid}
    for name in names:
        for inside in _run(f"ip netns pids {name}").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(inside), signal.SIGKILL)
    for command in [*(f"ip link del {link}" for link in sorted(links)), *(f"ip netns del {n}" for n in sorted(names))]:
        with contextlib.suppress(subprocess.CalledProcessError):
            _run(command)


def _run(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout

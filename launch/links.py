"""Links slow enough to watch layers arrive: each worker in a network namespace of its own, where this machine allows it.

Without root, iproute2 or the permission to make namespaces the workers talk over loopback.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench import netns
from blitzjax.serve.hosts import Launch

_OUR_IP = "10.77.0.254"  # controller and coordination service, on the bridge between the namespaces


@contextlib.contextmanager
def launch(workers: int, rate_mbit: int, run_dir: Path) -> Iterator[Launch]:
    """A Launch with links of `rate_mbit` each way; 0: loopback."""
    if rate_mbit == 0:
        yield Launch(run_dir=run_dir)
        return
    with netns.hosts(workers, rate_mbit) as hosts:
        subprocess.run(["ip", "addr", "add", f"{_OUR_IP}/24", "dev", f"bz{os.getpid()}br"], check=True)
        yield Launch(run_dir=run_dir, hosts=tuple(host.ip for host in hosts),
                     prefixes=tuple(tuple(host.command([])) for host in hosts), coordinator_host=_OUR_IP)


def unavailable() -> str:
    """Why links cannot be limited here; empty if they can."""
    return netns.missing()

"""Gives every test process eight CPU devices, before anything imports jax; a busy machine is no reason to fail."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from blitzjax.serve import client as clients

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tests that want a GPU say so, see README
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
clients.Client.status.__defaults__ = (300.0,)  # a controller that gets no time answers later, not wrongly
clients._LEAVE_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled_stays() -> Iterator[None]:
    """Executables are memory maps: those of all tests together are more than a process may have (vm.max_map_count)."""
    yield
    if "jax" in sys.modules:
        gc.collect()
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def logs_are_with_the_tests_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Clusters whose processes were killed keep their directories."""
    tempfile.tempdir = str(tmp_path_factory.getbasetemp())
    yield
    tempfile.tempdir = None

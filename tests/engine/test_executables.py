"""Compiled stages on disk are a convenience: nothing fails for want of them."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from blitzjax.engine import executables
from blitzjax.engine.executables import ExecutableCache, Program

_ARGS = (jax.ShapeDtypeStruct((4,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),)


def twice() -> Program:
    return Program(lambda x: 2 * x, _ARGS)


def cache(directory: Path, **options) -> ExecutableCache:
    return ExecutableCache(directory, "twice", jax.devices()[:1], **options)


def test_a_full_disk_costs_the_file_and_not_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    cache(tmp_path).get("twice", twice)
    [kept] = tmp_path.glob("*.xla")
    content = kept.read_bytes()
    kept.unlink()

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(executables.Path, "write_bytes", full)
    for again in (cache(tmp_path), cache(tmp_path, fetch=lambda name: content)):
        assert again.get("twice", twice)(np.ones(4, np.float32)).tolist() == [2] * 4
        assert again.compiled == 1 and "cannot be kept" in caplog.messages[-1]
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.xla"))


def test_a_directory_that_only_others_write_is_read(tmp_path: Path) -> None:
    """Filled by a build of a container image, say."""
    cache(tmp_path).get("twice", twice)
    for made in tmp_path.glob("*.lock"):
        made.unlink()
        made.mkdir()  # a root user may write what others cannot
    again = cache(tmp_path)
    assert again.get("twice", twice)(np.ones(4, np.float32)).tolist() == [2] * 4 and again.loaded == 1
    next(tmp_path.glob("*.xla")).unlink()
    assert again.get("twice", twice)(np.ones(4, np.float32)).tolist() == [2] * 4 and again.compiled == 1

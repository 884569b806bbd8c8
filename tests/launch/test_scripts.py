"""The two README commands exist, parse, and say what they take."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("launch/demo.sh", "launch/test.sh", "launch/venv.sh", ".ci/run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_script_parses(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_readme_opens_with_the_two_commands() -> None:
    first_block = re.search(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first_block is not None
    commands = [line.split("#")[0].split() for line in first_block.group(1).splitlines() if line.strip()]
    assert commands == [["bash", "launch/demo.sh"], ["bash", "launch/test.sh"]]


def test_ci_runs_the_documented_tests() -> None:
    assert "launch/test.sh" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("compiler, best, dtype", [("c++", "avx2", "bfloat16"), (None, "avx2", "float32"), ("c++", None, "float32")])
def test_demo_computes_in_what_makes_its_tokens_equal(compiler: str | None, best: str | None, dtype: str,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the demo's picture")
    from launch import demo
    monkeypatch.setattr(demo.native, "compiler", lambda: compiler)
    monkeypatch.setattr(demo.native, "best", lambda features: best)
    assert demo.config(2).engine.dtype == dtype


def test_demo_help_names_its_options() -> None:
    pytest.importorskip("matplotlib", reason="the demo's picture")
    done = subprocess.run([sys.executable, "-m", "launch.demo", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--link-mbit" in done.stdout and "--max-tokens" in done.stdout


@pytest.mark.parametrize(("options", "code", "says"), [
    ("--requests 0", 2, "--requests and --max-tokens must be at least 1"), ("--link-mbit -5", 2, "--link-mbit at least 0"),
    ("--max-tokens 0", 2, "must be at least 1"), ("--out {}/file", 1, "demo: cannot write to")])
def test_what_the_demo_cannot_do_is_said_before_anything_starts(options: str, code: int, says: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the demo's picture")
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-m", "launch.demo", *options.replace("{}", str(tmp_path)).split()], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_missing_python_is_said_clearly(tmp_path: Path) -> None:
    """With a PATH that holds no Python, in a checkout without .venv."""
    (tmp_path / "launch").mkdir()
    for name in ("demo.sh", "venv.sh"):
        (tmp_path / "launch" / name).write_text((ROOT / "launch" / name).read_text())
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "cat", "sha256sum"):
        os.symlink(_which(tool), tools / tool)
    done = subprocess.run([tools / "bash", tmp_path / "launch/demo.sh"], env={"PATH": str(tools)}, capture_output=True,
                          text=True)
    assert done.returncode == 1
    assert "needs Python 3.11" in done.stderr and "apt install" in done.stderr


@pytest.mark.parametrize("failing", ["", "--ignore=tests/engine", "tests/engine"])
def test_a_failure_in_either_half_is_one_of_the_whole(tmp_path: Path, failing: str) -> None:
    """With a Python that says what it is asked to run, and fails where `failing` is an argument."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "test.sh", tmp_path / "launch")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "ran $*"\ncase " $* " in *" {failing or "nothing"} "*) exit 1;; esac\n')
    python.chmod(0o755)
    (tmp_path / "launch" / "venv.sh").write_text(f"root={tmp_path} python={python}\nensure_venv() {{ :; }}\n")
    done = subprocess.run(["bash", tmp_path / "launch" / "test.sh"], capture_output=True, text=True)
    assert done.returncode == bool(failing), done.stdout + done.stderr
    assert done.stdout.count("ran -m pytest") == 2


def _which(tool: str) -> str:
    found = shutil.which(tool)
    assert found is not None, tool
    return found

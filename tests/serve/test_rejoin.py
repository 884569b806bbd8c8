"""What a client makes of calls that broke off and were made again."""

from __future__ import annotations

import random

import pytest

from blitzjax.serve.rejoin import Patience, Rejoin, Server
from blitzjax.v1 import inference_pb2


@pytest.mark.parametrize("seed", range(20))
def test_a_client_joins_what_it_gets_twice(seed: int):
    """Two answers in messages of any size, each call broken off anywhere: the joined stream is as if nothing broke."""
    rng = random.Random(seed)
    whole = {index: [(chr(97 + k), k) for k in range(rng.randrange(1, 30))] for index in range(2)}

    def messages():
        at = dict.fromkeys(whole, 0)
        while left := [i for i in whole if at[i] < len(whole[i])]:
            index = rng.choice(left)
            some = whole[index][at[index]:at[index] + rng.randrange(1, 8)]
            first, at[index] = not at[index], at[index] + len(some)
            yield inference_pb2.GenerateResponse(
                index=index, text="".join(c for c, _ in some), token_ids=[t for _, t in some],
                logprobs=[inference_pb2.ScoredToken(token_id=t) for _, t in some],
                prompt_token_ids=[7] if first else [], finish_reason="stop" if at[index] == len(whole[index]) else "")

    rejoin, got = Rejoin(inference_pb2.GenerateRequest(), Patience(Server(), None)), []
    for last in (False, False, False, True):
        rejoin.restart()
        for message in messages():
            if not last and rng.random() < 0.1:
                break
            got += [new] if (new := rejoin.unseen(message)) is not None else []
    for index, items in whole.items():
        mine = [m for m in got if m.index == index]
        assert "".join(m.text for m in mine) == "".join(c for c, _ in items)
        assert [t for m in mine for t in m.token_ids] == [t for _, t in items]
        assert [p.token_id for m in mine for p in m.logprobs] == [t for _, t in items]
        assert [m.finish_reason for m in mine if m.finish_reason] == ["stop"]
        assert [list(m.prompt_token_ids) for m in mine] == [[7], *[[]] * (len(mine) - 1)]

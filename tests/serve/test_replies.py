from __future__ import annotations

from blitzjax.serve import openai, replies
from blitzjax.serve.asking import Chunk, collect
from blitzjax.v1 import inference_pb2 as pb


def test_the_space_that_a_tokenizer_adds_to_a_prompt_is_not_in_its_echo() -> None:
    """As Llama 2's and Mistral's do, whose prompts begin with BOS."""
    asked = openai.completion({"prompt": "The tide", "echo": True, "logprobs": 0})
    *prompt, answer = (pb.ScoredToken(text=text, rank=1) for text in (" The", " tide", " is"))
    chunks = [Chunk("r", 0, "The tide", (), (), "", None, (1, 7, 8), tuple(prompt), None, "", 3, 0.0),
              Chunk("r", 0, " is", (9,), (answer,), "length", pb.Usage(), (), (), None, "", 3, 0.0)]
    [choice] = replies.Reply(asked, "m", "r").whole([[collect(chunks)]])["choices"]
    assert choice["logprobs"]["tokens"] == ["", "The", " tide", " is"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 3, 8] and choice["logprobs"]["token_logprobs"][0] is None


def test_what_was_drawn_has_its_logprob_though_others_are_likelier_or_have_the_same_text() -> None:
    asked = openai.completion({"prompt": "x", "logprobs": 2})
    halves = [pb.ScoredToken(text="\ufffd", raw=raw, logprob=logprob, rank=rank)
              for rank, (raw, logprob) in enumerate(((b"\xf0\x9f", -0.5), (b"\xc3", -1.5), (b"\xe4", -9.0)), 1)]
    drawn = halves[2]
    drawn.top.extend(halves[:2])
    chunk = Chunk("r", 0, "\ufffd", (9,), (drawn,), "length", pb.Usage(), (), (), None, "", 3, 0.0)
    [choice] = replies.Reply(asked, "m", "r").whole([[collect([chunk])]])["choices"]
    assert choice["logprobs"]["tokens"] == ["bytes:\\xe4"]
    assert choice["logprobs"]["top_logprobs"] == [{"bytes:\\xe4": -9.0, "bytes:\\xf0\\x9f": -0.5, "bytes:\\xc3": -1.5}]

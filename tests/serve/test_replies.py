from __future__ import annotations

from blitzjax.serve import openai, replies
from blitzjax.serve.asking import Chunk, collect
from blitzjax.v1 import inference_pb2 as pb


def test_the_space_that_a_tokenizer_adds_to_a_prompt_is_not_in_its_echo() -> None:
    """As Llama 2's and Mistral's do, whose prompts begin with BOS."""
    asked = openai.completion({"prompt": "The tide", "echo": True, "logprobs": 0})
    *prompt, answer = (pb.ScoredToken(text=text, rank=1) for text in (" The", " tide", " is"))
    chunk = Chunk("r", 0, "The tide is", (9,), (answer,), "length", pb.Usage(), (1, 7, 8), tuple(prompt), None, "", 3, 0.0)
    [choice] = replies.Reply(asked, "m", "r").whole([[collect([chunk])]])["choices"]
    assert choice["logprobs"]["tokens"] == ["", "The", " tide", " is"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 3, 8] and choice["logprobs"]["token_logprobs"][0] is None

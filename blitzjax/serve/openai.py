"""What does a body of OpenAI's JSON ask for? How answers to it look is in replies.py.

Fields that vLLM adds (`top_k`, `min_p`, `ignore_eos`, ...) mean the same here. Invariant: a body is understood wholly or
refused by the name of the field; nothing that would change an answer is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from blitzjax.errors import InvalidRequest
from blitzjax.serve import tools
from blitzjax.serve.asking import JSON, Options, Prompt

T = TypeVar("T")

_COMPLETION_TOKENS = 16  # OpenAI's default
_MAX_PROMPTS = 2048  # of one body: each is a request of its own, and others wait while so many begin
_MAX_PARTS = 1 << 14  # of anything but token ids, such as messages of a chat: others wait while a million is read
_LONG = ("prompt", "tokens")  # fields that have limits of their own
_TEMPERATURE = 1.0  # likewise; our own requests are greedy by default
_NUMBER = (int, float)
_SAMPLING: Mapping[str, tuple[type, ...]] = {
    "temperature": _NUMBER, "top_p": _NUMBER, "top_k": (int,), "min_p": _NUMBER, "repetition_penalty": _NUMBER,
    "presence_penalty": _NUMBER, "frequency_penalty": _NUMBER, "seed": (int,), "n": (int,), "min_tokens": (int,),
    "stop_token_ids": (list,), "ignore_eos": (bool,), "priority": (int,)}
_CONSTRAINTS: Mapping[str, tuple[type, ...]] = {  # vLLM's names and types
    "json": (dict, str), "json_object": (bool,), "regex": (str,), "grammar": (str,), "choice": (list,)}
_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                      "prompt_cache_options", "prompt_cache_retention"})
_HARMLESS: Mapping[str, tuple[JSON, ...]] = {  # fields of features that are not here, and values that do not ask for them
    "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "add_special_tokens": (True,), "return_token_strs": (False,), "prompt_logprobs": (),
    "stream_options.include_obfuscation": (False,), "modalities": (["text"],), "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "use_beam_search": (False,), "return_tokens_as_token_ids": (False,),
    "length_penalty": (1.0,), "spaces_between_special_tokens": (True,)}
_RENDERING: Mapping[str, Any] = {  # vLLM's, of chats: what it does without them
    "add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False,
    "chat_template_kwargs": {}}
_REPLACED = {"functions": "tools", "function_call": "tool_choice"}  # by OpenAI


@dataclass(frozen=True, slots=True)
class Asked:
    """One body. `logprobs`: how many alternatives to show, None: no logprobs."""

    chat: bool
    prompts: tuple[Prompt, ...]
    options: Options
    stream: bool
    include_usage: bool
    each_usage: bool  # in every piece, of its answer so far
    logprobs: int | None
    tools: tools.Tools = tools.Tools()
    prompt_alone: bool = False  # an echo, and nothing of the answer
    echo: bool = False  # texts begin with the prompt's
    token_ids: bool = False  # of prompt and answer, too

    @property
    def answers(self) -> int:
        """To each prompt."""
        return self.options.get("n", 1)


def completion(body: JSON) -> Asked:
    """POST /v1/completions. Raises InvalidRequest."""
    fields = _Fields(body)
    prompts = _prompts(fields.take("prompt", str, list))
    options = _options(fields)
    options.setdefault("max_tokens", _COMPLETION_TOKENS)
    logprobs, prompt_alone = fields.take("logprobs", int), False
    if fields.take("echo", bool):
        options["echo"] = True
        if prompt_alone := options["max_tokens"] == 0:
            options["max_tokens"] = 1  # nothing is said of a prompt that nothing follows
        if logprobs is not None:
            options["prompt_logprobs"] = logprobs
    best_of = fields.take("best_of", int)
    if best_of not in (None, options.get("n", 1)):
        raise InvalidRequest(f"best_of is not supported beyond n; got best_of={best_of} and n={options.get('n', 1)}")
    return replace(_asked(False, prompts, options, logprobs, fields), prompt_alone=prompt_alone)


def chat(body: JSON) -> Asked:
    """POST /v1/chat/completions. Raises InvalidRequest. Without a limit the answer may fill the context."""
    fields = _Fields(body)
    messages = _messages(fields.take("messages", list))
    _check_rendering(fields)
    options = _options(fields)
    newer = fields.take("max_completion_tokens", int)
    if newer is not None:
        options["max_tokens"] = newer
    if "max_tokens" not in options:
        options["fill_context"] = True
    wanted, top = fields.take("logprobs", bool), fields.take("top_logprobs", int)
    if top is not None and not wanted:
        raise InvalidRequest("top_logprobs needs logprobs: true")
    wants = tools.asked(fields.take("tools", list), fields.take("tool_choice", str, dict),
                        fields.take("parallel_tool_calls", bool))
    return _asked(True, (messages,), options | wants.options, (top or 0) if wanted else None, fields, wants)


def tokenize(body: JSON) -> tuple[Prompt, Options]:
    """POST /tokenize, as vLLM has it. → prompt, its model and tools. Raises InvalidRequest."""
    fields = _Fields(body)
    options = Options(model=fields.take("model", str) or "")
    prompt, messages = fields.take("prompt", str), fields.take("messages", list)
    if (prompt is None) == (messages is None):
        raise InvalidRequest("give either prompt, a text, or messages")
    if messages is not None:
        _check_rendering(fields)
        options |= tools.asked(fields.take("tools", list), None, None).options
    fields.done()
    return _messages(messages) if prompt is None else prompt, options


def detokenize(body: JSON) -> tuple[Prompt, str]:
    """POST /detokenize. → token ids, model. Raises InvalidRequest."""
    fields = _Fields(body)
    model, tokens = fields.take("model", str), _ids(fields.take("tokens", list))
    fields.done()
    if not tokens:
        raise InvalidRequest("tokens must be a list of token ids, at least 1")
    return tokens, model or ""


def _asked(chat: bool, prompts: tuple[Prompt, ...], options: Options, logprobs: int | None, fields: _Fields,
           wants: tools.Tools = tools.Tools()) -> Asked:
    stream = fields.take("stream", bool) or False
    if not stream and "stream_options" in fields:
        raise InvalidRequest("stream_options needs stream: true")
    about = fields.within("stream_options")
    include_usage = about.take("stream_options.include_usage", bool) or False
    each_usage = about.take("stream_options.continuous_usage_stats", bool) or False  # vLLM's
    about.done()
    token_ids = fields.take("return_token_ids", bool) or False  # vLLM's
    fields.done()
    if logprobs is not None:
        options["logprobs"] = logprobs
    echo = options.get("echo", False)
    if token_ids and not isinstance(prompts[0], tuple):  # an echo has those of its prompt
        options["echo"] = True
    return Asked(chat, prompts, options, stream, include_usage, include_usage and each_usage, logprobs, wants, echo=echo,
                 token_ids=token_ids)


def _check_rendering(fields: _Fields) -> None:
    """A chat becomes what its model's template says, up to where the assistant speaks, and nothing else."""
    for name, as_here in _RENDERING.items():
        if fields.take(name, type(as_here)) not in (None, as_here):
            raise InvalidRequest(f"{name} is not supported with messages but as {json.dumps(as_here)}; leave it out")


class _Fields:
    """The fields of a body, each taken once; null is absent."""

    def __init__(self, body: JSON):
        if not isinstance(body, dict):
            raise InvalidRequest("the body must be a JSON object")
        self._left = {key: value for key, value in body.items() if value is not None}

    def take(self, name: str, *kinds: type[T]) -> T | None:
        """Raises InvalidRequest for a value of another type, or with too many parts; bool is no number, 2.0 is an int, too."""
        value = self._left.pop(name, None)
        if value is None:
            return None
        if int in kinds and float not in kinds and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
            raise InvalidRequest(f"{name} must be {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
        if isinstance(value, list | dict) and name not in _LONG:
            _check_parts(name, len(value))
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def within(self, name: str) -> _Fields:
        """Those of the object `name`, as name.field. Raises InvalidRequest."""
        return _Fields({f"{name}.{key}": value for key, value in (self.take(name, dict) or {}).items()})

    def done(self) -> None:
        """Raises InvalidRequest for what nobody took."""
        for name, value in self._left.items():
            if name not in _IGNORED and value not in _HARMLESS.get(name, ()):
                known = "is not supported" if name in (*_HARMLESS, *_REPLACED) else "is no field of this request"
                instead = f"use {_REPLACED[name]}" if name in _REPLACED else "leave it out"
                raise InvalidRequest(f"{name} {known}; {instead}")


def _options(fields: _Fields) -> Options:
    options: Options = {"temperature": _TEMPERATURE}
    for name, kinds in _SAMPLING.items():
        if (value := fields.take(name, *kinds)) is not None:
            options[name] = value
    if options.get("top_k") == -1:  # vLLM's way to say off
        options["top_k"] = 0
    if (model := fields.take("model", str)) is not None:
        options["model"] = model
    if (most := fields.take("max_tokens", int)) is not None:
        options["max_tokens"] = most
    options |= _constraint(fields)
    stop = fields.take("stop", str, list)
    if stop is not None:
        options["stop"] = _strings("stop", [stop] if isinstance(stop, str) else stop)
    if (bias := fields.take("logit_bias", dict)) is not None:
        options["logit_bias"] = _bias(bias)
    if "stop_token_ids" in options:
        ids = _ids(options["stop_token_ids"])
        if ids is None:
            raise InvalidRequest("stop_token_ids must be a list of token ids")
        options["stop_token_ids"] = ids
    return options


def _constraint(fields: _Fields) -> Options:
    """What the answer must be: `response_format` is OpenAI's, `structured_outputs` vLLM's."""
    form, given = fields.take("response_format", dict), fields.take("structured_outputs", dict)
    asked = {name: value for name, value in (given or {}).items() if value is not None}
    if asked and form not in (None, {"type": "text"}):
        raise InvalidRequest("response_format and structured_outputs are two ways to say what an answer must be; use one")
    match form:
        case None | {"type": "text"}:
            pass
        case {"type": "json_object"}:
            asked["json_object"] = True
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            asked["json"] = schema
        case _:
            raise InvalidRequest("response_format must have type text, json_object, or json_schema with "
                                 f"json_schema.schema, an object; got {json.dumps(form)}")
    options = Options()
    for name, value in asked.items():
        kinds = _CONSTRAINTS.get(name, ())
        if not isinstance(value, kinds):
            what = f"must be {' or '.join(kind.__name__ for kind in kinds)}" if kinds else "is not supported"
            raise InvalidRequest(f"structured_outputs: {name} {what}; leave it out")
        options["json_schema" if name == "json" else name] = value  # type: ignore[literal-required]  # of _CONSTRAINTS
    if "choice" in options:
        _check_parts("choice", len(options["choice"]))
        _strings("choice", options["choice"])
    return options


def _check_parts(name: str, count: int) -> None:
    if count > _MAX_PARTS:
        raise InvalidRequest(f"at most {_MAX_PARTS} {name}, got {count}")


def _bias(given: Mapping[str, Any]) -> dict[int, float]:
    try:
        return {int(token): float(value) for token, value in given.items()}
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest("logit_bias must map token ids to numbers") from None


def _strings(name: str, given: Sequence[JSON]) -> list[str]:
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) != len(given):
        raise InvalidRequest(f"{name} must be a string or a list of strings")
    return texts


def _ids(given: JSON) -> tuple[int, ...] | None:
    """Token ids; None: they are none."""
    return tuple(map(int, given)) if isinstance(given, list) and all(map(_is_id, given)) else None


def _is_id(value: JSON) -> bool:
    """97.0 is one, as clients write it whose numbers are all of one kind."""
    return (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 31
            and value == int(value))


def _prompts(given: str | Sequence[Any] | None) -> tuple[Prompt, ...]:
    """A text, several, token ids, or several lists of them."""
    if ids := _ids(given):
        return (ids,)
    match given:
        case str():
            return (given,)
        case [*several] if len(several) > _MAX_PROMPTS:
            raise InvalidRequest(f"prompt may have {_MAX_PROMPTS} texts or lists of token ids, got {len(several)}")
        case [*several] if several and all(isinstance(p, str) for p in several):
            return tuple(several)
        case [*several] if several and len(each := [ids for p in several if (ids := _ids(p))]) == len(several):
            return tuple(each)
    raise InvalidRequest("prompt must be a text, a list of texts, a list of token ids, or a list of such lists")


def _messages(given: Sequence[JSON] | None) -> list[dict[str, JSON]]:
    out: list[dict[str, JSON]] = []
    parts = (value for message in given or () if isinstance(message, dict) for value in message.values())
    _check_parts("parts and tool_calls of messages", sum(len(value) for value in parts if isinstance(value, list)))
    for k, message in enumerate(given or ()):
        if not isinstance(message, dict) or not isinstance(role := message.get("role"), str):
            raise InvalidRequest(f"messages[{k}] must be an object with role and content")
        calls = tools.calls_of(f"messages[{k}]", role, message)
        content = message.get("content")
        silent = content is None and "tool_calls" in calls
        out.append({"role": "system" if role == "developer" else role,
                    "content": "" if silent else _content(k, content), **calls})
    if not out:
        raise InvalidRequest("messages must have at least 1 message")
    return out


def _content(k: int, given: Any) -> str:
    match given:
        case str():
            return given
        case [*parts] if all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
                             for p in parts):
            return "".join(p["text"] for p in parts)
    raise InvalidRequest(f"messages[{k}].content must be a text or a list of parts of type text")

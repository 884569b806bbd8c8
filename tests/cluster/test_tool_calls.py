"""Calls that an answer must have follow their functions' schemas over HTTP, wherever and beside whatever it runs."""

from __future__ import annotations

import asyncio
import json

import aiohttp
from aiohttp.test_utils import TestServer

from blitzjax.serve.client import AsyncClient
from blitzjax.serve.gateway import Gateway
from rig import Rig

FIND = {"type": "object", "required": ["city", "days"], "properties": {
    "city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 14}}}
MARK = {"type": "object", "required": ["at"], "properties": {"at": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in (("find", FIND), ("mark", MARK))]
NAMED = {"type": "function", "function": {"name": "mark"}}


def check(call: dict) -> None:
    given = json.loads(call["function"]["arguments"])
    assert len(call["id"]) == 9 and call["type"] == "function"
    if call["function"]["name"] == "find":
        assert given.keys() == {"city", "days"} and len(given["city"]) <= 6 and 1 <= given["days"] <= 14
    else:
        assert call["function"]["name"] == "mark" and given.keys() == {"at"} and set(given["at"]) <= {"a", "b"}


async def ask(session: aiohttp.ClientSession, seed: int, choice: object) -> tuple[dict, str]:
    """→ message, finish_reason; whole."""
    body = {"messages": [{"role": "user", "content": f"{seed}"}], "tools": TOOLS, "tool_choice": choice, "seed": seed,
            "temperature": 1.0, "max_tokens": 120, "parallel_tool_calls": seed % 2 == 0}
    async with session.post("/v1/chat/completions", json=body) as answer:
        whole = (await answer.json())["choices"][0]
    async with session.post("/v1/chat/completions", json={**body, "stream": True}) as answer:
        lines = (await answer.text()).split("\n\n")
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
    assert choices[0]["delta"]["role"] == "assistant" and choices[-1]["finish_reason"] == whole["finish_reason"]
    assert joined([choice["delta"] for choice in choices]) == plain(whole["message"])
    return whole["message"], whole["finish_reason"]


def joined(deltas: list[dict]) -> tuple[str, list[list[str]]]:
    """→ content, [name, arguments] of each call; a name comes once, with the id, and before any more of its arguments."""
    calls: list[list[str]] = []
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        if "id" in part:
            assert part["index"] == len(calls) and part["function"]["name"]
            calls.append([part["function"]["name"], ""])
        calls[part["index"]][1] += part["function"]["arguments"]
    return "".join(delta.get("content", "") for delta in deltas), calls


def plain(message: dict) -> tuple[str, list[list[str]]]:
    return message["content"] or "", [[c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", ())]


def test_calls_that_must_be_made_are_valid_while_instances_come(rig: Rig) -> None:
    rig.only(1)

    async def run() -> list[tuple[dict, str]]:
        async with AsyncClient(rig.cluster.address) as client, TestServer(Gateway(client, "").application()) as server:
            async with aiohttp.ClientSession(server.make_url("/")) as session:
                asked = [asyncio.create_task(ask(session, seed, NAMED if seed % 3 == 0 else "required")) for seed in range(8)]
                await client.scale(3, live="zigzag")
                return await asyncio.gather(*asked)

    for seed, (message, reason) in enumerate(asyncio.run(run())):
        named = seed % 3 == 0
        assert reason in ("length", "stop" if named else "tool_calls")
        calls = message.get("tool_calls", [])
        for call in calls if reason != "length" else calls[:-1]:
            check(call)
        if reason != "length":
            assert calls and message["content"] is None
        if named or seed % 2:
            assert len(calls) == 1
    rig.settle(3)

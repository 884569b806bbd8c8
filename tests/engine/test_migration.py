"""Requests move between instances with their KV: tokens of one instance, at whatever moment, whoever fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from blitzjax.config import EngineConfig
from blitzjax.engine import live, messages as m
from blitzjax.engine.attention import Attention, fused
from blitzjax.commands import Abort, EndLive, Migrate, Release, StartLive
from blitzjax.events import Drained, KVMigrated, LiveDrained, PrefillDone, RequestFailed, RequestFinished
from blitzjax.types import LivePair, TokenLogprob, Work
from test_instance import (LETTERS, PATIENT, PENALISED, SPEC, DirectPartner, Rig, answers, depth, finished, reference, wait,
                           work)

WORKS = [work(n, tokens, max_tokens=24, ignore_eos=True, **sampling) for n, (tokens, sampling) in enumerate([
    (5, {}), (40, PENALISED), (64, {"temperature": 0.8, "seed": 5, "top_k": 40}),
    (100, {"logprobs": 3, "min_tokens": 9}), (150, {"prompt_logprobs": 2, "logprobs": 0, **PENALISED}), (9, {}),
    (33, {"temperature": 1.1, "seed": 1 << 40}), (20, {"logprobs": 1, **LETTERS})])]


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Rig]]]:
    """Complete instances by name, with `engine` options. No prefix cache: it would cut a prompt's second run elsewhere,
    and every bit is compared."""
    made: dict[str, Rig] = {}

    def rigs(*names: str, units: int = SPEC.units, attention: Attention | None = None, **engine: int) -> dict[str, Rig]:
        options = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64,
                   "prefix_caching": False,
                   "executable_cache": str(tmp_path_factory.getbasetemp() / "executables")} | engine
        config = replace(PATIENT, engine=EngineConfig(**options))
        for name in names:
            made[name] = Rig(name, config, made, attention=attention)
            made[name].load(units)
        return made

    yield rigs
    for rig in made.values():
        rig.stop()
        assert rig.instance.idle, f"{rig.instance.name} keeps a request"
    nothing_is_taken()


def nothing_is_taken() -> None:
    # asked for, not joined: a thread is listed before it can be joined
    deadline = time.monotonic() + 120
    while any(t.name in ("take-moved-kv", "withdraw-kv") for t in threading.enumerate()):
        assert time.monotonic() < deadline, "somebody waits for KV that never comes"
        time.sleep(0.01)


def client(*rigs: Rig) -> dict[str, tuple[list[int], list[TokenLogprob], tuple[TokenLogprob, ...]]]:
    """Tokens, their logprobs and the prompt's, as the controller joins them; two instances never disagree."""
    out: dict[str, tuple[list[int], list[TokenLogprob], tuple[TokenLogprob, ...]]] = {}
    said = sorted((e for rig in rigs for e in list(rig.events) if isinstance(e, m.Tokens)), key=lambda e: e.start)
    for e in said:
        tokens, logprobs, prompt = out.get(e.request_id, ([], [], ()))
        assert e.start <= len(tokens), f"tokens before {e.start} of {e.request_id} were never said"
        known = len(tokens) - e.start
        assert e.token_ids[:known] == tuple(tokens[e.start : e.start + len(e.token_ids)])
        tokens, logprobs = [*tokens, *e.token_ids[known:]], [*logprobs, *e.logprobs[known:]]
        out[e.request_id] = (tokens, logprobs, prompt or e.prompt_logprobs)
    return out


def ended(*rigs: Rig) -> dict[str, str]:
    return {e.request_id: e.reason for rig in rigs for e in list(rig.events) if isinstance(e, RequestFinished)}


def tokens_said(rig: Rig, request_id: str) -> int:
    return sum(len(e.token_ids) for e in list(rig.events) if isinstance(e, m.Tokens) and e.request_id == request_id)


def migrate(source: Rig, request_id: str, target: Rig) -> None:
    source.instance.post(Migrate(source.instance.name, request_id, 1, target.instance.name))


def migrate_after(tokens: int, source: Rig, request_id: str, target: Rig) -> None:
    """The moment the source has said so many of the answer."""
    source.acts[request_id] = (tokens, lambda: migrate(source, request_id, target))


def catch_up(rig: Rig) -> None:
    """It handles all that it was told so far."""
    migrate(rig, "nobody", rig)
    wait(lambda: "nobody" in [e.request_id for e in of(rig, RequestFailed)], "an answer")


def held(rig: Rig, begin: Callable[[], object], timeout_s: float = 60.0) -> list[str]:
    """It takes KV once `begin`; give a short timeout if that is there no more by then. → where it was taken from."""
    take, addresses = rig.handoff.take_all, []

    def later(address, wanted, _):
        specs = wanted[0][1]
        if len(specs) >= 2 and specs[0].shape != specs[1].shape:  # keys and values, no residuals
            addresses.append(address)
            wait(begin, "begun")
        return take(address, wanted, timeout_s)

    rig.handoff.take_all = later
    return addresses


def of(rig: Rig, kind: type) -> list:
    return [e for e in list(rig.events) if isinstance(e, kind)]


def expected(rig: Rig, works: list[Work]) -> dict[str, tuple]:
    rig.post(*works)
    rig.wait(lambda events: finished(events) >= {w.request.id for w in works}, "reference")
    out = client(rig)
    with rig.changed:
        rig.events.clear()
    return out


@pytest.mark.parametrize("after,tp", [(1, 1), (2, 1), (7, 1), (23, 1), (3, 2)])
def test_a_moved_request_goes_on_as_if_it_had_stayed(make, after: int, tp: int) -> None:
    rigs = make("p", "d", tensor_parallel=tp)
    p, d = rigs["p"], rigs["d"]
    for item in WORKS if tp == 1 else WORKS[1:2]:  # alone: the shapes are the same, and so is every bit of the logprobs
        alone = expected(p, [item])
        request_id = item.request.id
        migrate_after(after, p, request_id, d)
        p.instance.post(item)
        wait(lambda: request_id in ended(p, d), "the end")
        assert client(p, d) == alone
        (moved,) = of(d, KVMigrated)
        assert moved.request_id == request_id and moved.kv_bytes > 0
        assert not of(p, RequestFinished) and tokens_said(p, request_id) == after
        p.events.clear(), d.events.clear()


def test_kv_travels_without_the_empty_rest_of_a_cache(make) -> None:
    rigs = make("p", "d")
    for tokens, width in ((5, 32), (40, 64), (150, 256)):
        migrate_after(1, rigs["p"], "r1", rigs["d"])
        rigs["p"].instance.post(work(1, tokens, max_tokens=20, ignore_eos=True))
        wait(lambda: "r1" in ended(rigs["d"]), "the end")
        (moved,) = of(rigs["d"], KVMigrated)
        assert moved.kv_bytes == SPEC.layers * 2 * SPEC.kv_heads * SPEC.head_dim * 4 * width
        rigs["p"].events.clear(), rigs["d"].events.clear()


def test_many_requests_move_on_twice_while_others_are_decoded(make) -> None:
    rigs = make("p", "d", "e")
    p, d, e = rigs["p"], rigs["d"], rigs["e"]
    works = WORKS[:4]
    wanted = expected(p, works)
    for n, item in enumerate(works):
        migrate_after(1 + n, p, item.request.id, d)
        migrate_after(12, d, item.request.id, e)
    p.post(*works)
    wait(lambda: len(ended(p, d, e)) == len(works), "ends")
    assert {i: t for i, (t, _, _) in client(p, d, e).items()} == {i: t for i, (t, _, _) in wanted.items()}
    assert {len(of(rig, KVMigrated)) for rig in (d, e)} == {len(works)} and not of(p, RequestFinished)
    assert set(ended(e).values()) == {"length"} and len(ended(e)) == len(works)


@pytest.mark.parametrize("then", ["nothing", "the pair ends", "the pair has ended", "another target", "the target is gone",
                                  "abort"])
def test_a_prompt_of_two_instances_is_taken_from_both(make, then: str, monkeypatch) -> None:
    """OLD emits the first token before NEW's layers of KV are with it; Migrate comes in between."""
    monkeypatch.setattr(live, "_KV_AT_ONCE", 1)
    rigs = make("old", "d", "e")
    old, d, e = rigs["old"], rigs["d"], rigs["e"]
    new = make("new", units=0)["new"]
    wanted = expected(old, WORKS[4:5])
    moves = then in ("nothing", "the pair ends", "the pair has ended")
    acted = threading.Event()
    kv_takes = {"old": held(old, lambda: leaves(old, "r4")), "d": held(d, acted.is_set, 60.0 if moves else 1.0)}
    pair = LivePair("old", "new", "zigzag")
    new.post(StartLive("new", pair), WORKS[4])
    new.load(SPEC.units - 1)  # all but the head
    wait(lambda: depth(new, WORKS[4]) == SPEC.layers - 1, "layers")

    def end() -> None:
        old.instance.post(EndLive("old", pair)), new.instance.post(EndLive("new", pair))
        wait(lambda: old.instance._partners.old is None and not new.instance._partners.new.open, "the end of the pair")

    if then == "the pair has ended":
        old.instance.post(StartLive("old", pair))
        wait(lambda: of(old, PrefillDone), "the first token")
        end()
        migrate(old, "r4", d)
    else:
        migrate_after(1, old, "r4", d)
        old.instance.post(StartLive("old", pair))
    wait(lambda: old.session is not None, "the offer")
    offered = old.session
    if then == "the pair ends":
        end()
    elif then == "another target":
        migrate(old, "r4", e)
        wait(lambda: old.session is not offered, "the other offer")
        catch_up(d)
    elif then == "the target is gone":
        offered.close()
        wait(lambda: of(old, RequestFailed), "its end at the source")
    elif then == "abort":
        old.instance.post(Abort("old", "r4"))
        wait(lambda: of(old, RequestFinished), "its end at the source")
    acted.set()
    new.load(SPEC.units)
    if then in ("the target is gone", "abort"):
        nothing_is_taken()
        assert not ended(d) and old.instance.idle
    else:
        wait(lambda: "r4" in ended(d if moves else e), "the end")
        got = client(old, new, d, e)["r4"]
        assert got == wanted["r4"] and got[2] and tokens_said(old, "r4") == 1
    assert bool(of(d, KVMigrated)) == moves
    if moves:
        assert kv_takes["old"] in ([], [new.handoff.offer().address]), "OLD took what D should take"
        assert set(kv_takes["d"]) == {old.handoff.offer().address, new.handoff.offer().address}
        whole = SPEC.layers * 2 * SPEC.kv_heads * SPEC.head_dim * 4 * 256
        assert [moved.kv_bytes for moved in of(d, KVMigrated)] == [whole]
    if not then.startswith("the pair"):
        old.wait(lambda events: any(isinstance(e, LiveDrained) for e in events), "LiveDrained")
        old.instance.post(EndLive("old", pair)), new.instance.post(EndLive("new", pair))
    wait(lambda: new.instance.idle and new.instance._partners.new is None, "the pair is over")


def test_a_request_whose_kv_waits_behind_anothers_leaves_at_once(make) -> None:
    rigs = make("old", "d")
    old, d, new = rigs["old"], rigs["d"], make("new", units=0)["new"]
    works = WORKS[3:5]
    wanted = expected(old, works)
    left = threading.Event()
    kv_takes = {"old": held(old, left.is_set), "d": held(d, lambda: True)}
    pair = LivePair("old", "new", "zigzag")
    new.post(StartLive("new", pair), *works)
    new.load(SPEC.units - 1)
    wait(lambda: all(depth(new, item) == SPEC.layers - 1 for item in works), "layers")
    migrate_after(1, old, "r4", d)
    old.instance.post(StartLive("old", pair))
    wait(lambda: "r4" in ended(d), "the end of the one that left")
    assert kv_takes["old"] == [new.handoff.offer().address] and not ended(old)
    assert set(kv_takes["d"]) == {old.handoff.offer().address, new.handoff.offer().address}
    left.set()
    wait(lambda: "r3" in ended(old), "the end of the other one")
    assert client(old, new, d) == wanted
    new.load(SPEC.units)
    old.wait(lambda events: any(isinstance(e, LiveDrained) for e in events), "LiveDrained")
    old.instance.post(EndLive("old", pair)), new.instance.post(EndLive("new", pair))


def test_the_next_attempt_of_a_request_that_did_not_get_away_has_all_of_its_kv(make, monkeypatch) -> None:
    """In the same pair: that the one before should leave a part with NEW says nothing about this one."""
    monkeypatch.setattr(live, "_KV_AT_ONCE", 1)
    rigs = make("old", "d")
    old, new = rigs["old"], make("new", units=0)["new"]
    wanted = expected(old, WORKS[4:5])
    held(old, lambda: leaves(old, "r4") or of(old, RequestFailed))
    held(rigs["d"], lambda: of(old, RequestFailed), 1.0)
    pull, later, pair = DirectPartner.pull, threading.Event(), LivePair("old", "new", "zigzag")
    pulls: list[Callable[[], None]] = []
    monkeypatch.setattr(DirectPartner, "pull", lambda link, seq: pull(link, seq) if seq == 1 or later.is_set()
                        else pulls.append(lambda: pull(link, seq)))
    new.post(StartLive("new", pair), WORKS[4])
    new.load(SPEC.units - 1)
    wait(lambda: depth(new, WORKS[4]) == SPEC.layers - 1, "layers")
    migrate_after(1, old, "r4", rigs["d"])
    old.instance.post(StartLive("old", pair))
    wait(lambda: old.session is not None, "the offer")
    old.session.close()
    wait(lambda: of(old, RequestFailed) and pulls, "the end of the first attempt, and another pull")
    new.instance.post(replace(WORKS[4], attempt=2))
    wait(lambda: depth(new, WORKS[4]) == SPEC.layers - 1, "layers once more")
    later.set(), pulls.pop()()
    wait(lambda: "r4" in ended(old), "the answer")
    assert client(old)["r4"] == wanted["r4"]
    new.load(SPEC.units)
    old.wait(lambda events: any(isinstance(e, LiveDrained) for e in events), "LiveDrained")
    old.instance.post(EndLive("old", pair)), new.instance.post(EndLive("new", pair))


def leaves(rig: Rig, request_id: str) -> bool:
    """It has handled a Migrate."""
    sequence = rig.instance.find(request_id)
    return sequence is not None and rig.instance._moves.leaving(sequence)


def test_the_source_decodes_on_when_its_target_is_gone_and_may_send_again(make) -> None:
    rigs = make("p", "d", "e")
    p, d, e = rigs["p"], rigs["d"], rigs["e"]
    wanted = expected(p, WORKS[:3])
    closed = threading.Event()
    held(d, closed.is_set, 1.0)
    migrate_after(3, p, "r0", d)
    p.post(*WORKS[:3])
    wait(lambda: p.session is not None, "the offer")
    migrate_after(6, p, "r0", e)  # decoding goes on
    p.session.close()  # what a broken connection looks like on both sides
    closed.set()
    wait(lambda: len(ended(p, d, e)) == 3, "ends")
    assert tokens_said(p, "r0") == 6
    assert client(p, d, e) == wanted and not of(d, KVMigrated)


def test_no_layer_of_a_prompt_runs_ahead_while_kv_is_on_its_way(make, monkeypatch) -> None:
    """A CPU's only thread would go from layer to layer, and send what is to be sent once the prompt is through."""
    rigs = make("p", "d")
    p, d = rigs["p"], rigs["d"]
    sent, ready, run = threading.Event(), [], p.instance.runner._run_layer

    def layer(prefill, number, index):
        if prefill.chunks[-1].stop == 150 and number:
            ready.append(prefill.x[index].is_ready())
        run(prefill, number, index)

    monkeypatch.setattr(p.instance.runner, "_run_layer", layer)
    held(d, sent.is_set)
    migrate_after(1, p, "r0", d)
    p.instance.post(WORKS[0])
    wait(lambda: p.session is not None, "the offer")
    p.instance.post(WORKS[4])
    wait(lambda: of(p, PrefillDone)[1:], "the prompt")
    sent.set()
    wait(lambda: {"r0", "r4"} == ended(p, d).keys(), "ends")
    assert len(ready) >= 2 * (SPEC.layers - 1) and all(ready)


def test_a_later_migrate_replaces_one_that_hangs(make) -> None:
    rigs = make("p", "d", "e")
    p, d, e = rigs["p"], rigs["d"], rigs["e"]
    wanted = expected(p, WORKS[:1])
    d.stop()  # never answers
    migrate_after(1, p, "r0", d)
    p.instance.post(WORKS[0])
    wait(lambda: p.session is not None, "the offer")
    migrate(p, "r0", e)
    wait(lambda: "r0" in ended(p, e), "the end")
    assert client(p, e) == wanted and len(of(e, KVMigrated)) == 1


def test_a_full_target_declines_and_disturbs_nobody(make) -> None:
    rigs = make("p", "d", max_num_seqs=2)
    p, d = rigs["p"], rigs["d"]
    long = [work(n, 10, max_tokens=240, ignore_eos=True) for n in (1, 2)]
    wanted = reference(d, long)
    arrived: list[m.KVArrived] = []
    post = d.instance.post
    d.instance.post = lambda message: arrived.append(message) if isinstance(message, m.KVArrived) else post(message)
    migrate_after(1, p, "r0", d)
    p.instance.post(WORKS[0])
    wait(lambda: arrived, "its KV")
    d.acts["r2"] = (1, lambda: post(arrived[0]))  # they came together, so both are there
    d.post(*long)
    wait(lambda: of(p, RequestFailed), "the refusal")
    assert "no room" in of(p, RequestFailed)[0].message and not of(d, KVMigrated)
    wait(lambda: len(ended(d)) == 2, "ends")
    assert answers(d) == wanted and p.instance.idle


def test_a_target_whose_kv_lies_otherwise_declines(make) -> None:
    """As large as the source's, so that nothing else would tell."""
    p, d = make("p")["p"], make("d", attention=fused("xla", "float32"))["d"]
    migrate_after(2, p, "r0", d)
    p.instance.post(WORKS[0])
    wait(lambda: of(p, RequestFailed), "the refusal")
    assert of(p, RequestFailed)[0].message.startswith("KV comes as float32 with heads, keys and values at 1, 3, 2, and is ")
    assert not of(d, KVMigrated)


@pytest.mark.parametrize(("when", "ends"), [("offered", "p"), ("taken", "p"), ("adopted", "pd"), ("answered", "d")])
def test_a_request_that_is_aborted_on_its_way_is_nowhere(make, when: str, ends: str) -> None:
    rigs = make("p", "d")
    p, d = rigs["p"], rigs["d"]
    take = d.handoff.take_all

    def abort_if(moment: str) -> None:
        if moment == when:
            p.instance.post(Abort("p", "r4"))
            wait(lambda: ended(p), "the abort")

    def taken(address, wanted, timeout_s):
        abort_if("offered")
        arrays = take(address, wanted, 1.0 if when == "offered" else timeout_s)
        abort_if("taken")
        return arrays

    def abort_both() -> None:  # as the brain does when it hears that a request that is over has a new owner
        p.instance.post(Abort("p", "r4")), d.instance.post(Abort("d", "r4"))

    d.handoff.take_all = taken
    if "d" in ends:
        d.acts["r4"] = (1 if when == "adopted" else 2, abort_both)
    migrate_after(1, p, "r4", d)
    p.instance.post(WORKS[4])
    wait(lambda: [rig.instance.name for rig in (p, d) if ended(rig)] == list(ends), "all ends")
    nothing_is_taken()
    catch_up(d)
    assert set(ended(p, d).values()) == {"abort"} and bool(of(d, KVMigrated)) == ("d" in ends)


def test_release_forgets_what_is_on_its_way(make) -> None:
    for released in ("p", "d"):
        rigs = make("p", "d")
        p, d = rigs["p"], rigs["d"]
        told = threading.Event()
        held(d, told.is_set, 1.0)
        migrate_after(1, p, "r4", d)
        p.instance.post(WORKS[4])
        wait(lambda: p.session is not None, "the offer")
        rigs[released].instance.post(Release(released))
        rigs[released].wait(lambda events: any(isinstance(e, Drained) for e in events), "Drained")
        told.set()
        if released == "d":  # the worker says so by ending the session
            p.session.close()
            wait(lambda: "r4" in ended(p), "the end at its source")
        nothing_is_taken()
        p.stop(), d.stop()  # after whatever was on its way to them
        assert p.instance.idle and d.instance.idle and not of(d, KVMigrated)


def test_migrate_of_a_request_that_is_not_here_is_answered(make) -> None:
    p = make("p")["p"]
    migrate(p, "r9", p)
    wait(lambda: of(p, RequestFailed), "an answer")
    assert (of(p, RequestFailed)[0].request_id, of(p, RequestFailed)[0].attempt) == ("r9", 1)

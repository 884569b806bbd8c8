"""Requests move between instances with their KV: tokens of one instance, at whatever moment, whoever fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from blitzjax.config import Config, EngineConfig, TransferConfig
from blitzjax.engine import messages as m
from blitzjax.commands import Abort, EndLive, Migrate, Release, StartLive
from blitzjax.events import Drained, KVMigrated, LiveDrained, RequestFailed, RequestFinished
from blitzjax.types import LivePair, TokenLogprob, Work
from test_instance import LETTERS, PENALISED, SPEC, DirectPartner, Rig, answers, apart, finished, reference, work

WORKS = [work(n, tokens, max_tokens=24, ignore_eos=True, **sampling) for n, (tokens, sampling) in enumerate([
    (5, {}), (40, PENALISED), (64, {"temperature": 0.8, "seed": 5, "top_k": 40}),
    (100, {"logprobs": 3, "min_tokens": 9}), (150, {"prompt_logprobs": 2, "logprobs": 0, **PENALISED}), (9, {}),
    (33, {"temperature": 1.1, "seed": 1 << 40}), (20, {"logprobs": 1, **LETTERS})])]


class Mover(Rig):
    """Is told to migrate a request the moment it has said so many tokens of the answer."""

    def __init__(self, name: str, config: Config, rigs: dict[str, Rig]):
        self.moves: dict[str, tuple[int, Rig]] = {}
        super().__init__(name, config, rigs)

    def _collect(self, output: object) -> None:
        super()._collect(output)
        for said in apart(output):
            if isinstance(said, m.Tokens) and said.request_id in self.moves:
                after, target = self.moves[said.request_id]
                if said.start + len(said.token_ids) >= after:
                    del self.moves[said.request_id]
                    migrate(self, said.request_id, target)


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Mover]]]:
    """Complete instances by name, with `engine` options. No prefix cache: it would cut a prompt's second run elsewhere,
    and every bit is compared."""
    made: dict[str, Mover] = {}

    def rigs(*names: str, units: int = SPEC.units, **engine: int) -> dict[str, Mover]:
        options = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64,
                   "prefix_caching": False,
                   "executable_cache": str(tmp_path_factory.getbasetemp() / "executables")} | engine
        config = Config(engine=EngineConfig(**options), transfer=TransferConfig(handoff_timeout_s=2.0))
        for name in names:
            made[name] = Mover(name, config, made)
            made[name].load(units)
        return made

    yield rigs
    for rig in made.values():
        rig.stop()
        assert rig.instance.idle, f"{rig.instance.name} keeps a request"
    nothing_is_taken()


def nothing_is_taken() -> None:
    for thread in [t for t in threading.enumerate() if t.name in ("take-moved-kv", "withdraw-kv")]:
        thread.join(60)
        assert not thread.is_alive(), "somebody waits for KV that never comes"


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


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, f"not {what}"
        time.sleep(0.002)


def tokens_said(rig: Rig, request_id: str) -> int:
    return sum(len(e.token_ids) for e in list(rig.events) if isinstance(e, m.Tokens) and e.request_id == request_id)


def migrate(source: Rig, request_id: str, target: Rig) -> None:
    source.instance.post(Migrate(source.instance.name, request_id, 1, target.instance.name))


def of(rig: Rig, kind: type) -> list:
    return [e for e in list(rig.events) if isinstance(e, kind)]


def expected(rig: Rig, works: list[Work]) -> dict[str, tuple]:
    for item in works:
        rig.instance.post(item)
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
        p.moves[request_id] = (after, d)
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
        rigs["p"].moves["r1"] = (1, rigs["d"])
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
        p.moves[item.request.id], d.moves[item.request.id] = (1 + n, d), (12, e)
    for item in works:
        p.instance.post(item)
    wait(lambda: len(ended(p, d, e)) == len(works), "ends")
    assert {i: t for i, (t, _, _) in client(p, d, e).items()} == {i: t for i, (t, _, _) in wanted.items()}
    assert {len(of(rig, KVMigrated)) for rig in (d, e)} == {len(works)} and not of(p, RequestFinished)
    assert set(ended(e).values()) == {"length"} and len(ended(e)) == len(works)


@pytest.mark.parametrize("then", ["nothing", "the pair ends", "another target", "the target is gone", "abort"])
def test_a_prompt_of_two_instances_is_taken_from_both(make, then: str) -> None:
    """OLD emits the first token before NEW's layers of KV are with it; Migrate comes in between."""
    rigs = make("old", "d", "e")
    old, d, e = rigs["old"], rigs["d"], rigs["e"]
    new = make("new", units=0)["new"]
    wanted = expected(old, WORKS[4:5])
    kv_takes = {rig.instance.name: slowed(rig, lambda: tokens_said(old, "r4")) for rig in (old, d)}
    pair = LivePair("old", "new", "zigzag")
    new.instance.post(StartLive("new", pair))
    new.instance.post(WORKS[4])
    new.load(SPEC.units - 1)  # all but the head
    wait(lambda: (s := new.instance.find("r4")) and s.prefill and s.prefill.next_layer == SPEC.layers - 1, "layers")
    old.moves["r4"] = (1, d)
    old.instance.post(StartLive("old", pair))
    wait(lambda: old.session is not None, "the offer")
    if then == "the pair ends":
        old.instance.post(EndLive("old", pair)), new.instance.post(EndLive("new", pair))
    elif then == "another target":
        migrate(old, "r4", e)
    elif then == "the target is gone":
        old.session.close()
    elif then == "abort":
        old.instance.post(Abort("old", "r4"))
    new.load(SPEC.units)
    if then in ("the target is gone", "abort"):
        wait(lambda: of(old, RequestFailed) if then != "abort" else of(old, RequestFinished), "its end at the source")
        assert not of(d, KVMigrated) and old.instance.idle
    else:
        wait(lambda: "r4" in ended(old, new, d, e) or of(old, RequestFailed), "the end")
    if ended(d, e):
        got = client(old, new, d, e)["r4"]
        assert got == wanted["r4"] and got[2] and tokens_said(old, "r4") == 1
    if then in ("nothing", "the pair ends"):
        assert kv_takes["old"].count(new.handoff.offer().address) < SPEC.layers - 1, "OLD took what D should take"
        assert set(kv_takes["d"]) == {old.handoff.offer().address, new.handoff.offer().address}
        whole = SPEC.layers * 2 * SPEC.kv_heads * SPEC.head_dim * 4 * 256
        assert [moved.kv_bytes for moved in of(d, KVMigrated)] == [whole]
    if then != "the pair ends":
        old.wait(lambda events: any(isinstance(e, LiveDrained) for e in events), "LiveDrained")
        old.instance.post(EndLive("old", pair)), new.instance.post(EndLive("new", pair))
    wait(lambda: new.instance.idle and new.instance._partners.new is None, "the pair is over")


def test_the_next_attempt_of_a_request_that_did_not_get_away_has_all_of_its_kv(make, monkeypatch) -> None:
    """In the same pair: that the one before should leave a part with NEW says nothing about this one."""
    rigs = make("old", "d")
    old, new = rigs["old"], make("new", units=0)["new"]
    wanted = expected(old, WORKS[4:5])
    slowed(old, lambda: tokens_said(old, "r4"))
    pull, later, pair = DirectPartner.pull, threading.Event(), LivePair("old", "new", "zigzag")
    held: list[Callable[[], None]] = []
    monkeypatch.setattr(DirectPartner, "pull", lambda link, seq: pull(link, seq) if seq == 1 or later.is_set()
                        else held.append(lambda: pull(link, seq)))

    def layers() -> bool:
        sequence = new.instance.find("r4")
        return sequence is not None and sequence.prefill is not None and sequence.prefill.next_layer == SPEC.layers - 1

    new.instance.post(StartLive("new", pair))
    new.instance.post(WORKS[4])
    new.load(SPEC.units - 1)
    wait(layers, "layers")
    old.moves["r4"] = (1, rigs["d"])
    old.instance.post(StartLive("old", pair))
    wait(lambda: old.session is not None, "the offer")
    old.session.close()
    wait(lambda: of(old, RequestFailed) and held, "the end of the first attempt, and another pull")
    new.instance.post(replace(WORKS[4], attempt=2))
    wait(layers, "layers once more")
    later.set(), held.pop()()
    wait(lambda: "r4" in ended(old), "the answer")
    assert client(old)["r4"] == wanted["r4"]
    new.load(SPEC.units)
    old.wait(lambda events: any(isinstance(e, LiveDrained) for e in events), "LiveDrained")
    old.instance.post(EndLive("old", pair)), new.instance.post(EndLive("new", pair))


def slowed(rig: Rig, begin: Callable[[], object]) -> list[str]:
    """KV is taken after `begin` only, and each piece takes its time. → where they were taken from."""
    take, addresses = rig.handoff.take, []

    def slow(address, uuid, specs, timeout_s):
        if len(specs) >= 2 and specs[0].shape != specs[1].shape:  # keys and values, no residuals
            addresses.append(address)
            wait(begin, "begun")
            time.sleep(0.2)
        return take(address, uuid, specs, timeout_s)

    rig.handoff.take = slow
    return addresses


def test_the_source_decodes_on_when_its_target_is_gone_and_may_send_again(make) -> None:
    rigs = make("p", "d", "e")
    p, d, e = rigs["p"], rigs["d"], rigs["e"]
    wanted = expected(p, WORKS[:3])
    closed = threading.Event()
    d.handoff.take = lambda *a, take=d.handoff.take: closed.wait() and take(*a)
    p.moves["r0"] = (3, d)
    for item in WORKS[:3]:
        p.instance.post(item)
    wait(lambda: p.session is not None, "the offer")
    p.moves["r0"] = (6, e)  # decoding goes on
    p.session.close()  # what a broken connection looks like on both sides
    closed.set()
    wait(lambda: len(ended(p, d, e)) == 3, "ends")
    assert tokens_said(p, "r0") == 6
    assert client(p, d, e) == wanted and not of(d, KVMigrated)


def test_a_later_migrate_replaces_one_that_hangs(make) -> None:
    rigs = make("p", "d", "e")
    p, d, e = rigs["p"], rigs["d"], rigs["e"]
    wanted = expected(p, WORKS[:1])
    d.instance.post(m.Stop())  # never answers
    d.thread.join(20)
    p.moves["r0"] = (1, d)
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
    held: list[m.KVArrived] = []
    post = d.instance.post
    d.instance.post = lambda message: held.append(message) if isinstance(message, m.KVArrived) else post(message)
    p.moves["r0"] = (1, d)
    p.instance.post(WORKS[0])
    wait(lambda: held, "its KV")
    for item in long:
        d.instance.post(item)
    wait(lambda: tokens_said(d, "r1") and tokens_said(d, "r2"), "tokens")
    post(held[0])
    wait(lambda: of(p, RequestFailed), "the refusal")
    assert "no room" in of(p, RequestFailed)[0].message and not of(d, KVMigrated)
    wait(lambda: len(ended(d)) == 2, "ends")
    assert answers(d) == wanted and p.instance.idle


@pytest.mark.parametrize("seconds", [0.0, 0.002, 0.01, 0.05])
def test_a_request_that_is_aborted_on_its_way_is_nowhere(make, seconds: float) -> None:
    rigs = make("p", "d")
    p, d = rigs["p"], rigs["d"]
    p.instance.post(WORKS[4])
    wait(lambda: tokens_said(p, "r4") >= 1, "tokens")
    migrate(p, "r4", d)
    time.sleep(seconds)
    p.instance.post(Abort("p", "r4"))
    wait(lambda: "r4" in ended(p) or of(d, KVMigrated), "an end, or a new owner")
    time.sleep(0.3)
    if of(d, KVMigrated):  # as the brain does when it hears of a request that is over
        d.instance.post(Abort("d", "r4"))
    wait(lambda: p.instance.idle and d.instance.idle, "idle")
    assert len(of(p, RequestFinished)) + len(of(d, RequestFinished)) >= 1


def test_release_forgets_what_is_on_its_way(make) -> None:
    for released in ("p", "d"):
        rigs = make("p", "d")
        p, d = rigs["p"], rigs["d"]
        told = threading.Event()
        d.handoff.take = lambda *a, told=told, take=d.handoff.take: told.wait() and take(*a)
        p.moves["r4"] = (1, d)
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

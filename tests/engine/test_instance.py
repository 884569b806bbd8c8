"""Two instances in one process, real arrays and a real hand-off server, a partner link without gRPC.

The reference is one instance alone; a live pair must give its tokens whatever the layers loaded when the prompts came.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from blitzjax.config import Config, EngineConfig, TransferConfig
from blitzjax.engine import checkpoint, messages as m
from blitzjax.engine.attention import Attention
from blitzjax.engine.instance import Instance
from blitzjax.engine.live import OldSide
from blitzjax.engine.params import LayerStore, fill, unit_arrays
from blitzjax.engine.runner import Runner
from blitzjax.engine.stages import Stages
from blitzjax.transfer.handoff import HandOff
from byte_tokenizer import byte_tokenizer
from blitzjax.commands import Abort, EndLive, Release, StartLive
from blitzjax.events import Drained, LiveDrained, PrefillDone, RequestFinished, RequestHanded, RequestReturned
from blitzjax.types import LivePair, LogitBias, ModelSpec, Request, Sampling, Span, Work

PATIENT = replace(Config(), transfer=TransferConfig(handoff_timeout_s=60.0))  # on a machine that is busy with other things
SPEC = ModelSpec("tiny", "llama", 5, 64, 4, 2, 16, 128, 272, 512, 10000.0, 1e-5, True, "float32", eos_token_ids=(7,))


def weights(unit: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(unit)
    return {a.name: rng.normal(1.0 if "norm" in a.name else 0.0, 0.2, a.shape).astype(np.float32)
            for a in unit_arrays(SPEC, unit)}


class Rig:
    """An Instance with its thread; collects what it emits.

    `acts[r] = (n, act)`: that thread calls `act` when it has said n tokens of r's answer. To a test's own thread all may be
    over by then.
    """

    def __init__(self, name: str, config: Config, rigs: dict[str, "Rig"], checkpoint: Path | None = None,
                 own_memory: bool = False, attention: Attention | None = None):
        devices = jax.local_devices()[: config.engine.tensor_parallel]
        self.store = LayerStore(SPEC, devices, own_memory)
        stages = Stages(SPEC, config.engine, self.store.mesh, attention)
        self.handoff = HandOff("127.0.0.1", devices, own_memory)
        self.events: list[object] = []
        self.changed = threading.Condition()
        self.acts: dict[str, tuple[int, Callable[[], object]]] = {}
        self.partner: DirectPartner | None = None  # of an OLD side
        self.session: DirectSession | None = None  # the last one in which it sent KV, once the target knows
        self.instance = Instance(name, config, self.store, stages, self.handoff, self._collect,
                                 lambda partner: DirectPartner(self, rigs[partner]),
                                 lambda target, offer: DirectSession(self, rigs[target], offer), checkpoint=checkpoint,
                                 tokenizer=lambda: byte_tokenizer({"<|eos|>": SPEC.eos_token_ids[0]}).to_str())
        self.thread = threading.Thread(target=self.instance.run, daemon=True)
        self.thread.start()

    def _collect(self, output: object) -> None:
        said = apart(output)
        with self.changed:
            self.events += said
            self.changed.notify_all()
        for event in said:
            if isinstance(event, m.Tokens) and event.request_id in self.acts:
                after, act = self.acts[event.request_id]
                if event.start + len(event.token_ids) >= after:
                    del self.acts[event.request_id]
                    act()

    def post(self, *messages: object) -> None:
        """It says nothing more before all of them are in its inbox, however long this takes."""
        with self.changed:
            for message in messages:
                self.instance.post(message)

    def load(self, units: int) -> None:
        for unit in range(self.store.units, units):
            fill(self.store, unit, weights(unit))
            self.store.commit(unit)
            self.instance.post(m.UnitsArrived())

    def wait(self, condition, what: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self.events), 300), f"no {what}: {self.events[-5:]}"

    def stop(self) -> None:
        self.instance.post(m.Stop())
        self.thread.join(300)
        assert not self.thread.is_alive()
        self.instance.check()


def apart(output: object) -> list[object]:
    """A Decoded as Tokens of each answer, all else as it is."""
    if not isinstance(output, m.Decoded):
        return [output]
    rows = zip(output.request_ids, output.attempts, output.starts, output.token_ids, strict=True)
    return [m.Tokens(request_id, attempt, start, (token,), "", 0) for request_id, attempt, start, token in rows]


class DirectPartner:
    """Partner link between two rigs of this process, both ends of it."""

    def __init__(self, old: Rig, new: Rig):
        self._old, self._new, self.name = old, new, old.instance.name
        self.loans: list[m.Loan] = []
        old.partner = self
        new.instance.post(m.Partnered(self))

    def hand_over(self, answer: m.HandOver) -> None:
        self._old.instance.post(m.HandedOver(self, answer))

    def borrow(self, borrow: m.Borrow) -> None:
        self._old.instance.post(m.Borrowed(self, borrow))

    def pull(self, seq: int) -> None:
        self._new.instance.post(m.Pulled(self, seq))

    def lend(self, loan: m.Loan) -> None:
        self.loans.append(loan)
        self._new.instance.post(m.Lent(self, loan))

    def taken(self, seq: int) -> None:
        self._new.instance.post(m.Taken(self, seq))

    def close(self) -> None:
        for rig in (self._new, self._old):
            rig.instance.post(m.PartnerLost(self))


class DirectSession:
    """A session about one request's KV between two rigs of this process, both ends of it."""

    def __init__(self, source: Rig, target: Rig, offer: m.KVOffer):
        self.source, self.target, self.offer = source, target, offer
        target.instance.post(m.KVOffered(offer, self))
        source.session = self

    def answer(self, error: str) -> None:
        self.source.instance.post(m.KVAnswered(self.offer, error))

    def close(self) -> None:
        self.target.instance.post(m.KVWithdrawn(self.offer))
        self.source.instance.post(m.KVUnanswered(self.offer))


@pytest.fixture
def rigs(tmp_path_factory):
    engine = EngineConfig(dtype="float32", max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64,
                          executable_cache=str(tmp_path_factory.getbasetemp() / "executables"))
    made: dict[str, Rig] = {}
    for name in ("old", "new"):  # what they say to each other is the same whatever memory they have
        made[name] = Rig(name, replace(PATIENT, engine=engine), made, own_memory=name == "new")
    yield made
    for rig in made.values():
        rig.stop()


def work(number: int, tokens: int, **sampling) -> Work:
    prompt = tuple(np.random.default_rng(number).integers(8, SPEC.vocab, tokens).tolist())
    sampling = Sampling(**{"max_tokens": 6, **sampling})
    return Work(Request(f"r{number}", "tiny", tokens, sampling.max_tokens, 0.0), 1, prompt, (), sampling)


PENALISED = {"temperature": 0.9, "seed": 11, "repetition_penalty": 1.4, "presence_penalty": 0.5,
             "frequency_penalty": 0.7}
LETTERS = {"grammar": "start: /([a-z][0-9]){99}/", "temperature": 1.2, "seed": 4}
KINDS = ({}, PENALISED, LETTERS)
WORKS = [work(n, tokens, **KINDS[n % 3]) for n, tokens in enumerate([5, 40, 64, 100, 150, 9, 33])]


def answers(rig: Rig) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for event in rig.events:
        if isinstance(event, m.Tokens):
            out.setdefault(event.request_id, []).extend(event.token_ids)
            assert event.start == len(out[event.request_id]) - len(event.token_ids)
    return out


def finished(events: list[object]) -> set[str]:
    return {e.request_id for e in events if isinstance(e, RequestFinished)}


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, f"not {what}"
        time.sleep(0.002)


def reference(rig: Rig, works: list[Work]) -> dict[str, list[int]]:
    rig.load(SPEC.units)
    rig.post(*works)
    rig.wait(lambda events: finished(events) >= {w.request.id for w in works}, "reference")
    expected = answers(rig)
    with rig.changed:
        rig.events.clear()
    return expected


def test_one_instance_answers_and_stops_where_it_should(rigs) -> None:
    rig = rigs["old"]
    expected = reference(rig, [work(1, 20, max_tokens=12, ignore_eos=True)])["r1"]
    assert len(expected) == 12
    stop = work(2, 20, max_tokens=12, ignore_eos=True, stop_token_ids=(expected[3],))
    rig.instance.post(replace(stop, prompt=work(1, 20).prompt))
    rig.wait(lambda events: "r2" in finished(events), "stop")
    assert answers(rig)["r2"] == expected[: expected.index(expected[3]) + 1]
    assert next(e for e in rig.events if isinstance(e, RequestFinished)).reason == "stop"


def test_a_step_reads_nothing_from_the_device_but_the_tokens_of_its_rows(rigs, monkeypatch) -> None:
    """Other ways from an array to the host would raise here; the pages of short answers are not kept."""
    rig, read, asarray = rigs["old"], [], np.asarray
    works = [work(n, 5, max_tokens=8, ignore_eos=True) for n in range(3)]
    expected = reference(rig, works)

    def counted(value: object, *args: object, **named: object) -> np.ndarray:
        if isinstance(value, jax.Array):
            read.append(value.nbytes)
        return asarray(value, *args, **named)

    monkeypatch.setattr(np, "asarray", counted)
    for way in ("__array__", "__int__", "__float__", "__bool__", "__index__", "__iter__", "tolist", "item"):
        monkeypatch.delattr(type(jax.numpy.zeros(1)), way)
    assert reference(rig, works) == expected
    steps = len(read) - len(works)  # every prompt's first token is read, too
    assert 7 <= steps <= 7 + len(works) - 1, "one read a step; all rows decode together, but for what begins later"
    assert max(read) <= 4 * np.dtype(np.int32).itemsize, "a token for each of four rows"


def test_a_later_attempt_continues_where_the_first_was_lost(rigs) -> None:
    for sampling in ({}, {"temperature": 0.9, "seed": 11, "top_p": 0.9}, PENALISED | {"min_tokens": 7}):
        rig = rigs["old"]
        item = work(5, 30, max_tokens=10, ignore_eos=True, **sampling)
        expected = reference(rig, [item])["r5"]
        rig.instance.post(replace(item, attempt=2, generated=tuple(expected[:4])))
        rig.wait(lambda events: "r5" in finished(events), "second attempt")
        assert [t for e in rig.events if isinstance(e, m.Tokens) for t in e.token_ids] == expected[4:]
        rig.events.clear()


def test_a_seed_gives_the_same_answer_whatever_else_is_in_the_batch(rigs) -> None:
    rig = rigs["old"]
    mixed = [work(n, 20 + n, max_tokens=12, ignore_eos=True, **sampling) for n, sampling in enumerate([
        {}, {"temperature": 0.8, "seed": 5, "top_k": 40}, PENALISED, {"temperature": 1.2, "seed": 1 << 40, "min_p": 0.05},
        {"logprobs": 3}, {"logit_bias": (LogitBias(33, 5.0),)}])]
    alone = {}
    for item in mixed:
        alone |= reference(rig, [item])
    assert reference(rig, mixed) == alone == reference(rig, mixed[::-1])
    assert reference(rig, [replace(mixed[1], sampling=replace(mixed[1].sampling, seed=6))])["r1"] != alone["r1"]


def test_nothing_stops_an_answer_before_its_min_tokens(rigs) -> None:
    wants_end = {"max_tokens": 12, "logit_bias": (LogitBias(7, 100.0), LogitBias(9, 90.0)), "stop_token_ids": (9,)}
    got = reference(rigs["old"], [work(1, 20, **wants_end), work(2, 20, min_tokens=5, **wants_end),
                                  work(3, 20, min_tokens=5, ignore_eos=True, **wants_end)])
    assert got["r1"] == [7]
    assert len(got["r2"]) == 6 and got["r2"][5] == 7 and not {7, 9} & set(got["r2"][:5])
    assert not {7, 9} & set(got["r3"][:5]) and got["r3"][5:] == [7] * 7, "an ignored end-of-sequence token comes later, too"


def test_logprobs_of_an_answer_are_those_of_the_same_tokens_as_a_prompt(rigs) -> None:
    rig, first = rigs["old"], work(1, 60, max_tokens=20, ignore_eos=True, logprobs=4, **PENALISED)
    answer = tuple(reference(rig, [first])["r1"])
    said = messages(rig, first)
    assert [len(t.logprobs) for t in said] == [1] * 20 and not any(t.prompt_logprobs for t in said)
    whole = work(2, 80, max_tokens=2, ignore_eos=True, prompt_logprobs=4)  # longer than a chunk
    said_of_prompt = messages(rig, replace(whole, prompt=first.prompt + answer))
    scores = said_of_prompt[0].prompt_logprobs
    assert len(scores) == 79 and not said_of_prompt[1].prompt_logprobs and not said_of_prompt[0].logprobs
    for t, score in zip(said, scores[59:], strict=True):
        np.testing.assert_allclose(t.logprobs[0].logprob, score.logprob, atol=2e-4)
        assert (t.logprobs[0].rank, t.logprobs[0].top_ids) == (score.rank, score.top_ids)
        np.testing.assert_allclose(t.logprobs[0].top_logprobs, score.top_logprobs, atol=2e-4)
    later = replace(whole, prompt=first.prompt + answer, attempt=2, generated=said_of_prompt[0].token_ids)
    again = messages(rig, later)
    assert len(again) == 1 and not again[0].prompt_logprobs, "they were sent with the first token"


def messages(rig: Rig, item: Work) -> list[m.Tokens]:
    rig.instance.post(item)
    rig.wait(lambda events: item.request.id in finished(events), "answer")
    with rig.changed:
        said = [e for e in rig.events if isinstance(e, m.Tokens)]
        rig.events.clear()
    return said


def test_abort_frees_everything(rigs) -> None:
    rig = rigs["old"]
    rig.load(SPEC.units)
    rig.acts["r3"] = (1, lambda: rig.post(*[Abort("old", f"r{n}") for n in range(4)]))  # the last prompt
    rig.post(*[work(n, 100, max_tokens=100, ignore_eos=True) for n in range(4)])
    rig.wait(lambda events: len(finished(events)) == 4, "aborts")
    assert {e.reason for e in rig.events if isinstance(e, RequestFinished)} == {"abort"} and len(answers(rig)) == 4
    rig.stop()
    assert rig.instance.idle


@pytest.mark.parametrize("mode", ["zigzag", "best_effort"])
@pytest.mark.parametrize("units_at_start", [0, 1, 3, 6])
def test_live_pair_gives_the_tokens_of_one_instance(rigs, mode: str, units_at_start: int) -> None:
    old, new = rigs["old"], rigs["new"]
    expected = reference(old, WORKS)
    new.load(units_at_start)
    pair = LivePair("old", "new", mode)
    start = StartLive("new", pair)
    new.post(*WORKS[:5], start) if units_at_start == 6 else new.post(start, *WORKS[:5])
    old.instance.post(StartLive("old", pair))
    if units_at_start in (1, 3):  # NEW has layers to run and no embedding
        wait(lambda: old.partner is not None and old.partner.loans, "embedded rows of OLD's")
    for units in range(units_at_start + 1, SPEC.units + 1):
        time.sleep(0.05)
        new.load(units)
        if units == 4:
            new.post(*WORKS[5:])
    old.wait(lambda events: any(isinstance(e, LiveDrained) for e in events), "LiveDrained")
    for rig in (old, new):
        rig.instance.post(EndLive(rig.instance.name, pair))
    sent = {w.request.id for w in (WORKS if units_at_start < 4 else WORKS[:5])}
    wait(lambda: finished(old.events) | finished(new.events) == sent, "answers")
    merged = answers(new)
    for request, tokens in answers(old).items():
        assert request not in merged, "a request ran on both sides"
        merged[request] = tokens
    assert merged == {request: expected[request] for request in sent}
    handed = {e.request_id for e in new.events if isinstance(e, RequestHanded)}
    assert handed == set(answers(old)), "old answers exactly what it was handed"
    for rig in (old, new):
        assert rig.instance.idle


def test_a_loan_is_as_narrow_as_it_can_be_without_losing_a_bit(rigs) -> None:
    for dtype, wanted in (("float32", "float32"), ("bfloat16", "bfloat16")):
        spec = replace(SPEC, dtype=dtype)
        store = LayerStore(spec, jax.local_devices()[:1])
        for unit in range(spec.units):
            fill(store, unit, weights(unit))
            store.commit(unit)
        runner = Runner(Stages(spec, rigs["old"].instance.config.engine, store.mesh), store)
        loans: list[m.Loan] = []
        side = OldSide(LivePair("old", "new", "zigzag"), runner, rigs["old"].handoff,
                       SimpleNamespace(lend=loans.append), lambda message: None, 1.0)
        tokens = WORKS[3].prompt  # two chunks
        side.lend(m.Borrow("r", 1, tokens))
        own, lent = runner.begin(list(tokens)), runner.begin(list(tokens))
        runner.enter(lent, np.frombuffer(loans[0].rows, np.dtype(loans[0].dtype)).reshape(len(tokens), -1))
        for prefill in (own, lent):
            runner.run_span(prefill, Span(0, 2))
        assert loans[0].dtype == wanted
        for a, b, chunk in zip(own.x, lent.x, own.chunks, strict=True):
            real = chunk.stop - chunk.start
            assert np.array_equal(np.asarray(a)[0, :real], np.asarray(b)[0, :real])


def test_old_leaves_what_it_has_not_begun_to_the_pair_and_finishes_the_rest(rigs) -> None:
    old, new = rigs["old"], rigs["new"]
    expected = reference(old, WORKS[:1])
    pair = LivePair("old", "new", "zigzag")
    new.instance.post(StartLive("new", pair))
    old.acts["r0"] = (3, lambda: old.post(*WORKS[1:4]))  # a step has room for the first of their prompts only
    old.acts["r1"] = (1, lambda: old.post(StartLive("old", pair)))
    old.post(work(0, 5, max_tokens=200, ignore_eos=True))
    old.wait(lambda events: finished(events) == {"r0", "r1"}, "the answers that were begun")
    assert [e.request_id for e in old.events if isinstance(e, PrefillDone)] == ["r0", "r1"]
    assert [e.request_id for e in old.events if isinstance(e, RequestReturned)] == ["r2", "r3"]
    assert answers(old)["r0"][: len(expected["r0"])] == expected["r0"]
    assert old.instance.idle


def test_new_goes_on_alone_behind_the_loader_when_old_is_gone(rigs, tmp_path) -> None:
    """With what it has, and with what comes now: nobody lends it embedded rows any more."""
    expected = reference(rigs["old"], WORKS)
    checkpoint.write(tmp_path / "tiny", SPEC, map(weights, range(SPEC.units)), None)
    rigs["alone"] = new = Rig("alone", rigs["old"].instance.config, rigs, tmp_path / "tiny")
    pair = LivePair("old", "alone", "zigzag")
    session = DirectPartner(rigs["old"], new)
    new.instance.post(StartLive("alone", pair))
    for item in WORKS[:2]:
        new.instance.post(item)
    new.load(1)
    session.close()
    new.instance.post(EndLive("alone", pair))
    new.post(*WORKS[2:])
    new.load(SPEC.embed_unit)
    wait_for_depth(new, SPEC.layers - 1)
    assert not answers(new)
    new.load(SPEC.units)
    new.wait(lambda events: finished(events) >= set(expected), "answers")
    assert answers(new) == expected and new.instance.idle


@pytest.mark.parametrize("damage", [None, "corrupt", "absent"])
def test_an_instance_that_loads_alone_runs_its_prompts_behind_the_loader(rigs, tmp_path, damage: str | None) -> None:
    """The embedding comes after the layers; until then prompts begin with the checkpoint's, if that is sound."""
    expected = reference(rigs["old"], WORKS)
    directory = tmp_path / "tiny"
    stored = dict(enumerate(map(weights, range(SPEC.units))))
    checkpoint.write(directory, SPEC, iter(stored.values()), None)
    if damage == "corrupt":
        entry = checkpoint.Checkpoint.open(directory).entries[SPEC.embed_unit][0]
        with (directory / checkpoint.WEIGHTS).open("r+b") as file:
            file.seek(entry.offset)
            file.write(bytes(4))
    rigs["alone"] = rig = Rig("alone", rigs["old"].instance.config, rigs, None if damage == "absent" else directory)
    rig.post(*WORKS)
    rig.load(SPEC.embed_unit)
    ran = SPEC.layers - 1 if damage is None else 0  # the last layer is run once the head is here
    wait_for_depth(rig, ran)
    wait(lambda: rig.instance.rests, "the end of what it can run")
    assert {depth(rig, item) for item in WORKS} == {ran} and not answers(rig)
    rig.load(SPEC.units)
    rig.wait(lambda events: finished(events) >= set(expected), "answers")
    assert answers(rig) == expected and rig.instance.idle


def wait_for_depth(rig: Rig, layers: int) -> None:
    """Until so many layers were run over every prompt."""
    wait(lambda: all(depth(rig, item) >= layers for item in WORKS), f"layer {layers} of every prompt")


def depth(rig: Rig, item: Work) -> int:
    """Layers that were run over its prompt."""
    sequence = rig.instance.find(item.request.id)
    return sequence.prefill.next_layer if sequence is not None and sequence.prefill is not None else -1


def test_release_drops_the_parameters(rigs) -> None:
    rig = rigs["old"]
    rig.load(SPEC.units)
    rig.instance.post(Release("old"))
    rig.wait(lambda events: any(isinstance(e, Drained) for e in events), "Drained")
    assert rig.store.units == 0
    expected = reference(rig, WORKS[:2])  # and can be loaded again
    assert set(expected) == {"r0", "r1"} and any(isinstance(e, PrefillDone) for e in rig.events) is False

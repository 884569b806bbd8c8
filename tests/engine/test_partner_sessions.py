"""What a live pair makes of a session that breaks, of one that ends late, and of a prompt that OLD has no room for."""

from dataclasses import replace

import pytest
from test_instance import SPEC, WORKS, Rig, answers, finished, reference, rigs, wait, work  # noqa: F401

from blitzjax.commands import EndLive, Release, StartLive
from blitzjax.engine import messages as m
from blitzjax.engine.attention import fused
from blitzjax.errors import TransferError
from blitzjax.events import Drained, LiveDrained, RequestFailed, RequestFinished, RequestHanded
from blitzjax.types import LivePair


def test_two_partners_whose_session_breaks_say_that_their_pair_may_end(rigs) -> None:  # noqa: F811
    """Both live on, so nobody but OLD can say it."""
    old, new = rigs["old"], rigs["new"]
    expected = reference(old, WORKS)
    for rig in (new, old):
        rig.instance.post(StartLive(rig.instance.name, LivePair("old", "new", "zigzag")))
    for item in WORKS:
        new.instance.post(item)
    new.load(1)
    new.wait(lambda events: any(isinstance(e, RequestHanded) for e in events), "a hand-over")
    old.partner.close()
    old.wait(lambda events: any(isinstance(e, LiveDrained) for e in events), "LiveDrained")
    new.load(SPEC.units)
    wait(lambda: finished(new.events) | {e.request_id for e in list(old.events) if isinstance(e, RequestHanded)}
         == set(expected), "answers of all that OLD did not get, to its last hand-over")
    assert all(tokens == expected[i] for i, tokens in answers(new).items())


def test_old_declines_kv_that_lies_otherwise_at_new(rigs) -> None:  # noqa: F811
    old = rigs["old"]
    rigs["new"].stop()
    new = rigs["new"] = Rig("new", old.instance.config, rigs, attention=fused("xla", "float32"))
    old.load(SPEC.units), new.load(SPEC.embed_unit + 1)
    pair = LivePair("old", "new", "zigzag")
    new.post(StartLive("new", pair), WORKS[4])
    side = new.instance._partners
    wait(lambda: side.new and any(s.begun.next_layer for s in list(side.new._sequences.values())), "a layer of it")
    old.instance.post(StartLive("old", pair))
    old.wait(lambda events: any(isinstance(e, RequestFailed) for e in events), "the refusal")
    (failed,) = [e for e in old.events if isinstance(e, RequestFailed)]
    assert failed.message.startswith("KV comes as float32 with heads, keys and values at 2, 1, 1, and is ")


def test_a_session_that_ends_late_does_not_disturb_the_next_pair_of_the_same_two(rigs) -> None:  # noqa: F811
    """Its end comes when the next session is there and its first pull waits for StartLive."""
    old, new = rigs["old"], rigs["new"]
    expected = reference(old, WORKS)
    pair = LivePair("old", "new", "zigzag")
    old.instance.post(StartLive("old", pair))
    wait(lambda: old.partner is not None, "a session")
    earlier = old.partner
    new.instance.post(StartLive("new", pair))
    for rig in (new, old):
        rig.instance.post(EndLive(rig.instance.name, pair))
    new.instance.post(Release("new"))
    new.wait(lambda events: any(isinstance(e, Drained) for e in events), "release")
    wait(lambda: old.instance._partners.old is None, "the end of the first pair")
    old.partner = None
    old.instance.post(StartLive("old", pair))
    wait(lambda: old.partner is not None, "another session")
    new.instance.post(m.PartnerLost(earlier)), old.instance.post(m.PartnerLost(earlier))
    new.instance.post(StartLive("new", pair))
    for item in WORKS:
        new.instance.post(item)
    old.wait(lambda events: any(isinstance(e, RequestHanded) for e in events), "a prompt of the pair's")
    new.load(SPEC.units)
    old.wait(lambda events: any(isinstance(e, LiveDrained) for e in events), "LiveDrained")
    wait(lambda: finished(old.events) | finished(new.events) == set(expected), "answers")
    assert answers(old) | answers(new) == expected


def test_a_prompt_that_old_has_no_room_for_waits_there(rigs) -> None:  # noqa: F811
    """What it pulls is its own: to give it back would cost an attempt, and NEW would hand over the same one again."""
    config = rigs["old"].instance.config
    config = replace(config, engine=replace(config.engine, kv_pages=20))
    old = rigs["small"] = Rig("small", config, rigs)
    new = rigs["new"]
    works = [work(1, 100, max_tokens=100, ignore_eos=True), work(2, 200, max_tokens=20, ignore_eos=True)]
    expected = reference(old, works)
    pair = LivePair("small", "new", "zigzag")
    new.post(StartLive("new", pair), works[1])
    old.acts["r1"] = (1, lambda: old.post(StartLive("small", pair)))
    old.post(works[0])
    over = (RequestFinished, RequestFailed)
    old.wait(lambda events: sum(isinstance(e, over) for e in events) == 2, "answers")
    assert answers(old) == expected and old.instance.idle


def test_a_void_attempt_that_old_still_runs_gives_way_to_what_new_hands_over(rigs) -> None:  # noqa: F811
    """The controller's Abort may come later than the partner's word."""
    old, new = rigs["old"], rigs["new"]
    item = work(1, 40, max_tokens=100, ignore_eos=True)
    expected = reference(old, [item])
    new.load(3)
    pair, second = LivePair("old", "new", "zigzag"), replace(item, attempt=2)
    old.acts["r1"] = (2, lambda: (new.post(StartLive("new", pair), second), old.instance.post(StartLive("old", pair))))
    old.post(item)
    old.wait(lambda events: any(isinstance(e, RequestFinished) and e.attempt == 2 for e in events), "the later attempt's end")
    tokens = [t for e in old.events if isinstance(e, m.Tokens) and e.attempt == 2 for t in e.token_ids]
    assert tokens == expected["r1"] and any(isinstance(e, RequestHanded) and e.attempt == 2 for e in old.events)
    new.load(SPEC.units)


@pytest.mark.parametrize("how", ["release", "next pair"])
def test_what_old_has_not_taken_is_freed_when_its_session_ends_whatever_new_does_by_then(
        rigs, monkeypatch, how: str) -> None:  # noqa: F811
    old, new = rigs["old"], rigs["new"]
    old.load(SPEC.units), new.load(SPEC.embed_unit + 1)

    def gone(*args, **kwargs):
        raise TransferError("nothing arrives")

    for name in ("take", "take_all"):
        monkeypatch.setattr(old.handoff, name, gone)
    pair = LivePair("old", "new", "zigzag")
    new.post(StartLive("new", pair), *[work(n, 40) for n in range(3)])
    side = new.instance._partners
    wait(lambda: side.new and any(s.begun.next_layer for s in list(side.new._sequences.values())), "a layer")
    old.instance.post(StartLive("old", pair))
    wait(lambda: side.new.offered, "an offer")
    offered = [uuid for uuids in list(side.new._offers.values()) for uuid in uuids]
    new.instance.post(EndLive("new", pair))
    new.instance.post(Release("new") if how == "release" else StartLive("new", LivePair("third", "new", "zigzag")))
    old.partner.close()
    wait(lambda: not any(map(new.handoff.offers, offered)), "the end of what was offered")
    assert offered and not any(isinstance(e, RequestFinished) for e in old.events)  # nothing of it was taken

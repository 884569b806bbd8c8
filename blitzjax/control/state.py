"""Everything the brain remembers, in one place, and the commands it has decided on so far in this event.

Invariant: between events `commands` is empty and `check` holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from blitzjax.config import Config
from blitzjax.control.blocks import pages_for
from blitzjax.control.lifecycle import COUNTED, LOADED
from blitzjax.control.members import Member
from blitzjax.control.tracking import RequestTable
from blitzjax.control.topology import Topology
from blitzjax.control.tickets import TransferTable
from blitzjax.types import Command, InstanceId, LivePair, ModelSpec, Phase


@dataclass(slots=True)
class State:
    config: Config
    spec: ModelSpec
    members: dict[InstanceId, Member] = field(default_factory=dict)
    requests: RequestTable = field(default_factory=RequestTable)
    transfers: TransferTable = field(default_factory=TransferTable)
    topology: Topology = field(default_factory=Topology)
    pairs: list[LivePair] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    def say(self, command: Command) -> None:
        self.commands.append(command)

    def in_phase(self, *phases: Phase) -> list[Member]:
        """Members in any of `phases`, by id."""
        return sorted((m for m in self.members.values() if m.phase in phases), key=lambda m: m.id)

    @property
    def counted(self) -> list[Member]:
        """Capacity that is there or on its way."""
        return self.in_phase(*COUNTED)

    def pair_of(self, instance: InstanceId) -> LivePair | None:
        return next((p for p in self.pairs if instance in (p.old, p.new)), None)

    def redirected(self, instance: InstanceId) -> bool:
        """OLD of a pair whose NEW is still loading: its share of new requests goes to NEW."""
        pair = self.pair_of(instance)
        return pair is not None and pair.old == instance and self.members[pair.new].phase is Phase.LIVE

    def check(self) -> None:
        """AssertionError when an invariant is broken."""
        self.requests.check()
        self.transfers.check()
        assert not self.commands
        paired = [i for p in self.pairs for i in (p.old, p.new)]
        assert len(paired) == len(set(paired)), "an instance is in two pairs"
        for pair in self.pairs:
            assert self.members[pair.old].phase in LOADED, f"{pair.old} is OLD but {self.members[pair.old].phase}"
            assert self.members[pair.new].phase in (Phase.LIVE, Phase.SERVING, Phase.DRAINING)
        for member in self.members.values():
            self._check_member(member)

    def _check_member(self, member: Member) -> None:
        assert 0 <= member.units <= self.spec.units
        assert (member.phase in LOADED) <= (member.units == self.spec.units), f"{member.id} serves without all units"
        if member.phase is Phase.LIVE:
            pair = self.pair_of(member.id)
            assert pair is not None and pair.new == member.id, f"{member.id} is LIVE without a partner"
        if member.phase in (Phase.IDLE, Phase.FAILED):
            assert not member.owned, f"{member.id} is {member.phase} and owns requests"
        assert member.unstarted.keys() <= member.owned.keys()
        for request_id, pages in member.owned.items():
            tracked = self.requests.get(request_id)
            assert tracked is not None and tracked.owner == member.id, f"{request_id} is not {member.id}'s"
            assert pages == pages_for(tracked.request.total_tokens, member.page_size)

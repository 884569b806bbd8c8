"""Which worker keeps which model in host memory? BlitzScale's global parameter pool (section 4 of our notes).

A model that an instance serves needs no host copy; any other has one, with a worker of the host that keeps fewest. It
comes from the last instance before that goes, else from disk, and is where the first instance's parameters come from.
Invariant: a model has at most one host copy, whole or in the making; none where `scale.host_copies` is false.
"""

from __future__ import annotations

from dataclasses import dataclass

from blitzjax.control.fleet import Fleet, Member, Roster
from blitzjax.control.transfers import Run, Transfers
from blitzjax.commands import Command, DropCopy
from blitzjax.events import TransferEnded
from blitzjax.types import InstanceId, Phase

# So that the first copies are spread evenly they wait this long for the whole pool, and for workers that still compile.
PLACE_WAIT_S, COMPILE_WAIT_S = 5.0, 60.0
RETRY_S = 10.0  # a worker that could not make a copy is not asked again before


@dataclass(slots=True)
class _Copy:
    instance: InstanceId
    units: int  # that are there
    whole: bool = False


class HostCache:
    """Host copies of all models, if any are `kept`. Owned by the Cluster; `pool` is the number of workers that it waits
    for.
    """

    def __init__(self, roster: Roster, transfers: Transfers, pool: int, kept: bool) -> None:
        self._roster, self._transfers, self._pool, self._kept = roster, transfers, pool, kept
        self._copies: dict[str, _Copy] = {}
        self._lacking_since: dict[str, float] = {}

    # ---- views

    def where(self, model: str) -> InstanceId | None:
        """Who keeps a whole copy."""
        copy = self._copies.get(model)
        return copy.instance if copy is not None and copy.whole else None

    def coming(self, model: str) -> InstanceId | None:
        """Where a copy is in the making."""
        copy = self._copies.get(model)
        return copy.instance if copy is not None and not copy.whole else None

    def kept_by(self, instance: InstanceId) -> tuple[str, ...]:
        """Models with a copy there, whole or in the making."""
        return tuple(sorted(model for model, copy in self._copies.items() if copy.instance == instance))

    def count(self, instance: InstanceId) -> int:
        return sum(copy.instance == instance for copy in self._copies.values())

    def due(self, fleet: Fleet) -> bool:
        """Whether a model's copy may have to be made or dropped."""
        return fleet.model in self._copies or (self._kept and not fleet.size)

    # ---- decisions

    def reconcile(self, at: float, fleet: Fleet, wanted: bool) -> list[Command]:
        """The next step towards one copy of a model that no instance holds, and none of one that is served, or
        not `wanted` any more.
        """
        copy = self._copies.get(fleet.model)
        if copy is None:
            if fleet.size or not (wanted and self._kept):
                self._lacking_since.pop(fleet.model, None)
                return []
            since = self._lacking_since.setdefault(fleet.model, at)
            if len(self._roster.members) < self._pool and at - since < PLACE_WAIT_S:
                return []
            if at - since < COMPILE_WAIT_S and any(fleet.model not in m.ready for m in self._roster.all_alive()):
                return []
            place = self._place(at, fleet.model)
            return [] if place is None else self._make(fleet, place, None)
        run = self._transfers.run_of(copy.instance)
        if run is not None and run.model == fleet.model or fleet.alive(copy.instance) is not None:
            return []  # a source, in the making, or the last instance that was told to keep it and has not done so yet
        if not wanted or fleet.count(Phase.SERVING):
            return self.drop(fleet.model)
        if copy.whole or self._transfers.settling(copy.instance):
            return []
        return self._make(fleet, self._roster.members[copy.instance], None)

    def retire(self, at: float, fleet: Fleet, last: Member) -> tuple[bool | None, list[Command]]:
        """The last instance is about to go. → (whether it keeps its parameters then; None: it must wait, commands)."""
        copy = self._copies.get(fleet.model)
        if not self._kept or copy is not None and copy.whole:
            return False, []
        if copy is not None and self._transfers.settling(copy.instance):
            return None, []
        place = self._place(at, fleet.model) if copy is None else self._roster.members[copy.instance]
        if place is not None and place.in_world and last.in_world and not self._transfers.busy(last.id):
            better = copy is not None or self._rank(place)[:2] < self._rank(last)[:2]
            drains = place.model == fleet.model and place.phase is not Phase.IDLE  # it goes as well
            if better and not drains and not last.yielded:  # else somebody waits for this worker
                return None, self._make(fleet, place, last)
        commands = self.drop(fleet.model)
        self._copies[fleet.model] = _Copy(last.id, fleet.units)
        return True, commands

    def use(self, model: str) -> None:
        """The copy becomes an instance."""
        assert self._copies[model].whole
        del self._copies[model]

    def drop(self, model: str) -> list[Command]:
        """Forgets the copy, if there is one."""
        copy = self._copies.pop(model, None)
        return [] if copy is None else [DropCopy(copy.instance, model)]

    def _make(self, fleet: Fleet, place: Member, source: Member | None) -> list[Command]:
        """From an instance if there is one, else from the disk of `place`; what is there already stays."""
        copy = self._copies.setdefault(fleet.model, _Copy(place.id, 0))
        if place.model == fleet.model:  # what it holds as a part of an instance
            place.model, place.units = "", 0
            return [DropCopy(place.id, fleet.model), self._transfers.keep_copy(place.id, fleet.model, fleet.units)]
        if source is not None:
            prepare, spent = self._transfers.plan(fleet.model, [(source.id, fleet.units)], [(place.id, copy.units)],
                                                  fleet.units, "off", copy=True)
            if prepare and not spent:
                return prepare
        return [self._transfers.keep_copy(place.id, fleet.model, fleet.units)]

    def _place(self, at: float, model: str) -> Member | None:
        """The worker with the fewest copies on the host with the fewest, an idle one rather than a busy one."""
        able = [m for m in self._roster.all_alive() if model in m.ready
                and (m.phase is Phase.IDLE or m.model != model)
                and not self._transfers.settling(m.id) and at >= m.barred_until.get(model, at)]
        return min(able, key=self._rank, default=None)

    def _rank(self, m: Member) -> tuple[int, int, bool, InstanceId]:
        on_host = sum(self._roster.members[c.instance].host == m.host for c in self._copies.values())
        return on_host, self.count(m.id), m.phase is not Phase.IDLE, m.id

    # ---- events

    def found(self, model: str, instance: InstanceId, fleet: Fleet | None) -> list[Command]:
        """A worker that joined keeps a copy: the cluster's, or one too many."""
        if fleet is None or not self._kept or model in self._copies or fleet.count(Phase.SERVING):
            return [DropCopy(instance, model)]
        self._copies[model] = _Copy(instance, fleet.units, whole=True)
        return []

    def kept(self, model: str, instance: InstanceId) -> None:
        """The last instance is a host copy now."""
        assert self.coming(model) == instance
        self._copies[model].whole = True

    def ended(self, run: Run, member: Member, event: TransferEnded, units: int) -> list[Command]:
        """A source or target of a copy left its transfer. What a broken chain brought stays where it is."""
        copy, is_target = self._copies.get(run.model), member.id in run.targets
        failed = bool(event.error) or is_target and event.units < units
        explained = run.broken
        self._transfers.leave(run, member.id)
        commands = self._transfers.break_off(run) if failed else []
        if is_target and copy is not None and copy.instance == member.id:
            copy.units, copy.whole = min(event.units, units), not failed
            if failed and not explained:
                member.barred_until[run.model] = event.at + RETRY_S
                commands += self.drop(run.model)
        return commands

    def lost(self, instance: InstanceId) -> None:
        for model in self.kept_by(instance):
            del self._copies[model]

    def check(self, fleets: dict[str, Fleet]) -> None:
        """Asserts the invariant."""
        assert self._kept or not self._copies
        for model, copy in self._copies.items():
            assert model in fleets, f"a copy of {model}, which is not deployed"
            assert self._roster.alive(copy.instance) is not None, f"{copy.instance} is gone and keeps {model}"
            assert not copy.whole or copy.units == fleets[model].units
            if copy.whole:
                assert fleets[model].alive(copy.instance) is None, f"{copy.instance} is an instance and keeps {model}"

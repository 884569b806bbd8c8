"""How do parameters get into the instances that lack them, and who executes with them meanwhile?

From a serving instance, else from the host copy, by multicast if it is in the world; where there is neither, as when
a cluster starts, all read their own disks at once. Who keeps the host copy becomes an instance at no cost. What a broken
transfer left behind stays valid: the rest comes with another plan. Invariant: a LIVE instance is the NEW side of a pair,
or alone: there was a time when no instance ran prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

from blitzjax.control.fleet import Fleet, Member
from blitzjax.control.hostcache import HostCache
from blitzjax.control.pairs import LivePairs
from blitzjax.control.requests import RequestBook
from blitzjax.control.transfers import Run, Transfers
from blitzjax.commands import Command, DropCopy, PrepareTransfer
from blitzjax.events import TransferEnded
from blitzjax.types import InstanceId, LiveMode, ModelSpec, Phase, Role, Source

WORLD_WAIT_S = 5.0  # how long an instance waits for WorldJoined before it reads its own disk
LEAVE_WAIT_S = 0.5  # how long one that has left a broken transfer waits for the others; some may hang in it


@dataclass(frozen=True, slots=True)
class Means:
    """Where parameters come from, and whether instances execute while they arrive."""

    live: LiveMode
    source: Source


class Provisioner:
    """Owns the pairs of one model; moves instances from IDLE over LOADING and LIVE to SERVING.

    `transfers` and `copies` are those of all models.
    """

    def __init__(self, spec: ModelSpec, fleet: Fleet, book: RequestBook, transfers: Transfers,
                 copies: HostCache) -> None:
        self._spec = spec
        self._fleet = fleet
        self._book = book
        self._copies = copies
        self.transfers = transfers
        self.pairs = LivePairs()
        self._waiting_since: dict[InstanceId, float] = {}  # for the world
        self._left: dict[InstanceId, float] = {}  # since when a broken transfer, that others are still in
        self._roots: frozenset[InstanceId] = frozenset()  # served when this scale-up began

    # ---- views

    def stranded(self) -> list[Member]:
        """LOADING and LIVE instances that nothing is moving to: their transfer broke and everybody has left it."""
        return [m for m in self._at_rest() if not self.transfers.settling(m.id)]

    def waiting(self) -> bool:
        """Somebody has left a broken transfer that others are still in."""
        return any(self.transfers.settling(m.id) for m in self._at_rest())

    def _at_rest(self) -> list[Member]:
        """LOADING and LIVE instances that are in no transfer."""
        return [m for m in self._fleet.loading() if not self.transfers.busy(m.id)]

    def redirected(self, instance: InstanceId) -> bool:
        """OLD side of a pair whose NEW side still loads: requests go to NEW."""
        pair = self.pairs.of(instance)
        return pair is not None and pair.old == instance and self._fleet.members[pair.new].phase is Phase.LIVE

    # ---- decisions

    def left_over(self, at: float) -> list[Member]:
        """Stranded instances, and those that have waited long enough for who is still in their broken transfer."""
        at_rest = self._at_rest()
        self._left = {m.id: self._left.get(m.id, at) for m in at_rest if self.transfers.settling(m.id)}
        return [m for m in at_rest if m.id not in self._left or at - self._left[m.id] >= LEAVE_WAIT_S]

    def provide(self, at: float, needy: list[Member], means: Means) -> list[Command]:
        """Begins whatever transfers can begin now for `needy` (IDLE, or as above) instances; the rest stays as it is."""
        needy_ids = {m.id for m in needy}
        self._waiting_since = {i: since for i, since in self._waiting_since.items() if i in needy_ids}
        if not needy:
            return []
        begun, needy = self._use_copy(needy)
        if means.source == "disk":
            return begun + [c for m in needy for c in self._load(m, means)]
        sources = self._sources(means)
        if sources:
            return begun + self._multicast(at, needy, sources, means)
        coming = [run for m in self._fleet.loading() if (run := self.transfers.run_of(m.id)) is not None]
        if any(not run.disk and not run.broken for run in coming) or self._copies.coming(self._spec.name):
            return begun  # the others follow it by multicast
        keeper = self._copies.where(self._spec.name)
        if keeper is not None:
            return self._multicast(at, needy, [self._fleet.members[keeper]], means)
        own = [m for m in needy if not (coming and m.failures)]  # whoever failed follows those that read
        return [c for m in own for c in self._load(m, means)]

    def _use_copy(self, needy: list[Member]) -> tuple[list[Command], list[Member]]:
        """The needy one that keeps the host copy becomes an instance of it. → (commands, the others)."""
        model = self._spec.name
        member = next((m for m in needy if m.id in (self._copies.where(model), self._copies.coming(model))), None)
        if member is None:
            return [], needy
        if self._copies.coming(model) is not None:  # broken in the making, and what is there is no part of an instance
            return self._copies.drop(model), needy
        self._copies.use(model)
        commands = self._take(member)
        return [*commands, self.transfers.use_copy(member.id, model, self._spec.units)], [
            m for m in needy if m is not member]

    def _held(self, member: Member) -> int:
        """Units of this model on an IDLE instance or one that is left over."""
        return member.units if member.model == self._spec.name else 0

    def _take(self, member: Member) -> list[Command]:
        """An IDLE instance begins to load; what it had of another model is dropped."""
        if member.phase is not Phase.IDLE:
            return []
        stale = self._fleet.take(member)
        return [DropCopy(member.id, stale)] if stale else []

    def _multicast(self, at: float, needy: list[Member], sources: list[Member], means: Means) -> list[Command]:
        """Plans for the targets in the world; the others read their disks once they waited long enough."""
        commands: list[Command] = []
        sources = [m for m in sources if m.in_world]
        targets = [m for m in needy if m.in_world] if sources else []
        here = {m.id for m in targets}
        for member in needy:
            if member.id in here:
                self._waiting_since.pop(member.id, None)
            elif at - self._waiting_since.setdefault(member.id, at) >= WORLD_WAIT_S:
                commands += self._load(member, means)
        free = [m for m in sources if not self.transfers.busy(m.id)]
        prefill = {m.id for m in sources if m.role is Role.PREFILL}  # they send KV out of their network ports
        local = prefill if means.source == "multicast" and len(prefill) < len(sources) else set()
        if means.source == "unicast":
            targets = targets[: len(free)]
        if not free or not targets:
            return commands
        prepare, spent = self.transfers.plan(
            self._spec.name, [(m.id, self._spec.units) for m in free], [(m.id, self._held(m)) for m in targets],
            self._spec.units, means.live, local)
        plan = next((c.plan for c in prepare if isinstance(c, PrepareTransfer)), None)
        for chain in plan.chains if plan is not None else ():
            members = [self._fleet.members[i] for i in chain.instances[1:]]
            self._prefer_prefill_tail(members)
            for member in members:
                commands += self._take(member)
        return commands + [c for i in spent for c in self._load(self._fleet.members[i], means)] + prepare

    def _prefer_prefill_tail(self, targets: list[Member]) -> None:
        """Only a chain's tail goes live, and only prefill does: decode roles move to the front."""
        decode = sum(m.role is Role.DECODE for m in targets)
        if 0 < decode < len(targets):
            for k, member in enumerate(targets):
                member.assume(Role.DECODE if k < decode else Role.PREFILL)

    def _sources(self, means: Means) -> list[Member]:
        """SERVING instances; for unicast those that served when the scale-up began, so that receivers do not send."""
        serving = self._fleet.in_phase(Phase.SERVING)
        if not self._fleet.loading():
            self._roots = frozenset(m.id for m in serving)
        roots = [m for m in serving if m.id in self._roots]
        return roots if roots and means.source == "unicast" else serving

    def _load(self, member: Member, means: Means) -> list[Command]:
        commands = self._take(member)
        run, command = self.transfers.load(member.id, self._spec.name, member.units, self._spec.units, means.live)
        return [*commands, command, *self.go_live(run)]

    def go_live(self, run: Run) -> list[Command]:
        """Pairs the chain's tail, whose out-link is free (section 3.3), with the chain's source or the busiest other.
        Where no instance runs prompts, all targets execute alone.

        An instance that still owns requests of an earlier pair finishes them alone.
        """
        self.go_on_alone()
        fit = [m for m in map(self._fleet.members.__getitem__, run.targets)
               if m.role is not Role.DECODE and m.phase is Phase.LOADING and not self._book.owns(m.id)]
        if run.live == "off" or not fit:
            return []
        new, serving = fit[-1], self._fleet.serving(fit[-1].role)
        olds = [m for m in serving if self.pairs.of(m.id) is None]
        if new.id != run.targets[-1] or not olds:
            return []
        source = run.chain.instances[0]
        old = max(olds, key=lambda m: (m.id == source, self._book.backlog_tokens(m.id)))
        new.move(Phase.LIVE)
        return self.pairs.start(old.id, new.id, run.live)

    def go_on_alone(self) -> None:
        """Nobody runs prompts, or nobody does any more: those whose parameters are on their way do."""
        loading = [m for m in self._fleet.in_phase(Phase.LOADING) if m.role is not Role.DECODE and not m.releasing]
        if not loading or self._fleet.serving(loading[0].role):
            return
        for member in loading:
            run = self.transfers.run_of(member.id)
            if run is not None and run.live != "off" and not run.unready:
                member.move(Phase.LIVE)

    # ---- events

    def arrived(self, member: Member, units: int) -> None:
        """Units [0, units) are on a loading instance."""
        if member.phase in (Phase.LOADING, Phase.LIVE):
            member.units = max(member.units, min(units, self._spec.units))

    def ended(self, run: Run, member: Member, event: TransferEnded) -> list[Command]:
        """A source or target left its transfer: a complete target serves, an incomplete one breaks its chain."""
        is_target = member.id in run.targets
        if is_target:
            member.units = max(0, min(event.units, self._spec.units))
        complete = not is_target or member.units == self._spec.units
        self._blame(run, member, is_target, failed=bool(event.error) or not complete)
        self.transfers.leave(run, member.id)
        commands = self.transfers.break_off(run) if event.error or not complete else []
        if is_target and complete and member.loading:
            member.move(Phase.SERVING)
            member.failures = 0
            commands += self._end_if_drained(member.id)
        return commands

    def _blame(self, run: Run, member: Member, is_target: bool, failed: bool) -> None:
        """Counts a failure that no loss explains: against the target that reports it, or all if the source does."""
        if not failed or run.broken:
            return
        for target in [member.id] if is_target else run.targets:
            blamed = self._fleet.members[target]
            if blamed.units < self._spec.units:
                blamed.failures += 1

    def drained(self, old: InstanceId) -> list[Command]:
        """OLD found nothing to pull. It may say so before NEW's TransferEnded is here: both are needed."""
        self.pairs.mark_drained(old)
        return self._end_if_drained(old)

    def _end_if_drained(self, instance: InstanceId) -> list[Command]:
        """OLD has taken what it said it took: what only NEW says that it handed over got lost between them."""
        pair = self.pairs.of(instance)
        if pair is None or not self.pairs.drained(pair) or self._fleet.members[pair.new].phase is not Phase.SERVING:
            return []
        commands = self.pairs.end(pair)
        for entry in self._book.given(pair.new):
            commands += self._book.lose(entry, f"{pair.old} and {pair.new} lost each other")
        return commands

    def unpair(self, instance: InstanceId, lost: bool) -> list[Command]:
        """Ends the instance's pair, if any; a NEW side, or one that executes alone, only loads from now on."""
        pair = self.pairs.of(instance)
        new = self._fleet.members[instance if pair is None else pair.new]
        if new.phase is Phase.LIVE:
            new.move(Phase.LOADING)
        return [] if pair is None else self.pairs.end(pair, instance if lost else None)

    def check(self) -> None:
        """Asserts the invariant and those of pairs."""
        self.pairs.check()
        for pair in self.pairs:
            old, new = self._fleet.alive(pair.old), self._fleet.alive(pair.new)
            assert old is not None and old.phase is Phase.SERVING, pair
            assert new is not None and new.phase in (Phase.LIVE, Phase.SERVING), pair
        for member in self._fleet.in_phase(Phase.LIVE):
            own = self.pairs.of(member.id)
            assert own is None or own.new == member.id, f"{member.id} is LIVE and has all layers to lend"

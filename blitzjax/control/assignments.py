"""Who runs which request: admission, dispatch from the global queue, and what becomes of requests whose instance is lost.

Invariant: a request's current attempt has one owner; whatever an older attempt still does is ignored and aborted.
"""

from __future__ import annotations

from blitzjax.control import routing
from blitzjax.control.blocks import pages_for
from blitzjax.control.members import Member
from blitzjax.control.tracking import Tracked
from blitzjax.control.state import State
from blitzjax.types import (
    Abort, Assign, InstanceId, Reject, Request, RequestArrived, RequestFailed, RequestFinished, RequestId,
)


class Assignments:
    def __init__(self, state: State) -> None:
        self._state = state

    def arrived(self, event: RequestArrived) -> None:
        """Accepts a request into the queue, or rejects it with the reason."""
        refusal = self._refusal(event.request)
        if refusal is not None:
            self._state.say(Reject(event.request.id, *refusal))
        else:
            self._state.requests.accept(event.request)

    def dispatch(self) -> None:
        """Gives queued requests, in order, to instances that have room."""
        state, config = self._state, self._state.config
        while (head := state.requests.head) is not None:
            seats = [m.seat(state.redirected(m.id)) for m in state.members.values()]
            chosen = routing.choose(head.request, seats, 2 * config.engine.max_num_batched_tokens,
                                    config.scale.live_queue_tokens)
            if chosen is None:
                return
            tracked = state.requests.take_head(chosen)
            self._own(state.members[chosen], tracked)
            state.say(Assign(chosen, tracked.request.id, tracked.attempt))

    def cancelled(self, request_id: RequestId) -> None:
        """A queued request is gone at once; an assigned one when its instance has let go of it."""
        tracked = self._state.requests.get(request_id)
        if tracked is None:
            return
        if tracked.owner is None:
            self._state.requests.forget(tracked)
        elif not tracked.cancelled:
            tracked.cancelled = True
            self._state.say(Abort(tracked.owner, request_id))

    def started(self, instance: InstanceId, request_id: RequestId, attempt: int) -> None:
        """The first token is out."""
        tracked = self._current(instance, request_id, attempt)
        if tracked is not None:
            self.handed(instance, request_id, attempt)
            self._state.members[instance].unstarted.pop(request_id, None)

    def handed(self, target: InstanceId, request_id: RequestId, attempt: int) -> None:
        """`target` has the request now. Either side may say so, any number of times, in any order."""
        tracked = self._current(target, request_id, attempt)
        if tracked is None or tracked.owner == target:
            return
        started = request_id not in self._state.members[tracked.owner].unstarted
        self._disown(tracked)
        self._own(self._state.members[target], tracked)
        if started:
            self._state.members[target].unstarted.pop(request_id, None)
        if tracked.cancelled:
            self._state.say(Abort(target, request_id))

    def finished(self, event: RequestFinished) -> None:
        tracked = self._current(event.instance, event.request_id, event.attempt)
        if tracked is None:
            return
        if event.reason == "abort" and not tracked.cancelled:  # an abort that was meant for an older attempt
            self._lost(tracked, f"{event.instance} dropped it")
        else:
            self._forget(tracked)

    def failed(self, event: RequestFailed) -> None:
        tracked = self._current(event.instance, event.request_id, event.attempt)
        if tracked is not None:
            self._lost(tracked, event.message)

    def owner_lost(self, instance: InstanceId, reason: str) -> None:
        """Everything that `instance` had runs again elsewhere, or ends."""
        for request_id in list(self._state.members[instance].owned):
            self._lost(self._state.requests.get(request_id), f"{instance} was lost: {reason}")

    # ----------------------------------------------------------------------------------------------------------------

    def _refusal(self, request: Request) -> tuple[str, str] | None:
        """(gRPC code, message) if the request cannot be accepted."""
        spec, config = self._state.spec, self._state.config
        limit = min(spec.max_len, config.engine.max_model_len)
        if request.id in self._state.requests:
            return "ALREADY_EXISTS", f"request {request.id!r} is already running"
        if request.model != spec.name:
            return "NOT_FOUND", f"model {request.model!r} is not served here; {spec.name!r} is"
        if request.total_tokens > limit:
            return "INVALID_ARGUMENT", (f"prompt of {request.prompt_tokens} tokens plus max_tokens {request.max_tokens} "
                                        f"is more than the context of {limit} tokens")
        room = max((m.pages * m.page_size for m in self._state.members.values()), default=None)
        if room is not None and request.total_tokens > room:
            return "INVALID_ARGUMENT", f"{request.total_tokens} tokens do not fit an instance's KV memory of {room} tokens"
        if self._state.requests.queued >= config.serve.max_queued_requests:
            return "RESOURCE_EXHAUSTED", f"the queue is full: {config.serve.max_queued_requests} requests wait already"
        return None

    def _current(self, instance: InstanceId, request_id: RequestId, attempt: int) -> Tracked | None:
        """The request if `attempt` is the one that counts; else tells the straggler to stop."""
        tracked = self._state.requests.get(request_id)
        if tracked is None or instance not in self._state.members:
            return None
        if tracked.owner is not None and tracked.attempt == attempt:
            return tracked
        if tracked.owner != instance:  # its owner has dropped the old attempt by itself
            self._state.say(Abort(instance, request_id))
        return None

    def _lost(self, tracked: Tracked, why: str) -> None:
        """The attempt is void: back to the queue, unless nobody waits for it or it was tried too often."""
        if tracked.cancelled:
            self._forget(tracked)
        elif tracked.attempt >= self._state.config.serve.max_attempts:
            self._state.say(Reject(tracked.request.id, "UNAVAILABLE",
                                   f"given up after {tracked.attempt} attempts; the last one ended because {why}"))
            self._forget(tracked)
        else:
            self._disown(tracked)
            self._state.requests.enqueue(tracked)

    def _own(self, member: Member, tracked: Tracked) -> None:
        request = tracked.request
        tracked.owner = member.id
        member.owned[request.id] = pages_for(request.total_tokens, member.page_size)
        member.unstarted[request.id] = request.prompt_tokens

    def _disown(self, tracked: Tracked) -> None:
        member = self._state.members[tracked.owner]
        member.owned.pop(tracked.request.id)
        member.unstarted.pop(tracked.request.id, None)

    def _forget(self, tracked: Tracked) -> None:
        self._disown(tracked)
        self._state.requests.forget(tracked)

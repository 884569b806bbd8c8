"""One request on one instance: its tokens, and where its prompt and its KV are."""

from __future__ import annotations

from dataclasses import dataclass, field

from jax import Array

from blitzjax.engine.runner import Prefill
from blitzjax.types import ModelSpec, RequestId, Work


@dataclass(slots=True)
class Sequence:
    """Owned by the engine thread. `tokens` is prompt + answer so far; the last one has no KV yet."""

    work: Work
    tokens: list[int]
    prefill: Prefill | None = None  # until the sequence joined the decode batch
    layers_helped: int = 0  # layers of the prompt pass that a live partner ran
    awaited: bool = False  # its residuals are on their way from a partner
    kv_missing: bool = False  # the partner's layers of KV are still on their way
    partner_kv: list[Array] = field(default_factory=list)  # they are here: k, v of layer 0, k, v of layer 1, ...

    @property
    def id(self) -> RequestId:
        return self.work.request.id

    @property
    def answered(self) -> int:
        """Tokens of the answer so far, those of earlier attempts included."""
        return len(self.tokens) - len(self.work.prompt)

    def finish_reason(self, spec: ModelSpec) -> str:
        """ "stop", "length", or "" to go on; looks at the last token."""
        sampling, token = self.work.sampling, self.tokens[-1]
        if token in sampling.stop_token_ids or (token in spec.eos_token_ids and not sampling.ignore_eos):
            return "stop"
        return "length" if self.answered >= sampling.max_tokens else ""


def sequence_of(work: Work) -> Sequence:
    return Sequence(work, [*work.prompt, *work.generated])

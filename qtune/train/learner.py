"""The model as it learns: memory techniques switched on, what can be given up when memory runs out, its bytes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qtune.events import Listener, MemoryMeasured
from qtune.memory.engine import Engine
from qtune.memory.memory_report import Ledger
from qtune.memory.oom_recovery import NextTechnique, Recovery, pieces_to_begin_with
from qtune.model.loaded import Loaded

if TYPE_CHECKING:
    from qtune.plan.plan import Plan


@dataclass(frozen=True)
class Learner:
    """`loaded` is the base with its adapter; `engine` holds the techniques that it runs with, `recovery` what scoring
    and training give up when memory runs out, and `ledger` measures what is held."""

    loaded: Loaded
    engine: Engine
    recovery: Recovery
    ledger: Ledger

    @classmethod
    def of(
        cls, loaded: Loaded, engine: Engine, ledger: Ledger, plan: "Plan", listen: Listener, together: int = 1
    ) -> "Learner":
        """What is given up is, one after another, what the plan has in reserve. So many documents of a batch stay
        `together`."""
        pieces = pieces_to_begin_with(plan.documents_apart)
        recovery = Recovery(listen, _climber(plan, engine), engine.forget_pass, pieces, together)
        return cls(loaded, engine, recovery, ledger)

    def measure(self, phase: str, step: int, optimizer: torch.optim.Optimizer | None = None) -> MemoryMeasured:
        """The bytes by part of what was just done, which was `phase`."""
        return self.ledger.measure(phase, step, self.loaded.model, self.engine, optimizer)


def _climber(plan: "Plan", engine: Engine) -> NextTechnique:
    """Switches on the next technique above the plan's, and names it; None when there is none left."""
    higher = iter(plan.reserve)

    def climb() -> str | None:
        rung = next(higher, None)
        if rung is None:
            return None
        engine.switch_to(rung.techniques)
        return rung.name

    return climb

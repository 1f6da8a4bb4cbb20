"""A plan: every open choice of a run, settled."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from qtune.hardware import Device
from qtune.memory.techniques import Techniques
from qtune.plan.forecast import Forecast
from qtune.plan.ladder import Budget, Reserve
from qtune.plan.rung_report import Rung
from qtune.plan.throughput import Speed


@dataclass(frozen=True)
class Choice:
    """One settled setting, as text, and why it is what it is."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Settled:
    """What a run that was interrupted had switched on, to be kept."""

    techniques: Techniques
    micro_batch: int


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know besides the recipe and the rows.

    `fits` is False for a plan that must not run; `is_assumed` says that no rows were read for it. `documents_apart`: a
    pack's documents would read each other in this base, and are fed one by one; memory is forecast for whole packs.
    """

    device: Device
    compute_dtype: str
    steps: int
    warmup_steps: int
    eval_every: int
    micro_batch: int
    gradient_accumulation: int
    is_assumed: bool
    fits: bool
    layers: int
    techniques: Techniques
    budget: Budget
    forecast: Forecast
    rungs: tuple[Rung, ...]
    reserve: tuple[Reserve, ...]
    speed: Speed
    disk_bytes: int  # of what the run itself leaves
    remedies: tuple[str, ...]
    choices: tuple[Choice, ...]
    documents_apart: bool = False
    trained_parameters: int = 0
    cache_bytes: int = 0  # of the base in 4 bits, kept for the next run

    def with_documents_apart(self, reason: str) -> "Plan":
        """The same steps over the same packs, but a pass for every document of a pack."""
        packing = Choice("packing", "no, a pass for each document", reason)
        choices = tuple(packing if choice.name == packing.name else choice for choice in self.choices)
        return replace(self, documents_apart=True, choices=choices)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

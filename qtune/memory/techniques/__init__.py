"""The memory techniques, a file each: who adds a file with a `Technique` in it has added one.

Its setting in [memory], its rows in a plan, its place on the ladder, its bytes and its refusals are all asked of that
one object. The recipe's schema reads these files, so what they import at the top must be light; what a technique does
to a live model stands in a module of `qtune.memory`, which is imported when it is switched on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from qtune.memory.techniques.standing import Parts, Standing
from qtune.registry import registered
from qtune.units import MAX_COUNT

Side = Literal["device", "host"]


def auto_or_count(least: int) -> Any:
    """The type of a setting that is "auto" or a whole number from `least` up; one sentence for all else."""

    def check(value: Any) -> Any:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_COUNT):
            return value
        raise PydanticCustomError("expected", "{wanted}", {"wanted": f'"auto" or a whole number of at least {least}'})

    return Annotated[Literal["auto"] | int, BeforeValidator(check)]


class LiveModel(Protocol):
    """What a technique is switched on in. `causal` is the base, below its adapter; `layers` are the decoder layers in
    the order they run, empty where they cannot be found; `runner` is their `memory.gradient_checkpointing.LayerRunner`;
    `ranks` are the `distributed.ranks.Ranks` that hold the same model.
    """

    model: Any
    causal: Any
    layers: list[Any]
    device: Any
    is_tied: bool
    runner: Any
    ranks: Any


def unchanged(techniques: "Techniques", standing: Standing) -> float:
    """The cost of what costs no time."""
    return 0.0


@dataclass(frozen=True)
class Step:
    """A rung of the ladder: a technique taken so far. Rungs are climbed by `order`, cheapest first.

    `up` is a set of techniques with the rung climbed, `cost` the share of a step's time that it adds. `value` is what
    the rung sets where a technique has several to choose from; `is_for_host`: what it takes off the device stands in
    host memory; `is_lossy`: it moves the loss, so a plan takes it only where nothing else does; `is_told`: it has a row
    in a plan.
    """

    technique: str
    name: str
    order: float
    note: str
    up: Callable[["Techniques", Standing], "Techniques"]
    cost: Callable[["Techniques", Standing], float] = unchanged
    value: Any = None
    is_for_host: bool = False
    is_lossy: bool = False
    is_told: bool = True

    @property
    def key(self) -> str:
        """Its setting in [memory]."""
        return TECHNIQUES[self.technique].key

    def is_on(self, techniques: "Techniques") -> bool:
        now, off = getattr(techniques, self.technique), TECHNIQUES[self.technique].off
        return bool(now != off if self.value is None else now == self.value)


class Technique:
    """One way to hold less.

    `name` is its field of `Techniques`, and so what plans and checkpoints call it; `off` is that field's value where it
    is off. `order` is its place in both, and in what order techniques are switched on. `key`, `setting` and
    `description` make its setting in [memory], "auto" by default: `setting` is the type that pydantic checks.
    """

    name: str
    order: float
    off: Any
    key: str
    setting: Any
    description: str
    steps: tuple[Step, ...]
    needs_layers = False  # whether it is refused where the decoder layers of a model cannot be found
    needs_ranks = False  # whether there is nothing in it for a process that is alone
    moves_layers = False  # whether layers are elsewhere then; ranks with parts of them have them in the same places
    fills_host = False  # whether as much of it is taken as host memory has room for
    is_as_loaded = False  # whether it begins as the base is loaded, and lasts when there is nothing left to train

    def settled(self, techniques: "Techniques", value: Any, standing: Standing) -> "Techniques":
        """`techniques` with the recipe's `value`, which is not "auto"."""
        return techniques.having(**{self.name: value})

    def is_asked_for(self, value: Any) -> bool:
        """Whether the recipe's `value`, which is not "auto", switches it on."""
        return bool(value != self.off)

    def fault(self, value: Any, standing: Standing) -> str | None:
        """Why the recipe's `value` cannot be had of this model, as the end of a sentence that begins with it."""
        return None

    def refusal(self, model: Any, layers: Sequence[Any]) -> str | None:
        """Why the model (a PeftModel, perhaps of fake tensors) does not allow it; None where it does."""
        return None

    def movable_bytes(self, model: Any, layers: Sequence[Any]) -> int:
        """Bytes that it would move, where no other count of `Standing` has them: they are `Standing.movable` by its
        name."""
        return 0

    def unsaid(self, planned: Mapping[str, Any]) -> Any:
        """Its value in a set of techniques, by name, that was written before there was this one."""
        return self.off

    def ruled_out(self, memory: Any) -> str | None:
        """Why what else stands in the recipe's [memory] does not allow it; None where it does."""
        return None

    def joined(self, wanted: Any, now: Any) -> Any:
        """What is on when `wanted` is asked for on top of `now`: nothing is switched off."""
        return now if wanted == self.off else wanted

    def amounts(self, value: Any) -> Sequence[Any]:
        """What `value` can be turned down to, least first, each holding more than the next; empty for what has no
        amount."""
        return ()

    def amount(self, value: Any, standing: Standing) -> str:
        """How much of it, behind the name of its rung: `, 12 of 32`."""
        return ""

    def on_device(self, parts: Parts, standing: Standing, techniques: "Techniques") -> Parts:
        """What of `parts`, which stand on the device without it, stands there with it."""
        return parts

    def on_host(self, standing: Standing, techniques: "Techniques") -> Parts:
        """What stands in host memory because of it."""
        return {}

    def is_in_a_pass(self, techniques: "Techniques") -> bool:
        """Whether it makes a difference to what comes and goes in a pass."""
        return True

    def stays_on_host(self, weight: str, techniques: "Techniques", text: Any) -> bool:
        """Whether the weight of that name is left in host memory as the base is loaded; `text` is its text_config."""
        return False

    def switch_on(self, live: LiveModel, wanted: "Techniques") -> None:
        """Bring the model to `wanted`, in which it is on; again with more of it adds that."""
        raise NotImplementedError

    def live_parts(self, live: LiveModel, techniques: "Techniques") -> Iterable[tuple[str, Side, list[Any]]]:
        """Part, side and tensors of what it has put elsewhere than the base's own weights stand."""
        return ()


class Techniques:
    """What is on, as a frozen dataclass: a field a technique, in their order, each off unless it is said."""

    if TYPE_CHECKING:  # the fields are the files of this package
        __dataclass_fields__: ClassVar[dict[str, Any]]

        def __init__(self, *values: Any, **named: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

    def having(self, **changed: Any) -> "Techniques":
        """These with some fields changed."""
        return replace(self, **changed)

    @classmethod
    def planned(cls, values: Mapping[str, Any]) -> "Techniques":
        """Those of a plan or a checkpoint, of whichever version. Raises TypeError for a name that is no technique."""
        return cls(**{name: each.unsaid(values) for name, each in TECHNIQUES.items()} | dict(values))

    @classmethod
    def for_answers(cls, plan: Mapping[str, Any]) -> "Techniques":
        """What a model that only answers needs of a plan's, of whichever version: the weights where they were in
        training. The head is as it was loaded, and what else was on made no difference to the weights."""
        planned = plan["techniques"]
        return cls(
            **{name: planned[name] for name, each in TECHNIQUES.items() if each.is_as_loaded and name in planned}
        )

    def on(self) -> list[Technique]:
        return [each for each in TECHNIQUES.values() if getattr(self, each.name) != each.off]

    def only(self, kept: Callable[[Technique], bool]) -> "Techniques":
        """Without those that are not `kept`."""
        return Techniques(**{each.name: getattr(self, each.name) for each in TECHNIQUES.values() if kept(each)})

    def on_top_of(self, others: "Techniques") -> "Techniques":
        """These, and of `others` what these do without: nothing is switched off, an amount asked for anew is taken."""
        joined = {
            each.name: each.joined(getattr(self, each.name), getattr(others, each.name)) for each in TECHNIQUES.values()
        }
        return Techniques(**joined)

    def as_loaded(self) -> "Techniques":
        """What of these begins as the base is loaded."""
        return self.only(lambda each: each.is_as_loaded)

    def in_a_pass(self) -> "Techniques":
        """What of these makes a difference to what comes and goes in a pass."""
        return self.only(lambda each: each.is_in_a_pass(self))

    def on_device(self, standing: Standing) -> Parts:
        """Parts that stand on the device."""
        parts = standing.parts()
        for each in self.on():
            parts = each.on_device(parts, standing, self)
        return parts

    def while_loading(self, standing: Standing) -> int:
        """Bytes on the device when the last weight has come: the head in 16 bits, one weight before it is quantised."""
        parts = self.as_loaded().on_device(standing)
        return parts["base"] + parts["embedding"] + parts["head"] + standing.largest_bytes

    def on_host(self, standing: Standing) -> Parts:
        """Parts that stand in page-locked or ordinary host memory."""
        parts: Parts = {}
        for each in self.on():
            parts |= each.on_host(standing, self)
        return parts


TECHNIQUES = registered("qtune.memory.techniques", Technique)
STEPS = tuple(sorted((step for each in TECHNIQUES.values() for step in each.steps), key=lambda step: step.order))
for _each in TECHNIQUES.values():
    Techniques.__annotations__[_each.name] = Any
    setattr(Techniques, _each.name, _each.off)
dataclass(frozen=True)(Techniques)

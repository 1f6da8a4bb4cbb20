"""What a run stands on, as lock.json has it: merging, scoring and a later resume hold it against what they find."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class LockedBase:
    """The base: `name` as the recipe had it, the `folder` of its weights, their SHA-256, and one of a glance at them.

    `has_towers` where it is the text model of a checkpoint that holds more. These two came later, and are None in older
    locks.
    """

    name: str
    folder: str
    sha256: str
    glance_sha256: str | None = None
    has_towers: bool | None = None


@dataclass(frozen=True)
class Quantization:
    """How the base's linears were held: as bitsandbytes calls it, which restores the same values by it.

    `is_given` where the base's files had them so.
    """

    type: str
    double: bool
    blocksize: int = 64
    quant_storage: str = "uint8"
    is_given: bool = False

    def __str__(self) -> str:
        double = ", double quantisation" if self.double else ""
        return f"{self.type.upper()}{double}{', as its files have it' if self.is_given else ''}"


@dataclass(frozen=True)
class PackingProbe:
    """How far a document's logits move, as a share of their own spread: root mean squares over the document.

    `by_neighbour` is between two neighbours of one length, `by_company` between alone and behind a neighbour,
    `by_attention` between our attention and the model's own, alone. `by_loss` is how far training's loss of it
    is from cross-entropy, as a share of that. `rounding` is what arithmetic in the run's dtype may do.
    """

    by_neighbour: float
    by_company: float
    by_attention: float
    by_loss: float
    rounding: float

    @property
    def moved_in_pack(self) -> float:
        return max(self.by_neighbour, self.by_company)

    @property
    def leaks(self) -> bool:
        """Whether a document is another in company, so that packs would train something else."""
        return not self.moved_in_pack <= self.rounding

    @property
    def is_another_model(self) -> bool:
        """Whether even a document alone is not what the model makes of it."""
        return not self.by_attention <= self.rounding

    @property
    def is_another_loss(self) -> bool:
        """Whether training's loss is not that of the model's logits. A mean over tokens rounds less than logits do."""
        return not self.by_loss <= self.rounding / 10


@dataclass(frozen=True)
class LockedStart:
    """The adapter that the run started from: `name` as the recipe had it, and the SHA-256 of its weights."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Lock:
    """`model` and `recipe` are settings as JSON, by the names of the version that wrote them; a `Model` and a `Recipe`
    are made of them where they are used, so that what another version cannot read is still shown.

    `quantized_modules` are the linears in 4 bits, by name, and the parameters that hold experts in 4 bits. What older
    versions did not note is None; they did not note experts.
    """

    name: str | None
    base: LockedBase
    model: dict[str, Any]
    recipe: dict[str, Any]
    quantized_modules: tuple[str, ...]
    quantization: Quantization | None
    device: str | None
    compute_dtype: str
    data_sha256: str
    template_sha256: str | None
    tokenizer_sha256: str | None
    stop_token_ids: tuple[int, ...]
    seed: int | None
    versions: dict[str, str]
    packing_probe: PackingProbe | None = None
    start: LockedStart | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Lock":
        """Raises LookupError or TypeError for what no version of qtune wrote; fields that are not known are left."""
        quantization, probe, start = values["quantization"], values.get("packing_probe"), values.get("start")
        return cls(
            name=values.get("name"),
            base=_made(LockedBase, values["base"]),
            model=_known_as(dict, values["model"]),
            recipe=_known_as(dict, values["recipe"]),
            quantized_modules=tuple(_known_as(list, values["quantized_modules"])),
            quantization=None if quantization is None else _made(Quantization, quantization),
            device=values.get("device"),
            compute_dtype=_known_as(str, values["compute_dtype"]),
            data_sha256=_known_as(str, values["data_sha256"]),
            template_sha256=values.get("template_sha256"),
            tokenizer_sha256=values.get("tokenizer_sha256"),
            stop_token_ids=tuple(_known_as(list, values["stop_token_ids"])),
            seed=values.get("seed"),
            versions=_known_as(dict, values["versions"]),
            packing_probe=None if probe is None else _made(PackingProbe, probe),
            start=None if start is None else _made(LockedStart, start),
        )

    def as_json(self) -> dict[str, Any]:
        """As `from_json` reads it. What was never noted is left out, and beside the probe's figures stands what follows
        from them."""
        values: dict[str, Any] = {
            **asdict(self),
            "base": {key: value for key, value in asdict(self.base).items() if value is not None},
            "quantized_modules": list(self.quantized_modules),
            "stop_token_ids": list(self.stop_token_ids),
        }
        if self.packing_probe is not None:
            values["packing_probe"] = {"leaks": self.packing_probe.leaks, **asdict(self.packing_probe)}
        return {key: value for key, value in values.items() if value is not None or key == "quantization"}

    def with_base_in(self, folder: Path) -> "Lock":
        """The same where the base has been moved to `folder`."""
        model = {**self.model, "base": str(folder)}
        recipe = {**self.recipe, "model": {**self.recipe["model"], "base": str(folder)}}
        return replace(self, base=replace(self.base, folder=str(folder)), model=model, recipe=recipe)

    @property
    def base_name(self) -> str:
        """The base as the settings have it: a folder, a name on the hub, or `demo`."""
        return str(self.model["base"])

    @property
    def trusts_remote_code(self) -> bool:
        return bool(self.model.get("trust_remote_code"))

    @property
    def documents_apart(self) -> bool:
        """Whether each document had a pass of its own, as packed ones would have read each other in this base."""
        return self.packing_probe is not None and self.packing_probe.leaks


def _made(kind: type[T], values: Mapping[str, Any]) -> T:
    """A value of those of its fields that there are; one without a default is asked for."""
    names = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: values[name] for name in names if name in values})


def _known_as(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value

"""What the data room gives: rows ready to train on, and how they are kept between runs."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from qtune.cache_dir import OFF, VARIABLE
from qtune.data.data_report import DataReport, Reason, SourceFigures
from qtune.data.dataset import Examples
from qtune.data.ragged import Ragged
from qtune.data.token_cache import CachedRows
from qtune.data.unused_columns import Unused
from qtune.recipe.schema import Data


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows, how they are packed (indices into them), and what identifies them.

    `held_out_sources` names, where there are several sources, that of the rows in each sequence held out.
    """

    train: Examples
    held_out: Examples
    train_packs: Ragged
    held_out_packs: Ragged
    stop_token_ids: tuple[int, ...]
    report: DataReport
    fingerprint: str
    template_fingerprint: str
    held_out_sources: tuple[str, ...] = ()

    @classmethod
    def from_cache(cls, cached: CachedRows, data: Data) -> "Prepared":
        """As it was kept; the report names what `data` does, which may have moved, and says where rows come from."""
        report = cached.facts["report"]
        told = f"The tokenised rows are from the cache; {VARIABLE}={OFF} in the environment makes them anew."
        return cls(
            train=Examples(cached.blocks, cached.arrays["train"], cached.arrays.get("weights")),
            held_out=Examples(cached.blocks, cached.arrays["held_out"]),
            train_packs=_packs_of(cached.arrays, "train"),
            held_out_packs=_packs_of(cached.arrays, "held_out"),
            stop_token_ids=tuple(cached.facts["stop_token_ids"]),
            report=DataReport(
                **report
                | {
                    "source": data.title,
                    "sources": tuple(SourceFigures(**each) for each in report["sources"]),
                    "dropped": tuple(Reason(r["reason"], r["rows"], tuple(r["places"])) for r in report["dropped"]),
                    "unused": tuple(Unused(**each) for each in report["unused"]),
                    "notices": (*report["notices"], told),
                    "sample": tuple((text, trained) for text, trained in report["sample"]),
                }
            ),
            fingerprint=cached.facts["fingerprint"],
            template_fingerprint=cached.facts["template_fingerprint"],
            held_out_sources=tuple(cached.facts["held_out_sources"]),
        )

    def for_cache(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The arrays and facts of an `CachedRows` beside the blocks."""
        arrays: dict[str, NDArray[Any]] = {"train": self.train.indices, "held_out": self.held_out.indices}
        arrays |= {} if self.train.weights is None else {"weights": self.train.weights}
        arrays |= _arrays_of(self.train_packs, "train") | _arrays_of(self.held_out_packs, "held_out")
        facts = {
            "report": dataclasses.asdict(self.report),
            "stop_token_ids": self.stop_token_ids,
            "fingerprint": self.fingerprint,
            "template_fingerprint": self.template_fingerprint,
            "held_out_sources": self.held_out_sources,
        }
        return arrays, facts


def _arrays_of(packs: Ragged, name: str) -> dict[str, NDArray[Any]]:
    return {f"{name}_packs": packs.values, f"{name}_pack_ends": packs.ends}


def _packs_of(arrays: dict[str, NDArray[Any]], name: str) -> Ragged:
    return Ragged(arrays[f"{name}_packs"], arrays[f"{name}_pack_ends"])

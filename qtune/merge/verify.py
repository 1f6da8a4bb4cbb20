"""Whether a merged folder is the model that was trained.

That is shown in three steps. Every weight that was written is held against the live model's own (`weights_proof`). Put
into the merged model in float32, as they were before they were rounded, those weights must answer as the live adapter
does. What rounding them costs is then all that is left: it is measured on the folder as anyone would load it, over rows
that were never trained on, and held against what tuning changed.

Both sides do their arithmetic in float32, so that what is measured is a difference of weights and not of kernels.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qtune.errors import MachineError, ModelError
from qtune.hardware import find_device, prepare
from qtune.memory.oom_recovery import free_memory, is_out_of_memory, let_go
from qtune.merge import greedy_answers
from qtune.merge.checkpoint_names import CheckpointNames
from qtune.merge.greedy_answers import Greedy
from qtune.merge.live_weights import compute_in_float32, with_weights_of
from qtune.merge.logit_distance import (
    ROWS_AT_ONCE,
    Closeness,
    Row,
    RowCloseness,
    divergences,
    in_batches,
    is_kl_at_most,
    is_loss_rise_at_most,
    logits_of,
    usable_rows,
)
from qtune.merge.lora_delta import AdapterWeights
from qtune.merge.merged_weights import Onto, checkpoint_names
from qtune.merge.weights_proof import Trained, WeightsProof
from qtune.model import adapter, base
from qtune.model.checkpoint import BaseCheckpoint
from qtune.model.open_model import model_of, techniques_of
from qtune.recipe.schema import Model
from qtune.rundir import MERGE_REPORT, RunDir, read_json, write_json

FOLD_KL = 1e-5  # in float32 both sides are the same but for the order of sums: 3e-11 in 30 trained layers
# KL grows with the square of a change, so rounding may move the answers a tenth as far as tuning did. It is no idle
# bound: changes under half a step are rounded away, and in bfloat16 8 % of what 12 steps had taught a model went.
ROUNDING_FRACTION = 0.01
# Where tuning changed next to nothing: perplexity moves by 0.1 % at the most. In bfloat16 30 layers cost 1.7e-4.
NEGLIGIBLE_KL = 1e-3
# The original weights are not those that were trained on: mean KL is the base's own quantisation error (0.004 to 0.45
# measured on small models) and says nothing of the merge, so what must hold is that the held-out rows got no worse.
ORIGINAL_LOSS_RISE = 0.1


@dataclass(frozen=True)
class MergeVerdict:
    """The merged model beside the live one, over every position of `rows` token rows.

    `weights` are all that were written. KL is of another model from live, in nats per position: `fold_kl` of the merged
    one before its weights were rounded, `mean_kl` of it as it is, `base_kl` of the base, which is what tuning changed,
    and `float16_kl` of the fold in float16, asked where bfloat16 costs much beside that. Agreement is how often both
    find the same next token most likely; losses are nats per token. A bound that does not apply to this base is None.
    """

    onto: Onto
    dtype: str
    weights: WeightsProof
    rows: int
    positions: int
    fold_kl: float
    mean_kl: float
    max_kl: float
    base_kl: float
    float16_kl: float | None
    agreement_fraction: float
    live_loss: float
    merged_loss: float
    mean_kl_bound: float | None
    loss_rise_bound: float | None
    greedy: tuple[Greedy, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """What does not hold, a clause each."""
        found = list(self.weights.faults)
        kl, rise = self.mean_kl_bound, self.loss_rise_bound
        if not self.fold_kl <= FOLD_KL:
            found.append(f"mean KL {self.fold_kl:.1e} nats before any rounding (at most {FOLD_KL:.0e})")
        if kl is not None and not self.mean_kl <= kl:
            found.append(f"mean KL {self.mean_kl:.1e} nats in {self.dtype} (at most {kl:.1e}), {self._beside_tuning()}")
        if rise is not None and not self.merged_loss - self.live_loss <= rise:
            found.append(f"held-out loss {self.merged_loss:.4f} after {self.live_loss:.4f} (at most {rise} more)")
        return tuple(found)

    def _beside_tuning(self) -> str:
        finer = "float32" if self.float16_kl is None else "float16"
        return f"where tuning changed {self.base_kl:.1e}: --dtype {finer} is finer"

    @property
    def passed(self) -> bool:
        return not self.faults

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "faults": self.faults, **dataclasses.asdict(self)}


@contextlib.contextmanager
def refusing_small_memory(what: object) -> Iterator[None]:
    """Raises MachineError, about `what`, where memory runs out inside."""
    try:
        yield
    except Exception as fault:
        if not is_out_of_memory(fault):
            raise
        let_go(fault)
        free_memory()
        raise MachineError(
            f"{what}: memory ran out. Close what else uses this device, or take the processor, with"
            " CUDA_VISIBLE_DEVICES= in the environment: that is slower, and finds the same."
        ) from None


def verify(run: RunDir, output: Path, rows: Sequence[Sequence[int]]) -> MergeVerdict:
    """Compare the merged folder `output` with the run's adapter on its base, on `rows` of token ids never trained on.

    As many of 64 rows of 512 tokens are used as it takes to be sure. The verdict is added to the run's merge.json and
    the folder's merge_report.json. Raises UserError where no row has two tokens, ModelError where `output` does not
    load.
    """
    report = read_json(output / MERGE_REPORT)
    verdict = compare(Live.open(run), output, rows, report["onto"], report["dtype"])
    known = {**report, "verdict": verdict.as_json()}
    write_json(output / MERGE_REPORT, known)
    write_json(run.merge, known)
    return verdict


@dataclass(frozen=True)
class Live:
    """The model that was trained: the base as the run loaded it, its adapter beside it, computing in float32.

    `checkpoint` is the base's, and `replaced` what the adapter's file has whole.
    """

    model: PeftModel
    checkpoint: BaseCheckpoint
    names: CheckpointNames
    replaced: dict[str, torch.Tensor]
    device: str
    compute_dtype: str
    quantized: bool
    stop_token_ids: tuple[int, ...]
    trust_remote_code: bool

    @classmethod
    def open(cls, run: RunDir) -> "Live":
        """On the device at hand; weights that waited in host memory through training wait there still."""
        lock, spec, device = run.read_lock(), model_of(run), prepare(find_device()).name
        loaded = base.load_base(spec, device, lock.compute_dtype, techniques_of(run))
        tuned = compute_in_float32(adapter.load(loaded, run.adapter).eval(), device)
        checkpoint = BaseCheckpoint.open(base.base_folder(spec))
        return cls(
            tuned,
            checkpoint,
            checkpoint_names(spec, checkpoint),
            AdapterWeights.read(run.adapter).replaced,
            device,
            lock.compute_dtype,
            bool(lock.quantized_modules),
            lock.stop_token_ids,
            spec.trust_remote_code,
        )

    def trained(self, onto: Onto) -> Trained:
        return Trained(self.model, self.checkpoint, self.names, self.replaced, onto, getattr(torch, self.compute_dtype))

    def is_another_base(self, onto: Onto) -> bool:
        """Whether what is folded `onto` is another base than was trained on; unless quantised, it is its original."""
        return onto == "original" and self.quantized

    def logits(self, batch: Sequence[Row]) -> list[torch.Tensor]:
        return logits_of(self.model, batch, self.device)

    def base_logits(self, batch: Sequence[Row]) -> list[torch.Tensor]:
        """The base's, which is what tuning began with."""
        with self.model.disable_adapter():
            return self.logits(batch)

    def continued(self, prompts: Sequence[Row]) -> list[Row]:
        return greedy_answers.continued(self.model, prompts, self.stop_token_ids, self.device)


def compare(live: Live, output: Path, rows: Sequence[Sequence[int]], onto: Onto, dtype: str) -> MergeVerdict:
    """The figures of `verify` for weights of `dtype` merged `onto` a base, nothing written."""
    usable = usable_rows(rows, output)
    merged, tokenizer = _load_merged(output, live)
    is_another = live.is_another_base(onto)

    def is_sure(measured: Sequence[RowCloseness]) -> bool:
        if is_another:
            return is_loss_rise_at_most(ORIGINAL_LOSS_RISE, measured) is not None
        return is_kl_at_most(NEGLIGIBLE_KL, ROUNDING_FRACTION, measured) is not None

    with torch.inference_mode():
        weights = live.trained(onto).prove(BaseCheckpoint.open(output))
        measured = measure(live, partial(logits_of, merged, device=live.device), usable, RowCloseness.of, is_sure)
        few = next(in_batches(usable[:ROWS_AT_ONCE]))
        fold_kl = _kl_with_weights_of(live, merged, few, torch.Tensor.float)
        closeness = Closeness.over(measured)
        asks_finer = (
            not is_another and dtype == "bfloat16" and closeness.mean_kl > ROUNDING_FRACTION * closeness.base_kl
        )
        float16_kl = _kl_with_weights_of(live, merged, few, torch.Tensor.half) if asks_finer else math.inf
        answers = _continue_both(live, merged, tokenizer, usable)
    return MergeVerdict(
        onto=onto,
        dtype=dtype,
        weights=weights,
        rows=closeness.rows,
        positions=closeness.positions,
        fold_kl=fold_kl,
        mean_kl=closeness.mean_kl,
        max_kl=closeness.max_kl,
        base_kl=closeness.base_kl,
        float16_kl=float16_kl if math.isfinite(float16_kl) else None,
        agreement_fraction=closeness.agreement_fraction,
        live_loss=closeness.live_loss,
        merged_loss=closeness.other_loss,
        mean_kl_bound=None if is_another else max(NEGLIGIBLE_KL, ROUNDING_FRACTION * closeness.base_kl),
        loss_rise_bound=ORIGINAL_LOSS_RISE if is_another else None,
        greedy=answers,
    )


Logits = Callable[[Sequence[Row]], Sequence[torch.Tensor]]
Measured = TypeVar("Measured", bound=RowCloseness)


def measure(
    live: Live,
    logits: Logits,
    rows: Sequence[Row],
    compared: Callable[[torch.Tensor, torch.Tensor, Row, float], Measured],
    is_sure: Callable[[Sequence[Measured]], bool],
) -> list[Measured]:
    """`rows`, a few at a time until it `is_sure` of them, `compared` each; `logits` are the other model's."""
    measured: list[Measured] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        for batch in in_batches(rows[start : start + ROWS_AT_ONCE]):
            expected = live.logits(batch)
            base_kl = [float(kl.sum()) for kl in map(divergences, expected, live.base_logits(batch))]
            measured += map(compared, expected, logits(batch), batch, base_kl)
        if is_sure(measured):
            break
    return measured


def _kl_with_weights_of(
    live: Live, merged: PreTrainedModel, batch: Sequence[Row], rounded: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """Mean KL of the merged model with the live one's weights, folded in float32 and then `rounded`."""
    expected = live.logits(batch)
    with with_weights_of(live.model, merged, rounded):
        found = logits_of(merged, batch, live.device)
    return float(torch.cat([divergences(*pair) for pair in zip(expected, found, strict=True)]).mean())


def _load_merged(output: Path, live: Live) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The folder through plain transformers, its linears left in host memory until they are used."""
    try:
        spec = Model(base=str(output), quantization="none", trust_remote_code=live.trust_remote_code)
        model = base.from_folder(output, base.config_in(output, spec), live.trust_remote_code, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=live.trust_remote_code)
    except Exception as fault:  # whatever stops the reader's own `from_pretrained` is the finding
        raise ModelError(f"{output}: does not load in transformers ({str(fault).splitlines()[0]}).") from None
    return compute_in_float32(model.eval(), live.device), tokenizer


def _continue_both(
    live: Live, merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> tuple[Greedy, ...]:
    prompts = greedy_answers.prompts_of(rows)
    from_live = live.continued(prompts)
    from_merged = greedy_answers.continued_alike(merged, prompts, from_live, live.stop_token_ids, live.device)
    return tuple(
        Greedy(tokenizer.decode(prompt), tokenizer.decode(ours), tokenizer.decode(theirs), ours == theirs)
        for prompt, ours, theirs in zip(prompts, from_live, from_merged, strict=True)
    )

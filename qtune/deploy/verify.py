"""Whether a merged folder is the model that was trained: it is loaded as anyone would, and held against the live one.

Both sides do their arithmetic in float32, so that what is measured is a difference of weights and not of kernels.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qtune.deploy.fold import Onto
from qtune.deploy.in_float32 import compute_in_float32
from qtune.deploy.opened import model_of
from qtune.errors import ModelError, UserError
from qtune.memory.device import find_device
from qtune.model import adapter, base
from qtune.rundir import MERGE_REPORT, RunDir, read_json, write_json
from qtune.units import format_percent

MAX_ROWS, MAX_ROW_TOKENS = 64, 512  # float32 logits of 512 tokens and a vocabulary of 128k are 256 MiB a side
GREEDY_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 3, 32, 24
POSITIONS_AT_ONCE = 64
# The same weights but for one rounding: twice what was measured on 64 texts (5.6e-6, in bfloat16 4.3e-5 and 98.8 %).
EXACT_KL, EXACT_KL_BFLOAT16 = 1e-5, 1e-4
EXACT_AGREEMENT_FRACTION = 0.985
# The original weights are not those that were trained on: mean KL is the base's own quantisation error (0.004 to 0.33
# measured on small models) and says nothing of the merge, so what must hold is that the held-out rows got no worse.
ORIGINAL_LOSS_RISE = 0.1


@dataclass(frozen=True)
class Greedy:
    """The most likely continuation of one prompt by the live and by the merged model."""

    prompt: str
    live: str
    merged: str
    same: bool


@dataclass(frozen=True)
class Verdict:
    """The merged model beside the live one, over every position of `rows` token rows.

    KL is of merged from live, in nats per position; agreement is how often both find the same next token most likely;
    losses are nats per token. A bound that does not apply to this base is None.
    """

    onto: Onto
    dtype: str
    rows: int
    positions: int
    mean_kl: float
    max_kl: float
    agreement_fraction: float
    live_loss: float
    merged_loss: float
    mean_kl_bound: float | None
    agreement_bound_fraction: float | None
    loss_rise_bound: float | None
    greedy: tuple[Greedy, ...]

    @property
    def passed(self) -> bool:
        kl, agreement, loss_rise = self.mean_kl_bound, self.agreement_bound_fraction, self.loss_rise_bound
        return (
            (kl is None or self.mean_kl <= kl)
            and (agreement is None or self.agreement_fraction >= agreement)
            and (loss_rise is None or self.merged_loss - self.live_loss <= loss_rise)
        )

    def sentence(self) -> str:
        """The figures beside their bounds, for a person."""
        kl, agreement, loss_rise = self.mean_kl_bound, self.agreement_bound_fraction, self.loss_rise_bound
        return (
            f"mean KL {self.mean_kl:.1e} nats{'' if kl is None else f' (at most {kl:.0e})'}, same next token"
            f" {format_percent(self.agreement_fraction)}"
            f"{'' if agreement is None else f' (at least {format_percent(agreement)})'}, held-out loss"
            f" {self.live_loss:.4f} before and {self.merged_loss:.4f} after merging"
            f"{'' if loss_rise is None else f' (at most {loss_rise} more)'}"
        )

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **dataclasses.asdict(self)}


def verify(run: RunDir, output: Path, rows: Sequence[Sequence[int]]) -> Verdict:
    """Compare the merged folder `output` with the run's adapter on its base, on `rows` of token ids never trained on.

    At most 64 rows of 512 tokens are used. The verdict is added to the run's merge.json and the folder's
    merge_report.json. Raises UserError where no row has two tokens, ModelError where `output` does not load.
    """
    report = read_json(output / MERGE_REPORT)
    verdict = compare(Live.open(run), output, rows, report["onto"], report["dtype"])
    known = {**report, "verdict": verdict.as_json()}
    write_json(output / MERGE_REPORT, known)
    write_json(run.merge, known)
    return verdict


@dataclass(frozen=True)
class Live:
    """The model that was trained: the base as the run loaded it, its adapter beside it, computing in float32."""

    model: PeftModel
    device: str
    compute_dtype: str
    quantized: bool
    stop_token_ids: tuple[int, ...]
    trust_remote_code: bool

    @classmethod
    def open(cls, run: RunDir) -> "Live":
        lock, spec, device = run.read_lock(), model_of(run), find_device().name
        loaded = base.load_base(spec, device, lock["compute_dtype"])
        tuned = compute_in_float32(adapter.load(loaded, run.adapter).eval(), device)
        quantized, stop = bool(lock["quantized_modules"]), tuple(lock["stop_token_ids"])
        return cls(tuned, device, lock["compute_dtype"], quantized, stop, spec.trust_remote_code)


def compare(live: Live, output: Path, rows: Sequence[Sequence[int]], onto: Onto, dtype: str) -> Verdict:
    """The figures of `verify` for weights of `dtype` merged `onto` a base, nothing written."""
    usable = usable_rows(rows, output)
    merged, tokenizer = _load_merged(output, live)
    with torch.inference_mode():
        closeness = Closeness.over([_measure(live, merged, row) for row in usable])
        greedy = tuple(_continue_both(live, merged, tokenizer, row) for row in usable[:GREEDY_PROMPTS])
    kl_bound, agreement_bound, loss_rise_bound = _bounds(live, onto, dtype)
    return Verdict(
        onto=onto,
        dtype=dtype,
        rows=closeness.rows,
        positions=closeness.positions,
        mean_kl=closeness.mean_kl,
        max_kl=closeness.max_kl,
        agreement_fraction=closeness.agreement_fraction,
        live_loss=closeness.live_loss,
        merged_loss=closeness.other_loss,
        mean_kl_bound=kl_bound,
        agreement_bound_fraction=agreement_bound,
        loss_rise_bound=loss_rise_bound,
        greedy=greedy,
    )


def usable_rows(rows: Sequence[Sequence[int]], output: Path) -> list[list[int]]:
    """The rows that are compared, cut to the tokens that are; UserError where there is none."""
    usable = [list(row[:MAX_ROW_TOKENS]) for row in rows if len(row) > 1][:MAX_ROWS]
    if not usable:
        raise UserError(
            f"{output}: there is no held-out row of two tokens or more to compare it on. Train with"
            " data.held_out_fraction above 0 to have some."
        )
    return usable


def _bounds(live: Live, onto: Onto, dtype: str) -> tuple[float | None, float | None, float | None]:
    """Mean KL, agreement and rise of the loss that must hold; a base that was never quantised is its original."""
    if onto == "original" and live.quantized:
        return None, None, ORIGINAL_LOSS_RISE
    rounded = "bfloat16" in (dtype, live.compute_dtype if onto == "original" else "")
    return EXACT_KL_BFLOAT16 if rounded else EXACT_KL, EXACT_AGREEMENT_FRACTION, None


def _load_merged(output: Path, live: Live) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The folder through plain transformers, its linears left in host memory until they are used."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            output, dtype="auto", use_safetensors=True, trust_remote_code=live.trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=live.trust_remote_code)
    except Exception as fault:  # whatever stops the reader's own `from_pretrained` is the finding
        raise ModelError(f"{output}: does not load in transformers ({str(fault).splitlines()[0]}).") from None
    return compute_in_float32(model.eval(), live.device), tokenizer


@dataclass(frozen=True)
class RowCloseness:
    """How another model's logits over one row compare with those of the live one."""

    positions: int
    kl_sum: float
    max_kl: float
    agreeing: int
    live_loss_sum: float
    other_loss_sum: float

    @classmethod
    def of(cls, expected: torch.Tensor, found: torch.Tensor, row: list[int]) -> "RowCloseness":
        """From both logits, (positions, vocabulary)."""
        pieces = zip(expected.split(POSITIONS_AT_ONCE), found.split(POSITIONS_AT_ONCE), strict=True)
        kl = torch.cat([_divergence(*pair) for pair in pieces])
        next_ids = torch.tensor(row[1:], device=expected.device)
        losses = (float(cross_entropy(logits[:-1], next_ids, reduction="sum")) for logits in (expected, found))
        agreeing = int((expected.argmax(-1) == found.argmax(-1)).sum())
        return cls(len(row), float(kl.sum()), float(kl.max()), agreeing, *losses)


@dataclass(frozen=True)
class Closeness:
    """The same over all rows: per position, and the losses per token."""

    rows: int
    positions: int
    mean_kl: float
    max_kl: float
    agreement_fraction: float
    live_loss: float
    other_loss: float

    @classmethod
    def over(cls, measured: Sequence[RowCloseness]) -> "Closeness":
        positions = sum(row.positions for row in measured)
        predicted = positions - len(measured)  # nothing comes before a row's first token
        return cls(
            rows=len(measured),
            positions=positions,
            mean_kl=sum(row.kl_sum for row in measured) / positions,
            max_kl=max(row.max_kl for row in measured),
            agreement_fraction=sum(row.agreeing for row in measured) / positions,
            live_loss=sum(row.live_loss_sum for row in measured) / predicted,
            other_loss=sum(row.other_loss_sum for row in measured) / predicted,
        )


def _measure(live: Live, merged: PreTrainedModel, row: list[int]) -> RowCloseness:
    ids = torch.tensor([row], device=live.device)
    expected, found = (model(input_ids=ids, use_cache=False).logits[0].float() for model in (live.model, merged))
    return RowCloseness.of(expected, found, row)


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL of each position in nats, from logits of (positions, vocabulary); double, as 1e-6 drowns in float32 sums."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _continue_both(live: Live, merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: list[int]) -> Greedy:
    """Both models go on from the first half of `row`."""
    prompt = prompt_of(row)
    from_live, from_merged = (continued(model, prompt, live) for model in (live.model, merged))
    return Greedy(
        prompt=tokenizer.decode(prompt),
        live=tokenizer.decode(from_live),
        merged=tokenizer.decode(from_merged),
        same=from_live == from_merged,
    )


def prompt_of(row: list[int]) -> list[int]:
    return row[: min(PROMPT_TOKENS, max(1, len(row) // 2))]


def continued(model: PreTrainedModel | PeftModel, prompt: list[int], live: Live) -> list[int]:
    """What follows `prompt`, until one of the run's stop tokens: the base's own settings may know fewer of them."""
    ids, stop = torch.tensor([prompt], device=live.device), list(live.stop_token_ids) or None
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        use_cache=True,
        eos_token_id=stop,
        pad_token_id=stop[0] if stop else 0,
    )
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return answer[0, len(prompt) :].tolist()

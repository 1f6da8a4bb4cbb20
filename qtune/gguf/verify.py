"""Whether a GGUF file is the model that was trained, asked of llama.cpp itself.

The live adapter computes in float32; llama.cpp computes as it does when it serves, with inputs rounded to what the
weights are stored in. Without the extra that has it nothing is claimed.

A whole model is asked as it is. A LoRA alone is asked on the run's base as training held it, so that the adapter is all
there is between the two sides: that base is written in f16 beside it, and removed once llama.cpp has answered.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qtune.errors import MachineError, ModelError
from qtune.gguf import llama_cpp, weights_proof
from qtune.gguf.contents import Draft, base_draft
from qtune.gguf.llama_cpp import GgufModel
from qtune.gguf.tokenizer_check import differing
from qtune.gguf.writer import Quant
from qtune.merge import greedy_answers
from qtune.merge.greedy_answers import ANSWER_TOKENS, Greedy
from qtune.merge.logit_distance import (
    MAX_ROW_TOKENS,
    Closeness,
    Row,
    RowCloseness,
    is_at_most,
    is_kl_at_most,
    is_loss_rise_at_most,
    usable_rows,
)
from qtune.merge.output_folder import Progress, check_disk, counting
from qtune.merge.verify import ORIGINAL_LOSS_RISE, Live, measure, refusing_small_memory
from qtune.merge.weights_proof import WeightsProof
from qtune.rundir import RunDir
from qtune.units import format_percent

# Another token than the live model's counts as the same where the live model finds it as likely but for this much:
# rounding to 8 bits tips such ties, 3 % of all positions of a model that is unsure (all within 0.014 of one of 656,000
# parameters), and the answer is none the worse.
NEAR_TIE_PROBABILITY = 0.02
# Below 8 bits it is the user's choice how much may go, and figures are shown.
AGREEMENT_BOUND_FRACTION: dict[Quant, float] = {"f32": 0.99, "f16": 0.99, "bf16": 0.98, "q8_0": 0.98}
# An adapter that changes few next tokens would pass without being there, so it is held to what it changes: of the KL
# that the base alone has, 0.007 was left at 0.9 of an adapter's scale, 0.1 at 1.4 and 0.2 at a half.
UNEXPLAINED_FRACTION, NEGLIGIBLE_KL = 0.05, 1e-4
SHOWN_ROWS = 16  # where nothing is bounded
BASE_NAME = "base.gguf"


@dataclass(frozen=True)
class GgufVerdict:
    """The file in llama.cpp beside the live model, over every position of `rows` token rows.

    `weights` are those in the file. KL is of the file from live, in nats per position; agreement is how often both find
    the same next token most likely, near ties how often the file's choice is another that live finds as likely; losses
    are nats per token. `base_kl` is that of the base, which is what tuning changed. `ends` counts positions where live
    ends its answer, `ends_found` those of them where llama.cpp stops too. `differing_texts` became other tokens, and
    llama.cpp is `deaf_to` some stop tokens. A bound that does not apply is None.
    """

    weights: WeightsProof
    rows: int
    positions: int
    mean_kl: float
    max_kl: float
    base_kl: float
    agreement_fraction: float
    near_tie_fraction: float
    mean_kl_bound: float | None
    agreement_bound_fraction: float | None
    live_loss: float
    file_loss: float
    loss_rise_bound: float | None
    texts: int
    differing_texts: tuple[str, ...]
    ends: int
    ends_found: int
    deaf_to: tuple[str, ...]
    greedy: tuple[Greedy, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """What does not hold, a clause each."""
        agreement, rise = self.agreement_bound_fraction, self.loss_rise_bound
        found = list(self.weights.faults)
        if self.differing_texts:
            found.append(f"{self.differing_texts[0]!r} becomes other tokens than in training")
        if self.deaf_to:
            found.append(f"llama.cpp does not stop at {', '.join(self.deaf_to)}")
        same = self.agreement_fraction + self.near_tie_fraction
        if agreement is not None and same < agreement:
            found.append(f"same next token {format_percent(same)} (at least {format_percent(agreement)})")
        if self.mean_kl_bound is not None and not self.mean_kl <= self.mean_kl_bound:
            found.append(f"mean KL {self.mean_kl:.1e} nats with the adapter, {self.base_kl:.1e} without it")
        if rise is not None and self.file_loss - self.live_loss > rise:
            found.append(f"held-out loss {self.file_loss:.4f} after {self.live_loss:.4f} (at most {rise} more)")
        return tuple(found)


def asked(
    run: RunDir, draft: Draft, path: Path, output: Path, rows: Sequence[Sequence[int]], progress: Progress | None
) -> tuple[GgufVerdict | None, tuple[str, ...]]:
    """The verdict on the file at `path`, which is to stand in `output`; or none, and a sentence that says why.

    Raises ModelError for a file that llama.cpp does not load.
    """
    if not llama_cpp.is_installed():
        return None, (_not_verified(llama_cpp.HOW_TO_GET_IT),)
    if not any(len(row) > 1 for row in rows):
        return None, (_not_verified("the run kept no held-out rows to compare on."),)
    try:
        with refusing_small_memory(path.name):
            if draft.vocabulary is None:
                return _asked_on_base(run, draft, path, output, rows, progress)
            _tell_of_asking(progress, draft)
            return judge(Live.open(run), path, rows, draft), ()
    except MachineError as fault:
        return None, (_not_verified(fault),)


def _not_verified(why: object) -> str:
    return f"Not verified with llama.cpp: {why}"


def _tell_of_asking(progress: Progress | None, draft: Draft) -> None:
    if progress is not None:
        progress(len(draft.entries), len(draft.entries), "and asking llama.cpp")


def _asked_on_base(
    run: RunDir, draft: Draft, path: Path, output: Path, rows: Sequence[Sequence[int]], progress: Progress | None
) -> tuple[GgufVerdict | None, tuple[str, ...]]:
    """The verdict on a LoRA alone; a base that cannot be written is no fault of it.

    Its texts are none: the tokenizer is in the file of the base.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        base_path = Path(folder) / BASE_NAME
        try:
            base = base_draft(run, draft.fold)
            check_disk(output, base.bytes, "base that the LoRA is verified on")
            base.write(base_path, counting(progress, len(base.entries)))
        except ModelError as fault:
            return None, (_not_verified(fault),)
        except OSError as fault:
            return None, (_not_verified(f"its base could not be written ({fault.strerror or fault})."),)
        _tell_of_asking(progress, base)
        return judge(Live.open(run), base_path, rows, draft, path), ()


def judge(live: Live, path: Path, rows: Sequence[Sequence[int]], draft: Draft, lora: Path | None = None) -> GgufVerdict:
    """Load `path`, a model made from `draft` or the base that `lora`, made from it, is put on; hold it against `live`.

    As many of 64 rows of 512 tokens are used as it takes to be sure. Raises ModelError for a file that llama.cpp does
    not load or survive, MachineError where it does not run on this processor.
    """
    usable, bounds = usable_rows(rows, path), _Bounds.of(live, draft, lora)
    with torch.inference_mode(), GgufModel.loaded(path, MAX_ROW_TOKENS, lora) as model:
        weights = weights_proof.prove(live.trained(draft.onto), draft, lora or path)

        def compared(expected: torch.Tensor, found: torch.Tensor, row: Row, base_kl_sum: float) -> _Row:
            return _Row.seen(live, model, expected, found, row, base_kl_sum)

        measured = measure(
            live,
            lambda batch: [model.logits(row).to(live.device) for row in batch],
            usable,
            compared,
            bounds.are_decided,
        )
        closeness = Closeness.over(measured)
        return GgufVerdict(
            weights=weights,
            rows=closeness.rows,
            positions=closeness.positions,
            mean_kl=closeness.mean_kl,
            max_kl=closeness.max_kl,
            base_kl=closeness.base_kl,
            agreement_fraction=closeness.agreement_fraction,
            near_tie_fraction=sum(row.near_ties for row in measured) / closeness.positions,
            mean_kl_bound=max(NEGLIGIBLE_KL, bounds.kl_fraction * closeness.base_kl) if bounds.kl_fraction else None,
            agreement_bound_fraction=bounds.agreement_fraction,
            live_loss=closeness.live_loss,
            file_loss=closeness.other_loss,
            loss_rise_bound=bounds.loss_rise,
            texts=len(draft.references),
            differing_texts=tuple(differing(draft.references, model.tokenize)),
            ends=sum(row.ends for row in measured),
            ends_found=sum(row.ends_found for row in measured),
            deaf_to=tuple(_spelled(model, token) for token in live.stop_token_ids if not model.ends(token)),
            greedy=_continue_both(live, model, usable),
        )


def _spelled(model: GgufModel, token: int) -> str:
    return model.text([token]) or f"token {token}"


@dataclass(frozen=True)
class _Row(RowCloseness):
    near_ties: int
    ends: int
    ends_found: int

    @classmethod
    def seen(
        cls, live: Live, model: GgufModel, expected: torch.Tensor, found: torch.Tensor, row: Row, base_kl_sum: float
    ) -> "_Row":
        """From both logits (T, V) of `row`."""
        best, guess = expected.argmax(-1), found.argmax(-1)
        ends = torch.isin(best, torch.tensor(live.stop_token_ids, device=best.device))
        likely = expected.softmax(-1)
        behind = (likely.gather(-1, best[:, None]) - likely.gather(-1, guess[:, None])).squeeze(-1)
        return cls(
            **vars(RowCloseness.of(expected, found, row, base_kl_sum)),
            near_ties=int(((best != guess) & (behind <= NEAR_TIE_PROBABILITY)).sum()),
            ends=int(ends.sum()),
            ends_found=sum(model.ends(token) for token in guess[ends].tolist()),
        )


@dataclass(frozen=True)
class _Bounds:
    """What must hold; None where it need not."""

    agreement_fraction: float | None = None
    kl_fraction: float | None = None
    loss_rise: float | None = None

    @classmethod
    def of(cls, live: Live, draft: Draft, lora: Path | None) -> "_Bounds":
        if live.is_another_base(draft.onto):
            return cls(loss_rise=ORIGINAL_LOSS_RISE)
        return cls(AGREEMENT_BOUND_FRACTION.get(draft.quant), UNEXPLAINED_FRACTION if lora else None)

    def are_decided(self, measured: Sequence[_Row]) -> bool:
        """Whether rows enough were measured to say on which side of each bound the file is."""
        answers = []
        if self.agreement_fraction is not None:
            missed = [row.positions - row.agreeing - row.near_ties for row in measured]
            answers += [is_at_most(1 - self.agreement_fraction, missed, [row.positions for row in measured])]
        if self.kl_fraction is not None:
            answers += [is_kl_at_most(NEGLIGIBLE_KL, self.kl_fraction, measured)]
        if self.loss_rise is not None:
            answers += [is_loss_rise_at_most(self.loss_rise, measured)]
        return None not in answers if answers else len(measured) >= SHOWN_ROWS


def _continue_both(live: Live, model: GgufModel, rows: Sequence[Row]) -> tuple[Greedy, ...]:
    prompts = greedy_answers.prompts_of(rows)
    found = []
    for prompt, from_live in zip(prompts, live.continued(prompts), strict=True):
        from_file = model.continued(prompt, ANSWER_TOKENS)
        asked, live_text, file_text = (model.text(ids) for ids in (prompt, from_live, from_file))
        found.append(Greedy(asked, live_text, file_text, from_live == from_file))
    return tuple(found)

"""Whether a GGUF file is the model that was trained, asked of llama.cpp itself.

The live adapter computes in float32; llama.cpp computes as it does when it serves, with inputs rounded to what the
weights are stored in. Without the extra that has it nothing is claimed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qtune.deploy.fold import Onto
from qtune.deploy.gguf_model import GgufModel
from qtune.deploy.gguf_storage import Quant
from qtune.deploy.gguf_tokens import Reference, differing
from qtune.deploy.verify import (
    ANSWER_TOKENS,
    EXACT_KL_BFLOAT16,
    GREEDY_PROMPTS,
    MAX_ROW_TOKENS,
    ORIGINAL_LOSS_RISE,
    Closeness,
    Greedy,
    Live,
    RowCloseness,
    continued,
    prompt_of,
    usable_rows,
)
from qtune.units import format_percent

# Another token than the live model's counts as the same where the live model finds it as likely but for this much:
# rounding to 8 bits tips such ties, 3 % of all positions of a model that is unsure (all within 0.014 of one of 656,000
# parameters), and the answer is none the worse.
NEAR_TIE_PROBABILITY = 0.02
# Below 8 bits it is the user's choice how much may go, and figures are shown.
AGREEMENT_BOUND_FRACTION: dict[Quant, float] = {"f32": 0.99, "f16": 0.99, "bf16": 0.98, "q8_0": 0.98}
# An adapter that changes few next tokens would pass without being there, so it is held to what it changes: of the KL
# that the base alone has, 0.007 was left at 0.9 of an adapter's scale, 0.1 at 1.4 and 0.2 at a half.
UNEXPLAINED_FRACTION = 0.05
BASE_ROWS = 8


@dataclass(frozen=True)
class GgufVerdict:
    """The file in llama.cpp beside the live model, over every position of `rows` token rows.

    KL is of the file from live, in nats per position; agreement is how often both find the same next token most likely,
    near ties how often the file's choice is another that live finds as likely; losses are nats per token. `base_kl` is
    the mean KL of the base without its adapter file, None where there is none. `ends` counts positions where live ends
    its answer, `ends_found` those of them where llama.cpp stops too. `differing_texts` became other tokens, and
    llama.cpp is `deaf_to` some stop tokens. A bound that does not apply is None.
    """

    rows: int
    positions: int
    mean_kl: float
    max_kl: float
    base_kl: float | None
    agreement_fraction: float
    near_tie_fraction: float
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
        found = []
        if self.differing_texts:
            found.append(f"{self.differing_texts[0]!r} becomes other tokens than in training")
        if self.deaf_to:
            found.append(f"llama.cpp does not stop at {', '.join(self.deaf_to)}")
        same = self.agreement_fraction + self.near_tie_fraction
        if agreement is not None and same < agreement:
            found.append(f"same next token {format_percent(same)} (at least {format_percent(agreement)})")
        if self.base_kl is not None and self.mean_kl > max(EXACT_KL_BFLOAT16, UNEXPLAINED_FRACTION * self.base_kl):
            found.append(f"mean KL {self.mean_kl:.1e} nats with the adapter, {self.base_kl:.1e} without it")
        if rise is not None and self.file_loss - self.live_loss > rise:
            found.append(f"held-out loss {self.file_loss:.4f} after {self.live_loss:.4f} (at most {rise} more)")
        return tuple(found)


def judge(
    live: Live,
    path: Path,
    rows: Sequence[Sequence[int]],
    references: Sequence[Reference],
    quant: Quant,
    onto: Onto,
    lora: Path | None = None,
) -> GgufVerdict:
    """Load `path`, with the adapter file `lora` if there is one, and hold it against `live`.

    At most 64 rows of 512 tokens are used. Raises ModelError for a file that llama.cpp does not
    load or survive, MachineError where it does not run on this processor.
    """
    usable = usable_rows(rows, path)
    is_another_base = onto == "original" and live.quantized
    with torch.inference_mode(), GgufModel.loaded(path, MAX_ROW_TOKENS, lora) as model:
        measured = [_measure(live, model, row) for row in usable]
        closeness = Closeness.over([row.closeness for row in measured])
        return GgufVerdict(
            rows=closeness.rows,
            positions=closeness.positions,
            mean_kl=closeness.mean_kl,
            max_kl=closeness.max_kl,
            base_kl=None if lora is None else _base_kl(live, path, usable[:BASE_ROWS]),
            agreement_fraction=closeness.agreement_fraction,
            near_tie_fraction=sum(row.near_ties for row in measured) / closeness.positions,
            agreement_bound_fraction=None if is_another_base else AGREEMENT_BOUND_FRACTION.get(quant),
            live_loss=closeness.live_loss,
            file_loss=closeness.other_loss,
            loss_rise_bound=ORIGINAL_LOSS_RISE if is_another_base else None,
            texts=len(references),
            differing_texts=tuple(differing(references, model.tokenize)),
            ends=sum(row.ends for row in measured),
            ends_found=sum(row.ends_found for row in measured),
            deaf_to=tuple(_spelled(model, token) for token in live.stop_token_ids if not model.ends(token)),
            greedy=tuple(_continue_both(live, model, row) for row in usable[:GREEDY_PROMPTS]),
        )


def _base_kl(live: Live, path: Path, rows: Sequence[list[int]]) -> float:
    """Mean KL of the file at `path` without its adapter."""
    with GgufModel.loaded(path, MAX_ROW_TOKENS) as model:
        return Closeness.over([_measure(live, model, row).closeness for row in rows]).mean_kl


def _spelled(model: GgufModel, token: int) -> str:
    return model.text([token]) or f"token {token}"


@dataclass(frozen=True)
class _RowFigures:
    closeness: RowCloseness
    near_ties: int
    ends: int
    ends_found: int


def _measure(live: Live, model: GgufModel, row: list[int]) -> _RowFigures:
    expected = live.model(input_ids=torch.tensor([row], device=live.device), use_cache=False).logits[0].float().cpu()
    found = model.logits(row)
    best, guess = expected.argmax(-1), found.argmax(-1)
    ends = torch.isin(best, torch.tensor(live.stop_token_ids))
    likely = expected.softmax(-1)
    behind = (likely.gather(-1, best[:, None]) - likely.gather(-1, guess[:, None])).squeeze(-1)
    return _RowFigures(
        RowCloseness.of(expected, found, row),
        int(((best != guess) & (behind <= NEAR_TIE_PROBABILITY)).sum()),
        int(ends.sum()),
        sum(model.ends(token) for token in guess[ends].tolist()),
    )


def _continue_both(live: Live, model: GgufModel, row: list[int]) -> Greedy:
    prompt = prompt_of(row)
    from_live, from_file = continued(live.model, prompt, live), model.continued(prompt, ANSWER_TOKENS)
    asked, live_text, file_text = (model.text(ids) for ids in (prompt, from_live, from_file))
    return Greedy(asked, live_text, file_text, from_live == from_file)

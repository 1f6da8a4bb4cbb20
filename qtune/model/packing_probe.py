"""Is a document in a pack what it is alone? Asked of the model that is about to be trained, in four short passes.

A pack is right where nothing but attention carries one token's state to another, attention asks ours
(`memory.packed_attention`), and ours knows all that it does. No list of architectures can promise that: recurrences
and convolutions run on from document to document, some code hands no keyword on to its attention, remote code does
what it likes. So the logits of one document are made alone, behind one neighbour and behind another as long, and alone
with the attention that transformers would have taken. Of the last the loss is made too, to be held against the one
that training makes without logits (`memory.fused_cross_entropy`, or trl's): a head may scale or cap them.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from qtune.data.dataset import Examples
from qtune.errors import ModelError
from qtune.lock import PackingProbe
from qtune.model.loaded import Loaded
from qtune.recipe.schema import Recipe
from qtune.units import format_percent

DOCUMENT_TOKENS, NEIGHBOUR_TOKENS = (
    24,
    17,
)  # enough for convolutions of 4 and a state; of unlike length, so no two align
VOCABULARY_ROWS = 8  # training rows whose tokens are drawn from: some hundred different ones
SEED = 0  # which tokens are drawn; a run that goes on draws the same
# Rows of other lengths may be summed in another order: ten times the unit of bfloat16, and that of TF32. On a
# CPU it was 0 to 1e-5, and the mildest leak seen 0.1 (tests/model/test_packing_probe.py).
ROUNDING_16_BIT, ROUNDING_32_BIT = 10 * 2**-8, 2**-10


def vocabulary_of(train: Examples) -> list[int]:
    """The tokens of the first training rows, each once, in order."""
    return sorted({int(token) for i in range(min(VOCABULARY_ROWS, len(train))) for token in train.arrays(i)[0]})


def probe(loaded: Loaded, vocabulary: Sequence[int], loss_of: Callable[[Sequence[int]], float]) -> PackingProbe:
    """Probe a model with tokens drawn from `vocabulary`, ids that the training rows hold. Nothing in it is changed.

    `loss_of` is training's mean loss in nats over a document of which every token but the first is a label.
    """
    draw = random.Random(SEED)
    document = draw.choices(vocabulary, k=DOCUMENT_TOKENS)
    neighbours = [draw.choices(vocabulary, k=NEIGHBOUR_TOKENS) for _ in range(2)]
    model, device = loaded.model, loaded.device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), loaded.autocast(), loaded.passes_together():
            alone = _logits(model, [document], device)
            behind = [_logits(model, [neighbour, document], device) for neighbour in neighbours]
            with own_attention(model):
                own = model(input_ids=torch.tensor([document], device=device), use_cache=False).logits[0].float()
    finally:
        model.train(was_training)
    return PackingProbe(
        by_neighbour=_moved(behind[0], behind[1]),
        by_company=max(_moved(alone, logits) for logits in behind),
        by_attention=_moved(own, alone),
        by_loss=_loss_apart(own, document, loss_of(document)),
        rounding=ROUNDING_32_BIT if loaded.compute_dtype == "float32" else ROUNDING_16_BIT,
    )


def _loss_apart(logits: torch.Tensor, document: Sequence[int], loss: float) -> float:
    wanted = torch.tensor(document[1:], device=logits.device)
    expected = float(cross_entropy(logits[:-1], wanted))
    return abs(loss - expected) / max(expected, 1e-12)


def _logits(model: PeftModel, documents: Sequence[Sequence[int]], device: str) -> torch.Tensor:
    """Logits (tokens of the last document, vocabulary) of documents packed as training packs them."""
    lengths = tuple(len(document) for document in documents)
    ids = torch.tensor([[token for document in documents for token in document]], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    output = model(input_ids=ids, position_ids=positions, document_lengths=lengths, use_cache=False)
    return output.logits[0, -lengths[-1] :].float()


def _moved(one: torch.Tensor, other: torch.Tensor) -> float:
    """The distance between two logits as a share of the first one's spread over the vocabulary; NaN stays NaN."""
    spread = one - one.mean(-1, keepdim=True)
    return float((one - other).square().mean().sqrt() / spread.square().mean().sqrt().clamp_min(1e-12))


def refuse_another(probed: PackingProbe, base: str) -> None:
    """Raises ModelError for a base that training would take for another one, or for another loss."""
    if probed.is_another_model:
        raise ModelError(
            f"model.base: {base} is another model under packed attention: one document's logits differ by"
            f" {format_percent(probed.by_attention)} from those that transformers' own attention gives. Its attention"
            " adds something that qtune's does not know, such as a bias or a mask. Take another base."
        )
    if probed.is_another_loss:
        raise ModelError(
            f"model.base: the loss that training makes of {base} is {100 * probed.by_loss:.2g} % off the"
            " cross-entropy of its logits. Its output head does something that qtune does not know, such as a scale or"
            " a cap. Take another base."
        )


def refuse_pairs(recipe: Recipe) -> None:
    """Raises ModelError for preferences in a base whose packed documents read each other."""
    if recipe.train.learns_pairs:
        raise ModelError(
            f"model.base: documents in a pack read each other in {recipe.model.base}, and train.objective ="
            f' "{recipe.train.objective}" has both answers of a pair in one. Take another base, or learn the chosen'
            ' answers alone: train.objective = "sft".'
        )


@contextlib.contextmanager
def own_attention(model: torch.nn.Module) -> Iterator[None]:
    """Inside, attention is what transformers would have chosen for these classes, masks included."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(part.config): part for part in parts}
    before = {key: part.config._attn_implementation for key, part in configs.items()}
    try:
        for part in configs.values():
            part.config._attn_implementation_internal = "sdpa" if part._supports_sdpa else "eager"
        yield
    finally:
        for key, part in configs.items():
            part.config._attn_implementation_internal = before[key]

"""An adapter that begins with what rounding took from the weights: s B A is the best of its rank for W - Q.

Held: of one weight at a time W, Q and their difference, (O, I) in float32. Costs: the base's files are read once, and
each difference is multiplied `PRODUCTS` times by (I, R + 16) before the first step; not measured on a card.

W - Q = U S V'; A = sqrt(S) V' and B = U sqrt(S) / s have the least distance to it (Eckart and Young 1936), found by
random projection with power iterations (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1).

Letters: O outputs, I inputs, R rank, s scale.
"""

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor

from qtune.model import adapter
from qtune.model.lora_inits import Rounded

OVERSAMPLED = 16  # directions beside those wanted: at least 5 to 10 (Halko et al., section 4.2)
ITERATIONS = 4  # what rounding takes has a flat spectrum: without them the first directions are found least well
PRODUCTS = 2 * ITERATIONS + 2
NOTHING = 1e-6  # of the longest direction: a shorter one is rounding's
SEED = 0  # of the projection; a run that begins again draws the same


@torch.no_grad()
def make_good(model: PeftModel, weights: Rounded) -> None:
    """Set A and B of every linear in 4 bits; those of others stay as they are."""
    for name, layer in adapter.adapted_layers(model):
        if isinstance(layer.get_base_layer(), Linear4bit):
            (own,) = layer.active_adapters
            low, high = layer.lora_A[own].weight, layer.lora_B[own].weight
            whole, rounded = weights(name, layer)
            a, b = best_of_rank(whole - rounded, len(low))
            low[: len(a)].copy_(a)  # what is beyond stays at random, and B zero there: two zeros would never learn
            high[:, : len(a)].copy_(b / layer.scaling[own])


def best_of_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) whose product B A is nearest to `matrix` (O, I), as long as each other; of a matrix of less
    than that rank fewer."""
    outputs, inputs = matrix.shape
    most = min(rank + OVERSAMPLED, outputs, inputs)
    probe = torch.randn(inputs, most, generator=torch.Generator().manual_seed(SEED)).to(matrix)
    basis, _ = torch.linalg.qr(matrix @ probe)
    for _ in range(ITERATIONS):
        across, _ = torch.linalg.qr(matrix.t() @ basis)
        basis, _ = torch.linalg.qr(matrix @ across)
    left, lengths, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    found = min(rank, int((lengths > NOTHING * lengths[0]).sum()))
    root = lengths[:found].sqrt()
    return root[:, None] * right[:found], (basis @ left[:, :found]) * root

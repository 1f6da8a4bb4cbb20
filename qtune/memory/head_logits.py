"""What a model makes of its output head's product: asked of its own code, with numbers that are not its own.

Families scale their logits (Cohere, Granite, Falcon-H1), cap them (Gemma, nanochat, xLSTM, RecurrentGemma) or scale the
hidden states before (MiniCPM3), each under names of its own. So the causal model's forward is run once with a decoder
that gives two made-up hidden states and a head that gives made-up products of them; what comes out says what was done.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

PRODUCTS = (0.0, 1e-3, 0.3, -1.0, 4.0, -20.0, 90.0, 1e9)  # the second tells the scale, the last the cap
EXACT = 1e-5  # of a value: some cast to float32 on the way


@dataclass(frozen=True)
class MadeOf:
    """Logits of products z: `scale` z, or `cap` tanh(`scale` z / `cap`)."""

    scale: float = 1.0
    cap: float | None = None

    def bend_(self, products: torch.Tensor, with_slopes: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits, in place, and on demand how steep they are, where not everywhere `scale`."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.cap is None:
            return products, None
        products.div_(self.cap).tanh_()
        slopes = products.square().neg_().add_(1.0) if with_slopes else None
        return products.mul_(self.cap), slopes

    def back_(self, gradient: torch.Tensor, slopes: torch.Tensor | None) -> torch.Tensor:
        """The products' gradient from that of the logits, in place."""
        if slopes is not None:
            gradient.mul_(slopes)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


PLAIN = MadeOf()
_known: "weakref.WeakKeyDictionary[PreTrainedModel, MadeOf | None]" = weakref.WeakKeyDictionary()


def made_of(causal: PreTrainedModel) -> MadeOf | None:
    """What `causal` makes of its head's products; None where it is anything else, or cannot be asked."""
    if causal not in _known:
        try:
            with unset_fake_temporarily(), torch.no_grad(), torch.device("cpu"):
                _known[causal] = _asked(causal)
        except Exception:  # a model's code between decoder and head can be anything
            _known[causal] = None
    return _known[causal]


def decoder_of(causal: Any) -> Any:
    """The part of a causal model that makes the hidden states, as its forward calls it."""
    named = next((part for part in (causal.get_decoder(), causal.base_model) if part not in (None, causal)), None)
    inside = (child for child in causal.children() if isinstance(child, PreTrainedModel))  # Llama 4's has another name
    return next(inside, causal) if named is None else named


def _asked(causal: Any) -> MadeOf | None:
    products = torch.tensor(PRODUCTS, dtype=torch.float64)
    hidden = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]], dtype=torch.float64)[None]
    seen: list[torch.Tensor] = []

    def decode(*args: Any, **kwargs: Any) -> Any:
        return _Decoded(hidden)

    def project(states: torch.Tensor) -> torch.Tensor:
        seen.append(states)
        return products.expand(1, 2, -1)

    with _forward_is(decoder_of(causal), decode), _forward_is(causal.get_output_embeddings(), project):
        logits = causal(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False, return_dict=True).logits
    (states,) = seen
    before = float((states * hidden).sum() / hidden.square().sum())
    if logits.shape != (1, 2, len(PRODUCTS)) or not _same(states, before * hidden):
        return None
    found = logits[0, 0].double()
    after = float(found[1]) / PRODUCTS[1]
    is_capped = not _same(found, after * products)
    cap = float(found[-1].abs()) if is_capped else None
    fitted = MadeOf(after, cap).bend_(products.clone(), with_slopes=False)[0]
    if not _same(found, fitted) or not _same(logits[0, 1].double(), fitted):
        return None
    return MadeOf(_rounded(before * after), None if cap is None else _rounded(cap))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(torch.allclose(one.double(), other, rtol=EXACT, atol=EXACT * PRODUCTS[1]))


def _rounded(value: float) -> float:
    """Without what float32 leaves behind."""
    return float(f"{value:.6g}")


class _Decoded:
    """What a decoder returns, of which only the hidden states are there."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else None


@contextlib.contextmanager
def _forward_is(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` runs `forward`, and nothing that was put around its own."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before

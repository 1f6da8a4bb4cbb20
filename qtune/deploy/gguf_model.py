"""A GGUF file in llama.cpp, asked by token ids.

llama-cpp-python is an extra, as it is compiled on the spot.
"""

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qtune.errors import ModelError

if TYPE_CHECKING:
    from llama_cpp import Llama

EXTRA = "llama_cpp"
HOW_TO_GET_IT = "pip install 'qtune[verify]'"


def is_installed() -> bool:
    return importlib.util.find_spec(EXTRA) is not None


@dataclass(frozen=True)
class GgufModel:
    """A loaded file; every question starts anew."""

    llama: "Llama"

    @classmethod
    def load(cls, path: Path, most_tokens: int, lora: Path | None = None) -> "GgufModel":
        """For rows of up to `most_tokens`, with the adapter file `lora` if there is one.

        Raises ModelError for a file that llama.cpp does not load.
        """
        try:
            from llama_cpp import Llama

            llama = Llama(str(path), n_ctx=most_tokens, logits_all=True, verbose=False)
        except Exception as fault:  # whatever stops llama.cpp is the finding
            raise ModelError(f"{path}: does not load in llama.cpp ({fault}).") from None
        if lora is not None:
            _add_lora(llama, lora)
        return cls(llama)

    def tokenize(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)

    def text(self, ids: Sequence[int]) -> str:
        return self.llama.detokenize(list(ids), special=True).decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Whether llama.cpp stops at it."""
        import llama_cpp

        return llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(self.llama.model), token)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """(T, vocabulary)"""
        self.llama.reset()
        self.llama.eval(list(ids))
        return torch.from_numpy(self.llama.scores[: len(ids)].copy())

    def continued(self, prompt: Sequence[int], most_tokens: int) -> list[int]:
        """What it finds most likely, one token after another, until one that it stops at."""
        self.llama.reset()
        self.llama.eval(list(prompt))
        answer: list[int] = []
        while len(answer) < most_tokens and not (answer and self.ends(answer[-1])):
            answer.append(int(self.llama.scores[self.llama.n_tokens - 1].argmax()))
            self.llama.eval(answer[-1:])
        return answer


def _add_lora(llama: "Llama", lora: Path) -> None:
    """Have `llama` add the adapter file `lora`, at the scale that the file says.

    Llama's own `lora_path` does the same, and reads the whole base into memory where this leaves it mapped.
    """
    import llama_cpp

    adapter = llama_cpp.llama_adapter_lora_init(llama.model, os.fsencode(lora))  # freed with the model
    if adapter is None:
        raise ModelError(f"{lora}: llama.cpp does not take it for an adapter of the run's base.")
    adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
    if llama_cpp.llama_set_adapters_lora(llama.ctx, adapters, 1, scales):
        raise ModelError(f"{lora}: llama.cpp cannot compute with it.")

"""llama.cpp, in a process of its own: pickled questions on standard input, pickled answers on standard output.

A question is the name of a method and its arguments, the first is `load`; an answer is a value, or a sentence in
`Refused`. Nothing of qtune is imported, so that this starts in a moment.
"""

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

import llama_cpp
import numpy as np
from numpy.typing import NDArray


class Refused(Exception):
    """A file that llama.cpp does not take: what it is, as a sentence."""


class Answerer:
    """A loaded file; every question starts anew."""

    def load(self, path: str, most_tokens: int, lora: str | None, is_for_talk: bool) -> None:
        """With logits of every position for comparing, of the last one only for talking."""
        try:
            self.llama = llama_cpp.Llama(path, n_ctx=most_tokens, logits_all=not is_for_talk, verbose=False)
        except Exception as fault:  # whatever stops llama.cpp is the finding
            raise Refused(f"{path}: does not load in llama.cpp ({fault}).") from None
        if lora is not None:
            self._add_lora(lora)

    def _add_lora(self, lora: str) -> None:
        """At the scale that the file says.

        Llama's own `lora_path` reads the whole base into memory where this leaves it mapped, and takes a file that was
        not loaded for one that was (a null pointer is not None).
        """
        adapter = llama_cpp.llama_adapter_lora_init(self.llama.model, os.fsencode(lora))  # freed with the model
        if not adapter:
            raise Refused(f"{lora}: llama.cpp does not take it for an adapter of the run's base.")
        adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        if llama_cpp.llama_set_adapters_lora(self.llama.ctx, adapters, 1, scales):
            raise Refused(f"{lora}: llama.cpp cannot compute with it.")

    def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self.llama.tokenize(text.encode(), add_bos=False, special=True)
        return tokens

    def text(self, ids: Sequence[int]) -> str:
        text: bytes = self.llama.detokenize(list(ids), special=True)
        return text.decode(errors="replace")

    def ends(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(self.llama.model), token))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self.llama.reset()
        self.llama.eval(list(ids))
        return np.array(self.llama.scores[: len(ids)])

    def continued(self, prompt: Sequence[int], most_tokens: int) -> list[int]:
        self.llama.reset()
        self.llama.eval(list(prompt))
        answer: list[int] = []
        while len(answer) < most_tokens and not (answer and self.ends(answer[-1])):
            answer.append(int(self.llama.scores[self.llama.n_tokens - 1].argmax()))
            self.llama.eval(answer[-1:])
        return answer

    def begin(self, messages: list[dict[str, str]], temperature: float, top_p: float, seed: int, most: int) -> None:
        """Start to answer by the file's own chat template; `piece` hands the answer over."""
        try:
            self.chunks = self.llama.create_chat_completion(
                messages,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                min_p=0.0,
                seed=seed,
                max_tokens=most,
                stream=True,
            )
            next(self.chunks)  # the role, once the prompt is read
        except Exception as fault:  # a template by strangers, or a conversation that is longer than the context
            raise Refused(f"llama.cpp does not answer this conversation ({fault}).") from None

    def piece(self) -> tuple[str, str | None]:
        """The next words, and once there are no more, why: stop or length."""
        chunk = next(self.chunks)["choices"][0]
        return chunk["delta"].get("content") or "", chunk["finish_reason"]


def main() -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks says when it is over
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever llama.cpp has to say is no answer
    answerer = Answerer()
    while (question := _next(sys.stdin.buffer)) is not None:
        name, arguments = question
        answer, refused = None, None
        try:
            answer = getattr(answerer, name)(*arguments)
        except Refused as fault:
            refused = str(fault)
        pickle.dump((answer, refused), answers)
        answers.flush()


def _next(questions: BinaryIO) -> tuple[str, tuple[Any, ...]] | None:
    try:
        question: tuple[str, tuple[Any, ...]] = pickle.load(questions)
        return question
    except EOFError:
        return None


if __name__ == "__main__":
    main()

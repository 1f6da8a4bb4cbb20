"""A GGUF file in llama.cpp, asked by token ids.

llama-cpp-python is an extra, as it is compiled on the spot. It runs in a process of its own: a build for another
processor, or a file it cannot bear, ends the process it is in, and that must not be the one that has an export to keep.
"""

import importlib.util
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from qtune.errors import MachineError, ModelError, how_to_install

EXTRA = "llama_cpp"
HOW_TO_GET_IT = how_to_install("verify")
HOW_TO_BUILD_IT = "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --force-reinstall --no-cache-dir llama-cpp-python"
CHILD = Path(__file__).with_name("llama_cpp_worker.py")


def is_installed() -> bool:
    return importlib.util.find_spec(EXTRA) is not None


@dataclass(frozen=True)
class GgufModel:
    """A loaded file; every question starts anew.

    Each raises ModelError where llama.cpp does not survive it, MachineError where it was built for another processor.
    """

    path: Path
    child: subprocess.Popen[bytes]
    said: IO[bytes]

    @classmethod
    @contextmanager
    def loaded(
        cls, path: Path, most_tokens: int, lora: Path | None = None, is_for_talk: bool = False
    ) -> Iterator["GgufModel"]:
        """For rows of up to `most_tokens`, with the adapter file `lora` if there is one; `is_for_talk` leaves out the
        logits that only a comparison needs.

        Raises ModelError for a file that llama.cpp does not load.
        """
        command = [sys.executable, "-P", str(CHILD)]
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said) as child,
        ):
            model = cls(path, child, said)
            try:
                model._ask("load", str(path), most_tokens, None if lora is None else str(lora), is_for_talk)
                yield model
            finally:
                child.kill()

    def tokenize(self, text: str) -> list[int]:
        return self._ask("tokenize", text)

    def text(self, ids: Sequence[int]) -> str:
        return self._ask("text", list(ids))

    def ends(self, token: int) -> bool:
        """Whether llama.cpp stops at it."""
        return self._ask("ends", token)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """(T, vocabulary)"""
        return torch.from_numpy(self._ask("logits", list(ids)))

    def continued(self, prompt: Sequence[int], most_tokens: int) -> list[int]:
        """What it finds most likely, one token after another, until one that it stops at."""
        return self._ask("continued", list(prompt), most_tokens)

    def spoken(
        self, messages: list[dict[str, str]], temperature: float, top_p: float, seed: int, most_tokens: int
    ) -> Iterator[tuple[str, str | None]]:
        """The answer to `messages` by the file's own chat template, as its words come; the last with the reason why it
        ended: stop or length. Raises ModelError for a conversation that the template or the context does not take."""
        with ctrl_c_afterwards():
            self._ask("begin", messages, temperature, top_p, seed, most_tokens)
        reason = None
        while reason is None:
            with ctrl_c_afterwards():
                words, reason = self._ask("piece")
            yield words, reason

    def _ask(self, name: str, *arguments: Any) -> Any:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            pickle.dump((name, arguments), self.child.stdin)
            self.child.stdin.flush()
            answer, refused = pickle.load(self.child.stdout)
        except (EOFError, BrokenPipeError):
            raise self._stopped() from None
        if refused is not None:
            raise ModelError(refused)
        return answer

    def _stopped(self) -> MachineError | ModelError:
        code = self.child.wait()
        if code == -signal.SIGILL:
            return MachineError(f"llama.cpp was built for another processor than this one; {HOW_TO_BUILD_IT}")
        self.said.seek(0)
        last = self.said.read().decode(errors="replace").strip().rpartition("\n")[2]
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ModelError(f"{self.path}: llama.cpp ended with {how} over it{f' ({last})' if last else ''}.")


@contextmanager
def ctrl_c_afterwards() -> Iterator[None]:
    """Ctrl-C is heard when the block ends: an answer that was left halfway would be taken for that to the next one."""
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt

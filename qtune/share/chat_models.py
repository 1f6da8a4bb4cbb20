"""What a chat is held with: a run, a merged folder, or a GGUF file in llama.cpp. Each answers piece by piece."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qtune.data.chat_template import ChatTemplate
from qtune.data.formats import Message
from qtune.data.tokenize import Encoder, prompt_of
from qtune.evaluate.generate import Choosing, answer_aloud
from qtune.gguf.llama_cpp import GgufModel
from qtune.model.loaded import Loaded
from qtune.model.open_model import open_merged, open_run
from qtune.rundir import RunDir

CONTEXT_TOKENS = 4096  # of a chat with a GGUF file, or fewer where it was made for fewer: 0.5 GiB of an 8B model's keys


class Speaker(Protocol):
    """A model to talk to; `system` is the system prompt that it was trained with, where it is known."""

    system: str | None

    def speak(
        self, messages: Sequence[Message], choosing: Choosing, max_new_tokens: int, say: Callable[[str], None]
    ) -> bool:
        """Answer `messages`, which end with the user's; returns whether the answer came to its own end.

        Raises ModelError for a conversation that the chat template, or the context, does not take.
        """

    def as_base(self) -> AbstractContextManager[None]:
        """Within it the base answers, where there is one beside the tuned model."""


@contextmanager
def opened(what: RunDir | Path) -> Iterator[Speaker]:
    """A run, a merged folder or a GGUF file, loaded as long as the block lasts."""
    if isinstance(what, RunDir):
        lock = what.read_lock()
        yield InThisProcess(open_run(what, is_for_talk=True), lock.stop_token_ids, lock.recipe["data"]["system"])
    elif what.is_dir():
        merged = open_merged(what)
        yield InThisProcess(merged, _ends_of(merged))
    else:
        with GgufModel.loaded(what, CONTEXT_TOKENS, is_for_talk=True) as model:
            yield InLlamaCpp(model)


def _ends_of(merged: Loaded) -> tuple[int, ...]:
    """What ends an answer by the folder's generation_config.json, and by its chat template."""
    ends = merged.model.generation_config.eos_token_id
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return tuple(dict.fromkeys([*known, *ChatTemplate.of(merged.tokenizer).stop_token_ids]))


@dataclass
class InThisProcess:
    """A model that answers here."""

    loaded: Loaded
    stop_token_ids: Sequence[int]
    system: str | None = None

    def __post_init__(self) -> None:
        self._template, self._encoder = ChatTemplate.of(self.loaded.tokenizer), Encoder.of(self.loaded.tokenizer)

    def speak(
        self, messages: Sequence[Message], choosing: Choosing, max_new_tokens: int, say: Callable[[str], None]
    ) -> bool:
        prompt = self._prompt(messages)
        return answer_aloud(self.loaded, prompt, self.stop_token_ids, max_new_tokens, choosing, say)

    def as_base(self) -> AbstractContextManager[None]:
        return self.loaded.as_base()

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        return prompt_of(messages, self._template, self._encoder)


@dataclass
class InLlamaCpp:
    """A GGUF file, whose own chat template and end tokens llama.cpp goes by."""

    model: GgufModel
    system: str | None = None

    def speak(
        self, messages: Sequence[Message], choosing: Choosing, max_new_tokens: int, say: Callable[[str], None]
    ) -> bool:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        told, is_cut = "", False
        drawn = (choosing.temperature, choosing.top_p, choosing.seed)
        for words, why in self.model.spoken(turns, *drawn, max_new_tokens):
            is_cut = why == "length"
            before, told = told.strip(), told + words
            if len(told.strip()) > len(before):
                say(told.strip()[len(before) :])
        return not is_cut

    def as_base(self) -> AbstractContextManager[None]:
        return nullcontext()

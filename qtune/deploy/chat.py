"""Talk to a run: the tuned model, or base and tuned side by side."""

from dataclasses import dataclass, field

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qtune.data.formats import Conversation, Message
from qtune.data.rows import Dropped
from qtune.data.template import ChatTemplate
from qtune.data.tokens import Encoder, tokenize
from qtune.deploy.opened import Opened
from qtune.errors import ModelError
from qtune.evaluate.answer import answer
from qtune.rundir import RunDir


@dataclass
class Chat:
    """A conversation with one run. The base is the same model with its adapter switched off."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: list[int]
    device: str
    compute_dtype: str
    system: str | None = None
    max_new_tokens: int = 256
    turns: list[Message] = field(default_factory=list)

    @classmethod
    def open(cls, run: RunDir, max_new_tokens: int) -> "Chat":
        """Load the run's base as it was trained on, and its adapter."""
        opened = Opened.of(run)
        return cls(
            opened.model,
            opened.tokenizer,
            opened.lock["stop_token_ids"],
            opened.device,
            opened.compute_dtype,
            opened.lock["recipe"]["data"]["system"],
            max_new_tokens,
        )

    def ask(self, question: str) -> str:
        """The tuned model's answer; question and answer join the conversation."""
        self.turns.append(Message("user", question))
        reply = self._answer()
        self.turns.append(Message("assistant", reply))
        return reply

    def ask_both(self, question: str) -> tuple[str, str]:
        """Base and tuned, both after the same conversation; the tuned answer is the one that joins it."""
        self.turns.append(Message("user", question))
        with self.model.disable_adapter():
            plain = self._answer()
        self.turns.pop()
        return plain, self.ask(question)

    def forget(self) -> None:
        self.turns.clear()

    def _answer(self) -> str:
        return answer(
            self.model,
            self.tokenizer,
            [self._prompt()],
            self.stop_token_ids,
            self.max_new_tokens,
            self.device,
            self.compute_dtype,
        )[0]

    def _prompt(self) -> list[int]:
        """The conversation so far as training would feed it, up to where the answer begins."""
        system = [Message("system", self.system)] if self.system else []
        asked = Conversation((*system, *self.turns, Message("assistant", "x")), "this conversation")
        (example,) = tokenize([asked], ChatTemplate.of(self.tokenizer), Encoder.of(self.tokenizer))
        if isinstance(example, Dropped):
            raise ModelError(f"{example.place}: {example.reason}. Type /forget to start over.")
        return example.prompt_ids


def converse(chat: Chat, console: Console, compare: bool, prompt: str | None) -> None:
    """Answer `prompt`, or what is typed line by line until an empty line, Ctrl-D or /quit; /forget starts over."""
    if prompt is not None:
        _reply(chat, console, compare, prompt)
        return
    console.print("Type a message. /forget starts over, /quit or Ctrl-D ends.", style="dim")
    while True:
        try:
            question = console.input("[bold]you[/] ").strip()
        except EOFError:
            return
        if question in ("/quit", "/exit"):
            return
        if question == "/forget":
            chat.forget()
        elif question:
            _reply(chat, console, compare, question)


def _reply(chat: Chat, console: Console, compare: bool, question: str) -> None:
    if not compare:
        console.print(Text(chat.ask(question)))
        return
    plain, tuned = chat.ask_both(question)
    side_by_side = Table("base", "tuned", expand=True)
    side_by_side.add_row(Text(plain), Text(tuned))
    console.print(side_by_side)

"""Talk to a model: words as they are made, and commands that begin with a slash."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qtune.data.formats import Message
from qtune.data.formats.messages import MESSAGES
from qtune.data.rows import Dropped, RawRow, parse_row
from qtune.errors import ModelError
from qtune.evaluate.generate import Choosing
from qtune.report.wording import visible

if TYPE_CHECKING:
    from qtune.share.chat_models import Speaker

HELP = """\
/help          this list
/reset         start over; the system prompt stays
/system TEXT   use this system prompt from now on; without a text, none
/save FILE     add the conversation to a .jsonl file, as a row to train on
/quit          end, as Ctrl-D and the words quit and exit do
//TEXT         send a message that begins with a slash
Ctrl-C stops an answer, and ends the chat where none is being made."""
ENDS = ("/quit", "/exit", "quit", "exit")


@dataclass
class Chat:
    """A conversation with one model, so far as it has come."""

    speaker: "Speaker"
    choosing: Choosing
    system: str | None = None
    max_new_tokens: int = 256
    turns: list[Message] = field(default_factory=list)

    def ask(self, question: str, say: Callable[[str], None]) -> bool:
        """Answer `question`; both join the conversation. Returns whether the answer came to its own end.

        `say` hears the answer as it is made. After a KeyboardInterrupt what was said by then is the answer; a question
        that nothing was said to is taken back, as is one that raises ModelError.
        """
        said: list[str] = []

        def hear(piece: str) -> None:
            said.append(piece)
            say(piece)

        came_to_its_end = False
        try:
            came_to_its_end = self._speak(question, hear)
        finally:
            if said:
                answer = Message("assistant", "".join(said), is_trained=came_to_its_end)
                self.turns += [Message("user", question), answer]
        return came_to_its_end

    def ask_base(self, question: str, say: Callable[[str], None]) -> bool:
        """What the base answers to `question` at this point; nothing joins the conversation."""
        with self.speaker.as_base():
            return self._speak(question, say)

    def _speak(self, question: str, say: Callable[[str], None]) -> bool:
        """Every turn draws by a seed of its own, so that a conversation can be had again."""
        messages = [*self.messages, Message("user", question)]
        choosing = replace(self.choosing, seed=self.choosing.seed + len(self.turns) // 2)
        return self.speaker.speak(messages, choosing, self.max_new_tokens, say)

    @property
    def messages(self) -> list[Message]:
        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def save(self, path: Path) -> str:
        """Add the conversation to `path` as a row of chat messages; returns what was done, or why nothing was.

        An answer that was cut short has the weight 0: it is to be read and not learned.
        """
        if path.suffix != ".jsonl":
            return f"{path}: is no .jsonl file. Name one, such as /save talk.jsonl."
        row = {"messages": [_as_row(message) for message in self.messages]}
        read = parse_row(RawRow(row, "it"), MESSAGES, {}, None)
        if isinstance(read, Dropped):
            return f"Not saved: {read.reason}."
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as fault:
            return f"{path}: cannot be written ({fault.strerror})."
        return f"Added to {path}, which `qtune data check` reads."


def _as_row(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": message.content, **({} if message.is_trained else {"weight": 0})}


def converse(chat: Chat, console: Console, compare: bool, prompt: str | None) -> None:
    """Answer `prompt`, or what is typed line by line until Ctrl-D or /quit; an empty line says nothing."""
    if prompt is not None:
        _reply(chat, console, compare, prompt)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (with it loaded, input() takes arrow keys and knows what was typed before)
    console.print("Type a message, or /help. /quit or Ctrl-D ends.", style="dim", markup=False)
    while (typed := _typed()) is not None and typed.lower() not in ENDS:
        if typed.startswith("/") and not typed.startswith("//"):
            console.print(_obey(chat, *typed.partition(" ")[::2]), style="dim", markup=False)
        elif typed:
            try:
                _reply(chat, console, compare, typed.removeprefix("/"))
            except KeyboardInterrupt:
                console.print("stopped; the conversation goes on", style="dim")
            except ModelError as fault:
                console.print(f"{fault} /reset starts over.", markup=False)


def _typed() -> str | None:
    """The next line without what is around it; None where there is none any more."""
    try:
        return input("you ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _obey(chat: Chat, command: str, rest: str) -> str:
    """Do what a slash command says; returns what to say of it."""
    rest = rest.strip()
    if command == "/save" and rest:
        return chat.save(Path(rest).expanduser())
    if command == "/system":
        before, chat.system = chat.system, rest or None
        return f"The system prompt is now {_quoted(chat.system)}; it was {_quoted(before)}."
    if command in ("/reset", "/forget") and not rest:
        chat.turns.clear()
        return "Starting over."
    return HELP if command == "/help" else f"{command} is no command, or lacks what belongs to it.\n{HELP}"


def _quoted(text: str | None) -> str:
    return "none" if text is None else f'"{visible(text)}"'


def _reply(chat: Chat, console: Console, compare: bool, question: str) -> None:
    if compare:
        console.print("base", style="dim")
        _tell(chat, console, chat.ask_base, question)
        console.print("tuned", style="dim")
    _tell(chat, console, chat.ask, question)


def _tell(chat: Chat, console: Console, ask: Callable[..., bool], question: str) -> None:
    """The words of an answer as they are made, and a line of its own where it was cut."""
    try:
        came_to_its_end = ask(question, lambda piece: console.out(visible(piece), end="", highlight=False))
    finally:
        console.out("")
    if not came_to_its_end:
        console.print(f"cut after {chat.max_new_tokens:,} tokens; --max-new-tokens allows more", style="dim")

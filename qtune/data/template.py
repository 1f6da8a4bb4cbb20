"""The chat template, applied once: a conversation becomes pieces of text that are trained or not.

Where an answer stands in the rendered text is found by rendering the conversation a second time with a marker in place
of every answer. What surrounds the markers is the template's own, so this works for templates that rewrite earlier
turns, add empty thinking blocks or put the system prompt elsewhere, and needs no knowledge of any of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qtune.data.formats import Message
from qtune.errors import ModelError

MARKER = "qtunemarker{}x"
HOW_TO_GIVE_ONE = 'Give one in the recipe: [model] chat_template = "template.jinja".'


@dataclass(frozen=True)
class Piece:
    """Text that goes to the model as it is, learned where `trained`."""

    text: str
    trained: bool


class Untraceable(Exception):
    """A conversation the template rewrites so that its answers cannot be found again."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, understood: how it ends a turn, and whether it takes a system prompt."""

    tokenizer: PreTrainedTokenizerBase
    special_tokens: frozenset[str]
    end_of_turn: str
    takes_system: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatTemplate":
        """Raises ModelError where there is no template, it fails, or it never ends the assistant's turn."""
        if not tokenizer.chat_template:
            raise ModelError(f"model.base: this base has no chat template, and the rows are chats. {HOW_TO_GIVE_ONE}")
        question = [Message("user", "a question")]
        try:
            _, after = _render_marked(tokenizer, [*question, Message("assistant", "an answer")])
        except (TemplateError, TypeError, ValueError) as fault:
            raise ModelError(f"model.chat_template: fails on a question and an answer ({fault}).") from None
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        special = frozenset(added | set(tokenizer.all_special_tokens))
        end_of_turn = _end_of_turn(after, special)
        if end_of_turn is None:
            raise ModelError(
                f"model.chat_template: writes {after[:20]!r} after an answer, which is no special token, so a model"
                f" trained with it would never stop. End every turn with one, {tokenizer.eos_token!r} perhaps."
            )
        return cls(tokenizer, special, end_of_turn, _takes_system(tokenizer, question))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """What ends an answer: the end of turn, and the tokenizer's end of sequence where that is another."""
        last = self.tokenizer(self.end_of_turn, add_special_tokens=False)["input_ids"][-1]
        ends = self.tokenizer.eos_token_id
        return (last,) if ends is None or ends == last else (last, ends)

    def pieces(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        """The conversation as the model is to see it; answers and their end of turn are trained, nothing else.

        Raises Untraceable for a conversation that the template rejects or rewrites beyond recognition.
        """
        messages = messages if self.takes_system else fold_system(messages)
        try:
            whole = _render(self.tokenizer, messages)
            frame = _render_marked(self.tokenizer, messages)
        except (TemplateError, TypeError, ValueError) as fault:
            raise Untraceable(f"the chat template rejects it ({fault})") from None
        answers = _answers_between(whole, frame, [m.content for m in messages if m.role == "assistant"])
        pieces, before = [], frame[0]
        for answer, after in zip(answers, frame[1:], strict=True):
            end = _end_of_turn(after, self.special_tokens)
            if end is None:
                raise Untraceable("the chat template does not end one of its answers")
            pieces += [Piece(before, False), Piece(answer + end, True)]
            before = after.removeprefix(end)
        return (*pieces, Piece(before, False)) if before else tuple(pieces)


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The system prompt at the head of the first question, for templates that know no system role."""
    if not messages or messages[0].role != "system":
        return list(messages)
    first, *rest = messages[1:]
    return [Message(first.role, f"{messages[0].content}\n\n{first.content}"), *rest]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **kwargs: Any) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)


def _render_marked(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[str]:
    """What stands before, between and after the answers: one part more than there are answers."""
    markers: list[str] = []
    marked = []
    for message in messages:
        if message.role == "assistant":
            markers.append(MARKER.format(len(markers)))
            message = Message("assistant", markers[-1])
        marked.append(message)
    rest, parts = _render(tokenizer, marked), []
    for marker in markers:
        before, found, rest = rest.partition(marker)
        if not found:
            raise Untraceable("the chat template leaves one of its answers out")
        parts.append(before)
    return [*parts, rest]


def _answers_between(whole: str, frame: list[str], contents: list[str]) -> list[str]:
    """The answers as the template wrote them, perhaps stripped; the frame around them must be the same."""
    for as_written in (contents, [content.strip() for content in contents]):
        if whole == "".join(part for pair in zip(frame, [*as_written, ""], strict=True) for part in pair):
            return as_written
    answers, at = [], len(frame[0])
    for after in frame[1:-1]:
        end = whole.find(after, at)
        answers.append(whole[at:end])
        at = end + len(after)
    answers.append(whole[at : len(whole) - len(frame[-1])])
    rebuilt = "".join(part for pair in zip(frame, [*answers, ""], strict=True) for part in pair)
    if rebuilt != whole:
        raise Untraceable("the chat template rewrites one of its answers")
    return answers


def _end_of_turn(after: str, special_tokens: Collection[str]) -> str | None:
    """What follows an answer, up to and with the special token that ends the turn; None where none follows."""
    found = [token for token in special_tokens if after.lstrip().startswith(token)]
    if not found:
        return None
    token = max(found, key=len)
    return after[: after.index(token) + len(token)]


def _takes_system(tokenizer: PreTrainedTokenizerBase, question: list[Message]) -> bool:
    """Whether a system prompt is rendered; some templates reject one, some drop it without a word."""
    try:
        return "asystemprompt" in _render(tokenizer, [Message("system", "asystemprompt"), *question])
    except (TemplateError, TypeError, ValueError):
        return False

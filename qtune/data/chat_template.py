"""The chat template, applied once: a conversation becomes pieces of text that are trained or not.

Where an answer stands in the rendered text is found by rendering the conversation a second time with a marker in place
of every answer. What surrounds the markers is the template's own, so this works for templates that rewrite earlier
turns or put the system prompt elsewhere, and needs no knowledge of any of them.

What a template writes between its generation prompt and an answer (Qwen3's empty thinking block, gpt-oss's channel) is
trained with the answer: when the model is asked, it stands at the generation prompt and has to write it itself.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qtune.data.formats import Message
from qtune.data.template_process import Asked, Renderer, Untraceable
from qtune.errors import ModelError

MARKER = "qtunemarker{}x"
HOW_TO_GIVE_ONE = 'Give one in the recipe: [model] chat_template = "template.jinja".'
QUESTION, ANSWER, SYSTEM = Message("user", "a question"), Message("assistant", "an answer"), "asystemprompt"


@dataclass(frozen=True)
class Piece:
    """Text that goes to the model as it is, learned where `trained`."""

    text: str
    trained: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, understood.

    `opening` is what it writes after the generation prompt and before an answer, `end_of_turn` what ends one.
    `differing_prompts` is there where it asks in one way and writes rows in another (QwQ's opened thinking block).
    """

    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    opening: str
    differing_prompts: tuple[str, str] | None
    end_of_turn: str
    takes_system: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatTemplate":
        """Raises ModelError where there is no template, it fails, or it never ends the assistant's turn."""
        if not tokenizer.chat_template:
            raise ModelError(f"model.base: this base has no chat template, and the rows are chats. {HOW_TO_GIVE_ONE}")
        try:
            renderer = Renderer.of(tokenizer)
            before, after = _parts(_render(renderer, _marked([QUESTION, ANSWER])), answers=1)
            opening, differing_prompts = _opening(renderer, before)
        except Untraceable as fault:
            raise ModelError(f"model.chat_template: fails on a question and an answer: {fault}.") from None
        end_of_turn = _end_of_turn(after, tokenizer)
        if end_of_turn is None:
            raise ModelError(
                f"model.chat_template: writes {after[:20]!r} after an answer, which is no special token, so a model"
                f" trained with it would never stop. End every turn with one, {tokenizer.eos_token!r} perhaps."
            )
        return cls(tokenizer, renderer, opening, differing_prompts, end_of_turn, _takes_system(renderer))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """What ends an answer: the end of turn, and the tokenizer's end of sequence where that is another."""
        last = self.tokenizer(self.end_of_turn, add_special_tokens=False)["input_ids"][-1]
        ends = self.tokenizer.eos_token_id
        return (last,) if ends is None or ends == last else (last, ends)

    def pieces(self, messages: Sequence[Message]) -> tuple[Piece, ...]:
        """The conversation as the model is to see it: openings, answers and their ends are trained, nothing else, and
        these only of a message that `is_trained`.

        The last trained piece is the last such answer. Raises Untraceable.
        """
        (traced,) = self.all_pieces([messages])
        if isinstance(traced, Untraceable):
            raise traced
        return traced

    def all_pieces(self, conversations: Iterable[Sequence[Message]]) -> list[tuple[Piece, ...] | Untraceable]:
        """The same for many conversations, in less time; one that cannot be traced has its Untraceable here."""
        folded = [messages if self.takes_system else _folded(messages) for messages in conversations]
        known = [messages for messages in folded if not isinstance(messages, Untraceable)]
        texts = iter(self.renderer.render([ask for chat in known for ask in (Asked(chat), Asked(_marked(chat)))]))
        return [
            messages if isinstance(messages, Untraceable) else self._traced(messages, next(texts), next(texts))
            for messages in folded
        ]

    def _traced(
        self, messages: Sequence[Message], whole: str | Untraceable, marked: str | Untraceable
    ) -> tuple[Piece, ...] | Untraceable:
        if isinstance(whole, Untraceable):
            return whole
        if isinstance(marked, Untraceable):
            return marked
        answers = [message for message in messages if message.role == "assistant"]
        try:
            return self._cut(whole, _parts(marked, len(answers)), answers)
        except Untraceable as fault:
            return fault

    def _cut(self, whole: str, frame: list[str], messages: list[Message]) -> tuple[Piece, ...]:
        """`whole` as pieces: `frame` is what stands around its answers, `messages` are those as they came."""
        openings = [self.opening if part.endswith(self.opening) else "" for part in frame[:-1]]
        frame = [*map(str.removesuffix, frame[:-1], openings), frame[-1]]
        pieces, before = [], frame[0]
        answers = _answers_between(whole, frame, openings, [message.content for message in messages])
        for message, opening, answer, after in zip(messages, openings, answers, frame[1:], strict=True):
            end = self.end_of_turn if after.startswith(self.end_of_turn) else ""
            opening = opening if answer.startswith(opening) else ""
            told = Piece(answer.removeprefix(opening) + end, message.is_trained)
            pieces += [Piece(before, False), Piece(opening, message.is_trained), told]
            before = after.removeprefix(end)
        if not end:
            raise Untraceable("the chat template does not end its last answer")
        return tuple(piece for piece in (*pieces, Piece(before, False)) if piece.text)


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The system prompt at the head of the first question, for templates that know no system role."""
    if messages[0].role != "system":
        return list(messages)
    system, *rest = messages
    first = next((i for i, message in enumerate(rest) if message.role == "user"), None)
    if first is None:
        raise Untraceable("the chat template knows no system prompt, and there is no question to put it before")
    rest[first] = Message("user", f"{system.content}\n\n{rest[first].content}")
    return rest


def _folded(messages: Sequence[Message]) -> list[Message] | Untraceable:
    try:
        return fold_system(messages)
    except Untraceable as fault:
        return fault


def _render(renderer: Renderer, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    (text,) = renderer.render([Asked(messages, add_generation_prompt)])
    if isinstance(text, Untraceable):
        raise text
    return text


def _marked(messages: Sequence[Message]) -> list[Message]:
    """The conversation with a marker, counted from 0, in place of every answer."""
    numbers = itertools.count()
    return [
        Message("assistant", MARKER.format(next(numbers))) if message.role == "assistant" else message
        for message in messages
    ]


def _parts(marked: str, answers: int) -> list[str]:
    """What stands before, between and after the markers: one part more than there are answers."""
    parts, rest = [], marked
    for number in range(answers):
        before, marker, rest = rest.partition(MARKER.format(number))
        if not marker:
            raise Untraceable("the chat template leaves one of its answers out")
        parts.append(before)
    return [*parts, rest]


def _opening(renderer: Renderer, before: str) -> tuple[str, tuple[str, str] | None]:
    """What stands between the generation prompt and an answer; or both from the question on, where they disagree."""
    asked = _render(renderer, [QUESTION], add_generation_prompt=True)
    if asked == _render(renderer, [QUESTION]):  # it has no generation prompt
        return "", None
    if before.startswith(asked):
        return before.removeprefix(asked), None
    return "", (asked.partition(QUESTION.content)[2], before.partition(QUESTION.content)[2])


def _answers_between(whole: str, frame: list[str], openings: list[str], contents: list[str]) -> list[str]:
    """The answers as the template wrote them, openings included; the frame around them must be the same."""
    for as_written in (contents, [content.strip() for content in contents]):
        answers = [opening + content for opening, content in zip(openings, as_written, strict=True)]
        if whole == _join(frame, answers):
            return answers
    answers, at = [], len(frame[0])
    for after in frame[1:-1]:
        end = whole.find(after, at)
        answers.append(whole[at:end])
        at = end + len(after)
    answers.append(whole[at : len(whole) - len(frame[-1])])
    if whole != _join(frame, answers):
        raise Untraceable("the chat template rewrites what stands around its answers")
    return answers


def _join(frame: list[str], answers: list[str]) -> str:
    return "".join(part for pair in zip(frame, [*answers, ""], strict=True) for part in pair)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Every token that is no ordinary text, the longest first, so that the first match is the whole one."""
    special = {*map(str, tokenizer.added_tokens_decoder.values()), *tokenizer.all_special_tokens}
    return tuple(sorted(special, key=lambda token: (-len(token), token)))


def _end_of_turn(after: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What follows an answer, up to and with the special token that ends the turn; None where none follows.

    A template may close the answer and then the turn (Command R7B): an end of sequence right behind counts too.
    """
    token = next((token for token in special_tokens(tokenizer) if after.lstrip().startswith(token)), None)
    if token is None:
        return None
    end = after[: after.index(token) + len(token)]
    return end + tokenizer.eos_token if tokenizer.eos_token and after.startswith(end + tokenizer.eos_token) else end


def _takes_system(renderer: Renderer) -> bool:
    """Whether an answered question keeps its system prompt; some templates reject one, some drop it without a word."""
    try:
        return SYSTEM in _render(renderer, [Message("system", SYSTEM), QUESTION, ANSWER])
    except Untraceable:
        return False

"""The chat template, applied once: a conversation becomes pieces of text that are trained or not.

Where an answer stands in the rendered text is found by rendering the conversation a second time with a marker in place
of every answer. What surrounds the markers is the template's own, so this works for templates that rewrite earlier
turns or put the system prompt elsewhere, and needs no knowledge of any of them.

What a template writes between its generation prompt and an answer (gpt-oss's channel) is trained with the answer: when
the model is asked, it stands at the generation prompt and has to write it itself. An empty thinking block (Qwen3's) is
not, as it would be learned as the habit not to think.

A turn that thinks or calls tools is text of the template's own from its header to its end. There the markers stand in
place of what is thought, said and given as arguments, and say which turn a stretch belongs to.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qtune.data.formats import Call, Message, thoughts
from qtune.data.formats.tool_calls import json_text
from qtune.data.rows import Conversation, Document
from qtune.data.template_process import Asked, Renderer, Spelling, Untraceable
from qtune.data.unused_columns import SAID_BESIDE
from qtune.errors import ModelError
from qtune.recipe import chat_templates

MARKER = "qtunemarker{}x"
QUESTION, ANSWER, SYSTEM = Message("user", "a question"), Message("assistant", "an answer"), "asystemprompt"
CALL = Message("assistant", "", calls=(Call("aprobename", '{"aprobekey": "aprobevalue"}', "call_1"),))
RESULT = Message("tool", "aproberesult", call_id="call_1", name="aprobename")
SAYING = dataclasses.replace(CALL, content="aprobesaid")
THOUGHT, THOUGHT_KEYS = "aprobethought", ("reasoning_content", "thinking", "reasoning")
TOOLS = json_text(
    [
        {
            "type": "function",
            "function": {
                "name": "aprobetool",
                "description": "A tool.",
                "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "A text."}}},
            },
        }
    ]
)
TRAINED_THOUGHTS = ("train", "train_all")
Chat = tuple[Sequence[Message], str]
"""Messages, and the JSON text of their tools, "" for none."""


@dataclass(frozen=True)
class Piece:
    """Text that goes to the model as it is, learned where `trained`; a model that is asked writes a thought itself."""

    text: str
    trained: bool
    is_thought: bool = False


@dataclass(frozen=True)
class Turns:
    """How a template writes turns that think or call.

    `header` stands before them and `lead` between that and the arguments of a call of CALL's name; where there is no
    header the lead tells where a call begins. The first of `ends` behind a call ends it. `opened` is what the
    generation prompt has behind the header, such as the beginning of a thought. What is said beside a call is left out
    unless it `writes_said`, and stands behind the call's result where it is `said_late`.
    """

    spelling: Spelling
    header: str
    opened: str
    lead: str
    ends: tuple[str, ...]
    writes_calls: bool
    shows_tools: bool
    writes_said: bool
    said_late: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, understood.

    `opening` is what it writes after the generation prompt and before an answer, `end_of_turn` what ends one.
    `differing_prompts` is there where it asks in one way and writes rows in another (QwQ's opened thinking block).
    A turn that is `ended_by_next` ends with the token that begins the next one (GLM), and the last with nothing.
    """

    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    opening: str
    differing_prompts: tuple[str, str] | None
    end_of_turn: str
    takes_system: bool
    ended_by_next: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatTemplate":
        """Raises ModelError where there is no template, it fails, or it never ends the assistant's turn."""
        if not tokenizer.chat_template:
            raise ModelError(
                "model.base: this base has no chat template, and the rows are chats. Give it one of qtune's own in the"
                f" recipe: {_proposed(tokenizer)}"
            )
        try:
            renderer = Renderer.of(tokenizer)
            before, after = _parts(_render(renderer, _marked([QUESTION, ANSWER])), answers=1)
            opening, differing_prompts = _opening(renderer, before)
            ended_by_next = not after
            if ended_by_next:
                after = _parts(_render(renderer, _marked([QUESTION, ANSWER, QUESTION])), answers=1)[1]
        except Untraceable as fault:
            raise ModelError(f"model.chat_template: fails on a question and an answer: {fault}.") from None
        end_of_turn = _end_of_turn(after, tokenizer)
        if end_of_turn is None or end_of_turn == tokenizer.bos_token:
            raise ModelError(
                f"model.chat_template: writes {after[:20]!r} after an answer, which is no special token, so a model"
                " trained with it would never stop. End every turn with one of the tokenizer's, or take one of qtune's"
                f" own: {_proposed(tokenizer)}"
            )
        takes_system = _takes_system(renderer)
        return cls(tokenizer, renderer, opening, differing_prompts, end_of_turn, takes_system, ended_by_next)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """What ends an answer: the end of turn, the tokenizer's end of sequence and the end of a call, where those are
        others."""
        of_calls = self.turns.ends if "tool_calls" in str(self.tokenizer.get_chat_template()) else ()
        ends = [self.tokenizer(end, add_special_tokens=False)["input_ids"][-1] for end in (self.end_of_turn, *of_calls)]
        return tuple(dict.fromkeys(end for end in (*ends, self.tokenizer.eos_token_id) if end is not None))

    @functools.cached_property
    def turns(self) -> Turns:
        """How thoughts and calls are written, which is looked at when a row has some."""
        return _turns(self.renderer, self.end_of_turn, self.tokenizer, self.ended_by_next)

    def pieces(self, messages: Sequence[Message], tools: str = "") -> tuple[Piece, ...]:
        """The conversation as the model is to see it: openings, answers, calls and their ends are trained, nothing
        else, and these only of a message that `is_trained`.

        The last trained piece is the last such answer. Raises Untraceable.
        """
        (traced,) = self.all_pieces([(messages, tools)])
        if isinstance(traced, Untraceable):
            raise traced
        return traced

    def all_pieces(self, chats: Iterable[Chat]) -> list[tuple[Piece, ...] | Untraceable]:
        """The same for many conversations with their tools, in less time; one that cannot be traced has its Untraceable
        here."""
        known = [self._foldable(messages, tools) for messages, tools in chats]
        asked = [self._asked(*chat) for chat in known if not isinstance(chat, Untraceable)]
        texts = iter(self.renderer.render(list(itertools.chain.from_iterable(asked))))
        return [
            chat if isinstance(chat, Untraceable) else self._traced(*chat, next(texts), next(texts)) for chat in known
        ]

    def _foldable(self, messages: Sequence[Message], tools: str) -> Chat | Untraceable:
        """The conversation as the template takes it, or why it cannot be written."""
        if _is_more_than_text(messages, tools):
            if any(message.calls or message.role == "tool" for message in messages) and not self.turns.writes_calls:
                return Untraceable(f"a tool is called, and the chat template writes no calls: {self._another}")
            if tools and not self.turns.shows_tools:
                return Untraceable(f"there are tools, and the chat template does not show them: {self._another}")
            followed = [message for message, after in itertools.pairwise(messages) if after.role == "tool"]
            if self.turns.said_late and any(map(self._says_beside_a_call, followed)):
                return Untraceable(
                    "the chat template writes what is said beside a call behind the call's result: leave it out"
                )
        if self.takes_system:
            return messages, tools
        try:
            return fold_system(messages), tools
        except Untraceable as fault:
            return fault

    @property
    def _another(self) -> str:
        """What to do about a template that knows no tools."""
        fits = "chatml" in chat_templates.fitting(special_tokens(self.tokenizer), self.tokenizer.eos_token)
        name = "chatml" if fits else "template.jinja"
        return f'choose a base whose template does, or name one: [model] chat_template = "{name}"'

    def left_out(self, item: Conversation | Document) -> tuple[str, ...]:
        """What of a conversation the template does not write, as `unused_columns` names it."""
        messages = item.messages if isinstance(item, Conversation) else ()
        beside = [message for message in messages if self._says_beside_a_call(message)]
        return (SAID_BESIDE,) if beside and not self.turns.writes_said else ()

    def _says_beside_a_call(self, message: Message) -> bool:
        """Whether a message has more than calls in its content, where some templates want thoughts as well."""
        has_thought = bool(message.calls and message.thought) and not self.turns.spelling.thought_key
        return bool(message.calls and message.content) or has_thought

    def _asked(self, messages: Sequence[Message], tools: str) -> tuple[Asked, Asked]:
        spelling = self.turns.spelling if _is_more_than_text(messages, tools) else Spelling()
        return Asked(messages, False, tools, spelling), Asked(_marked(messages), False, tools, spelling)

    def _traced(
        self, messages: Sequence[Message], tools: str, whole: str | Untraceable, marked: str | Untraceable
    ) -> tuple[Piece, ...] | Untraceable:
        if isinstance(whole, Untraceable):
            return whole
        if isinstance(marked, Untraceable):
            return marked
        answers = [message for message in messages if message.role == "assistant"]
        if self.ended_by_next:  # as if there were a next one: what it begins with is what the model has to write
            end = self.turns.ends[-1] if answers[-1].calls else self.end_of_turn
            whole, marked = whole + end, marked + end
        try:
            if _is_more_than_text(messages, tools):
                return self._cut_turns(whole, marked, answers)
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
            is_opened = message.is_trained and (
                not thoughts.OPENED_EMPTY.fullmatch(opening) or message.thoughts == "train_all"
            )
            told = _without_empty_thought(answer.removeprefix(opening) + end, message)
            pieces += [Piece(before, False), Piece(opening, is_opened), *told]
            before = after.removeprefix(end)
        if not end:
            raise Untraceable("the chat template does not end its last answer")
        return tuple(piece for piece in (*pieces, Piece(before, False)) if piece.text)

    def _cut_turns(self, whole: str, marked: str, messages: list[Message]) -> tuple[Piece, ...]:
        """The same where turns think or call: a turn goes from its header to its end, and the rest is the frame."""
        edges = list(self._edges(marked, messages))
        starts, ends = [start for start, _ in edges], [end for _, end in edges]
        frame = [marked[end:start] for end, start in zip([0, *ends], [*starts, len(marked)], strict=True)]
        pieces, at = [Piece(frame[0], False)], len(frame[0])
        last = len(messages) - 1
        for number, (message, after) in enumerate(zip(messages, frame[1:], strict=True)):
            until = len(whole) - len(after) if number == last else whole.find(after, at)
            turn, written = whole[at:until], marked[starts[number] : ends[number]]
            if until < at or not _says_all(turn, written, message, number):
                raise Untraceable("the chat template rewrites what stands around its answers")
            opened = self.turns.opened if turn.startswith(self.turns.opened) and message.thought else ""
            pieces += [Piece(opened, False), *_turn_pieces(turn, written, message, number, opened), Piece(after, False)]
            at = until + len(after)
        if at != len(whole) or not whole.startswith(frame[0]):
            raise Untraceable("the chat template rewrites what stands around its answers")
        return tuple(piece for piece in pieces if piece.text)

    def _edges(self, marked: str, messages: list[Message]) -> Iterator[tuple[int, int]]:
        """Where every turn begins and ends, behind its end where that can be learned."""
        at = 0
        for number, message in enumerate(messages):
            marker = MARKER.format(number)
            first, behind = marked.find(marker, at), marked.rfind(marker) + len(marker)
            if first < 0:
                raise Untraceable("the chat template leaves one of its answers out")
            if marked.count(marker) < 2 * len(message.calls):
                raise Untraceable("the chat template leaves out some of several calls in one message")
            limit = marked.find(MARKER.format(number + 1), behind)
            goes_on = number > 0 and bool(messages[number - 1].calls)
            start = self._start(marked, at if goes_on else 0, first, message)
            at = behind + self._end(marked[behind : None if limit < 0 else limit], message)
            if at == behind and number == len(messages) - 1:
                raise Untraceable("the chat template does not end its last answer")
            yield start, at

    def _start(self, marked: str, at: int, first: int, message: Message) -> int:
        """Where a turn begins whose first marker stands at `first`. One that comes after a call, which ends `at`, may
        go on with its turn behind the result, without a header (Gemma 4); `at` is 0 for others."""
        header = marked.rfind(self.turns.header, at, first) if self.turns.header else -1
        if header >= 0:
            return header + len(self.turns.header)
        if self.turns.header and not at:
            raise Untraceable("the chat template writes an answer without its generation prompt")
        before = marked[:first]
        if before.endswith(THOUGHT):
            return max((begin.start() for begin in thoughts.BEGIN.finditer(before)), default=first)
        lead = self.turns.lead.replace(CALL.calls[0].name, message.calls[0].name) if message.calls else ""
        return first - len(lead) if lead and before.endswith(lead) else first

    def _end(self, after: str, message: Message) -> int:
        """How much of what follows a turn's last marker belongs to it."""
        if not message.calls:
            return len(self.end_of_turn) if after.startswith(self.end_of_turn) else 0
        known = [(after.find(end), end) for end in self.turns.ends if end in after]
        return sum((at + len(end) for at, end in [min(known)])) if known else 0


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


def _render(renderer: Renderer, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    (text,) = renderer.render([Asked(messages, add_generation_prompt)])
    if isinstance(text, Untraceable):
        raise text
    return text


def _is_more_than_text(messages: Sequence[Message], tools: str) -> bool:
    return bool(tools) or any(message.calls or message.thought or message.role == "tool" for message in messages)


def _marked(messages: Sequence[Message]) -> list[Message]:
    """The conversation with a marker, counted from 0, in place of every answer, thought and argument."""
    numbers = itertools.count()
    return [_marked_answer(m, MARKER.format(next(numbers))) if m.role == "assistant" else m for m in messages]


def _marked_answer(message: Message, marker: str) -> Message:
    calls = tuple(dataclasses.replace(call, arguments=json_text({marker: marker})) for call in message.calls)
    said = marker if message.content or not calls else ""
    return Message("assistant", said, calls=calls, thought=THOUGHT + marker if message.thought else "")


def _says_all(turn: str, written: str, message: Message, number: int) -> bool:
    """Whether a turn as the template wrote it holds what the message says: one that looks like the template's own frame
    within must not be cut there."""
    marker = MARKER.format(number)
    said = thoughts.END.split(message.content)[-1].strip()  # the template may drop a thought of an earlier turn
    is_written = written.count(marker) - written.count(THOUGHT + marker) > 2 * len(message.calls)
    called = [text for call in message.calls for text in (call.name, *_texts_in(call.arguments))]
    return (not is_written or said in turn) and all(text in turn or json_text(text)[1:-1] in turn for text in called)


def _texts_in(arguments: str) -> list[str]:
    """Every text in the values of JSON."""

    def within(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from within(each)

    return list(within(json.loads(arguments)))


def _turn_pieces(turn: str, written: str, message: Message, number: int, opened: str) -> list[Piece]:
    """A turn, behind what the generation prompt opened, as its thought, where it has one, and what it says and calls;
    `written` is the turn with markers."""
    thought = _thought_in(turn, written.partition(THOUGHT + MARKER.format(number)), message.thought.strip())
    turn = turn.removeprefix(opened)
    if not thought:
        return _without_empty_thought(turn, message)
    is_learned = message.is_trained and message.thoughts in TRAINED_THOUGHTS
    thought = thought.removeprefix(opened)
    return [Piece(thought, is_learned, is_thought=True), Piece(turn.removeprefix(thought), message.is_trained)]


def _thought_in(turn: str, written: tuple[str, str, str], thought: str) -> str:
    """The beginning of a turn up to where its thought ends; "" where the template leaves that out. `written` is what
    stands before the thought's marker, that, and the rest."""
    before, marker, _ = written
    at = turn.find(thought, len(before))
    if not marker or not turn.startswith(before) or at < 0:
        return ""
    end = thoughts.END.search(turn, at + len(thought))
    return turn[: end.end()] if end else turn[: at + len(thought)]


def _without_empty_thought(said: str, message: Message) -> list[Piece]:
    """What is said, an empty thinking block before it apart: that is a habit, and learned where all is asked for."""
    block = thoughts.EMPTY.match(said)
    if block is None or message.thoughts == "train_all":
        return [Piece(said, message.is_trained)]
    return [Piece(block[0], False), Piece(said[block.end() :], message.is_trained)]


def _turns(renderer: Renderer, end_of_turn: str, tokenizer: PreTrainedTokenizerBase, ended_by_next: bool) -> Turns:
    spelling, writes_calls = _spelling(renderer)
    shown, said, *texts = renderer.render(
        [
            Asked([QUESTION, ANSWER], tools=TOOLS),
            Asked([QUESTION, SAYING, RESULT, ANSWER], tools=TOOLS, spelling=spelling),
            Asked([QUESTION], add_generation_prompt=True),
            Asked([QUESTION]),
            Asked(_marked([QUESTION, ANSWER])),
            Asked(_marked([QUESTION, CALL]), spelling=spelling),
            Asked(_marked([QUESTION, CALL, RESULT, ANSWER]), spelling=spelling),
        ]
    )
    tails = ["" if isinstance(text, Untraceable) else text.rpartition(QUESTION.content)[2] for text in texts]
    marker, special = MARKER.format(0), special_tokens(tokenizer)
    asked, plain, answered, called = (tail.partition(marker)[0] for tail in tails[:4])
    closing, closed = (tail.rpartition(marker)[2] for tail in tails[3:])
    before_result = closed.removeprefix(closing) if ended_by_next else ""
    header = _header(asked, plain, answered, special)
    return Turns(
        spelling=spelling,
        header=header,
        opened=asked.rpartition(header)[2] if header else "",
        lead=called[len(_shared(called, answered)) :],
        ends=_ends(closing.partition(header)[0] if header else closing, end_of_turn, before_result, tokenizer),
        writes_calls=writes_calls,
        shows_tools=isinstance(shown, str) and "aprobetool" in shown,
        writes_said=isinstance(said, Untraceable) or SAYING.content in said,
        said_late=isinstance(said, str) and -1 < said.find(RESULT.content) < said.find(SAYING.content),
    )


def _header(asked: str, plain: str, answered: str, special: Sequence[str]) -> str:
    """What both the generation prompt and a row write before an answer, without the end of the question and without the
    beginning of a thought."""
    shared = _shared(asked, answered)
    if asked != plain:
        return thoughts.BEGIN.split(shared.removeprefix(plain))[0]
    # There is no generation prompt, or always one (Command R7B): the special tokens behind that which ends a question.
    tokens = re.finditer("|".join(map(re.escape, special)), asked)
    ends = [token.end() for token in tokens if token.end() <= len(shared)]
    return shared[ends[0] : ends[-1]] if len(ends) > 1 else ""


def _shared(one: str, other: str) -> str:
    """The beginning that both have."""
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _ends(closing: str, end_of_turn: str, before_result: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What ends a turn that calls, of what is `closing` one: the end of every turn, else its own last special token,
    or, where the next turn ends one, what begins that of the result, the last of them."""
    special = special_tokens(tokenizer)
    ends = [token for token in special if end_of_turn.endswith(token)][:1]
    ends += [tokenizer.eos_token] if tokenizer.eos_token else []
    if before_result:
        ends += [_end_of_turn(before_result, tokenizer) or end_of_turn]
    elif not any(end in closing for end in ends):
        own = [(closing.rfind(token) + len(token), token) for token in special if token in closing]
        ends += [token for _, token in sorted(own)[-1:]]
    return tuple(dict.fromkeys(ends))


def _spelling(renderer: Renderer) -> tuple[Spelling, bool]:
    """How this template wants thoughts and calls, and whether it writes calls at all."""
    every = [Spelling(*each) for each in itertools.product((False, True), ("", None), (False, True))]
    chats = [[QUESTION, CALL, RESULT, ANSWER], [QUESTION, CALL]]  # some take no result without the calls' own ids
    texts = renderer.render([Asked(chat, tools=TOOLS, spelling=each) for chat in chats for each in every])
    fitting = [each for each, text in zip([*every, *every], texts, strict=True) if _has_call(text)]
    thinking = dataclasses.replace(ANSWER, thought=THOUGHT)
    texts = renderer.render([Asked([QUESTION, thinking], spelling=Spelling(thought_key=key)) for key in THOUGHT_KEYS])
    known = [key for key, text in zip(THOUGHT_KEYS, texts, strict=True) if isinstance(text, str) and THOUGHT in text]
    spelling = fitting[0] if fitting else Spelling()
    return dataclasses.replace(spelling, thought_key=known[0] if known else ""), bool(fitting)


def _has_call(text: str | Untraceable) -> bool:
    """Whether a call is written as a call, neither as Python shows an object nor as JSON of JSON."""
    if isinstance(text, Untraceable):
        return False
    is_python, is_twice = "{'aprobekey'" in text, '\\"aprobekey' in text
    return "aprobekey" in text and "aprobename" in text and not is_python and not is_twice


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


def _proposed(tokenizer: PreTrainedTokenizerBase) -> str:
    """The line of a recipe that gives this tokenizer a chat template whose tokens it has, and why that one."""
    names = chat_templates.fitting(special_tokens(tokenizer), tokenizer.eos_token)
    if not names:
        return (
            '[model] chat_template = "template.jinja", a file of yours: the tokenizer has no end of sequence, which'
            ' "alpaca" and "plain" end a turn with, nor the tokens of "chatml" or "llama3".'
        )
    best, *others = names
    writes = ", ".join(chat_templates.BUILT_IN[best].tokens) or f"{tokenizer.eos_token} to end an answer"
    also = f"; nor {'do' if len(others) > 1 else 'does'} {' and '.join(map(json_text, others))}" if others else ""
    return f'[model] chat_template = "{best}" needs no new token, as the tokenizer has {writes}{also}.'


def _takes_system(renderer: Renderer) -> bool:
    """Whether an answered question keeps its system prompt; some templates reject one, some drop it without a word."""
    try:
        return SYSTEM in _render(renderer, [Message("system", SYSTEM), QUESTION, ANSWER])
    except Untraceable:
        return False

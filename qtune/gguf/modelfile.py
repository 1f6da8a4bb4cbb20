"""The run's chat template as Ollama has it: a Go template, and the words an answer ends with.

A Jinja template is a program and Go's is another, so nothing is translated. The chat template is asked what it writes
around a question, an answer and a system prompt, and the Go template writes that. A template that writes something
else around the second question than around the third, or tells rows apart by what is in them, is refused.

Ollama gives `.Messages` (system first if there is one, neighbours of one role joined) and `.System`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qtune.data.chat_template import ChatTemplate, fold_system
from qtune.data.formats import Message
from qtune.data.template_process import Untraceable
from qtune.errors import ModelError
from qtune.gguf.contents import Draft
from qtune.gguf.tokenizer_check import without_bos

MODEL_NAME = "model.gguf"  # beside its Modelfile
SYSTEM, FIRST = Message("system", "Asystemprompt."), Message("user", "Afirstquestion?")
TURNS = (
    Message("assistant", "Afirstanswer."),
    Message("user", "Asecondquestion?"),
    Message("assistant", "Asecondanswer."),
    Message("user", "Athirdquestion?"),
)
GO_TEMPLATE = """\
{{{{- $role := "" }}}}
{{{{- range $i, $m := .Messages }}}}
{{{{- if eq $m.Role "system" }}}}{{{{ {before_system} }}}}{{{{ $m.Content }}}}
{{{{- else if eq $m.Role "assistant" }}}}{{{{ {before_answer} }}}}{{{{ $m.Content }}}}
{{{{- else if eq $i 0 }}}}{{{{ {before_first} }}}}{{{{ $m.Content }}}}
{{{{- else if and $.System (eq $i 1) }}}}{{{{ {after_system} }}}}{{{{ $m.Content }}}}
{{{{- else }}}}{{{{ {after_answer} }}}}{{{{ $m.Content }}}}
{{{{- end }}}}
{{{{- $role = $m.Role }}}}
{{{{- end }}}}
{{{{- if ne $role "assistant" }}}}{{{{ {asking} }}}}{{{{ end }}}}"""


@dataclass(frozen=True)
class Frame:
    """What stands around the words of a conversation that ends with a question.

    `before_first` comes before the first question where there is no system prompt, `before_system` and `after_system`
    around one, `before_answer` and `after_answer` around an answer, `asking` behind the last question.
    """

    before_first: str
    before_system: str
    after_system: str
    before_answer: str
    after_answer: str
    asking: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, adds_bos: bool) -> "Frame":
        """Raises ModelError for a chat template that no frame can stand for."""
        takes_system = ChatTemplate.of(tokenizer).takes_system
        asked = [[FIRST], [FIRST, *TURNS[:2]], [FIRST, *TURNS]]
        conversations = [*asked, *([SYSTEM, *messages] for messages in asked)]
        try:
            rendered = [_prompt(tokenizer, messages, takes_system, adds_bos) for messages in conversations]
            before_first, asking = _split(rendered[0], [FIRST])
            _, before_answer, after_answer, _ = _split(rendered[1], [FIRST, *TURNS[:2]])
            before_system, after_system, _ = _split(rendered[3], [SYSTEM, FIRST])
        except Untraceable as fault:
            raise ModelError(f"--to ollama: {fault}. Use --to gguf: the file carries the template as it is.") from None
        frame = cls(before_first, before_system, after_system, before_answer, after_answer, asking)
        if any(frame.render(messages) != text for messages, text in zip(conversations, rendered, strict=True)):
            raise ModelError(
                "--to ollama: the chat template writes one turn otherwise than another, which a Modelfile cannot say."
                " Use --to gguf: the file carries the template as it is."
            )
        return frame

    def render(self, messages: Sequence[Message]) -> str:
        """What the Go template makes of a conversation."""
        return (
            "".join(
                self._before(number, message, messages[0].role == "system") + message.content
                for number, message in enumerate(messages)
            )
            + self.asking
        )

    def _before(self, number: int, message: Message, has_system: bool) -> str:
        if message.role == "system":
            return self.before_system
        if message.role == "assistant":
            return self.before_answer
        if number == 0:
            return self.before_first
        return self.after_system if has_system and number == 1 else self.after_answer

    def go_template(self) -> str:
        return GO_TEMPLATE.format(**{name: json.dumps(text, ensure_ascii=False) for name, text in vars(self).items()})


def modelfile(frame: Frame, weights: str, stop: Sequence[str]) -> str:
    """A Modelfile for `ollama create`, beside the GGUF file named `weights`."""
    stops = "".join(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}\n" for text in stop)
    return f'FROM ./{weights}\nTEMPLATE """{frame.go_template()}"""\n{stops}'


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], takes_system: bool, adds_bos: bool) -> str:
    """The conversation as the model is asked it, without the BOS that Ollama adds."""
    messages = messages if takes_system else fold_system(messages)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as fault:  # a template is a program, and fails in as many ways as one
        raise Untraceable(f"the chat template rejects a conversation ({str(fault).splitlines()[0]})") from None
    return without_bos(tokenizer, text) if adds_bos else text


def _split(text: str, messages: Sequence[Message]) -> list[str]:
    """What stands before, between and behind the contents of `messages`."""
    parts = []
    for message in messages:
        before, found, text = text.partition(message.content)
        if not found:
            raise Untraceable("the chat template leaves words of a conversation out")
        parts.append(before)
    return [*parts, text]


def modelfile_of(draft: Draft) -> str:
    """The Modelfile beside a whole model. Raises ModelError for a chat template that it cannot say."""
    assert draft.tokenizer is not None, "an adapter has no Modelfile"
    assert draft.vocabulary is not None
    frame = Frame.of(draft.tokenizer, draft.vocabulary.adds_bos)
    stop = [draft.vocabulary.tokens[token] for token in draft.fold.lock.stop_token_ids]
    return modelfile(frame, MODEL_NAME, stop)

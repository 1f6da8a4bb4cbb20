"""The same text must become the same ids: by the tokenizer that training used, and by what a GGUF file says of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qtune.data.chat_template import ChatTemplate
from qtune.data.formats import Message
from qtune.data.template_process import Untraceable
from qtune.data.tokenize import Encoder
from qtune.errors import ModelError
from qtune.gguf.tokenizer import SPACE, Vocabulary

TEXTS = (
    "Hello world", " Hello world", "Hello  world ", "HELLO WORLD", "I'm sure you'll say they've gone, isn't it?",
    "DON'T SHOUT, I'M HERE", "0 1 22 333 4444 55555 3.14159 1,000,000 10^6 1e-5 ½ ² ٣", "a\nb\n\nc\n\n\nd", "\n",
    "\n \n",    " ", "  ", "   ", "\t", "\t\t", " \t\n", "a   b", "tab\tseparated\tvalues", "end of line\r\nCRLF\r\n",
    "def f(x):\n    return x ** 2  # square\n", "{\"key\": [1, 2.5, null]}", "if (a != b && c <= d) { e += f; }",
    "https://example.org/a?b=c&d=%20#e", "someone@example.org", "C:\\path\\file.txt", "<b>bold</b> & &amp;",
    "naïve café Ångström", "Füße in größter Höhe", "¿Qué tal, señor?", "Привет, как дела?", "Γειά σου Κόσμε",
    "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก", "你好，世界。", "こんにちは世界", "안녕하세요 세계",
    "កាន់តែពិសេស",    "🦙", "😀😃 🎉", "👩\u200d👩\u200d👧 👍🏽 🇩🇪", "→ ≤ ∑ √ µg/mL 5 °C", "“quoted” – dash — … †",
    "\u00a0no-break\u200bzero",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "--------", "......", "!!!???", "camelCase snake_case SCREAMING_CASE",
)  # fmt: skip
QUESTION, ANSWER = Message("user", "What is 12 mg/kg of it?"), Message("assistant", "Ask your doctor, please.")
SYSTEM, AGAIN = Message("system", "You answer briefly."), Message("user", "And für Käse 🧀?\n")
CONVERSATIONS = (
    (QUESTION, ANSWER),
    (QUESTION, ANSWER, AGAIN, ANSWER),
    (SYSTEM, QUESTION, ANSWER),
    (SYSTEM, QUESTION, ANSWER, AGAIN, ANSWER),
)
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Reference:
    """A text and its ids, without a BOS that the tokenizer adds."""

    text: str
    ids: tuple[int, ...]


def matching(
    tokenizer: PreTrainedTokenizerBase, rows: int, stop_token_ids: Sequence[int]
) -> tuple[Vocabulary, tuple[Reference, ...]]:
    """The GGUF vocabulary whose tokenizer gives the same ids as the base's, and the texts it was held to.

    Raises ModelError, naming a text, where there is none.
    """
    adds_bos = Encoder.of(tokenizer).bos_id is not None
    faults: list[str] = []
    for vocabulary in Vocabulary.choices(tokenizer, rows, adds_bos, stop_token_ids):
        references = _references(tokenizer, vocabulary)
        rebuilt = vocabulary.tokenizer()
        faults = differing(references, lambda text: rebuilt.encode(text, add_special_tokens=False).ids)  # noqa: B023
        if not faults:
            return vocabulary, references
    raise ModelError(
        f"model.base: the tokenizer cannot be exported to GGUF: {len(faults)} of {len(references)} texts would become"
        f" other tokens, {faults[0]!r} for one. Use `qtune merge`."
    )


def differing(references: Sequence[Reference], encode: Encode) -> list[str]:
    """The texts whose ids are others."""
    return [reference.text for reference in references if tuple(encode(reference.text)) != reference.ids]


def _references(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> tuple[Reference, ...]:
    """Plain texts, then prompts through the chat template.

    A tokenizer may put a space before a text, but not behind the BOS that its chat template writes. llama.cpp does both
    or neither, and is compared where it matters: behind the BOS, if it does neither.
    """
    guard = "" if vocabulary.model == "gpt2" or vocabulary.begins_with_space else tokenizer.bos_token or ""
    texts = [text for text in TEXTS if _is_spelled(vocabulary, text)]
    ids = tokenizer([guard + text for text in texts], add_special_tokens=False)["input_ids"]
    plain = [Reference(text, tuple(found[bool(guard) :])) for text, found in zip(texts, ids, strict=True)]
    return (*plain, *_prompts(tokenizer, vocabulary))


def _is_spelled(vocabulary: Vocabulary, text: str) -> bool:
    return vocabulary.spells_everything or set(text.replace(" ", SPACE)) <= set(vocabulary.tokens)


def _prompts(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> list[Reference]:
    """Conversations up to where the last answer begins; those that the chat template rejects are left out."""
    if not tokenizer.chat_template:
        return []
    template, encoder = ChatTemplate.of(tokenizer), Encoder.of(tokenizer)
    found = []
    for messages in CONVERSATIONS:
        try:
            pieces = template.pieces(messages)
        except Untraceable:
            continue
        last = max(number for number, piece in enumerate(pieces) if piece.trained)
        text = "".join(piece.text for piece in pieces[:last])
        ids = encoder.with_one_bos(encoder.rows([[text]])[0][0])
        if vocabulary.adds_bos:
            text, ids = without_bos(tokenizer, text), ids[1:]
        if _is_spelled(vocabulary, text):
            found.append(Reference(text, tuple(ids)))
    return found


def without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A prompt without the BOS that its template wrote and that llama.cpp adds by itself."""
    bos = tokenizer.bos_token
    while bos and text.startswith(bos):
        text = text.removeprefix(bos)
    return text

"""What a model forgets while it learns something else: its loss on text that has nothing to do with the task."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qtune.data.dataset import ExampleWriter
from qtune.data.packing import PackedRows, pack, packed_rows
from qtune.data.rows import Document, Dropped
from qtune.data.tokenize import Encoder, fit, tokenize
from qtune.errors import DataError

BUILTIN = Path(__file__).with_name("general.txt")
MOST_TOKENS = 8192  # about a second of an 8-billion model on a card; enough for a loss that is sure to 0.02 nats


def general_packs(wanted: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> PackedRows | None:
    """Up to MOST_TOKENS of the text that `evaluate.general` names, in packs of `max_tokens`; None where it is "none".

    Every line is a document; one that is longer than a pack is cut. Raises DataError for a file without text.
    """
    if wanted == "none":
        return None
    path = BUILTIN if wanted == "builtin" else Path(wanted)
    writer, held = ExampleWriter(None), 0
    for example in tokenize(_documents(path), None, Encoder.of(tokenizer)):
        fitted = example if isinstance(example, Dropped) else fit(example, max_tokens, is_cut=True)
        if isinstance(fitted, Dropped):
            continue
        held += len(fitted.input_ids)
        if held > MOST_TOKENS:
            break
        writer.add(fitted)
    examples = writer.finish()
    if not len(examples):
        raise DataError(f'{path}: evaluate.general holds no text to measure with. Name another, or set it to "none".')
    return packed_rows(examples, pack(examples.tokens.tolist(), max_tokens))


def _documents(path: Path) -> list[Document]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"{path}: evaluate.general cannot be read as UTF-8 text ({fault}).") from None
    return [Document(line, f"{path.name}:{number:,}") for number, line in enumerate(lines, 1) if line.strip()]

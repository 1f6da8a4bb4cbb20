"""A Hugging Face tokenizer as the fields of a GGUF file, and a tokenizer again out of those fields.

llama.cpp knows two kinds of tokenizer that matter here. Byte-level BPE (`gpt2`) takes tokens, merges, and a name for
how text is cut up before them (`tokenizer.ggml.pre`). A wrong name degrades the model without a word, so the cutting is
read out of tokenizer.json and must be one that has a name. SentencePiece (`llama`) takes tokens and scores: neighbours
whose union scores highest are joined first, so the score of a token is the rank of the merge that makes it, negated.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gguf import GGUFReader, GGUFWriter, Keys, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from qtune.errors import ModelError
from qtune.gguf.architectures import BYTE_LEVEL, CUTS, DIGITS

SPACE = "\u2581"  # what SentencePiece writes for a space
UNMERGED_SCORE = -1e9
IDS = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "unk": Keys.Tokenizer.UNK_ID,
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer; `tokens`, `types` and `scores` are in the order of the ids.

    `merges` are there for byte-level BPE only, `scores` for SentencePiece only. `ids` are the special tokens by role.
    `begins_with_space` puts a space before text at the very start and behind a special token.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    ids: dict[str, int]
    adds_bos: bool
    begins_with_space: bool
    chat_template: str | None

    @classmethod
    def choices(
        cls, tokenizer: PreTrainedTokenizerBase, rows: int, adds_bos: bool, stop_token_ids: Sequence[int]
    ) -> "list[Vocabulary]":
        """The fields for a model with `rows` of embedding, whose answers end with one of `stop_token_ids`.

        There are two where only texts can tell whether llama.cpp must begin with a space. Raises ModelError for a
        tokenizer that llama.cpp has no equal of.
        """
        described = _described(tokenizer)
        is_sentencepiece = bool(described["model"].get("byte_fallback"))
        tokens, types = _tokens_and_types(described, rows, is_sentencepiece)
        pairs = [_pair(merge) for merge in described["model"]["merges"]]
        eos = tokenizer.eos_token_id
        ids = {
            "bos": tokenizer.bos_token_id,
            "eos": eos,
            "eot": next((token for token in stop_token_ids if token != eos), None),
            "pad": tokenizer.pad_token_id,
            "unk": tokenizer.unk_token_id,
        }
        made = cls(
            model="llama" if is_sentencepiece else "gpt2",
            pre="default" if is_sentencepiece else _pre(described),
            tokens=tokens,
            types=types,
            merges=() if is_sentencepiece else tuple(" ".join(pair) for pair in pairs),
            scores=_scores(tokens, pairs) if is_sentencepiece else (),
            ids={role: token for role, token in ids.items() if token is not None},
            adds_bos=adds_bos,
            begins_with_space=False,
            chat_template=tokenizer.get_chat_template() if tokenizer.chat_template else None,
        )
        spaces = _begins_with_space(described) if is_sentencepiece else (False,)
        return [replace(made, begins_with_space=space) for space in spaces]

    @classmethod
    def read(cls, reader: GGUFReader) -> "Vocabulary":
        """The same fields out of a GGUF file."""

        def field(key: str, default: Any = ()) -> Any:
            found = reader.get_field(key)
            return default if found is None else found.contents()

        keys = Keys.Tokenizer
        return cls(
            model=field(keys.MODEL),
            pre=field(keys.PRE),
            tokens=tuple(field(keys.LIST)),
            types=tuple(field(keys.TOKEN_TYPE)),
            merges=tuple(field(keys.MERGES)),
            scores=tuple(field(keys.SCORES)),
            ids={role: field(key) for role, key in IDS.items() if reader.get_field(key) is not None},
            adds_bos=field(keys.ADD_BOS),
            begins_with_space=field(keys.ADD_PREFIX, False),
            chat_template=field(keys.CHAT_TEMPLATE, None),
        )

    @property
    def spells_everything(self) -> bool:
        """Whether a character that is no token is spelled in bytes; llama.cpp fails on text where it is not."""
        return self.model == "gpt2" or TokenType.BYTE in self.types

    def write_to(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_token_scores(self.scores)
        for role, token in self.ids.items():
            writer.add_uint32(IDS[role], token)
        writer.add_add_bos_token(self.adds_bos)
        if self.model == "llama":
            writer.add_add_space_prefix(self.begins_with_space)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)

    def tokenizer(self) -> Tokenizer:
        """A tokenizer made of these fields alone, as llama.cpp would read them. It adds no BOS."""
        made = self._sentencepiece() if self.model == "llama" else self._byte_level()
        special, ordinary = (TokenType.CONTROL, TokenType.UNKNOWN), (TokenType.USER_DEFINED,)
        made.add_special_tokens([AddedToken(token, normalized=False) for token in self._of_type(special)])
        made.add_tokens([AddedToken(token, normalized=False) for token in self._of_type(ordinary)])
        return made

    def _of_type(self, kinds: tuple[TokenType, ...]) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in kinds]

    def _byte_level(self) -> Tokenizer:
        cut = CUTS[self.pre]
        merges = [_pair(merge) for merge in self.merges]
        made = Tokenizer(models.BPE(self._vocab(), merges, ignore_merges=cut.takes_whole))
        spelled = [] if BYTE_LEVEL in cut.steps else [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        made.pre_tokenizer = pre_tokenizers.Sequence([*map(_cutter, cut.steps), *spelled])
        return made

    def _sentencepiece(self) -> Tokenizer:
        unknown = self.ids.get("unk")
        known = self._vocab()
        ranked = sorted(
            (-self.scores[known[token]], token, cut)
            for token, kind in zip(self.tokens, self.types, strict=True)
            for cut in range(1, len(token))
            if kind == TokenType.NORMAL and token[:cut] in known and token[cut:] in known
        )
        merges = [(token[:cut], token[cut:]) for _, token, cut in ranked]
        unk_token = None if unknown is None else self.tokens[unknown]
        made = Tokenizer(models.BPE(known, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
        space = [normalizers.Prepend(SPACE)] if self.begins_with_space else []
        made.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", SPACE)])
        return made

    def _vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}


def _described(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer as tokenizer.json spells it, wherever it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"is a {type(tokenizer).__name__} written in Python")
    described: dict[str, Any] = json.loads(backend.to_str())
    if described["model"]["type"] != "BPE":
        raise _refused(f"is a {described['model']['type']} model")
    if not described["model"]["merges"]:
        raise _refused("has no merges")
    return described


def _refused(what: str) -> ModelError:
    return ModelError(
        f"the base's tokenizer {what}, and a GGUF file takes SentencePiece with byte fallback, or byte-level BPE cut as"
        f" {', '.join(CUTS)} do. Use `qtune merge`, and a server that reads Hugging Face folders."
    )


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Both halves of a merge, which older files keep as one text."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _tokens_and_types(
    described: dict[str, Any], rows: int, is_sentencepiece: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every id from 0 to `rows`; one that the tokenizer never gives is padding."""
    by_id = {number: token for token, number in described["model"]["vocab"].items()}
    added = {token["id"]: token for token in described["added_tokens"]}
    by_id |= {number: token["content"] for number, token in added.items()}
    if max(by_id) >= rows:
        raise ModelError(f"the base's tokenizer has {max(by_id) + 1:,} tokens and its embedding {rows:,} rows.")
    unknown = described["model"].get("unk_token")

    def kind(number: int) -> TokenType:
        if number not in by_id:
            return TokenType.UNUSED
        token = by_id[number]
        if is_sentencepiece and token == unknown:
            return TokenType.UNKNOWN
        if number in added:
            return TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        is_byte = is_sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return TokenType.BYTE if is_byte else TokenType.NORMAL

    tokens = tuple(by_id.get(number, f"[PAD{number}]") for number in range(rows))
    return tokens, tuple(map(int, map(kind, range(rows))))


def _scores(tokens: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[float, ...]:
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, number)
    return tuple(float(-rank[token]) if token in rank else UNMERGED_SCORE for token in tokens)


def _pre(described: dict[str, Any]) -> str:
    """llama.cpp's name for how this tokenizer cuts text."""
    normalizer = described["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp leaves text as it comes, which is NFC mostly
        raise _refused(f"rewrites text ({normalizer['type']})")
    step = described["pre_tokenizer"] or {"type": "none"}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    cuts = tuple(cut for step in steps if (cut := _cut(step)) is not None)
    takes_whole = bool(described["model"].get("ignore_merges"))
    named = (cut.pre for cut in CUTS.values() if (cut.steps, cut.takes_whole) == (cuts, takes_whole))
    pre = next(named, None)
    if pre is None:
        raise _refused("cuts text in a way that has no name there")
    return pre


def _cut(step: dict[str, Any]) -> str | None:
    """One step of cutting as a `Cut` has it; None where it only spells bytes."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return BYTE_LEVEL if step["use_regex"] else None
    if step["type"] == "Digits" and step["individual_digits"]:
        return DIGITS
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return f"a {step['type']} step"


def _cutter(cut: str) -> pre_tokenizers.PreTokenizer:
    if cut == BYTE_LEVEL:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if cut == DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(cut), "isolated")


def _begins_with_space(described: dict[str, Any]) -> tuple[bool, ...]:
    """Older files put the space there while normalising, newer ones while cutting; `first` is neither always nor never.

    Raises ModelError for a tokenizer that does anything else to text.
    """
    normalizer, cutter = described["normalizer"], described["pre_tokenizer"]
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if cutter is None and all(part["type"] in ("Prepend", "Replace") for part in parts):
        return (any(part["type"] == "Prepend" for part in parts),)
    if cutter is None or cutter["type"] != "Metaspace" or cutter["split"] or parts:
        raise _refused("rewrites or cuts text before SentencePiece")
    return {"always": (True,), "first": (False, True)}.get(cutter["prepend_scheme"], (False,))

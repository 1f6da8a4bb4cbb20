#!/usr/bin/env python3
"""Train the embedded demo base: a 3 M parameter Llama with its own tokenizer and chat template.

    scripts/build_demo_base.py --minutes 30 --output qtune/demo_base

The text is WordNet 3.0 (Debian package `wordnet-base`; its licence lets anyone use, copy, modify and distribute it
and is written beside the weights). A synset becomes a plain gloss and short chats ("What kind of thing is an X?"),
so the base knows its chat template before any fine-tuning, as an instruct model does.

Every entry that names a drug of the medical sample data is left out: the base has never seen the words that
the demo is scored on.

Words are cut with BPE-dropout while training (Provilkov et al. 2020, arXiv:1910.13267): the same word arrives in many
pieces, so a model this small learns what its endings mean.
"""

import argparse
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from build_medical_data import DRUGS_BY_CLASS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, SEQUENCE_TOKENS, BATCH = 4096, 128, 32
PEAK_LEARNING_RATE, WARMUP_FRACTION, BPE_DROPOUT = 3e-3, 0.02, 0.1
BOS, END, PAD = "<s>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DEFINE = ("What does {} mean?", "Define {}.", "Explain the word {}.")
KIND = (
    "What kind of thing is {}?",
    "{} is a kind of what?",
    "Which group does {} belong to?",
    "Name the category of {}.",
    "What type is {}?",
)


@dataclass(frozen=True)
class Synset:
    """One meaning: its words, its definition, and the first word of the meaning above it (empty for a root)."""

    words: tuple[str, ...]
    gloss: str
    kind: str


def read_wordnet(folder: Path) -> list[Synset]:
    """All synsets of data.noun/verb/adj/adv (format: wndb(5WN))."""
    words_at: dict[tuple[str, str], tuple[str, ...]] = {}
    raw: list[tuple[str, str, str]] = []
    for name, part in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        for line in (folder / f"data.{name}").read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):
                continue
            head, _, gloss = line.partition(" | ")
            field = head.split()
            count = int(field[3], 16)
            words = tuple(re.sub(r"\(.*\)", "", word).replace("_", " ") for word in field[4 : 4 + 2 * count : 2])
            above = re.search(r" @i? (\d{8}) ([nvar])", head)
            words_at[field[0], part] = words
            raw.append((field[0], part, gloss.strip()))
            if above:
                words_at["above" + field[0], part] = above.groups()
    synsets = []
    for offset, part, gloss in raw:
        above = words_at.get(("above" + offset, part))
        kind = words_at[above][0] if above else ""
        synsets.append(Synset(words_at[offset, part], gloss, kind))
    return synsets


def drug_names() -> re.Pattern[str]:
    """A pattern that matches any drug of the medical sample data."""
    names = " ".join(DRUGS_BY_CLASS.values()).split()
    return re.compile("|".join(map(re.escape, names)), re.IGNORECASE)


def parted_synsets(folder: Path) -> tuple[list[Synset], list[Synset]]:
    """Held-out and training synsets, none of which names a drug of the sample data; every hundredth is held out."""
    drugs = drug_names()
    synsets = [s for s in read_wordnet(folder) if not drugs.search(" ".join((*s.words, s.gloss, s.kind)))]
    random.Random(0).shuffle(synsets)
    return synsets[: len(synsets) // 100], synsets[len(synsets) // 100 :]


def chat(question: str, answer: str) -> str:
    return f"{BOS}<|user|>\n{question}{END}\n<|assistant|>\n{answer}{END}\n"


def documents(synset: Synset, rng: random.Random) -> Iterator[str]:
    """The texts made of one synset; which word and which phrasing changes from epoch to epoch."""
    word = rng.choice(synset.words)
    definition = synset.gloss.split('; "')[0]
    yield f"{BOS}{', '.join(synset.words)}: {synset.gloss}{END}\n"
    if rng.random() < 0.5:
        yield chat(rng.choice(DEFINE).format(word), definition)
    if synset.kind:
        yield chat(rng.choice(KIND).format(word), synset.kind)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: lossless on any text, digits apart, one BOS added on encode as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, END, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, synsets: list[Synset], seed: int, dropout: float | None) -> torch.Tensor:
    """Every document of one epoch, in a random order, as one line of token ids (N,)."""
    rng = random.Random(seed)
    texts = [text for synset in synsets for text in documents(synset, rng)]
    rng.shuffle(texts)
    tokenizer.model.dropout = dropout
    ids = [i for line in tokenizer.encode_batch(texts, add_special_tokens=False) for i in line.ids]
    tokenizer.model.dropout = None
    return torch.tensor(ids, dtype=torch.long)


def batches(tokenizer: Tokenizer, synsets: list[Synset]) -> Iterator[torch.Tensor]:
    """Endless (BATCH, SEQUENCE_TOKENS) batches; each epoch is cut into pieces anew."""
    for epoch in range(10**9):
        stream = token_stream(tokenizer, synsets, seed=epoch, dropout=BPE_DROPOUT)
        rows = stream[: len(stream) // SEQUENCE_TOKENS * SEQUENCE_TOKENS].view(-1, SEQUENCE_TOKENS)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))]
        print(f"epoch {epoch}: {len(stream):,} tokens", flush=True)
        yield from (batch for batch in rows.split(BATCH) if len(batch) == BATCH)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, synsets: list[Synset]) -> float:
    """Mean loss in nats per token over the held-out synsets."""
    stream = token_stream(tokenizer, synsets, seed=0, dropout=None)
    rows = stream[: len(stream) // SEQUENCE_TOKENS * SEQUENCE_TOKENS].view(-1, SEQUENCE_TOKENS)
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in rows.split(BATCH)]
    model.train()
    return float(sum(losses)) / len(rows)


def learning_rate(done: float) -> float:
    """Linear warm-up, then a cosine to a twentieth; `done` is the fraction of the time that has passed."""
    warm = min(1.0, done / WARMUP_FRACTION)
    return PEAK_LEARNING_RATE * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, train_set, held_out, minutes: float) -> None:
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    start, seen = time.monotonic(), 0
    for step, batch in enumerate(batches(tokenizer, train_set)):
        done = (time.monotonic() - start) / (60 * minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += batch.numel()
        if step % 200 == 0:
            speed = seen / (time.monotonic() - start)
            print(f"step {step}  {seen:,} tokens  loss {loss.item():.3f}  {speed:,.0f} tokens/s", flush=True)
        if step % 1000 == 999:
            print(f"step {step}  held-out loss {held_out_loss(model, tokenizer, held_out):.4f}", flush=True)
    print(f"{seen:,} tokens in {time.monotonic() - start:.0f} s")


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path, licence: Path) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(output)
    model.generation_config = GenerationConfig(
        bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(output)
    (output / "LICENSE.wordnet").write_text(licence.read_text(encoding="utf-8"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--licence", type=Path, default=Path("/usr/share/doc/wordnet-base/copyright"))
    parser.add_argument("--output", type=Path, default=ROOT / "qtune" / "demo_base")
    parser.add_argument("--minutes", type=float, default=30.0)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    held_out, train_set = parted_synsets(arguments.wordnet)
    rng = random.Random(0)
    tokenizer = train_tokenizer([text for synset in train_set for text in documents(synset, rng)])
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        attn_implementation="eager",  # at 128 tokens on a CPU its backward is the fastest
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = LlamaForCausalLM(config)
    print(f"{len(train_set):,} synsets, {sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, tokenizer, train_set, held_out, arguments.minutes)
    loss = held_out_loss(model, tokenizer, held_out)
    print(f"held-out loss {loss:.4f} nats per token (perplexity {math.exp(loss):.1f})")
    save(model, tokenizer, arguments.output, arguments.licence)


if __name__ == "__main__":
    main()

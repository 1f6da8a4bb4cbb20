"""What is shown of one architecture, step by step: a real run of a tiny base, and plain transformers and peft beside.

Plain is `AutoModelForCausalLM.from_pretrained` of the same folder in float32 with the weights that the run rounded to
4 bits, and `PeftModel.from_pretrained` of the written adapter: nothing of qtune has a part in it. It is given one
document at a time and runs its own attention.
"""

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from conforming import small_models
from qtune import ready as readiness
from qtune import resume
from qtune import run as story
from qtune.data.packing import packed_rows
from qtune.errors import UserError, VerificationFailed
from qtune.evaluate.held_out_loss import document_loss
from qtune.events import Event, Rehearsed
from qtune.gguf.architectures import FAMILIES
from qtune.gguf.export import export
from qtune.memory import fused_cross_entropy
from qtune.memory.engine import Engine, refusals
from qtune.memory.techniques import TECHNIQUES, Techniques
from qtune.merge.merge import chosen_onto, merge_and_verify
from qtune.model import adapter, base, packing_probe
from qtune.model.loaded import Loaded
from qtune.model.open_model import open_run
from qtune.model.tokenizer import load_tokenizer
from qtune.plan.plan import Plan
from qtune.recipe.load import load
from qtune.recipe.schema import Lora, Model
from qtune.report.progress_line import Doing
from qtune.rundir import RunDir, read_json

Outcome = Literal["proven", "refused", "not made", "not merged", "wrong", "leaks", "our fault"]
Document = tuple[list[int], list[int]]  # token ids, and labels that are -100 where a token is not trained on

EXACT = 1e-4  # of a loss in nats, of logits' spread, of a gradient's norm: float32 in another order of summation
FORECAST_OFF = 0.05  # of the bytes counted; which experts a token visits is not known before
STEPS, CHECKPOINT = 3, 2
GENERATED_TOKENS = 12  # more than a window, in which nothing of the prompt is seen then
TILE_TOKENS = 10  # of packs of a hundred, so that the last tile is a short one
ADAPTER_STD = 0.05  # of the weights of an adapter that has learned more than three steps teach
ROWS = 30
LENGTHS = (37, 21, 45)  # tokens of made documents; none is a multiple of a chunk, and all are longer than a window
RECIPE = """\
name = "t"
[model]
base = "{base}"
compute_dtype = "float32"
[lora]
rank = 4
[data]
train = "rows.jsonl"
held_out_fraction = 0.3
max_tokens = 128
[train]
max_steps = {steps}
gradient_accumulation = 2
learning_rate = 1e-3
[save]
every = {checkpoint}
[evaluate]
metric = "none"
general = "none"
"""


@dataclass(frozen=True)
class Finding:
    """What one step came to: `told` goes into the table; `outcome` is "proven" unless something is wrong, and then
    `fault` says what."""

    step: str
    told: str = ""
    outcome: Outcome = "proven"
    fault: str = ""


@dataclass
class Pair:
    """A tuned model as qtune has it, and the same in plain transformers and peft; documents that neither has seen.

    `kind` is a model type; its base is in `folder`, and the adapter was written to `written`. `is_packed` says whether
    documents share a pass, or have one each because they would read each other.
    """

    kind: str
    folder: Path
    written: Path
    model: PeftModel
    plain: PeftModel
    documents: list[Document]
    is_packed: bool


@dataclass
class Trained(Pair):
    """The same of a run, what the run left, and its plan."""

    plan: Plan
    run: RunDir
    events: list[Event]


def tuned_at_once(kind: str, folder: Path) -> Pair:
    """A base in NF4 with an adapter that was never trained; raises what a run of it would refuse."""
    model = Model(base=str(folder / "base"))
    lora = Lora(rank=4)
    attached = adapter.attach(base.load_base(model, "cpu", "float32"), lora, 0)
    adapter.save(attached, folder / "adapter", model.base)
    loaded = Loaded(attached, load_tokenizer(model), "cpu", "float32")
    probed = packing_probe.probe(loaded, range(250), lambda document: document_loss(loaded, document))
    packing_probe.refuse_another(probed, kind)
    plain = plain_model(folder / "base", folder / "adapter", attached)
    torch.manual_seed(0)
    ids = [torch.randint(0, 250, (length,)).tolist() for length in LENGTHS]
    documents = [(tokens, [-100 if i % 3 == 0 else token for i, token in enumerate(tokens)]) for tokens in ids]
    return Pair(kind, folder, folder / "adapter", attached, plain, documents, not probed.leaks)


def trained(kind: str, folder: Path) -> Trained:
    """A whole run: checked, planned, probed, rehearsed, trained, scored."""
    rows = [{"question": f"what is {'x' * (i % 9)}{i}?", "answer": f"it is {i} times {i * i}"} for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "t.toml"
    path.write_text(RECIPE.format(base=folder / "base", steps=STEPS, checkpoint=CHECKPOINT))
    ready = readiness.get_ready(load(path))
    invocation = resume.Invocation(str(folder), (), False)
    run = readiness.start_folder(ready, path.read_text(), invocation, folder / "run")
    events: list[Event] = []
    with run.held():
        story.run(ready, run, events.append)
    tuned = open_run(run).model
    plain = plain_model(folder / "base", run.adapter, tuned)
    is_packed = not run.read_lock().packing_probe.leaks
    packs = packed_rows(ready.prepared.held_out, ready.prepared.held_out_packs)
    documents = [document for pack in packs for document in _documents(pack)]
    return Trained(kind, folder, run.adapter, tuned, plain, documents, is_packed, ready.plan, run, events)


def _documents(pack: Any) -> Iterator[Document]:
    ids, labels = [*map(int, pack["input_ids"])], [*map(int, pack["labels"])]
    for end, length in zip(accumulate(pack["seq_lengths"]), pack["seq_lengths"], strict=True):
        yield ids[end - length : end], labels[end - length : end]


def plain_model(folder: Path, written: Path, tuned: PeftModel) -> PeftModel:
    """The base as transformers has it, its rounded weights put in, with the adapter that was written."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held = {name.replace(".base_layer", ""): p for name, p in tuned.get_base_model().named_parameters()}
    for name, parameter in plain.named_parameters():
        state = getattr(held.get(name), "quant_state", None)
        if state is not None:
            flat = copy.copy(state)  # bitsandbytes' processor kernel misreads rows that are no whole number of blocks
            flat.shape = torch.Size([state.shape.numel()])
            rounded = dequantize_4bit(held[name].data, flat).reshape(state.shape)
            is_turned = isinstance(plain.get_submodule(name.rpartition(".")[0]), Conv1D)
            parameter.data.copy_(rounded.mT if is_turned or rounded.shape != parameter.shape else rounded)
    return PeftModel.from_pretrained(plain, written, is_trainable=True).eval()


def loss(work: Trained) -> Finding:
    """The run's held-out losses of base and tuned, beside plain's of one document at a time."""
    scores = read_json(work.run.scores)
    with torch.no_grad():
        apart = abs(_alone_loss(work.plain, work.documents) - scores["tuned"]["held_out_loss"])
        with work.plain.disable_adapter():
            apart = max(apart, abs(_alone_loss(work.plain, work.documents) - scores["base"]["held_out_loss"]))
    return _within("loss", apart, "the held-out loss is {:.1e} nats from that of plain transformers and peft")


def _alone_loss(model: Any, documents: Sequence[Document]) -> float:
    nats = sum(float(_nats(model, *document)) for document in documents)
    return nats / sum(label != -100 for _, labels in documents for label in labels[1:])


def _nats(model: Any, ids: list[int], labels: list[int]) -> torch.Tensor:
    logits = _logits(model, ids)[:-1]
    return cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum", ignore_index=-100)


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def _within(step: str, apart: float, said: str) -> Finding:
    return Finding(step, f"{apart:.0e}") if apart <= EXACT else Finding(step, "", "wrong", said.format(apart))


def enlarge(pair: Pair) -> None:
    """Give both adapters the same larger weights, so that what they do is seen."""
    theirs = dict(pair.plain.named_parameters())
    torch.manual_seed(1)
    for name, parameter in sorted(pair.model.named_parameters()):
        if ".lora_" in name:
            torch.nn.init.normal_(parameter.data, std=ADAPTER_STD)
            theirs[name].data.copy_(parameter.data)
            parameter.requires_grad_(True)


def apart(pair: Pair) -> Finding:
    """A document's logits in a pack beside those with another neighbour, and beside plain's alone."""
    enlarge(pair)
    first, second = (ids for ids, _ in pair.documents[:2])
    neighbours = (first, first[::-1]) if pair.is_packed else ([],)
    with torch.no_grad():
        alone = _logits(pair.plain, second)
        behind = [_packed(pair.model, neighbour, second) for neighbour in neighbours]
    moved = _share(behind[0] - behind[-1], alone)
    if not moved <= EXACT:
        return Finding("apart", "", "leaks", f"logits move by {moved:.1e} of their spread with the neighbour in a pack")
    away = _share(behind[0] - alone, alone)
    return _within("apart", away, "logits in a pack are {:.1e} of their spread from plain transformers' and peft's")


def _share(difference: torch.Tensor, of: torch.Tensor) -> float:
    return float(difference.abs().max() / of.std())


def _packed(model: Any, neighbour: list[int], document: list[int]) -> torch.Tensor:
    """Logits of `document` behind its neighbour."""
    lengths = tuple(len(ids) for ids in (neighbour, document) if ids)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.tensor([neighbour + document])
    output = model(input_ids=ids, position_ids=positions, document_lengths=lengths, use_cache=False)
    logits: torch.Tensor = output.logits[0, -len(document) :]
    return logits


def gradients(pair: Pair) -> Finding:
    """Of a pack of documents, beside those of plain transformers and peft, a document at a time."""
    documents = pair.documents[:3]
    pair.plain.zero_grad()
    for document in documents:
        _nats(pair.plain, *document).backward()
    theirs = {name: p.grad for name, p in pair.plain.named_parameters() if p.grad is not None}
    _, ours = one_pass(pair.model, documents, pair.is_packed)
    return _within("gradients", _furthest(ours, theirs), "gradients are {:.1e} of their norm from plain peft's")


def one_pass(model: PeftModel, documents: Sequence[Document], is_packed: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss in nats, and gradients by name, as training makes them."""
    model.train()
    model.zero_grad()
    nats = 0.0
    for pack in [documents] if is_packed else [[document] for document in documents]:
        summed = _training_loss(model, pack)
        summed.backward()
        nats += summed.item()
    made = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    return nats, made


def _training_loss(model: PeftModel, pack: Sequence[Document]) -> torch.Tensor:
    lengths = tuple(len(ids) for ids, _ in pack)
    labels = torch.tensor([[label for _, labels in pack for label in (-100, *labels[1:])]])
    batch = {
        "input_ids": torch.tensor([[token for ids, _ in pack for token in ids]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "document_lengths": lengths,
    }
    if fused_cross_entropy.suits(model):
        return model(**batch, labels=labels, fused_loss=True).nats
    logits = model(**batch, use_cache=False).logits[0, :-1]
    return cross_entropy(logits.float(), labels[0, 1:], reduction="sum", ignore_index=-100)


def _furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest distance between two gradients as a share of the largest norm."""
    if ours.keys() != theirs.keys():
        return float("inf")
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    return max(float((ours[name] - theirs[name]).norm()) for name in theirs) / largest


def generation(pair: Pair) -> Finding:
    """A greedy continuation of a prompt that is longer than a window, beside plain's."""
    ids = torch.tensor([pair.documents[0][0]])
    theirs, ours = _continued(pair.plain, ids), _continued(pair.model, ids)
    if isinstance(theirs, Exception):
        return Finding("generation", "not in plain transformers")
    if isinstance(ours, Exception):
        return Finding("generation", "", "our fault", f"generating fails ({first_line(ours)})")
    if not torch.equal(ours, theirs):
        return Finding("generation", "", "wrong", "generates other tokens than plain transformers and peft")
    return Finding("generation", "same")


def _continued(model: Any, ids: torch.Tensor) -> torch.Tensor | Exception:
    settings = {"max_new_tokens": GENERATED_TOKENS, "min_new_tokens": GENERATED_TOKENS, "do_sample": False}
    try:
        with torch.no_grad():
            tokens: torch.Tensor = model.generate(input_ids=ids, **settings)
    except Exception as fault:  # some tiny shapes are too small for a model's own cache
        return fault
    return tokens


def each_alone(layers: int) -> dict[str, Techniques]:
    """By name, each memory technique of one process on alone; one that rests on another with that."""
    alone: dict[str, dict[str, Any]] = {
        "recomputed_layers": {"recomputed_layers": layers},
        "recomputed_attention": {"recomputed_layers": layers, "recomputed_attention": layers},
        "host_checkpoints": {"recomputed_layers": layers, "host_checkpoints": True},
        "tile_tokens": {"tile_tokens": TILE_TOKENS},
        "host_embedding": {"host_embedding": True},
        "head": {"head": "host"},
        "streamed_layers": {"recomputed_layers": layers, "streamed_layers": layers},
        "head_groups": {"head_groups": 2},
    }
    return {name: Techniques(**settings) for name, settings in alone.items()}


def techniques(work: Pair) -> Finding:
    """Loss and gradients with each memory technique on alone, beside those without; in a fresh model each."""
    documents = work.documents[:3]
    nats, expected = one_pass(work.model, documents, work.is_packed)
    refused, wrong = [], []
    for name, wanted in each_alone(small_models.layers_of(work.model.config)).items():
        model = _fresh(work)
        if refusals(model).keys() & {each.name for each in wanted.on()}:
            refused.append(TECHNIQUES[name].key)
            continue
        Engine(model).switch_to(wanted)
        summed, made = one_pass(model, documents, work.is_packed)
        apart = max(abs(summed / nats - 1), _furthest(made, expected))
        if not apart <= EXACT:
            wrong.append(f"{TECHNIQUES[name].key} moves loss or gradients by {apart:.1e}")
    told = "all" if not refused else "not " + ", ".join(refused)
    return Finding("techniques", told, "wrong" if wrong else "proven", "; ".join(wrong))


def _fresh(work: Pair) -> PeftModel:
    """The base loaded again, with the adapter as it is now."""
    model = Model(base=str(work.folder / "base"))
    fresh = adapter.load(base.load_base(model, "cpu", "float32"), work.written)
    weights = dict(work.model.named_parameters())
    for name, parameter in fresh.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(weights[name])
            parameter.requires_grad_(True)
    return fresh


def forecast(work: Trained) -> Finding:
    """How far the plan's bytes at the peak are from those that were counted."""
    (rehearsed,) = [event for event in work.events if isinstance(event, Rehearsed)]
    off = rehearsed.forecast_bytes / rehearsed.measured_bytes - 1
    told = f"{100 * off:+.1f} %"
    if abs(off) > FORECAST_OFF:
        return Finding("forecast", told, "wrong", f"the forecast is {told} off the bytes that were counted")
    return Finding("forecast", told)


def resumed(work: Trained) -> Finding:
    """The run as it was at a checkpoint, gone on with: its adapter, to the bit that of the whole run."""
    again = RunDir(work.folder / "again")
    shutil.copytree(work.run.path, again.path)
    shutil.rmtree(again.adapter)
    again.scores.unlink()
    for path in again.checkpoints.iterdir():
        if int(path.name.removeprefix("step-")) > CHECKPOINT:
            shutil.rmtree(path)
    with again.held(), _planned(work.plan):
        ready, going_on = readiness.get_ready_again(again, resume.recipe_of(again, ()), (), Doing())
        story.run(ready, again, lambda event: None, going_on)
    whole, halves = ((run.adapter / "adapter_model.safetensors").read_bytes() for run in (work.run, again))
    if whole != halves:
        return Finding("resumed", "", "wrong", "a run that goes on ends with another adapter")
    return Finding("resumed", "to the bit")


@contextlib.contextmanager
def _planned(plan: Plan) -> Iterator[None]:
    """Inside, planning takes no time: it is two thirds of what going on with a tiny run takes."""
    decide = readiness.decide
    readiness.decide = lambda *given, **named: plan
    try:
        yield
    finally:
        readiness.decide = decide


def merge(work: Trained) -> Finding:
    """Folded into the base it was trained on, and proven."""
    try:
        onto = chosen_onto(work.run, None)
        _, verdict = merge_and_verify(work.run, work.folder / "merged", onto, "auto", Doing())
    except UserError as fault:
        return Finding("merge", "", "not merged", f"merge: {_sentence(fault, work.folder)}")
    if verdict.faults:
        return Finding("merge", "", "wrong", f"merge: {'; '.join(verdict.faults)}")
    return Finding("merge", f"{verdict.mean_kl:.0e}")


def gguf(work: Trained) -> Finding:
    """A GGUF file, where llama.cpp has a family of this name."""
    if work.kind not in FAMILIES:
        return Finding("gguf")
    report = export(work.run, work.folder / "gguf", "gguf")
    if report.faults:
        return Finding("gguf", "", "wrong", f"GGUF: {'; '.join(report.faults)}")
    return Finding("gguf", "yes")


OF_A_PAIR = (apart, gradients, generation, techniques)  # the first gives both adapters other weights
OF_A_RUN = (loss, *OF_A_PAIR, forecast, resumed, merge, gguf)


def walk(kind: str, folder: Path, is_whole: bool) -> Iterator[Finding]:
    """Every step in turn, each told as it is done; a refusal ends the walk.

    One that is not `is_whole` leaves out the run and what comes after it.
    """
    try:
        small_models.save(kind, folder / "base")
    except Exception as fault:
        yield Finding("made", "", "not made", first_line(fault))
        return
    try:
        work = trained(kind, folder) if is_whole else _tuned_at_once_or_run(kind, folder)
    except UserError as fault:
        yield Finding("refused", "", "refused", _sentence(fault, folder))
        return
    yield Finding("trained", "packed" if work.is_packed else "a document a pass")
    yield Finding("held", "NF4" if base.quantized_modules(work.model) else "16 bits")
    for step in OF_A_RUN if is_whole else OF_A_PAIR:
        yield _taken(step, work)


def _tuned_at_once_or_run(kind: str, folder: Path) -> Pair:
    """A run refuses much as it plans, which is what counts where a pair cannot be made."""
    try:
        return tuned_at_once(kind, folder)
    except UserError:
        raise
    except Exception:
        return trained(kind, folder)


def _taken(step: Callable[[Any], Finding], work: Pair) -> Finding:
    """What a step finds; what it raises is a finding too, and the next step is taken."""
    try:
        return step(work)
    except (UserError, VerificationFailed) as fault:
        return Finding(step.__name__, "", "wrong", str(fault))
    except Exception as fault:
        return Finding(step.__name__, "", "our fault", first_line(fault))


def _sentence(fault: BaseException, folder: Path) -> str:
    """What the user is told, less the folder that the base happens to be in."""
    told = str(fault).replace(f"{folder}/", "").replace("\n", " ")
    return re.sub(r"^(t\.toml:\d+: )?(model\.base: )?(base is )?", "", told)


def first_line(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0]}" if lines else type(fault).__name__

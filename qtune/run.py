"""The story of one run, in the order it happens."""

import contextlib
import dataclasses
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qtune import accelerator, card_faults
from qtune.atomic_files import write_text
from qtune.data.packing import packed_rows
from qtune.distributed.ranks import ALONE, Ranks
from qtune.errors import MachineError, ModelError, RankLost, UserError
from qtune.evaluate.before_after import Score, compare, measured, score_told
from qtune.evaluate.generate import watched_answers
from qtune.evaluate.held_out_loss import document_loss, held_out_loss
from qtune.evaluate.held_out_pairs import loss_and_pairs
from qtune.evaluate.memorization import memorised_told
from qtune.events import Event, Listener, Notice
from qtune.hardware import Device, prepare
from qtune.memory import attention_kernels, fused_cross_entropy, trained_rows
from qtune.memory.engine import Engine
from qtune.memory.memory_report import Ledger
from qtune.merge.live_weights import held
from qtune.merge.merged_weights import checkpoint_names
from qtune.model import adapter, base, packing_probe
from qtune.model.checkpoint import BaseCheckpoint
from qtune.model.loaded import Loaded
from qtune.model.lora_inits import LORA_INITS
from qtune.model.start_adapter import StartAdapter
from qtune.model.tokenizer import trained_ids
from qtune.ready import GoingOn, Ready, is_on_hub
from qtune.recipe import chat_templates
from qtune.report import model_card, summary, tables
from qtune.rundir import RunDir, write_json
from qtune.train import checkpoint_files
from qtune.train.checkpoint_files import Checkpoint
from qtune.train.learner import Learner
from qtune.train.loop import Fitted, TrainingSession
from qtune.train.objectives import OBJECTIVES
from qtune.train.rows import HeldOutLoss, TrainingRows
from qtune.units import counted, format_percent

PASSES = 32  # over training rows, by which an adapter may begin; chosen
UNLOCKED = (
    "the driver refused to page-lock host memory, so copies between host and card wait instead of running beside the"
    " arithmetic: layers, checkpoints and a head in host memory cost the whole time of their copies. Under WSL2 the"
    " limit grows with `memory` in .wslconfig"
)


def get_weights(ready: Ready, folder: RunDir, say: Callable[[str], None]) -> None:
    """Have the weights of a base on the hub on this machine. `run` gets them too; the hub draws bars of its own, and
    whoever draws others beside asks first."""
    if is_on_hub(ready.recipe):
        with _leaving_no_folder(folder):
            say(f"getting the weights of {ready.recipe.model.base}")
            base.base_folder(ready.recipe.model)


def run(
    ready: Ready,
    folder: RunDir,
    listen: Listener,
    going_on: GoingOn | None = None,
    stop: threading.Event | None = None,
    catches_signals: bool = False,
    ranks: Ranks = ALONE,
) -> Fitted:
    """Load, score, train, score again; everything worth keeping is in `folder` when this returns.

    Of several `ranks` each does so in a folder of its own; the first one's is the run.

    `listen` hears every event, one at a time; of a run that is `going_on`, as if it had never been stopped, what its
    folder has first. Training ends after the step in which `stop` is set, or a signal comes if it `catches_signals`,
    which only the main thread can. The caller holds the folder.
    """
    checkpoint = going_on.checkpoint if going_on else None
    tell = Teller(folder, listen, repeats=checkpoint is not None)
    folder.wind_back(checkpoint.journal_bytes if checkpoint and ranks.is_first else {})
    for event in folder.events():
        listen(event)
    if going_on is not None:
        tell(going_on.told)
    locking = accelerator.when_locking_is_refused(lambda: tell(Notice(UNLOCKED)))
    with locking, _naming_what_is_kept(ready.plan.device, folder):
        return _told(ready, folder, tell, checkpoint, stop, catches_signals, ranks)


def _told(
    ready: Ready,
    folder: RunDir,
    tell: "Teller",
    checkpoint: Checkpoint | None,
    stop: threading.Event | None,
    catches_signals: bool,
    ranks: Ranks,
) -> Fitted:
    """What `run` does, told as it happens."""
    prepare(ready.plan.device, ready.plan.budget.device_bytes)
    ledger = Ledger.begin(ready.plan.device)
    with _leaving_no_folder(folder):
        kind = base.read_config(ready.recipe.model).model_type
        with base.refusing_unfit(kind, "loading one"):
            loaded, engine = _load(ready, folder, ledger, tell, checkpoint, ranks)
        with base.refusing_unfit(kind, "a first pass through one"):
            ready = _probed(ready, folder, loaded, tell)
    together = OBJECTIVES[ready.recipe.train.objective].documents
    learner = Learner.of(loaded, engine, ledger, ready.plan, tell, together)
    rows = _rows(ready, learner)
    if checkpoint is None:
        _begin_by_rows(ready, learner, rows, tell)
    before = _base_score(ready, folder, learner, tell)
    if before is not None and before.pairs:
        ready = dataclasses.replace(ready, held_out=dataclasses.replace(ready.held_out, base=before.pairs))
        rows = _rows(ready, learner)  # whose held-out loss is against the base's
    tell(learner.measure("eval", 0))
    tell.repeats = False
    session = TrainingSession(ready.recipe, ready.plan, learner, rows, tell, folder, checkpoint, ranks)
    fitted = session.run(stop, catches_signals)
    tell(learner.measure("save", fitted.steps))
    if not fitted.was_stopped:
        after = _score("tuned", ready, learner, tell)
        told = memorised_told(ready.recipe, ready.prepared, loaded, tell, ranks)
        if before is not None and after is not None and ranks.is_first:
            scores = compare(before, after, ready.held_out, ready.recipe.evaluate, ready.recipe.train.seed)
            write_json(folder.scores, {**scores, "memorised": dataclasses.asdict(told) if told else None})
    if ranks.is_first:
        _keep_template(ready, folder)
        summary.write_summary(folder)
        model_card.write_card(folder)
    return fitted


def _keep_template(ready: Ready, folder: RunDir) -> None:
    """The recipe's chat template beside the adapter: who serves that on its base has the base's, or none."""
    if ready.recipe.model.chat_template is not None and folder.adapter.is_dir():
        write_text(folder.adapter / chat_templates.FILE, str(ready.tokenizer.chat_template))


class Teller:
    """Keeps an event in the run's folder, then hands it on; one at a time, as what a signal does is said by a thread.

    What a resumed run `repeats` of what was kept before goes where interruptions are kept.
    """

    def __init__(self, folder: RunDir, listen: Listener, repeats: bool):
        self.repeats = repeats
        self._folder, self._listen, self._one_at_a_time = folder, listen, threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._one_at_a_time:
            (self._folder.record_again if self.repeats else self._folder.record)(event)
            self._listen(event)


def _load(
    ready: Ready, folder: RunDir, ledger: Ledger, tell: Listener, checkpoint: Checkpoint | None, ranks: Ranks
) -> tuple[Loaded, Engine]:
    """The base with a fresh adapter, or that which it starts from, and the plan's memory techniques switched on."""
    recipe, plan = ready.recipe, ready.plan
    tell(Notice(f"loading {recipe.model.base}"))
    with ranks.one_before_others("base"):  # which the first leaves in the cache, quantised, where it reads it whole
        frozen = base.load_base(recipe.model, plan.device.name, plan.compute_dtype, plan.techniques, ranks)
    if not folder.lock.is_file():
        folder.write_lock(ready.lock(base.quantized_modules(frozen)))
    token_ids = trained_ids(ready.tokenizer, recipe.lora.train_tokens)
    for token_id in base.never_seen(frozen, ready.prepared.stop_token_ids[:1]):
        if token_id not in token_ids:
            tell(Notice(_never_seen_told(ready.tokenizer, token_id)))
    unseen = base.never_seen(frozen, token_ids)
    model = adapter.attach(frozen, recipe.lora, recipe.train.seed, token_ids)
    if unseen:
        named = ", ".join(ready.tokenizer.convert_ids_to_tokens(unseen))
        tell(Notice(f"the base was never trained on {named}: rows of it begin as the mean of all"))
        trained_rows.begin_as_mean(frozen, unseen)
    if start := StartAdapter.of(recipe.lora):
        start.put_on(model)
        tell(Notice(start.told(recipe.model)))
    if ready.prepared.train.weights is not None and not fused_cross_entropy.suits(model):
        raise ModelError(
            f"{recipe.model.base}: data.sources weigh differently, and the loss of a base with such a head is made"
            " where tokens have no weights. Leave out the weights; a share says how much of each is read."
        )
    tell(ledger.measure("load", 0, model))
    if checkpoint is None:
        _begin_by_weights(ready, model, tell, ranks)
    engine = Engine(model, ranks)
    engine.switch_to(plan.techniques)
    tell(ledger.measure("attach", 0, model, engine))
    return Loaded(model, ready.tokenizer, plan.device.name, plan.compute_dtype), engine


def _never_seen_told(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """That an answer ends with a token which the base does not know."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    told = (
        f"the base was never trained on {token}, which ends an answer, and an adapter on its layers leaves that as it"
        f' is: answers may not end. lora.train_tokens = ["{token}"] trains it'
    )
    is_other = tokenizer.eos_token_id not in (None, token_id)
    return f'{told}; model.chat_template = "alpaca" ends them with {tokenizer.eos_token}' if is_other else told


def _begin_by_weights(ready: Ready, model: PeftModel, tell: Listener, ranks: Ranks) -> None:
    """Have the adapter begin by what was rounded away, where the recipe asks for that."""
    init = LORA_INITS[ready.recipe.lora.init]
    if init.by_weights is None:
        return
    tell(Notice("the adapter begins by what rounding took from the weights"))
    checkpoint = BaseCheckpoint.open(base.base_folder(ready.recipe.model))
    names = checkpoint_names(ready.recipe.model, checkpoint)
    device = torch.device(ready.plan.device.name)

    def weights(name: str, layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        whole = names.assembled(f"{name}.weight", checkpoint.called)
        return whole.to(device, torch.float32), held(layer, device)

    init.by_weights(model, weights)
    _take_that_of_first(model, ranks)


def _begin_by_rows(ready: Ready, learner: Learner, rows: TrainingRows, tell: Listener) -> None:
    """Have the adapter begin by what passes over the first rows of training show, where the recipe asks for that."""
    init, ranks = LORA_INITS[ready.recipe.lora.init], learner.engine.ranks
    if init.by_rows is None:
        return
    numbers = rows.order(ready.recipe.train.seed).of_step(1, PASSES, 1)
    tell(Notice(f"the adapter begins by what {counted(len(numbers), 'training sequence')} show"))
    with learner.loaded.as_base():
        init.by_rows(
            learner.loaded.model,
            (rows.packs[number] for number in numbers),
            lambda pack: held_out_loss(learner.loaded, [pack], learner.recovery),
        )
    _take_that_of_first(learner.loaded.model, ranks)


def _take_that_of_first(model: PeftModel, ranks: Ranks) -> None:
    """Have every rank the adapter of the first: cards of several kinds round differently."""
    for parameter in adapter.trained_parameters(model) if ranks.size > 1 else ():
        flat = parameter.data.float().flatten()
        parameter.data.copy_(ranks.sum_in_order(flat if ranks.is_first else flat.zero_()).view_as(parameter))


@contextlib.contextmanager
def _naming_what_is_kept(device: Device, folder: RunDir) -> Iterator[None]:
    """A card that falls out in the middle becomes a MachineError that names the checkpoint to go on from."""
    try:
        yield
    except Exception as fault:
        said = card_faults.why_gone(fault)
        if said is None:
            raise
        newest, _ = checkpoint_files.newest_whole(folder.checkpoints)
        kept = f"The newest checkpoint is kept: {newest}" if newest else "There is no checkpoint yet"
        then = f"{kept}. Then go on: {tables.NextCommands.of(folder).resume}"
        raise MachineError(f"{card_faults.told(device.label, said)} {then}") from fault


@contextlib.contextmanager
def _leaving_no_folder(folder: RunDir) -> Iterator[None]:
    """A run that the user must put right before it can start leaves no folder, unless it has begun already."""
    try:
        yield
    except (UserError, RankLost) as fault:
        if fault.exit_code == UserError.exit_code and not folder.checkpoints.exists():
            shutil.rmtree(folder.path, ignore_errors=True)  # a rank's is gone with that of the first
        raise


def _probed(ready: Ready, folder: RunDir, loaded: Loaded, tell: Listener) -> Ready:
    """`ready`, its plan settled on one document a pass where packed documents would read each other in this base.

    Raises ModelError for a base that is not itself under packed attention, not even with one document.
    """
    vocabulary = packing_probe.vocabulary_of(ready.prepared.train)
    probed = packing_probe.probe(loaded, vocabulary, lambda document: document_loss(loaded, document))
    folder.write_lock(dataclasses.replace(folder.read_lock(), packing_probe=probed))
    packing_probe.refuse_another(probed, ready.recipe.model.base)
    for why in attention_kernels.varlen_faults():
        tell(Notice(f"torch's varlen_attn does not work here ({why}): packed documents are padded to powers of two"))
    if not probed.leaks:
        return ready
    packing_probe.refuse_pairs(ready.recipe)
    reason = f"documents in a pack read each other in this base (logits move by {format_percent(probed.moved_in_pack)})"
    tell(Notice(f"{reason}: each has a pass of its own, steps and losses stay those of packs"))
    ready = dataclasses.replace(ready, plan=ready.plan.with_documents_apart(reason))
    write_json(folder.plan, ready.plan.as_json())
    return ready


def _base_score(ready: Ready, folder: RunDir, learner: Learner, tell: Teller) -> Score | None:
    """The base's score, measured once: a run that goes on has it in its folder, of several ranks the first."""
    ranks, is_known = learner.engine.ranks, tell.repeats and folder.base_score.is_file()
    known = folder.read_as(folder.base_score, Score.from_json) if is_known else None
    told = ranks.broadcast(dataclasses.asdict(known) if known else None)
    if told is not None:
        return Score.from_json(told)
    lora = ready.recipe.lora
    changes_answers = LORA_INITS[lora.init].changes_answers or bool(lora.train_tokens)
    with learner.loaded.as_base() if changes_answers else contextlib.nullcontext():
        score = _score("base", ready, learner, tell)
    if score is not None and ranks.is_first:
        write_json(folder.base_score, dataclasses.asdict(score))
    return score


def _score(who: str, ready: Ready, learner: Learner, tell: Listener) -> Score | None:
    wanted, ranks = ready.recipe.evaluate, learner.engine.ranks
    return score_told(who, learner.loaded, ready.held_out, wanted, learner.recovery, tell, ranks)


def _rows(ready: Ready, learner: Learner) -> TrainingRows:
    """The packs to train on, and the held-out loss of the model as it then stands."""
    examples, packs, held_out = ready.prepared.train, ready.prepared.train_packs, ready.held_out

    def places(numbers: Sequence[int]) -> list[str]:
        return [examples[i].place for number in numbers for i in packs[number]]

    loss = None
    if held_out.packs:
        largest = max(held_out.packs, key=lambda pack: len(pack["input_ids"]))
        loss = HeldOutLoss(
            rows=len(held_out.examples),
            of_all=lambda: measured(learner.loaded, held_out, learner.recovery, learner.engine.ranks)[:2],
            of_largest=lambda: loss_and_pairs(learner.loaded, [largest], held_out.learned, learner.recovery)[0],
        )
    answers = _answers_along_the_way(ready, learner) if held_out.watched else None
    return TrainingRows(packed_rows(examples, packs), loss, answers, places)


def _answers_along_the_way(ready: Ready, learner: Learner) -> Callable[[], list[tuple[str, str]]]:
    """The prompts that are watched, with what the model as it then stands answers; each rank has a share of them."""
    held_out, ranks, most = ready.held_out, learner.engine.ranks, ready.recipe.evaluate.max_new_tokens

    def answers() -> list[tuple[str, str]]:
        prompts = ranks.share([watched.ids for watched in held_out.watched])
        told = ranks.in_order(watched_answers(learner.loaded, prompts, held_out.stop_token_ids, most))
        return [(watched.text, text) for watched, text in zip(held_out.watched, told, strict=True)]

    return answers

"""What a recipe may say: one frozen model per TOML table, one sentence, unit, range and reasoned default per field."""

import re
from collections.abc import Callable
from os.path import isabs
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic_core import PydanticCustomError

from qtune.data.formats import FORMATS
from qtune.evaluate.metrics import METRICS
from qtune.memory.techniques import TECHNIQUES
from qtune.model import lora_inits
from qtune.model.lora_variants import LORA_VARIANTS
from qtune.train.objectives import OBJECTIVES
from qtune.train.optimizers import ADAMW_RATE, OPTIMIZERS
from qtune.train.trackers import TRACKERS
from qtune.units import MAX_COUNT, parse_bytes, parse_seconds


class Table(BaseModel):
    """A TOML table: unknown keys are faults, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, str_strip_whitespace=True, allow_inf_nan=False)


def _layer_names(value: Any) -> Any:
    """A TOML array as the tuple a strict model wants; one sentence for all that is neither word nor list of names."""
    if value == "all-linear":
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name.strip() for name in value):
        return tuple(value)
    raise PydanticCustomError("expected", '"all-linear" or a list of layer names such as ["q_proj", "v_proj"]')


def _tokens(value: Any) -> Any:
    """A TOML array of tokens, each once, as a tuple."""
    is_list = isinstance(value, list | tuple) and all(isinstance(token, str) and token for token in value)
    if is_list and len(set(value)) == len(value):
        return tuple(value)
    raise PydanticCustomError("expected", 'a list of tokens, each once, such as ["<|im_start|>", "<|im_end|>"]')


def _pattern(name: str) -> str:
    """The end of a layer's name, or a regular expression for one."""
    try:
        re.compile(name)
    except re.error as fault:
        raise PydanticCustomError(
            "expected",
            "the end of a layer's name such as v_proj, or a regular expression for one ({fault})",
            {"fault": str(fault)},
        ) from None
    return name


def _known_init(name: Any) -> Any:
    """One of the inits; of those that people ask for and that are not done, why."""
    if isinstance(name, str) and name in lora_inits.REFUSED:
        told = {"words": ", ".join(lora_inits.LORA_INITS), "why": lora_inits.REFUSED[name]}
        raise PydanticCustomError("expected", "one of {words} ({why})", told)
    return name


def _auto_or_size(value: Any) -> Any:
    """ "auto" or a size such as "6GiB"."""
    if value == "auto" or (isinstance(value, str) and parse_bytes(value) is not None):
        return value
    raise PydanticCustomError("expected", '"auto" or a size such as "6GiB" or "7.5 GiB"')


def _steps_or_duration(value: Any) -> Any:
    """A whole number of steps, or a duration such as "10min"."""
    is_steps = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_COUNT
    if is_steps or (isinstance(value, str) and parse_seconds(value) is not None):
        return value
    raise PydanticCustomError("expected", 'a whole number of steps, or a duration such as "90s", "10min" or "1.5h"')


def _rows_or_prompts(value: Any) -> Any:
    """A number of held-out rows, or a TOML array of prompts as the tuple a strict model wants."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_WATCHED:
        return value
    is_some = isinstance(value, list | tuple) and 1 <= len(value) <= MOST_WATCHED
    if is_some and all(isinstance(prompt, str) and prompt.strip() for prompt in value):
        return tuple(value)
    raise PydanticCustomError(
        "expected",
        f'a number of held-out rows, 0 to {MOST_WATCHED}, or a list of as many prompts such as ["Who are you?"]',
    )


def _list_of_tables(value: Any) -> Any:
    """A TOML array of tables as the tuple a strict model wants."""
    if isinstance(value, list | tuple):
        return tuple(value)
    raise PydanticCustomError("expected", "tables, each begun with [[data.sources]]")


MOST_WATCHED = 20  # prompts that are answered at every held-out loss; more are not read
HOST_FRACTION = 0.8  # of the host's free memory: the rest is for data, the libraries and other programs
MAX_TOKENS = 4_194_304  # 2^22; the planner finds the bound of a card far below
NonEmpty = Annotated[str, Field(min_length=1)]
Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[float, Field(gt=0, le=4096)]
LayerPattern = Annotated[NonEmpty, AfterValidator(_pattern)]
if TYPE_CHECKING:
    FormatName = str
    MetricName = str
    InitName = str
    ObjectiveName = str
    OptimizerName = str
    TrackerName = str
else:
    FormatName = Literal["auto", *FORMATS]
    MetricName = Literal["none", *METRICS]
    InitName = Annotated[Literal[tuple(lora_inits.LORA_INITS)], BeforeValidator(_known_init)]
    ObjectiveName = Literal[tuple(OBJECTIVES)]
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    TrackerName = Literal[tuple(TRACKERS)]


class Model(Table):
    """The frozen base."""

    base: NonEmpty = Field(
        description="Hub name or local folder of the base model; `demo` is the small one inside qtune.",
        examples=["Qwen/Qwen3-4B-Instruct-2507"],
    )
    revision: NonEmpty | None = Field(
        None, description="Branch, tag or commit of a hub model; unset takes the default branch and records its commit."
    )
    quantization: Literal["nf4", "none"] = Field(
        "nf4", description="How the base's linear layers are held; nf4 takes 4.13 bits a weight and is why a card fits."
    )
    double_quantization: bool = Field(
        True, description="Quantise the NF4 block scales too; saves 0.37 bits a weight at no measured loss (QLoRA)."
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="What the arithmetic runs in; auto is bfloat16 where the machine has it, else float32."
    )
    chat_template: NonEmpty | None = Field(
        None,
        description="`chatml`, `llama3`, `alpaca`, `plain`, or a Jinja file; unset keeps the base's own chat template.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model; off, because it can do anything you can."
    )


class _Pair(Table):
    """What every adapter has."""

    rank: Rank = Field(16, description="Inner dimension of each adapter pair; 16 is enough for most tasks.")
    alpha: Alpha = Field(
        32.0, description="Strength: the update is scaled by alpha/rank (alpha/sqrt(rank) with rslora)."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of adapter inputs zeroed in training; 0, since few epochs seldom overfit."
    )
    targets: Annotated[Literal["all-linear"] | tuple[NonEmpty, ...], BeforeValidator(_layer_names)] = Field(
        "all-linear",
        description="Names of the linear layers that get an adapter; all of them but the head learns best (QLoRA).",
    )


_VARIANTS: dict[str, Any] = {
    each.name: (bool, Field(False, description=each.description)) for each in LORA_VARIANTS.values()
}
_Variants: Any = create_model("_Variants", __base__=_Pair, __doc__="A setting a variant.", **_VARIANTS)


class Lora(_Variants):  # a setting for each variant of LoRA that there is
    """The adapter that is trained."""

    start_from: NonEmpty | None = Field(
        None,
        description="An adapter to go on from: a PEFT folder, a run's folder or a hub name, on the same base; its rank,"
        " alpha, targets and variant are taken over. Unset starts from none.",
    )
    master_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="What adapter weights are kept in; bfloat16 loses half of the small updates at 2e-5."
    )
    train_tokens: Annotated[tuple[NonEmpty, ...], BeforeValidator(_tokens)] = Field(
        (),
        description="Tokens whose rows of the embedding and the output head are trained, too, such as markers of a chat"
        " template that the base has not learned; all other rows stay as they are.",
    )
    init: InitName = Field(
        lora_inits.DEFAULT,
        description="What A and B begin from; the base stays as it is. "
        + "; ".join(f"{name}: {each.use}" for name, each in lora_inits.LORA_INITS.items())
        + ".",
    )
    rank_pattern: dict[LayerPattern, Rank] = Field(
        {},
        description="Other ranks, by the end of a layer's name or a regular expression for it, as peft reads them:"
        " `v_proj = 32`.",
    )
    alpha_pattern: dict[LayerPattern, Alpha] = Field({}, description="Other alphas, by the same names.")


class Columns(Table):
    """Which column of the data holds what; only needed where the names are not recognised."""

    prompt: NonEmpty | None = Field(None, description="Column with what the user asks.")
    completion: NonEmpty | None = Field(None, description="Column with what the model is to answer.")
    input: NonEmpty | None = Field(None, description="Column with extra input, put under the prompt (alpaca).")
    system: NonEmpty | None = Field(None, description="Column with the row's own system prompt.")
    messages: NonEmpty | None = Field(None, description="Column with the list of messages.")
    chosen: NonEmpty | None = Field(None, description="Column with the answer that is to be preferred, of a pair.")
    rejected: NonEmpty | None = Field(None, description="Column with the answer that it is preferred to.")
    text: NonEmpty | None = Field(None, description="Column with plain text.")
    thought: NonEmpty | None = Field(None, description="Column with what is thought before the completion.")
    tools: NonEmpty | None = Field(None, description="Column with the tools at hand.")
    check: NonEmpty | None = Field(
        None, description="Column with what a metric holds the answer against, such as tests; never shown to the model."
    )

    @property
    def mapped(self) -> dict[str, str]:
        """The columns that are named, by field."""
        return {field: column for field, column in self if column is not None}


class DataCheck(Table):
    """How much `qtune data check` lets pass before it calls the data faulty."""

    max_dropped_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description='Share of rows that may be of no use with on_bad_row = "drop"; more points to a wrong export.',
    )
    max_long_fraction: float = Field(
        0.05, ge=0, le=1, description="Share of rows that may be over max_tokens; with more, it is the wrong limit."
    )
    max_duplicate_fraction: float = Field(
        0.1, ge=0, le=1, description="Share of rows that may repeat another; they count as often as they are there."
    )
    max_overlap_fraction: float = Field(
        0.0, ge=0, le=1, description="Share of held_out rows that may be trained on too; each one flatters the score."
    )
    near_duplicate_similarity: float = Field(
        0.85,
        ge=0.7,
        le=1,
        description="Share of 5-character runs two rows have in common (Jaccard, by MinHash) to be called nearly the"
        " same; 0.85 is a word or two changed in a sentence, and under 0.7 many pairs would be missed.",
    )


class DataSource(Table):
    """One of several sources, each with its own shape; what it leaves unsaid is as in [data]."""

    train: NonEmpty = Field(
        description="A file, folder, pattern of files or hub dataset, as in data.train.", examples=["data/chats.jsonl"]
    )
    train_split: NonEmpty | None = Field(None, description="Split of a hub dataset.")
    subset: NonEmpty | None = Field(None, description="Configuration of a hub dataset, table or sheet.")
    format: FormatName | None = Field(None, description="How a row of this source is read.")
    columns: Columns | None = Field(None, description="This source's column names.")
    system: NonEmpty | None = Field(None, description="System prompt of its rows that have none of their own.")
    max_rows: int | None = Field(None, ge=1, le=MAX_COUNT, description="Read at most this many of its rows, a cap.")
    held_out_fraction: float | None = Field(
        None, ge=0, lt=1, description="Share of its rows kept apart when data.held_out is unset; 0 keeps none."
    )
    share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of all tokens to train on that it is to be, by rows that the seed draws, none twice; sources"
        " without one are taken whole. Where all have one they count by their sum.",
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=100,
        description="What a trained token of it counts for in the mean that the loss is, beside 1 of the others.",
    )

    @property
    def said(self) -> dict[str, Any]:
        """What of it has the place of a setting in [data]."""
        return {name: value for name, value in self if value is not None and name not in ("share", "weight")}


class Data(Table):
    """What is learned from."""

    train: NonEmpty | None = Field(
        None,
        description="A .jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt or .md file, also compressed (.jsonl.gz); a"
        " SQLite database (.db, .sqlite, .sqlite3) or Excel workbook (.xlsx); a folder of texts, or one that"
        " save_to_disk of datasets wrote; a pattern of files (data/*.jsonl); or a hub dataset's name. Needed, unless"
        " there are [[data.sources]].",
        examples=["data/train.jsonl"],
    )
    sources: Annotated[tuple[DataSource, ...], BeforeValidator(_list_of_tables)] = Field(
        (), description="Several sources in place of train, a [[data.sources]] table each, mixed by the seed."
    )
    train_split: NonEmpty = Field("train", description="Split of a hub dataset; files have none.")
    subset: NonEmpty | None = Field(
        None,
        description="Configuration of a hub dataset, table of a SQLite database or sheet of a workbook; unset takes the"
        " only one, of a workbook the first.",
    )
    streaming: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether a hub dataset is read over the network without being downloaded; auto does so over 10 GB."
        " The tokens are kept either way.",
    )
    held_out: NonEmpty | None = Field(
        None,
        description="A file (or hub dataset) never trained on; unset takes held_out_fraction of the training rows.",
    )
    held_out_split: NonEmpty = Field("test", description="Split of a hub dataset named in held_out.")
    held_out_fraction: float = Field(
        0.05, ge=0, lt=1, description="Share of the training rows kept apart when held_out is unset; 0 keeps none."
    )
    format: FormatName = Field(
        "auto",
        description="How a row is read; auto recognises it by its columns. "
        + "; ".join(f"{name}: {each.description}" for name, each in FORMATS.items())
        + ".",
    )
    columns: Columns = Field(Columns(), description="Maps this data's column names to the ones qtune knows.")
    system: NonEmpty | None = Field(None, description="A system prompt put before every row that has none of its own.")
    thoughts: Literal["train", "train_all", "show", "drop"] = Field(
        "train",
        description="What becomes of thoughts before an answer: trained, only read, or left out. An empty thinking"
        " block is trained with train_all alone, as it teaches not to think.",
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="Which answers of a conversation are trained: all, as each is right, or the last alone."
    )
    max_rows: int | None = Field(None, ge=1, le=MAX_COUNT, description="Read at most this many rows; unset reads all.")
    max_tokens: int = Field(
        2048,
        ge=8,
        le=MAX_TOKENS,
        description="Longest sequence in tokens, and the size of a pack; memory grows with it.",
    )
    on_long: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description="What to do with a row over max_tokens; drop, because a cut answer teaches not to finish. A text"
        " is cut into pieces instead, and none of it is lost.",
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="What to do with a row that cannot be used; error, because it seldom comes alone."
    )
    packing: bool = Field(
        True, description="Join short rows into full sequences that cannot see one another; often twice as fast."
    )
    check: DataCheck = Field(DataCheck(), description="What `qtune data check` lets pass.")

    @property
    def parts(self) -> "dict[str, Data]":
        """Each source as if it were all there is, by the key of its table: "data.sources.0", or "data" for the one that
        data.train names."""
        if not self.sources:
            return {"data": self}
        return {
            f"data.sources.{number}": self.model_copy(update={"sources": (), **each.said})
            for number, each in enumerate(self.sources)
        }

    @property
    def title(self) -> str:
        """What data.train names; of several sources the names of their files, without their folders."""
        if not self.sources:
            return str(self.train)
        return ", ".join(PurePath(each.train).name if isabs(each.train) else each.train for each in self.sources)


def _of_optimizer(setting: str) -> Callable[[dict[str, Any]], Any]:
    """The value that the optimizer has for a recipe that names none. Some versions of pydantic ask for it also where
    another setting is at fault."""
    return lambda settled: getattr(OPTIMIZERS[settled.get("optimizer", "adamw")], setting)


_OTHERS = {name: each.learning_rate for name, each in OPTIMIZERS.items() if each.learning_rate != ADAMW_RATE}
_OWN_RATES = ", ".join([f"{ADAMW_RATE:g}", *(f"{rate:g} for {name}" for name, rate in _OTHERS.items())])


_UNSCHEDULED = [name for name, each in OPTIMIZERS.items() if each.schedule == "constant"]


class Train(Table):
    """How long, how fast, in what portions."""

    objective: ObjectiveName = Field(
        "sft",
        description="What is learned from rows: "
        + "; ".join(f"{name} {each.description}" for name, each in OBJECTIVES.items())
        + ".",
    )
    beta: float = Field(
        0.1,
        gt=0,
        le=100,
        description="Of dpo how strongly it is held to the base, of orpo what a preference weighs; 0.1, as in most of"
        " what the papers tried.",
    )
    epochs: float = Field(1.0, gt=0, le=1000, description="Passes over the training rows; max_steps may end it sooner.")
    max_steps: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="Optimizer steps at the most; unset leaves it to epochs."
    )
    optimizer: OptimizerName = Field(
        "adamw_8bit",
        description="What takes the steps; 8-bit AdamW holds 2 bytes a trained weight, the paged one may spill to the"
        " host and is slower, and the others are for those who want to try them.",
    )
    learning_rate: float = Field(
        default_factory=_of_optimizer("learning_rate"),
        json_schema_extra={"default": ADAMW_RATE},
        gt=0,
        le=0.1,
        description=f"Peak step size of the adapter; unset is what suits the optimizer: {_OWN_RATES}.",
    )
    schedule: Literal["cosine", "linear", "constant", "wsd", "cosine_restarts"] = Field(
        default_factory=_of_optimizer("schedule"),
        json_schema_extra={"default": "cosine"},
        description="How the learning rate falls after warm-up; wsd stays at the peak first, cosine_restarts falls"
        f" again and again. Unset it is constant with {', '.join(_UNSCHEDULED)}.",
    )
    floor_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of its peak that the learning rate falls to; 0 ends as small as can be."
    )
    decay_fraction: float = Field(
        0.2, gt=0, le=1, description="Share of the steps, the last ones, in which wsd falls; 0.2 is enough."
    )
    cycles: int = Field(2, ge=1, le=1000, description="How often cosine_restarts falls, each time from the peak.")
    warmup_fraction: float = Field(
        0.03, ge=0, le=0.5, description="Share of the steps in which the learning rate rises, evenly, to its peak."
    )
    lora_plus_ratio: float = Field(
        1.0,
        ge=1,
        le=256,
        description="How many times the learning rate of A that of B is (LoRA+); the paper has 16, at half the rate.",
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="The optimizer's decay; 0, as adapters are small already.")
    neftune_alpha: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Noise on the embeddings of training passes (NEFTune); 5 is the paper's, 0 is none.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm; tames odd batches.")
    micro_batch: int = Field(
        1, ge=1, le=4096, description="Sequences (packs, with packing) in one forward pass; memory grows with it."
    )
    gradient_accumulation: int = Field(
        8, ge=1, le=4096, description="Forward passes per optimizer step; costs no memory."
    )
    eval_every: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="Steps between held-out losses; unset measures ten times in a run."
    )
    patience: int | None = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        description="Held-out losses in a row without a better one that end training; unset takes all steps.",
    )
    log_every: int = Field(1, ge=1, le=MAX_COUNT, description="Steps between log lines and dashboard points.")
    seed: int = Field(0, ge=0, le=MAX_COUNT, description="Seed of the split, the data order and the adapter's start.")

    @property
    def learns_pairs(self) -> bool:
        """Whether a row is a pair of answers."""
        return OBJECTIVES[self.objective].learns_pairs


Size = Annotated[str, BeforeValidator(_auto_or_size)]


class _Budgets(Table):
    """What a run may take."""

    budget: Size = Field(
        "auto", description='Device memory the run may take, such as "6GiB"; auto is what is free when it starts.'
    )
    host_budget: Size = Field(
        "auto",
        description='Host memory the techniques may take, such as "16GiB"; auto is'
        f" {100 * HOST_FRACTION:.0f} % of what is free.",
    )


_SETTINGS: dict[str, Any] = {
    each.key: (each.setting, Field("auto", description=each.description)) for each in TECHNIQUES.values()
}
_Techniques: Any = create_model("_Techniques", __base__=_Budgets, __doc__="A setting a technique.", **_SETTINGS)


class Memory(_Techniques):  # a setting for each technique that there is
    """How the run is made to fit. Left alone, the plan climbs as far as it must, cheapest technique first."""

    rehearse: bool = Field(
        True, description="Run the largest batch once before the first step, so that a wrong forecast costs nothing."
    )


class Save(Table):
    """Checkpoints, from which a run that was stopped goes on."""

    every: Annotated[int | str, BeforeValidator(_steps_or_duration)] = Field(
        "10min",
        description='Steps (a number) or time ("10min") between checkpoints; what is lost at a power cut is no more.',
    )
    keep: int = Field(
        2,
        ge=1,
        le=1000,
        description="Newest checkpoints kept, beside that of the best held-out loss; 2 survive a bad one.",
    )
    result: Literal["last", "best"] = Field(
        "last",
        description="Which step's adapter is scored, merged and exported: the last, or that of the best held-out loss.",
    )


class Evaluate(Table):
    """The score before and after."""

    metric: MetricName = Field(
        "token_f1",
        description="How an answer is scored 0-1; "
        + ", ".join(f"{metric.name} {metric.use}" for metric in METRICS.values())
        + ".",
    )
    rows: int = Field(
        100, ge=0, le=MAX_COUNT, description="Held-out rows that are answered and scored; 0 leaves the score out."
    )
    max_new_tokens: int = Field(64, ge=1, le=8192, description="Longest answer in tokens.")
    samples: int = Field(
        5, ge=0, le=100, description="Answers shown, drawn by the seed, and as many of those that scored lowest."
    )
    watch: Annotated[int | tuple[NonEmpty, ...], BeforeValidator(_rows_or_prompts)] = Field(
        0,
        description="How many held-out rows, or which prompts of your own, are answered at every held-out loss, in at"
        " most 64 tokens, to be seen while it trains; 0 answers none and costs nothing.",
    )
    general: NonEmpty = Field(
        "builtin",
        description="Plain text, a document a line, whose loss before and after tells what was forgotten: a .txt file,"
        ' "builtin" (dictionary entries) or "none".',
    )
    canaries: int = Field(
        0,
        ge=0,
        le=1000,
        description="Made-up secrets planted in the training rows, to see whether the model tells them.",
    )
    canary_repeats: int = Field(
        1, ge=1, le=1000, description="Rows that hold each of them; 1 is what anything that stands there once risks."
    )


class Report(Table):
    """Where else the run is told, beside the dashboard and the run folder."""

    to: TrackerName | None = Field(
        None, description="An experiment tracker that gets the losses as they come; unset tells none."
    )


class DemoModel(Table):
    """What --demo puts in [model]."""

    base: NonEmpty = Field("demo", description="Base used by --demo.")
    chat_template: NonEmpty | None = Field(
        None, description="A name or a Jinja file as in [model]; unset keeps what the recipe or base has."
    )


class DemoData(Table):
    """What --demo puts in [data]: other rows, and how to read them."""

    train: NonEmpty = Field(description="Training rows of --demo.", examples=["data/demo_train.jsonl"])
    held_out: NonEmpty | None = Field(None, description="Held-out rows of --demo.")
    format: FormatName = Field("auto", description="Format of the demo rows.")
    columns: Columns = Field(Columns(), description="Column names of the demo rows.")
    max_tokens: int = Field(512, ge=8, le=MAX_TOKENS, description="Longest sequence of --demo, in tokens.")


class DemoTrain(Table):
    """What --demo puts in [train]: the length of the run, and the step size so small a base needs."""

    epochs: float = Field(gt=0, le=1000, description="Passes over the demo rows.", examples=[2])
    learning_rate: float | None = Field(None, gt=0, le=0.1, description="Step size; unset keeps the recipe's.")
    gradient_accumulation: int | None = Field(None, ge=1, le=4096, description="Unset keeps the recipe's.")
    eval_every: int | None = Field(None, ge=1, le=MAX_COUNT, description="Unset keeps the recipe's.")


class DemoEvaluate(Table):
    """What --demo puts in [evaluate]: a metric that suits the demo rows."""

    metric: MetricName = Field(description="How a demo answer is scored.", examples=["token_f1"])
    rows: int = Field(100, ge=0, le=MAX_COUNT, description="Held-out demo rows that are answered and scored.")
    max_new_tokens: int = Field(16, ge=1, le=8192, description="Longest demo answer in tokens.")


class Demo(Table):
    """What `--demo` replaces so that the recipe runs in minutes on any machine; nothing else changes."""

    model: DemoModel = Field(DemoModel(), description="Base of the demo.")
    data: DemoData = Field(description="Rows of the demo.")
    train: DemoTrain = Field(description="Length of the demo.")
    evaluate: DemoEvaluate | None = Field(None, description="Score of the demo.")


class Recipe(Table):
    """One fine-tuning run, as the user asks for it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")] = Field(
        description="Short name of the run: a-z, 0-9, - and _; run folders start with it.", examples=["medical"]
    )
    about: str = Field("", description="One sentence on what the adapter is for.")
    model: Model = Field(description="The frozen base.")
    lora: Lora = Field(Lora(), description="The adapter.")
    data: Data = Field(description="What is learned from.")
    train: Train = Field(Train(), description="How it is trained.")
    memory: Memory = Field(Memory(), description="How it is made to fit.")
    save: Save = Field(Save(), description="When checkpoints are written.")
    evaluate: Evaluate = Field(Evaluate(), description="How it is scored.")
    report: Report = Field(Report(), description="Where else it is told.")
    demo: Demo | None = Field(None, description="What --demo replaces.")

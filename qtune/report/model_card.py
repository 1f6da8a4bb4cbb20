"""The model card of a run, in the format of the Hugging Face hub: a YAML header, then Markdown.

It is made to be shown: no row of the data, no system prompt, no folder of this machine is in it.
"""

from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from qtune.atomic_files import write_text
from qtune.evaluate.metrics import label
from qtune.model.lora_inits import DEFAULT
from qtune.model.lora_variants import LORA_VARIANTS, PLAIN
from qtune.report import conclusions, markdown, memory_bar, run_record, serving_snippets, summary, tables
from qtune.report.run_record import Record
from qtune.rundir import RunDir
from qtune.units import format_count, format_percent, format_rate, format_seconds

What = Literal["adapter", "merged"]
FILE = "README.md"


EXPERTS_IN_16_BITS = (
    "The experts of the base were in 4 bits while this adapter was trained. transformers leaves them in 16 bits, also"
    " where it is told to load the rest in 4, so what it answers differs a little from what was measured here. A merge"
    " onto the dequantised base has the experts as they were."
)


def write_card(run: RunDir) -> None:
    """README.md in the run's adapter folder, which peft leaves a blank form in; nothing where no adapter was saved."""
    found = run_record.read(run)
    if found.has_adapter and found.lock:
        write_text(run.adapter / FILE, card(found))


def card(found: Record, what: What = "adapter", address: str | None = None) -> str:
    """The card of the adapter, or of the model that it was merged into. `found` has a lock.

    `address` is the name on the hub that the code in it loads from; unset leaves a place to fill in.
    """
    assert found.lock is not None, "a card tells what a run stands on"
    address = address or f"OWNER/{found.name}"
    sections = (
        _head(found, what),
        _results(found),
        _use(found, what, address),
        _training(found),
        _merge(found) if what == "merged" else [],
        _limits(found),
    )
    lines = [line for section in sections for line in section]
    return f"---\n{_header(found, what).strip()}\n---\n\n" + "\n".join(lines).rstrip() + "\n"


def _header(found: Record, what: What) -> str:
    """The YAML that the hub reads."""
    assert found.lock is not None
    results = _eval_results(found)
    values: dict[str, Any] = {
        "base_model": found.base_on_hub,
        "base_model_relation": ("adapter" if what == "adapter" else "finetune") if found.base_on_hub else None,
        "library_name": "peft" if what == "adapter" else "transformers",
        "license": found.base_license,
        "datasets": _hub_datasets(found) or None,
        "pipeline_tag": "text-generation",
        "tags": ["lora", *(["qlora"] if found.lock.quantization else []), "qtune"],
        "model_name": found.name if results else None,
        "eval_results": results or None,
    }
    return ModelCardData(**values).to_yaml()


def _data(found: Record) -> dict[str, Any]:
    assert found.lock is not None
    return dict(found.lock.recipe.get("data", {}))


def _hub_datasets(found: Record) -> list[str]:
    """The names of the data that is on the hub; files of this machine are nobody else's business."""
    data = _data(found)
    names = (data.get("train"), *(each["train"] for each in data.get("sources", ())), data.get("held_out"))
    return list(dict.fromkeys(name for name in names if name and not Path(name).is_absolute()))


def _eval_results(found: Record) -> list[EvalResult]:
    """The tuned model's loss and score on the held-out rows."""
    scores = found.scores
    if not scores:
        return []
    figures = {"loss": ("held-out loss", scores["tuned"]["held_out_loss"])}
    if scores["tuned"]["score"] is not None:
        figures[scores["metric"]] = (str(label(scores["metric"])), scores["tuned"]["score"])
    data = _data(found)
    name = data.get("held_out") or data.get("train") or "held-out rows"
    kind = "held-out-rows" if Path(name).is_absolute() else name
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=f"{serving_snippets.folder_name(name)}, held-out rows",
            metric_type=metric,
            metric_name=title,
            metric_value=round(value, 4),
        )
        for metric, (title, value) in figures.items()
    ]


def _head(found: Record, what: What) -> list[str]:
    assert found.lock is not None
    about = found.lock.recipe.get("about")
    is_a = "A LoRA adapter for" if what == "adapter" else "A LoRA adapter merged into"
    lines = [f"# {markdown.inline(found.name)}", ""]
    lines += [markdown.inline(about).rstrip(".") + ".", ""] if about else []
    how = "QLoRA" if found.lock.quantization else "LoRA"
    return [*lines, f"{is_a} {_base(found)}, trained with qtune ({how}).", ""]


def _base(found: Record) -> str:
    if found.base_on_hub:
        return f"[{found.base_on_hub}](https://huggingface.co/{found.base_on_hub})"
    return markdown.inline(serving_snippets.base_title(found))


def _results(found: Record) -> list[str]:
    rows = tables.result_rows(found)
    if not rows:
        return ["It was not scored.", ""]
    told = conclusions.text(found)
    said = [markdown.inline(told), ""] if told else []
    lines = ["## Base and tuned", "", *said, *markdown.table(("", "base → tuned"), rows)]
    if found.scores and found.scores.get("difference"):
        lines += ["Intervals are 95 %; that of the difference is a paired bootstrap over the same rows.", ""]
    return lines


def _use(found: Record, what: What, address: str) -> list[str]:
    base, has_towers = found.base_on_hub or "FOLDER_OF_THE_BASE", serving_snippets.has_towers(found)
    if what == "merged":
        snippet = serving_snippets.transformers_snippet(address, has_towers)
        return ["## Use", "", *markdown.fenced(snippet, "python"), ""]
    lines = ["## Use", "", *markdown.fenced(serving_snippets.peft_snippet(found, base, address), "python"), ""]
    command = serving_snippets.vllm_command(found, base, address)
    assert found.lock is not None
    if any(name.split(".")[-2:-1] == ["experts"] for name in found.lock.quantized_modules):
        lines += [EXPERTS_IN_16_BITS, ""]
    return [*lines, *markdown.fenced(command, "sh"), ""] if command else lines


def _training(found: Record) -> list[str]:
    return ["## Training", "", *markdown.table(("", ""), _training_rows(found))]


def _training_rows(found: Record) -> list[tuple[str, str]]:
    lock, data = found.lock, found.data
    assert lock is not None
    rows = [("base weights", f"SHA-256 {lock.base.sha256}")]
    if start := serving_snippets.started_from(found):
        rows.append(("started from", f"{start}; the base in the figures above has it on"))
    if lock.quantization:
        rows.append(("base held in", str(lock.quantization)))
    rows += _setting_rows(lock.recipe)
    if data:
        rows.append(
            ("rows", f"{data['train_rows']:,} to train on, {data['held_out_rows']:,} held out ({data['format']})")
        )
        rows += tables.canary_rows(data)
        rows.append(("tokens", f"{data['tokens']:,}, of which {data['trained_tokens']:,} trained"))
    rows.append(("data", f"SHA-256 {lock.data_sha256}"))
    rows += _cost_rows(found)
    return [*rows, ("seed", str(lock.seed)), ("versions", summary.versions(lock))]


def _setting_rows(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    lora, train = recipe.get("lora"), recipe.get("train")
    rows = []
    if lora:
        kind = next((each.title for name, each in reversed(LORA_VARIANTS.items()) if lora.get(name)), PLAIN)
        targets = lora["targets"] if isinstance(lora["targets"], str) else ", ".join(lora["targets"])
        others = "".join(
            f", {what} {value:g} in {name}"
            for what in ("rank", "alpha")
            for name, value in lora.get(f"{what}_pattern", {}).items()
        )
        rows.append(("adapter", f"{kind}, rank {lora['rank']}, alpha {lora['alpha']:g}{others}, on {targets}"))
        if lora.get("init", DEFAULT) != DEFAULT:
            rows.append(("begun by", lora["init"]))
        if lora.get("train_tokens"):
            rows.append(("rows of tokens", ", ".join(lora["train_tokens"])))
    if train:
        batch = train["micro_batch"] * train["gradient_accumulation"]
        sequences = "1 sequence" if batch == 1 else f"{batch:,} sequences"
        ratio = train.get("lora_plus_ratio", 1.0)
        of_b = f" and {format_rate(ratio * train['learning_rate'])} of B" if ratio != 1 else ""
        noise = f", NEFTune at {train['neftune_alpha']:g}" if train.get("neftune_alpha") else ""
        rate = f"{format_rate(train['learning_rate'])}{of_b}, {train['schedule']}{noise}"
        rows.append(("optimizer", f"{train['optimizer']}, learning rate {rate}"))
        rows.append(("batch", f"{sequences} of at most {recipe['data']['max_tokens']:,} tokens"))
    return rows


def _cost_rows(found: Record) -> list[tuple[str, str]]:
    rows = []
    if found.steps:
        took = f" in {format_seconds(found.train_seconds)}" if found.train_seconds is not None else ""
        pace = found.tokens_per_second
        speed = f", {format_count(pace)} tokens/s" if pace is not None else ""
        rows.append(("steps", f"{found.steps[-1].step:,}{took}{speed}"))
    if found.memory:
        rows.append((f"peak {memory_bar.title(found.memory)}", memory_bar.peak_of_total(found.memory)))
    return rows


def _merge(found: Record) -> list[str]:
    """How close the merged model is to the adapter that it came from."""
    if not found.merge:
        return []
    told = f"Merged onto the {found.merge['onto']} base in {found.merge['dtype']}. {_how_close(found.merge)}"
    return ["## Merge", "", told, ""]


def _how_close(merge: dict[str, Any]) -> str:
    measured = merge.get("verdict")
    if not measured:
        return "It was not held against the live adapter."
    told = f"Held against the live adapter on held-out rows: {tables.closeness(measured)}."
    return told if measured["passed"] else f"{told} That is further off than qtune allows: it failed."


def _limits(found: Record) -> list[str]:
    """What the figures do not say."""
    told = [_measured_on(found)] if found.scores else []
    overlap = (found.data or {}).get("overlap_rows")
    if found.scores and overlap:
        share = format_percent(overlap / (found.data or {})["held_out_rows"])
        told.append(f"{overlap:,} of the held-out rows ({share}) were trained on too, which flatters it.")
    if not found.base_license:
        told.append("The licence of its base applies; the base's files did not name it.")
    return ["## Limits", "", " ".join(told), ""] if told else []


def _measured_on(found: Record) -> str:
    assert found.scores is not None
    source = "rows of a file of their own" if _data(found).get("held_out") else "rows kept apart from those of training"
    general = found.scores["tuned"].get("general_loss") is not None
    beside = ", and of text that has nothing to do with the task" if general else ""
    return f"The figures above are of {source}{beside}. They say nothing of other tasks."

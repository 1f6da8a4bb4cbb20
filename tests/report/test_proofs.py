"""No proof is claimed that was not made: each sentence beside each state of the check it tells of."""

import io
from pathlib import Path
from typing import Any

import pytest
from made_events import DATA, LOCK, SCORES, whole_run_in
from rich.console import Console

from qtune.recipe.schema import Recipe
from qtune.report import compare_runs, html_page, model_card, run_record, summary, tables
from qtune.rundir import RunDir, write_json

GREEDY = [{"same": True}, {"same": False}]
MERGED = {
    "mean_kl": 5.6e-6,
    "agreement_fraction": 0.998,
    "live_loss": 1.2461,
    "merged_loss": 1.2462,
    "passed": True,
    "greedy": GREEDY,
}
MERGE = {"tensors": 290, "shards": 1, "bytes": 10**7, "onto": "dequantised", "dtype": "float16", "measured": []}
ASKED = {
    "mean_kl": 2.7e-4,
    "agreement_fraction": 0.992,
    "near_tie_fraction": 0.008,
    "positions": 2042,
    "base_kl": None,
    "live_loss": 3.6892,
    "file_loss": 3.6882,
    "differing_texts": [],
    "ends": 277,
    "ends_found": 277,
    "greedy": GREEDY,
}
EXPORT = {
    "passed": True,
    "faults": [],
    "output": "out",
    "file": "model.gguf",
    "to": "gguf",
    "onto": "dequantised",
    "bytes": 3 << 20,
    "stored": {"Q8_0": 43, "F32": 13},
    "read_back": {"tensors": 56, "worst_fraction": 0.878, "worst_tensor": "output.weight"},
    "texts": 54,
    "notes": [],
}
NOT_ASKED = {**EXPORT, "verdict": None, "notes": ["Not verified with llama.cpp: it is not installed"]}
SETTINGS = {"name": "m", "model": {"base": "demo"}, "data": {"train": "x"}}
RECIPE = Recipe.model_validate(SETTINGS).model_dump(mode="json")
HELD = "The merged model, loaded again and held against the live adapter on held-out rows"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return whole_run_in(tmp_path)


def flat(shown: Any) -> str:
    console = Console(width=200, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(shown)
    return " ".join(capture.get().split())


def exported(run: RunDir, report: dict[str, Any]) -> tuple[str, str]:
    """What page and terminal tell of an export."""
    write_json(run.export_report("mine"), report)
    return html_page.run_page(run), flat(tables.export_table(report))


def test_llama_cpp_is_named_as_a_witness_only_where_it_was_asked(run: RunDir) -> None:
    """The caption said that llama.cpp had been asked, above a line that said it had not."""
    asked = "asked of llama.cpp beside the live adapter"
    shown, printed = exported(run, NOT_ASKED)
    assert "Export mine" in shown
    assert asked not in shown
    assert ">passed<" not in shown
    assert "The file, read back byte by byte</caption>" in shown
    for place in (shown, printed):
        assert "read back, and not asked of llama.cpp" in place
        assert "Not verified with llama.cpp: it is not installed" in place
        assert "54 texts become the same tokens as qtune reads the file" in place
        assert "greedy answers" not in place
    shown, printed = exported(run, {**EXPORT, "verdict": ASKED})
    assert f"The file, read back byte by byte and {asked}</caption>" in shown
    assert ">passed<" in shown
    for place in (shown, printed):
        assert "54 texts become the same tokens in llama.cpp" in place
        assert "the file ends 277 of the 277 answers that the live model ends" in place


def test_what_failed_in_an_export_is_said_and_what_held_is_not_claimed(run: RunDir) -> None:
    verdict = {**ASKED, "differing_texts": ["café", "naïve"]}
    fault = "'café' becomes other tokens than in training"
    shown, printed = exported(run, {**EXPORT, "passed": False, "faults": [fault], "verdict": verdict})
    assert ">FAILED<" in shown
    for place in (shown.replace("&#39;", "'"), printed):
        assert fault in place
        assert "2 of 54 texts become other tokens in llama.cpp" in place
        assert "become the same tokens" not in place
        assert "passed" not in place.split("Use it")[0].split("Proofs")[-1]


@pytest.mark.parametrize("worst", [1.5, float("inf"), float("nan")])
def test_a_file_that_is_not_what_was_to_be_written_is_not_within_its_type(run: RunDir, worst: float) -> None:
    read = {"tensors": 56, "worst_fraction": worst, "worst_tensor": "output.weight"}
    for place in exported(run, {**NOT_ASKED, "passed": False, "read_back": read}):
        assert "56 tensors, and output.weight is not what was to be written" in place
        assert "of what its type may cost" not in place
        assert "not asked of llama.cpp" not in place  # FAILED, whoever was asked


def merged(run: RunDir, verdict: dict[str, Any] | None) -> tuple[str, str, str]:
    """What page, terminal and model card tell of a merge."""
    write_json(run.lock, {**LOCK, "recipe": RECIPE})
    write_json(run.merge, {**MERGE, "output": "merged/x", "verdict": verdict})
    return html_page.run_page(run), flat(summary.report(run)), model_card.card(run_record.read(run), "merged")


def test_a_merge_is_held_against_the_adapter_or_said_not_to_be(run: RunDir) -> None:
    """A merge that was killed before its proof was told of as if there had been none; a card never said it failed."""
    shown, printed, model_card = merged(run, None)
    assert HELD not in shown
    assert 'Merge: <span class="unproven">not verified</span>' in shown
    assert "merged: merged/x, not verified" in printed
    assert "It was not held against the live adapter." in model_card
    assert "mean KL" not in model_card

    shown, printed, model_card = merged(run, MERGED)
    assert HELD in shown
    assert 'Merge: <span class="passed">passed</span>' in shown
    assert "passed: mean KL 5.6e-06" in printed
    assert "Held against the live adapter on held-out rows: mean KL 5.6e-06" in model_card
    assert "failed" not in model_card

    shown, printed, model_card = merged(run, {**MERGED, "passed": False})
    assert 'Merge: <span class="failed">failed</span>' in shown
    assert "FAILED: mean KL" in printed
    assert "it failed." in model_card


def test_what_a_fold_costs_apart_from_rounding_is_told_where_it_was_measured(run: RunDir) -> None:
    asked = {
        **MERGED,
        "passed": False,
        "fold_kl": 1.2e-8,
        "base_kl": 0.45,
        "faults": ["mean KL 1.0e-02 nats (at most 1e-3)"],
    }
    for place in merged(run, asked)[:2]:
        assert "before its weights were rounded: mean KL 1.2e-08 nats" in place
        assert "tuning itself moved it by a mean KL of 4.5e-01 nats" in place
        assert "mean KL 1.0e-02 nats (at most 1e-3)" in place
    for place in merged(run, MERGED)[:2]:
        assert "rounded" not in place.split("Proofs")[-1].split("Use it")[0]
        assert "tuning itself" not in place


def test_a_run_without_merge_or_export_has_no_proofs(run: RunDir) -> None:
    assert html_page.proofs(run_record.read(run)) == []
    assert "Proofs" not in html_page.run_page(run)
    assert "not verified" not in flat(summary.report(run))


def test_held_out_rows_are_called_untrained_only_where_that_was_looked_at(run: RunDir) -> None:
    """`which neither was trained on` stood there whatever the data report said."""
    apart, flattered = "None of them is among the rows that were trained on.", "held-out rows are trained on too"
    assert apart in html_page.run_page(run)
    write_json(run.data, {**DATA, "overlap_rows": 12})
    assert apart not in html_page.run_page(run)
    assert flattered in html_page.run_page(run)
    dropped = [{"rows": 1, "reason": "is a held-out (draft) row", "places": ["rows.jsonl:3"]}]
    write_json(run.data, {**DATA, "dropped": dropped})  # a word of a reason said that held-out rows were trained on
    assert apart in html_page.run_page(run)
    run.data.unlink()
    assert apart not in html_page.run_page(run)
    assert flattered not in html_page.run_page(run)


def test_a_card_says_what_was_measured_and_no_more(run: RunDir) -> None:
    """It said `and on nothing else` beside a loss on general text, and `measured` of a run that was not."""

    def limits() -> str:
        return model_card.card(run_record.read(run)).split("## Limits")[1]

    write_json(run.lock, {**LOCK, "recipe": RECIPE})
    assert "rows kept apart from those of training. They say nothing of other tasks." in limits()
    figures = {who: {**SCORES[who], "general_loss": 3.0} for who in ("base", "tuned")}
    write_json(run.scores, {**SCORES, **figures})
    assert "and of text that has nothing to do with the task." in limits()
    write_json(run.lock, {**LOCK, "recipe": {**RECIPE, "data": {**RECIPE["data"], "held_out": "h.jsonl"}}})
    assert "rows of a file of their own" in limits()
    run.scores.unlink()
    assert "figures" not in limits()


def test_packs_are_told_as_the_probe_before_the_first_step_found_them(run: RunDir) -> None:
    same, another = "a document is the same alone and behind others", "so each had a pass of its own"
    shown = html_page.run_page(run)
    assert same not in shown
    assert another not in shown
    probe = {"by_neighbour": 0.0, "by_company": 1e-6, "by_attention": 0.0, "by_loss": 0.0, "rounding": 0.001}
    write_json(run.lock, {**LOCK, "packing_probe": probe})
    assert same in html_page.run_page(run)
    write_json(run.lock, {**LOCK, "packing_probe": {**probe, "by_company": 0.2}})
    shown = html_page.run_page(run)
    assert same not in shown
    assert f"its logits move by 20.0 % of their spread), {another}" in shown


def test_quantisation_is_named_only_where_the_lock_has_it(run: RunDir) -> None:
    write_json(run.lock, {**LOCK, "recipe": RECIPE, "quantization": None})
    assert "trained with qtune (LoRA)." in model_card.card(run_record.read(run))
    assert "qlora" not in model_card.card(run_record.read(run))
    assert "not quantised" in html_page.run_page(run)
    write_json(run.lock, {**LOCK, "recipe": RECIPE, "quantization": {"type": "nf4", "double": True}})
    assert "trained with qtune (QLoRA)." in model_card.card(run_record.read(run))
    write_json(run.lock, {key: value for key, value in LOCK.items() if key != "quantization"})
    shown = html_page.run_page(run)
    assert "not quantised" not in shown
    assert "held in NF4" not in shown


def test_recipes_are_called_alike_only_where_they_are_known(run: RunDir, tmp_path: Path) -> None:
    other = whole_run_in(tmp_path / "other")
    assert compare_runs.compare([run, other]).alike == "The recipes are the same."
    for each in (run, other):
        each.lock.write_text("{")
    found = compare_runs.compare([run, other])
    assert "The recipes are the same." not in html_page.comparison_page(found) + flat(compare_runs.table(found))
    assert "Not known" in html_page.comparison_page(found)


def test_samples_say_how_they_were_chosen_and_the_worst_say_that_they_are(run: RunDir) -> None:
    """Five answers drawn by the seed were all right, and where it failed was nowhere."""
    worst = [{**SCORES["samples"][0], "tuned": "A cough syrup.", "tuned_score": 0.1, "place": "rows.jsonl:17"}]
    more = {"samples_seed": 7, "worst": worst, "tuned_scores": [1.0, 0.1, 0.4]}
    assert "Where it did worst" not in html_page.run_page(run)
    assert "How they were chosen was not noted." in html_page.run_page(run)
    write_json(run.scores, {**SCORES, **more})
    summary.write_summary(run)
    for place in (html_page.run_page(run), flat(summary.report(run)), run.summary.read_text()):
        assert "Drawn with seed 7, not picked by hand." in place
        assert "Where it did worst" in place
        assert "The lowest scores of the tuned model: 1 of the 2 rows below 1." in place
        assert "A cough syrup." in place
        assert "rows.jsonl:17" in place

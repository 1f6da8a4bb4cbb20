"""Merges and exports that are wrong on purpose, of a real base: not one passes, however little it shows in answers."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import broken
import pytest
import torch
from broken import ADAPTERS, TENSORS, Adapted, Tensors
from crossed import crossed
from made_runs import make_run
from safetensors.torch import load_file, save_file

from qtune.gguf import weights_proof
from qtune.gguf.contents import adapter_draft, model_draft
from qtune.merge.merge import merge
from qtune.merge.merged_weights import Fold
from qtune.merge.verify import Live
from qtune.merge.weights_proof import WeightsProof
from qtune.model.base_files import DEMO_BASE
from qtune.model.checkpoint import BaseCheckpoint
from qtune.rundir import RunDir

STRENGTHS = {
    "as one step leaves it": 1e-4,
    "as a run leaves it": 3e-3,
}  # of B; the first step of Adam is the learning rate


QUANTS = ["f16", "q8_0", "q4_0", "lora"]


@dataclasses.dataclass(frozen=True)
class Case:
    run: RunDir
    live: Live
    fold: Fold
    right: Tensors


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """By strength, made once: the demo base, which is trained and in bfloat16, an adapter on every projection."""
    return functools.cache(lambda strength: made(tmp_path_factory.mktemp("case"), STRENGTHS[strength]))


@pytest.fixture(params=STRENGTHS)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def made(folder: Path, strength: float) -> Case:
    run = make_run(folder / "run", DEMO_BASE, {"use_rslora": True}, strength=strength)
    merge(run, folder / "out", "dequantised", "bfloat16")
    return Case(run, Live.open(run), Fold.open(run, "bfloat16"), load_file(folder / "out" / "model.safetensors"))


def proven(case: Case, tensors: Tensors, folder: Path) -> WeightsProof:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with torch.inference_mode():
        return case.live.trained("dequantised").prove(BaseCheckpoint.open(folder))


def test_a_right_merge_has_no_strays(case, tmp_path) -> None:
    proof = proven(case, case.right, tmp_path)
    assert (proof.tensors, proof.strays, proof.worst_tensor) == (len(case.right), 0, "")
    assert proof.weights == sum(tensor.numel() for tensor in case.right.values())


@pytest.mark.parametrize("adapted", ADAPTERS.values(), ids=ADAPTERS)
def test_another_adapter_is_found(case, tmp_path, adapted: Adapted) -> None:
    """KL cannot: of an adapter at nine tenths of its scale it sees 0.7 %, of one step's nothing."""
    assert proven(case, broken.refolded(case.right, case.fold, adapted, "dequantised"), tmp_path).strays


@pytest.mark.parametrize("edited", TENSORS.values(), ids=TENSORS)
def test_another_tensor_is_found(case, tmp_path, edited: Callable[[Tensors], Tensors]) -> None:
    proof = proven(case, edited(case.right), tmp_path)
    assert proof.strays
    assert proof.faults[0].endswith(f"not those that were trained, most in {proof.worst_tensor}")


def test_one_step_is_one_stray(case, tmp_path) -> None:
    assert proven(case, TENSORS["one weight a step off"](case.right), tmp_path).strays == 1


def test_rounding_towards_zero_is_found(case, tmp_path) -> None:
    assert proven(case, broken.truncated(case.right, case.fold, "dequantised"), tmp_path).strays


def exported(case: Case, path: Path, quant: str, adapted: Adapted = lambda changes: changes) -> WeightsProof:
    fold = broken.with_adapter(Fold.open(case.run, "float32"), adapted)
    lora = quant == "lora"
    draft = adapter_draft(case.run, fold) if lora else model_draft(case.run, fold, quant, "dequantised")
    draft.write(path, lambda name: None)
    with torch.inference_mode():
        return weights_proof.prove(case.live.trained("dequantised"), draft, path)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_right_file_has_no_strays(case, tmp_path, quant) -> None:
    assert exported(case, tmp_path / "x.gguf", quant).strays == 0


FAULTS = ["scale x 0.9", "rslora missed", "adapters of two layers swapped", "A and B mixed up"]


@pytest.mark.parametrize(("strength", "quant", "name"), crossed([*STRENGTHS], QUANTS, FAULTS))
def test_a_file_of_another_adapter_is_found(cases, tmp_path, strength, quant, name) -> None:
    """Every byte is read back as it was meant to be written."""
    assert exported(cases(strength), tmp_path / "x.gguf", quant, ADAPTERS[name]).strays

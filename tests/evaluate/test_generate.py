"""Greedy answers: a batch gives what one prompt at a time gives."""

import random

import pytest
import torch
from conftest import BOS, END
from made_models import on_cpu

from qtune.errors import OutOfMemory
from qtune.evaluate.generate import answer, batches_of_like_length, left_pad
from qtune.model import base
from qtune.model.tokenizer import load_tokenizer
from qtune.recipe.schema import Model


def test_a_batch_answers_as_one_at_a_time(tiny_base) -> None:
    spec = Model(base=str(tiny_base))
    model, tokenizer = base.load_base(spec, "cpu", "float32"), load_tokenizer(spec)
    rng = random.Random(0)
    prompts = [[BOS, *(rng.randint(0, 255) for _ in range(rng.randint(1, 12)))] for _ in range(9)]
    together = answer(on_cpu(model, tokenizer), prompts, [END], 6)
    apart = [answer(on_cpu(model, tokenizer), [prompt], [END], 6)[0] for prompt in prompts]
    assert together == apart
    assert any(together)


def test_every_token_is_the_likeliest_one(tiny_base) -> None:
    """One after another by hand: with a penalty of ours on repeated words, base and tuned would both score less."""
    spec = Model(base=str(tiny_base))
    model, tokenizer = base.load_base(spec, "cpu", "float32").eval(), load_tokenizer(spec)
    for prompt in ([BOS, *range(6, 12)], [BOS, 7, 7, 7, 7]):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 24 and ids[-1] != END:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
        assert answer(on_cpu(model, tokenizer), [prompt], [END], 24) == [expected]


def test_what_a_base_likes_to_add_does_not_change_what_is_likeliest(tiny_base) -> None:
    """Qwen2.5's generation_config.json brings a penalty on repeated words, which transformers mixed into ours."""
    spec = Model(base=str(tiny_base))
    model, tokenizer = base.load_base(spec, "cpu", "float32"), load_tokenizer(spec)
    prompts = [[BOS, *range(6, 8 + i)] for i in range(3)]
    expected = answer(on_cpu(model, tokenizer), prompts, [END], 24)
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 5.0, 1
    assert answer(on_cpu(model, tokenizer), prompts, [END], 24) == expected


@pytest.mark.parametrize("most_rows", [1, 2, 5])
def test_a_batch_that_runs_out_of_memory_is_answered_in_halves(tiny_base, most_rows) -> None:
    spec = Model(base=str(tiny_base))
    model, tokenizer = base.load_base(spec, "cpu", "float32"), load_tokenizer(spec)
    prompts = [[BOS, *range(6, 8 + i)] for i in range(9)]
    expected = answer(on_cpu(model, tokenizer), prompts, [END], 6)

    def run_out(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with model.model.layers[1].register_forward_pre_hook(run_out):
        assert answer(on_cpu(model, tokenizer), prompts, [END], 6) == expected


def test_one_row_that_does_not_fit_says_what_would_help(tiny_base) -> None:
    spec = Model(base=str(tiny_base))
    model, tokenizer = base.load_base(spec, "cpu", "float32"), load_tokenizer(spec)

    def run_out(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with (
        model.model.layers[1].register_forward_pre_hook(run_out),
        pytest.raises(OutOfMemory, match=r"evaluate\.max_new_tokens"),
    ):
        answer(on_cpu(model, tokenizer), [[BOS, 6], [BOS, 7]], [END], 6)


def test_no_prompts_give_no_answers(tiny_base) -> None:
    spec = Model(base=str(tiny_base))
    assert answer(on_cpu(base.load_base(spec, "cpu", "float32"), load_tokenizer(spec)), [], [END], 6) == []


def test_every_prompt_is_in_one_batch() -> None:
    prompts = [[1] * (i % 7 + 1) for i in range(100)]
    assert sorted(i for batch in batches_of_like_length(prompts) for i in batch) == list(range(100))


def test_padding_is_on_the_left() -> None:
    ids, mask = left_pad([[5], [6, 7, 8]], 2, "cpu")
    assert ids.tolist() == [[2, 2, 5], [6, 7, 8]]
    assert torch.equal(mask, torch.tensor([[0, 0, 1], [1, 1, 1]]))

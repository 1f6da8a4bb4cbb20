"""The noise of NEFTune, beside the hook of transformers."""

import math
from types import SimpleNamespace

import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from qtune.memory.documents import documents_are
from qtune.recipe.schema import Train
from qtune.train.callbacks import NoisyEmbeddings

ALPHA, WIDTH, LENGTHS = 5.0, 96, (40, 360)
IDS = torch.arange(sum(LENGTHS))[None] % 50


def noisy(step: int = 1, seed: int = 0) -> tuple[torch.nn.Embedding, NoisyEmbeddings]:
    """An embedding of zeros: what comes out is the noise."""
    embedding = torch.nn.Embedding(50, WIDTH)
    embedding.weight.data.zero_().requires_grad_(False)
    model = SimpleNamespace(get_base_model=lambda: SimpleNamespace(get_input_embeddings=lambda: embedding))
    noise = NoisyEmbeddings(model, Train(neftune_alpha=ALPHA, seed=seed))
    noise.on_train_begin(None, None, None)
    noise.on_step_begin(None, SimpleNamespace(global_step=step - 1), None)
    return embedding, noise


def test_each_document_has_noise_as_strong_as_transformers_gives_it_alone() -> None:
    embedding, _ = noisy()
    with documents_are(LENGTHS):
        documents = embedding(IDS)[0].split(LENGTHS)
    for document in documents:
        theirs = SimpleNamespace(training=True, neftune_noise_alpha=ALPHA)
        alone = neftune_post_forward_hook(theirs, (), torch.zeros_like(document)[None])
        most = ALPHA / math.sqrt(document.numel())
        assert 0.99 * most < document.abs().max() <= most
        assert abs(document.std() / alone.std() - 1) < 0.03
        assert abs(document.mean()) < 0.05 * most


def test_noise_is_another_in_every_step_and_gone_with_training() -> None:
    embedding, noise = noisy()
    drawn = [noisy(step, seed)[0](IDS) for step, seed in ((1, 0), (1, 0), (2, 0), (1, 1))]
    assert torch.equal(embedding(IDS), drawn[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])
    with torch.no_grad():
        assert not embedding(IDS).any()
    embedding.eval()
    assert not embedding(IDS).any()
    embedding.train()
    noise.remove()
    assert not embedding(IDS).any()


def test_rows_of_which_no_documents_are_known_are_one_each() -> None:
    embedding, _ = noisy()
    rows = IDS.view(10, 40)
    together = embedding(rows)
    assert torch.equal(together[3], embedding(rows[3:4])[0])

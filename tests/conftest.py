"""Tiny real models, made once: a Llama with its own tokenizer and chat template, on disk as a user would have it."""

import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of several processes wait for each other
os.environ["QTUNE_CACHE"] = "off"  # no test leaves rows in the cache of whoever runs it
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, by an import: none asks the hub, or waits until it does not answer
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels run on the processor

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

if TYPE_CHECKING:  # the process that hands out tests needs no torch, nor do many tests
    from transformers import LlamaConfig, PreTrainedTokenizerFast

TESTS = Path(__file__).resolve().parent
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<s>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
BOS, END, PAD = range(len(BYTES), len(BYTES) + 3)  # none is 0, which `if token_id:` takes for no token
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests that are marked long, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long, unless all tests are asked for, or some by name (FILE::TEST).

    Whole runs, which are in no room's folder, come first: whoever has nothing left to do takes tests from the end.
    """
    items.sort(key=lambda item: item.path.parent != TESTS)
    if not config.getoption("--all") and not any("::" in argument for argument in config.args):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def pytest_collection() -> None:
    """Imports make much and leave all of it there."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What is imported by now is walked by no collection any more: where memory runs out, there are many."""
    if "qtune.plan.activation_memory" in sys.modules:
        import made_once

        made_once.install()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def walked_once() -> Iterator[None]:
    """What a file leaves for good, as modules that it has imported, is walked once and not by each later collection."""
    yield
    gc.collect()
    gc.freeze()


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per byte, six special ones, a BOS added on encode."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*BYTES, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(**changes: object) -> "LlamaConfig":
    from transformers import LlamaConfig

    settings = {
        "vocab_size": 262,
        "hidden_size": 64,
        "intermediate_size": 172,  # odd for NF4 blocks, as real checkpoints can be
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture(autouse=True)
def nothing_said_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal stands alone in most tests; test_first_line asks for what is said before it, of real processes."""
    monkeypatch.setattr("qtune.commands.terminal._lines_to", lambda console, is_log: None)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama in float32."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_base")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run that learned something, and has five held-out rows; not to be changed."""
    from stopped_runs import qtune, write_recipe

    folder = tmp_path_factory.mktemp("finished")
    scored = {"metric": "token_f1", "rows": 3, "max_new_tokens": 4, "samples": 2, "general": "none"}
    recipe = write_recipe(folder, tiny_base, evaluate=scored, train={"learning_rate": 2e-2})
    assert qtune("run", recipe, "--output", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """A disk that is full for every file that would grow beyond so many bytes, until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def material() -> Path:
    """Real models and data kept beside the checkout; tests that want them are skipped where they are not."""
    beside = TESTS.parent.parent / "shared" / "material"
    folder = Path(os.environ.get("QTUNE_MATERIAL", beside))
    if not folder.is_dir():
        pytest.skip(f"no real material in {folder}; set QTUNE_MATERIAL")
    return folder

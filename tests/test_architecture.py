"""The house keeps its shape: rooms import upwards only, there is no cycle, and the front door is light."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "qtune"

# A room may import itself and any room before it. A room with a dot is a package of things of one kind, a file each,
# which the recipe's schema asks for names: what it imports at the top is light, and what it imports inside functions,
# once a thing is switched on, is what the room around it may import.
ROOMS = [
    "errors",
    "atomic_files",
    "units",
    "cache_dir",
    "events",
    "subprocess_limits",
    "registry",
    "logs",
    "accelerator",
    "distributed",
    "gpu_models",
    "gpu_choice",
    "card_faults",
    "hardware",
    "memory.techniques",
    "model.lora_variants",
    "model.lora_inits",
    "train.objectives",
    "train.optimizers",
    "train.trackers",
    "data.formats",
    "evaluate.metrics",
    "recipe",
    "lock",
    "rundir",
    "removal",
    "fast_imports",
    "data",
    "audit",
    "memory",
    "model",
    "report",
    "merge",
    "gguf.architectures",
    "gguf",
    "plan",
    "train",
    "evaluate",
    "share",
    "resume",
    "rescore",
    "ready",
    "planning",
    "run",
    "guest",
    "library",
    "commands",
    "cli",
]

LONGEST_CHAIN = 12
MOST_WITH_ONE_IMPORTER = 20
MOST_PARAMETERS = 7


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" and path.name != "__main__.py")


def room_of(dotted: str) -> str:
    within = ".".join(dotted.split(".")[1:3])
    return within if within in ROOMS else within.partition(".")[0]


def holds_things(path: Path) -> bool:
    return "." in room_of(dotted_name(path))


def qtune_imports(path: Path, at_the_top: bool = False) -> set[str]:
    """Every module of qtune that the file names, inside functions too unless `at_the_top`."""
    named = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            named.update(alias.name for alias in node.names if alias.name.startswith("qtune."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qtune":
            within = {f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")}
            named |= within or ({node.module} - {"qtune"})
    return named


def is_module(dotted: str) -> bool:
    path = PACKAGE.parent.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def dotted_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("path", modules(), ids=dotted_name)
def test_a_room_imports_only_itself_and_rooms_before_it(path: Path) -> None:
    def after(room: str, named: set[str]) -> list[str]:
        return [name for name in named if ROOMS.index(room_of(name)) > ROOMS.index(room)]

    room = room_of(dotted_name(path))
    assert not after(room, qtune_imports(path, at_the_top=holds_things(path)))
    assert not after(room.partition(".")[0], qtune_imports(path))


def test_there_is_no_import_cycle() -> None:
    """Imports inside functions count, too, but for what a thing imports once it is switched on."""
    graph = {dotted_name(path): qtune_imports(path, holds_things(path)) for path in modules()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as cycle:
        pytest.fail(" -> ".join(reversed(cycle.args[1])))


def imported_at_the_top() -> dict[str, set[str]]:
    """What each module, and each package that has code, cannot be imported without."""
    graph = {dotted_name(path).removesuffix(".__init__"): qtune_imports(path, True) for path in PACKAGE.rglob("*.py")}
    return {name: {target for target in targets if target in graph} for name, targets in graph.items()}


def test_to_read_a_module_one_reads_a_dozen_at_most() -> None:
    graph = imported_at_the_top()
    chains: dict[str, list[str]] = {}
    for name in TopologicalSorter(graph).static_order():
        chains[name] = [name, *max((chains[target] for target in graph[name]), key=len, default=[])]
    longest = max(chains.values(), key=len)
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)


def test_few_modules_are_there_for_one_other_alone() -> None:
    graph = imported_at_the_top()
    importers = Counter(target for targets in graph.values() for target in targets)
    single = sorted(name for name, count in importers.items() if count == 1)
    assert len(single) <= MOST_WITH_ONE_IMPORTER, single


def _is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A kernel of Triton's takes addresses, sizes and strides one by one."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)


@pytest.mark.parametrize("path", PACKAGE.rglob("*.py"), ids=dotted_name)
def test_no_function_takes_more_than_seven_parameters(path: Path) -> None:
    """Methods: beside self or cls."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_kernel(node):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in taken if argument.arg not in ("self", "cls")]
            assert len(names) <= MOST_PARAMETERS, f"{node.name}({', '.join(names)})"


SAYS_CUDA = {
    "qtune.accelerator": "asks torch for what only CUDA has: capabilities, memory locked in its place",
    "qtune.hardware": "finds the card",
    "qtune.commands.doctor": "looks at it more closely",
    "qtune.plan.activation_memory": "peft asks whether CUDA autocasts, and a forecast is of a card that is not here",
}


def test_one_place_knows_what_a_card_is() -> None:
    """All others ask `accelerator` or `hardware.Device`, so that a card of another kind is a matter of that place."""
    saying = {dotted_name(path) for path in modules() if says_cuda(path)}
    assert saying == SAYS_CUDA.keys()


def says_cuda(path: Path) -> bool:
    """Whether code asks `.is_cuda` or `torch.cuda`, or has a device's name written out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    asks = any(each == "torch.cuda" or each.endswith(".is_cuda") for each in attributes)
    return asks or any(re.fullmatch(r"cuda(:\d*)?", text) for text in texts)


@pytest.mark.parametrize(
    ("room", "others"),
    [("evaluate", ["train"]), ("merge", ["train", "plan", "evaluate"]), ("gguf", ["train", "plan", "evaluate"])],
)
def test_what_is_done_with_weights_needs_nothing_that_trained_them(room: str, others: list[str]) -> None:
    """Inside functions neither."""
    for path in (PACKAGE / room).rglob("*.py"):
        assert not [name for name in qtune_imports(path) if room_of(name) in others], path


def test_only_packages_of_things_are_deeper_than_one_level_and_inner_init_files_are_empty() -> None:
    for init in PACKAGE.rglob("__init__.py"):
        package = init.parent.relative_to(PACKAGE).parts
        assert len(package) < 2 or ".".join(package) in ROOMS, init
        if len(package) == 1:
            assert init.read_text(encoding="utf-8") == "", init


@pytest.mark.parametrize("module", ["qtune.cli", "qtune.recipe.load"])
def test_the_front_door_does_not_load_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_looking_at_data_loads_no_more_than_a_tokenizer(tmp_path: Path) -> None:
    """Both took as long to begin as a training run: the tokenizer was loaded by the file that loads models."""
    code = """
import sys
from qtune import cli
heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "bitsandbytes", "peft", "trl", "accelerate",
         "datasets", "pandas", "numba", "transformers.modeling_utils", "qtune.model.base", "qtune.memory.engine",
         "qtune.memory.memory_tracker", "qtune.plan")
for verb in (["data", "check"], ["data", "show"], ["check", "--no-plan"]):
    assert cli.main([*verb, "medical", "--demo"]) == 0
    print(verb, [name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "QTUNE_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if line.startswith("[")] == [
        "['data', 'check'] []",
        "['data', 'show'] []",
        "['check', '--no-plan'] []",
    ]

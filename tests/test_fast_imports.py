"""What a verb imports, and in how little time: torch's compiler waits until a kernel is first run."""

import forked
import torch

from qtune.fast_imports import compiled_when_called

AS_IMPORTED = """
import gc, sys, torch
assert gc.isenabled()
assert "put_off" not in torch.compile.__qualname__
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_a_run_is_imported_without_torchs_compiler() -> None:
    """bitsandbytes decorates kernels with torch.compile, which loaded all of it: a second of every verb's start. What
    is forked has imported a run in `quick_imports`, and nothing else of qtune."""
    assert forked.run(["-c", AS_IMPORTED]).stdout == "False\n"


def test_a_function_is_compiled_when_it_is_first_called() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    put_off = compiled_when_called(torch.compile)
    decorate = put_off(backend=backend, dynamic=False)

    @decorate
    def twice(x: torch.Tensor) -> torch.Tensor:
        """Two of it."""
        return x + x

    assert (graphs, twice.__name__, twice.__doc__) == ([], "twice", "Two of it.")
    assert twice(torch.ones(3)).tolist() == twice(torch.ones(3)).tolist() == [2, 2, 2]
    assert len(graphs) == 1
    module = torch.nn.Linear(2, 2)
    assert type(put_off(module, backend=backend)) is type(torch.compile(module, backend=backend))

"""llama.cpp may end its process: one sentence, and nothing of an export is lost."""

import textwrap

import pytest

from qtune.errors import MachineError, ModelError
from qtune.gguf import llama_cpp
from qtune.gguf.llama_cpp import GgufModel


@pytest.fixture
def ending(tmp_path, monkeypatch):
    """llama.cpp's place taken by a program that answers `load` and then does what it is given."""

    def end(does: str) -> None:
        program = f"""\
            import os, pickle, signal, sys
            pickle.load(sys.stdin.buffer)
            pickle.dump((None, None), sys.stdout.buffer)
            sys.stdout.flush()
            pickle.load(sys.stdin.buffer)
            print("GGML_ASSERT(i < n) failed", file=sys.stderr, flush=True)
            {does}
            """
        (tmp_path / "child.py").write_text(textwrap.dedent(program))
        monkeypatch.setattr(llama_cpp, "CHILD", tmp_path / "child.py")

    return end


def ask(path) -> None:
    with GgufModel.loaded(path, 64) as model:
        model.logits([1, 2, 3])


def test_a_build_for_another_processor_is_the_machines_fault(ending, tmp_path) -> None:
    """A build that found AMX, in a virtual machine that says it has it and stops who uses it."""
    ending("os.kill(os.getpid(), signal.SIGILL)")
    with pytest.raises(MachineError, match=r"another processor than this one; CMAKE_ARGS=-DGGML_NATIVE=OFF pip"):
        ask(tmp_path / "x.gguf")


def test_a_file_that_llama_cpp_does_not_survive_is_named(ending, tmp_path) -> None:
    ending("os.abort()")
    with pytest.raises(ModelError, match=r"x\.gguf: llama\.cpp ended with SIGABRT over it \(GGML_ASSERT\(i < n\)"):
        ask(tmp_path / "x.gguf")
    ending("sys.exit(3)")
    with pytest.raises(ModelError, match=r"x\.gguf: llama\.cpp ended with exit code 3"):
        ask(tmp_path / "x.gguf")


def test_a_file_that_is_no_model_is_refused_by_llama_cpp(tmp_path) -> None:
    pytest.importorskip("llama_cpp")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match=r"x\.gguf: does not load in llama\.cpp"):
        ask(tmp_path / "x.gguf")

"""Which servers take a run, as an adapter or merged, and what stands in the way of the others.

What qtune writes by itself is asked of the code that writes it: nothing is written, but it refuses what it would
refuse. What others read is known from their sources and documents: vLLM as in `report.serving_snippets`; SGLang's
python/sglang/srt/lora/lora.py scales by alpha / rank whatever use_rslora says (its issue 40835) and keeps no DoRA;
llama.cpp's convert_lora_to_gguf.py takes lora_A and lora_B and stops at any other tensor; Ollama's modelfile
documentation has ADAPTER for a GGUF file beside the model it was trained on.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from qtune.errors import ModelError, QtuneError
from qtune.gguf.contents import Target, adapter_draft, model_draft
from qtune.gguf.modelfile import modelfile_of
from qtune.merge.lora_delta import read_config, weights_path
from qtune.merge.merge import chosen_onto
from qtune.merge.merged_weights import Fold
from qtune.model import base_files
from qtune.model.lora_variants import faults_of
from qtune.report import run_record, serving_snippets, tables
from qtune.rundir import RunDir, default_export


@dataclass(frozen=True)
class Answer:
    """Whether a server takes one form of a run: `lines` to type, and `why` not, or where else than in a shell.

    `is_taken` is None where that cannot be said without the base's files.
    """

    is_taken: bool | None
    lines: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Server:
    """A server, and its answers to the adapter and to the merged model."""

    name: str
    adapter: Answer
    merged: Answer

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def servers(run: RunDir) -> list[Server]:
    """Every server known here. Raises ModelError for a run without an adapter, or with one that is no LoRA."""
    return _Asked.of(run).servers()


@dataclass(frozen=True)
class _Asked:
    """What the answers are made of: `config` is adapter_config.json, `fold` is why there can be none, where there is a
    reason, and else the run's weights; None where the base is not on this machine."""

    run: RunDir
    found: run_record.Record
    config: Mapping[str, Any]
    fold: Fold | ModelError | None

    @classmethod
    def of(cls, run: RunDir) -> "_Asked":
        config = read_config(run.adapter)
        weights_path(run.adapter)
        return cls(run, run_record.read(run), config, _fold(run))

    def servers(self) -> list[Server]:
        return [
            Server(
                "transformers + peft",
                self._peft(),
                self._merged("AutoModelForCausalLM.from_pretrained({folder!r})", "the last line in Python"),
            ),
            Server("vLLM", self._vllm(), self._merged("vllm serve {folder}")),
            Server("SGLang", self._sglang(), self._merged("python -m sglang.launch_server --model-path {folder}")),
            Server("llama.cpp", self._llama_cpp(), self._gguf("gguf", "llama-server -m {folder}/model.gguf")),
            Server("Ollama", self._ollama(), self._gguf("ollama", "ollama create {name} -f {folder}/Modelfile")),
        ]

    @property
    def base(self) -> str:
        """The base's hub name or folder."""
        return str(self.run.base or serving_snippets.base_place(self.found))

    @property
    def _is_lost(self) -> bool:
        """Whether the base is a folder of this machine that is not there any more."""
        return Path(self.base).is_absolute() and not Path(self.base).exists()

    def _unknown(self) -> Answer:
        where = "; if it was moved, give --base FOLDER" if self._is_lost else ""
        return Answer(None, why=f"cannot be said here: the base {self.base} is not on this machine{where}")

    @property
    def adapter(self) -> str:
        return str(self.run.adapter)

    def _peft(self) -> Answer:
        return Answer(True, (f"PeftModel.from_pretrained(base, {self.adapter!r})",), "in Python")

    def _vllm(self) -> Answer:
        faults = serving_snippets.vllm_faults(self.config) + self._of_run()
        if faults:
            return _refused(faults)
        if self._is_lost:
            return self._unknown()
        command = serving_snippets.vllm_with_adapter(self.base, self.found.name, self.adapter, self.config["r"])
        return Answer(True, (self._with_template(command, "--chat-template"),))

    def _sglang(self) -> Answer:
        faults = serving_snippets.faults_of_plain_loaders(self.config, "SGLang")
        faults += faults_of(self.config, "SGLang") + self._of_run()
        if faults:
            return _refused(faults)
        if self._is_lost:
            return self._unknown()
        served, module = shlex.quote(self.base), shlex.quote(f"{self.found.name}={self.adapter}")
        command = f"python -m sglang.launch_server --model-path {served} --enable-lora --lora-paths {module}"
        return Answer(True, (self._with_template(command, "--chat-template"),))

    def _with_template(self, command: str, option: str) -> str:
        return serving_snippets.with_template(command, option, self.run, self.adapter)

    def _of_run(self) -> list[str]:
        """What the adapter's own files do not say."""
        return serving_snippets.faults_of_run(self.found)

    def _merged(self, command: str, why: str = "") -> Answer:
        """For a server that reads a Hugging Face folder."""
        merge = tables.NextCommands.of(self.run).merge
        folder = merge.split(" --output ")[-1]
        return self._drafted(lambda fold: None, (merge, command.format(folder=folder)), why)

    def _llama_cpp(self) -> Answer:
        export, folder = self._export("adapter-gguf")
        command = f"llama-server -m BASE.gguf --lora {folder}/adapter.gguf"
        lines = (export, self._with_template(command, "--jinja --chat-template-file"))
        return self._drafted(lambda fold: adapter_draft(self.run, fold), lines)

    def _ollama(self) -> Answer:
        export, folder = self._export("adapter-gguf")
        lines = (export, "FROM BASE.gguf", f"ADAPTER {folder}/adapter.gguf")
        return self._drafted(lambda fold: adapter_draft(self.run, fold), lines, "the last two lines as its Modelfile")

    def _gguf(self, target: Target, command: str) -> Answer:
        def draft(fold: Fold) -> None:
            drafted = model_draft(self.run, fold, "q8_0", chosen_onto(self.run, None))
            if target == "ollama":
                modelfile_of(drafted)

        export, folder = self._export(target)
        return self._drafted(draft, (export, command.format(folder=folder, name=shlex.quote(self.found.name))))

    def _export(self, target: Target) -> tuple[str, str]:
        """The command that exports, and where it writes."""
        folder = shlex.quote(str(default_export(self.run.path, target, "q8_0")))
        return f"qtune export {shlex.quote(str(self.run.path))} --to {target}", folder

    def _drafted(self, draft: Callable[[Fold], object], lines: tuple[str, ...], why: str = "") -> Answer:
        """Whether qtune itself would write what `draft` drafts."""
        if self.fold is None:
            return self._unknown()
        try:
            if isinstance(self.fold, ModelError):
                raise self.fold
            draft(self.fold)
        except QtuneError as fault:
            return Answer(False, why=str(fault))
        return Answer(True, lines, why)


def _fold(run: RunDir) -> Fold | ModelError | None:
    lock = run.read_lock()
    is_demo = lock.base.name == "demo" and run.base is None
    folder = base_files.DEMO_BASE if is_demo else Path(lock.base.folder)
    if not (folder / "config.json").is_file():
        return None
    try:
        return Fold.open(run, "float32", folder)
    except ModelError as fault:
        return fault


def _refused(faults: list[str]) -> Answer:
    return Answer(False, why="; ".join(faults))


def table(found: list[Server]) -> Group:
    """Each server with its answers below it, and the commands on lines of their own. Print with crop=False."""
    words = {True: Text("yes", "green"), False: Text("no", "red"), None: Text("not known", "yellow")}
    lines: list[Text] = []
    for server in found:
        lines.append(Text(server.name, "bold"))
        for form, answer in (("adapter", server.adapter), ("merged", server.merged)):
            why = f", {answer.why}" if answer.why else ""
            lines.append(Text.assemble(f"  {form:<8}", words[answer.is_taken], why))
            lines += tables.command_lines([f"  {line}" for line in answer.lines])
        lines.append(Text())
    return Group(*lines[:-1])

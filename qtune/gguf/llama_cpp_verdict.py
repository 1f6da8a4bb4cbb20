"""llama.cpp's verdict on an export, or why there is none.

A whole model is asked as it is. A LoRA alone is asked on the run's base as training held it, so that the adapter is all
there is between the two sides: that base is written in f16 beside it, and removed once llama.cpp has answered.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from qtune.errors import MachineError, ModelError
from qtune.gguf import llama_cpp, verify
from qtune.gguf.contents import Draft, base_draft
from qtune.gguf.verify import GgufVerdict
from qtune.merge.merge import Progress, check_disk, counting
from qtune.merge.verify import Live
from qtune.rundir import RunDir

BASE_NAME = "base.gguf"


def asked(
    run: RunDir, draft: Draft, path: Path, output: Path, rows: Sequence[Sequence[int]], progress: Progress | None
) -> tuple[GgufVerdict | None, tuple[str, ...]]:
    """The verdict on the file at `path`, which is to stand in `output`; or none, and a sentence that says why.

    Raises ModelError for a file that llama.cpp does not load.
    """
    if not llama_cpp.is_installed():
        return None, (_not_verified(llama_cpp.HOW_TO_GET_IT),)
    if not any(len(row) > 1 for row in rows):
        return None, (_not_verified("the run kept no held-out rows to compare on."),)
    try:
        if draft.vocabulary is None:
            return _asked_on_base(run, draft, path, output, rows, progress)
        _tell_of_asking(progress, draft)
        return verify.judge(Live.open(run), path, rows, draft), ()
    except MachineError as fault:
        return None, (_not_verified(fault),)


def _not_verified(why: object) -> str:
    return f"Not verified with llama.cpp: {why}"


def _tell_of_asking(progress: Progress | None, draft: Draft) -> None:
    if progress is not None:
        progress(len(draft.entries), len(draft.entries), "and asking llama.cpp")


def _asked_on_base(
    run: RunDir, draft: Draft, path: Path, output: Path, rows: Sequence[Sequence[int]], progress: Progress | None
) -> tuple[GgufVerdict | None, tuple[str, ...]]:
    """The verdict on a LoRA alone; a base that cannot be written is no fault of it.

    Its texts are none: the tokenizer is in the file of the base.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        base_path = Path(folder) / BASE_NAME
        try:
            base = base_draft(run, draft.fold)
            check_disk(output, base.bytes, "base that the LoRA is verified on")
            base.write(base_path, counting(progress, len(base.entries)))
        except ModelError as fault:
            return None, (_not_verified(fault),)
        except OSError as fault:
            return None, (_not_verified(f"its base could not be written ({fault.strerror or fault})."),)
        _tell_of_asking(progress, base)
        return verify.judge(Live.open(run), base_path, rows, draft, path), ()

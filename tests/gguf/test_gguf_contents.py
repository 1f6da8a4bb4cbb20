"""What the user of a GGUF file is told beside it."""

from pathlib import Path

import pytest
from made_bases import make_base
from made_runs import make_run

from qtune.gguf.contents import model_draft
from qtune.merge.merged_weights import Fold

WINDOW = "Beyond 128 tokens the base attends to a window, so the file ends there."


@pytest.mark.parametrize(
    ("kind", "changes", "notes"),
    [
        (
            "mistral",
            {"sliding_window": 128},
            ["Beyond 128 tokens the base attends to a window, so the file ends there."],
        ),
        ("mistral", {"sliding_window": 4096}, []),
        ("mistral", {}, []),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": False}, []),
    ],
)
def test_a_window_is_told_where_the_file_ends_before_the_context_of_the_base(
    tmp_path: Path, kind: str, changes: dict, notes: list[str]
) -> None:
    """Told the wrong way round it was told of bases without a window, and not of those with one."""
    run = make_run(tmp_path / "run", make_base(tmp_path / "base", kind, **changes), compute_dtype="float32")
    draft = model_draft(run, Fold.open(run, "float32"), "q8_0", "original")
    assert list(draft.notes) == notes

"""S2: what is secret in the environment is in no file that a run writes, in nothing that it prints, and asked of
nobody."""

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from fault_lab import stage

WHAT = "no token, password or key of the environment is in a run folder, a crash file or the output"
NAMES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "OPENAI_API_KEY",
    "COMET_API_KEY",
    "DATABASE_PASSWORD",
)
CRASH = """\
import os, qtune.cli as cli
from qtune.commands import arguments
def crash(options):
    held = dict(os.environ)
    raise RuntimeError("made by the fault lab")
arguments.load_recipe = crash
raise SystemExit(cli.main(["check", "t.toml"]))
"""


def run(cases: int, seed: int, folder: Path) -> Iterator[str | None]:
    """Runs and crashes in turn, each with new secrets."""
    workplace = stage.make_workplace(folder / "secrets")
    for case in range(cases):
        secrets = made_up(random.Random(f"{seed} {case}"))
        written = workplace / f"case-{case}"
        (written / "tmp").mkdir(parents=True)
        environment = {**secrets, "TMPDIR": str(written / "tmp")}
        ended = (
            crash(workplace, environment)
            if case % 2
            else stage.qtune(workplace, "run", "t.toml", "--output", str(written / "run"), environment=environment)
        )
        yield judged(ended, written, secrets, expected=case % 2)
        shutil.rmtree(written)


def made_up(dice: random.Random) -> dict[str, str]:
    return {name: f"secret{dice.getrandbits(128):032x}" for name in NAMES}


def crash(workplace: Path, environment: Mapping[str, str]) -> stage.Ended:
    """A verb that fails by our fault, which leaves its traceback in a file."""
    ended = subprocess.run(
        [sys.executable, "-c", CRASH],
        cwd=workplace,
        env={"PYTHONPATH": str(stage.ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return stage.Ended(ended.returncode, ended.stdout + ended.stderr, ())


def judged(ended: stage.Ended, written: Path, secrets: Mapping[str, str], expected: int) -> str | None:
    if ended.status != expected:
        return f"ended with {ended.status}: {ended.printed[-300:]}"
    if ended.sockets:
        return f"tried {'; '.join(ended.sockets[:3])}"
    leaks = [name for name, value in secrets.items() if value in ended.printed]
    files = [path for path in sorted(written.rglob("*")) if path.is_file()]
    if not files:
        return "nothing was written, so nothing was looked at"
    for path in files:
        content = path.read_bytes()
        leaks += [f"{name} in {path.name}" for name, value in secrets.items() if value.encode() in content]
    return f"leaked: {', '.join(leaks)}" if leaks else None

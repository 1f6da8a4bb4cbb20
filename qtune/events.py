"""What happens in a run, as frozen values: training sends them, the journal and the dashboard listen."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """Training begins: `steps` optimizer steps over `train_rows` rows."""

    steps: int
    train_rows: int
    held_out_rows: int


@dataclass(frozen=True)
class StepDone:
    """An optimizer step, and those before it since the last such event (`train.log_every`).

    `loss` is nats per trained token, the mean over the steps; `tokens` counts all of their tokens (there is no
    padding), `trained_tokens` those with a label; `wait_seconds` is the part of `step_seconds` spent waiting for data.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    step_seconds: float
    wait_seconds: float


@dataclass(frozen=True)
class Evaluated:
    """The held-out loss after `step` steps, in nats per trained token, and where there are several sources that over
    the rows of each, by name."""

    step: int
    loss: float
    is_best: bool
    eval_seconds: float
    by_source: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Answered:
    """The same `prompts` as ever (evaluate.watch), answered after `step` steps."""

    step: int
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    answer_seconds: float


@dataclass(frozen=True)
class MemoryMeasured:
    """Bytes held on the device after `step` steps: `parts` by name, in the order of `memory.memory_report.PARTS`.

    `phase` is what was being done since the last measurement (load, attach, forward, backward, step, eval, save),
    `peak_bytes` the most that was held then, and `total_bytes` what the device has. On the CPU the device is the
    host's RAM and the parts sum to this process's resident size. `is_rehearsal` where nothing was trained yet: the
    largest batch was run once.
    """

    step: int
    parts: tuple[tuple[str, int], ...]
    peak_bytes: int
    total_bytes: int
    free_bytes: int
    phase: str = "step"
    is_rehearsal: bool = False


@dataclass(frozen=True)
class Rehearsed:
    """The largest batch was run once: bytes forecast and measured at the peak, which was in `phase`, and what had to be
    switched on beside the plan for it to fit."""

    forecast_bytes: int
    measured_bytes: int
    phase: str
    climbed: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """Base (`who="base"`) or tuned (`who="tuned"`) on the held-out rows; `score` is None where no metric was asked.

    `general_loss` is over text that has nothing to do with the task, None where none was measured. Of pairs `preferred`
    is in what share of them the chosen answer is the likelier one.
    """

    who: str
    loss: float | None
    metric: str
    score: float | None
    rows: int
    score_seconds: float
    general_loss: float | None = None
    preferred: float | None = None


@dataclass(frozen=True)
class Memorised:
    """Of `canaries` secrets, each in `repeats` training rows, so many were `told`; `control_` are as many that were
    never planted. Exposure is the mean, in bits, and at most `most_exposure_bits`."""

    canaries: int
    repeats: int
    told: int
    control_told: int
    exposure_bits: float
    control_exposure_bits: float
    most_exposure_bits: float
    memorised_seconds: float


@dataclass(frozen=True)
class Saved:
    """Something was written to the run folder."""

    what: str
    bytes: int
    save_seconds: float


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was written after `step` steps."""

    step: int
    name: str
    bytes: int
    save_seconds: float


@dataclass(frozen=True)
class Resumed:
    """A run that was stopped goes on after `step` steps; `text` says from which checkpoint, and why from that one."""

    step: int
    text: str


@dataclass(frozen=True)
class Notice:
    """A plain sentence the user should read once."""

    text: str


@dataclass(frozen=True)
class RanksStanding:
    """Of several ranks, in their order, at `step`: the most bytes that each has held on its device, and how long it has
    waited for the others since the last such event."""

    step: int
    peak_bytes: tuple[int, ...]
    waited_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Stopping:
    """A signal asked training to end: with the step under way, or, where it `drops` that one, with the step before it.
    `by` is what would drop it, `Ctrl-C` or `SIGTERM`. It is said, and not kept."""

    by: str
    drops: bool


@dataclass(frozen=True)
class Finished:
    """Training ended after `steps` steps; `without_better` is how many held-out losses in a row ended it early
    (train.patience), 0 where none did."""

    steps: int
    train_seconds: float
    without_better: int = 0


Event = (
    Started
    | StepDone
    | Evaluated
    | Answered
    | MemoryMeasured
    | RanksStanding
    | Rehearsed
    | Scored
    | Memorised
    | Saved
    | CheckpointSaved
    | Resumed
    | Notice
    | Stopping
    | Finished
)
Listener = Callable[[Event], None]
EVENT_BY_NAME = {
    "started": Started,
    "step": StepDone,
    "held_out": Evaluated,
    "answers": Answered,
    "memory": MemoryMeasured,
    "ranks": RanksStanding,
    "rehearsed": Rehearsed,
    "score": Scored,
    "memorised": Memorised,
    "saved": Saved,
    "checkpoint": CheckpointSaved,
    "resumed": Resumed,
    "notice": Notice,
    "finished": Finished,
}

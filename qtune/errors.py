"""Every way qtune refuses.

    QtuneError                 exit 1: our fault, or a run that could not be finished
    ├── TrainingDiverged       a loss or gradient stopped being a number; raised before the step is taken
    ├── OutOfMemory            a step or a loss that does not fit, whatever was tried; the last whole step is kept
    ├── DiskFull               a disk with no room left; what was there stays as it was
    ├── RankLost               another process of the same run failed, ended or did not come in time
    ├── RanksDiffer            processes of one run whose adapters are no longer equal
    ├── DoesNotFit             exit 3: a run that the forecast says cannot fit, with the changes that would
    ├── VerificationFailed     a merge that is not the model that was trained
    └── UserError              exit 2: something the user wrote, named or has; the message says what would work
        ├── RecipeError        a recipe or a --set that does not hold; carries every fault, not the first
        ├── DataError          rows that cannot be trained on, by file and line
        ├── ModelError         a base, tokenizer, template or adapter that does not fit the job
        ├── RunFolderError     a run folder that exists, is missing, or is not complete
        └── MachineError       no space, no network, no device for what was asked

Messages are written for the person at the terminal: where (file and line, or key), what was found, what would work.
One about a setting begins with its full name (`lora.targets: ...`), before which `cli` puts the recipe's file and line.
"""

from collections.abc import Sequence


class QtuneError(Exception):
    """What qtune raises on purpose; `exit_code` is the exit status of the command line."""

    exit_code = 1


class TrainingDiverged(QtuneError):
    """The loss or a gradient is not finite."""


class OutOfMemory(QtuneError):
    """Memory ran out, and there is nothing left to give up; the weights are those of the last whole step."""


class DiskFull(QtuneError):
    """The disk filled up in the middle of a run; the last checkpoint is whole."""


class RankLost(QtuneError):
    """Another process of the run, a `rank` of it, failed, ended, or did not come in time."""

    def __init__(self, sentence: str, rank: int = 0, exit_code: int = 1):
        super().__init__(sentence)
        self.rank, self.exit_code = rank, exit_code


class RanksDiffer(QtuneError):
    """The processes of one run have different adapters, though each is to take every step alike."""


class DoesNotFit(QtuneError):
    """The forecast is larger than the memory there is, whatever technique is on; nothing was loaded."""

    exit_code = 3


class VerificationFailed(QtuneError):
    """The merged model does not reproduce the trained one."""


class UserError(QtuneError):
    """Something the user can put right."""

    exit_code = 2


class RecipeError(UserError):
    """One or more faults of a recipe, each a full sentence that starts with its place (`file:line: ...`)."""

    def __init__(self, faults: Sequence[str]):
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


class DataError(UserError):
    """Rows that cannot be read or trained on."""


class ModelError(UserError):
    """A base, tokenizer, chat template or adapter that does not fit."""


class RunFolderError(UserError):
    """A run folder that exists already, is missing, or lacks a file."""


class MachineError(UserError):
    """The machine lacks what was asked for: disk, memory, network, device."""


def how_to_install(extra: str) -> str:
    """How to get what `extra` of pyproject.toml names: from qtune's own source, as no package index has it."""
    return f"pip install '.[{extra}]', in the folder that qtune was cloned into"

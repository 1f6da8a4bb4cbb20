"""What a launcher of several processes says in the environment: torchrun, accelerate launch, srun."""

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

from qtune.errors import MachineError

# What accelerate, transformers, datasets and torch would read: they are to believe in one process, and qtune, which
# has the whole model in each, does by itself what is to be done between them.
READ_BY_LIBRARIES = re.compile(
    r"(LOCAL_|NODE_|GROUP_|ROLE_|CROSS_)?(RANK|WORLD_SIZE)|LOCAL_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|(TORCHELASTIC|ACCELERATE|FSDP|PARALLELISM_CONFIG)_.*|(PMI|MV2_COMM_WORLD|OMPI_COMM_WORLD)_.*"
)
MET = "QTUNE_RANKS_MET"  # a pipe of qtune's own launcher, for a byte of each rank that has met the others
SLURMS_PORT = 20_000  # chosen: the ports from here on, one a job, where nobody names one
SLURMS_PORTS = 10_000


@dataclass(frozen=True)
class Launched:
    """One process of `size`; `local_rank` counts those of this machine. They meet at `address`, where a launcher that
    `keeps_store` has the store, else rank 0. Who has `met` the others tells a launcher that asks for it there."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    keeps_store: bool = False
    met: int | None = None

    @classmethod
    def taken(cls, environment: MutableMapping[str, str] = os.environ) -> "Launched | None":
        """What the launcher said, taken out of the environment; None for a process that is alone.

        To be called before torch and accelerate are imported. Raises MachineError for what is half said.
        """
        said = dict(environment)
        is_torchs = "RANK" in said and "WORLD_SIZE" in said
        is_slurms = "SLURM_PROCID" in said and "SLURM_STEP_NODELIST" in said and "SLURM_STEP_NUM_TASKS" in said
        launched = _by_torch(said) if is_torchs else _by_slurm(said) if is_slurms else None
        if launched is not None:
            for name in [name for name in environment if READ_BY_LIBRARIES.fullmatch(name) or name == MET]:
                del environment[name]
        return launched if launched is not None and launched.size > 1 else None

    def tell_met(self) -> None:
        if self.met is not None:
            os.write(self.met, b".")
            os.close(self.met)


def _by_torch(said: dict[str, str]) -> Launched:
    """As torchrun says it, and accelerate launch, which calls it."""
    rank, size = _number(said, "RANK"), _number(said, "WORLD_SIZE")
    alone = size == 1
    return Launched(
        rank=rank,
        size=size,
        local_rank=_number(said, "LOCAL_RANK", rank),
        local_size=_number(said, "LOCAL_WORLD_SIZE", size),
        address="" if alone else _text(said, "MASTER_ADDR"),
        port=0 if alone else _number(said, "MASTER_PORT"),
        keeps_store=said.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        met=int(said[MET]) if MET in said else None,
    )


def _by_slurm(said: dict[str, str]) -> Launched:
    """As srun says it: rank 0 is on the first machine of the step."""
    size, job = _number(said, "SLURM_STEP_NUM_TASKS"), _number(said, "SLURM_JOB_ID", 0)
    per_machine = re.match(r"\d+", said.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return Launched(
        rank=_number(said, "SLURM_PROCID"),
        size=size,
        local_rank=_number(said, "SLURM_LOCALID"),
        local_size=int(per_machine[0]) if per_machine else size,
        address=said.get("MASTER_ADDR") or first_host(said["SLURM_STEP_NODELIST"]),
        port=_number(said, "MASTER_PORT", SLURMS_PORT + job % SLURMS_PORTS),
    )


def first_host(nodes: str) -> str:
    """The first machine of a list as Slurm writes it: `node[07-09,12],big1` begins with node07."""
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if first is None:
        raise MachineError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no machine. Set MASTER_ADDR.")
    return "".join(part or "" for part in first.groups())


def _number(said: dict[str, str], name: str, otherwise: int | None = None) -> int:
    if name not in said and otherwise is not None:
        return otherwise
    text = _text(said, name)
    if not text.isdecimal():
        raise MachineError(f"{name} is {text!r} in the environment; a launcher sets a whole number there.")
    return int(text)


def _text(said: dict[str, str], name: str) -> str:
    if not said.get(name):
        raise MachineError(
            f"{name} is not in the environment, though RANK and WORLD_SIZE are. torchrun sets all of them; unset these"
            " two to run in one process."
        )
    return said[name]

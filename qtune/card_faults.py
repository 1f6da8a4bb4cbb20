"""What CUDA says when a card cannot be used, or can be no longer, told to the person who has it.

The texts are cudaGetErrorString's, which torch raises as AcceleratorErrors that begin with "CUDA error: ", and those of
torch 2.11 to 2.13 itself (c10/cuda/CUDAFunctions.cpp).
"""

import re
from collections.abc import Iterator, Sequence

import torch

from qtune.accelerator import Capability
from qtune.errors import MachineError

ON_THE_PROCESSOR = "With CUDA_VISIBLE_DEVICES= in the environment qtune runs on the processor."
OLD_DRIVER = re.compile(
    r"driver on your system is too old|driver version is insufficient|"
    r"forward compatibility was attempted|unsupported display driver"
)
BUSY, FULL = "busy or unavailable", "out of memory"
GONE = re.compile(
    r"unspecified launch failure|unknown error|busy or unavailable|no CUDA-capable device is detected|"
    r"uncorrectable .*ECC error|hardware stack error|launch timed out|driver shutting down|GPU is lost"
)


def refusal(fault: Exception, label: str, is_exclusive: bool) -> MachineError | None:
    """Why no run can begin on the card named `label`, of whatever CUDA said; None for a fault of another kind.

    `is_exclusive`: the driver lets one process at a time have it.
    """
    said = str(fault)
    if OLD_DRIVER.search(said):
        return MachineError(
            f"This machine's NVIDIA driver is too old for this torch, {torch.__version__}, which was built for CUDA"
            f" {torch.version.cuda}. Install a newer driver and start the machine anew, or a torch that was built for"
            f" an older CUDA. {ON_THE_PROCESSOR}"
        )
    if BUSY not in said and FULL not in said:
        return None
    taken = "has no memory left for CUDA to begin with: others have it" if FULL in said else "is taken: others have it"
    alone = ", and its compute mode (`nvidia-smi -q -d COMPUTE`) lets in one process alone" if is_exclusive else ""
    return MachineError(
        f"{label} {taken}{alone}. End what uses it (`nvidia-smi` names that), or name another card with"
        f" CUDA_VISIBLE_DEVICES. {ON_THE_PROCESSOR}"
    )


def refuse_too_old(label: str, capability: Capability, built_for: Sequence[str]) -> None:
    """Raises MachineError for a card that this torch has no kernels for; `built_for` are torch.cuda.get_arch_list().

    A `sm_` of the same generation runs on it, and a `compute_` of any before is compiled when it is loaded.
    """
    built = [(kind, *divmod(int(number), 10)) for kind, number in _architectures(built_for)]
    runs = [
        (major, minor) <= capability if kind == "compute" else major == capability[0] and minor <= capability[1]
        for kind, major, minor in built
    ]
    if built and not any(runs):
        oldest = min((major, minor) for _, major, minor in built)
        is_older = capability < oldest
        raise MachineError(
            f"{label} is {'older' if is_older else 'newer'} than what this torch, {torch.__version__}, has kernels for:"
            f" its compute capability is {_dotted(capability)}, and they begin at {_dotted(oldest)}. Install"
            f" {'an older' if is_older else 'a newer'} torch, or one built for another CUDA. {ON_THE_PROCESSOR}"
        )


def _architectures(built_for: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in built_for:
        if parts := re.fullmatch(r"(sm|compute)_(\d+)[af]?", name):
            yield parts[1], parts[2]


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def told(label: str, said: str) -> str:
    """That the card named `label` fell out, where CUDA `said` so."""
    return (
        f"{label} fell out in the middle ({said}). Heat, power and a driver that was updated under it are the usual"
        " causes; where `nvidia-smi` does not show the card, start the machine anew."
    )


def why_gone(fault: BaseException) -> str | None:
    """The first line of what CUDA said when a card fell out in the middle; None for a fault of another kind."""
    seen: set[int] = set()
    link: BaseException | None = fault
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        said = str(link).strip().partition("\n")[0]
        if isinstance(link, RuntimeError) and said.startswith("CUDA error") and GONE.search(said):
            return said
        link = link.__cause__ or link.__context__
    return None

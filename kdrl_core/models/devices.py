"""The GPUs of this machine that this process may use. CUDA is not started here: a process that starts it keeps memory
on a GPU, and cannot fork any more.

CUDA_VISIBLE_DEVICES is read as CUDA reads it. Names are indices (`0,3`), UUIDs of GPUs (`GPU-5d5ba0d6…`) or of MIG
devices (`MIG-…`); a UUID may be cut short. The list ends at the first name that is no device: `-1`, or an index that is
not there. If a name stands twice, or the value is empty, no device is visible; without the variable, all are.
"""

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from shutil import which

from kdrl_core.errors import EngineError

_FIELDS = ("index", "uuid", "name", "memory.total", "driver_version")
_QUERY = f"--query-gpu={','.join(_FIELDS)}"
CSV = "--format=csv,noheader,nounits"
_PATIENCE_S = 60.0
_NO_DEVICES = "No devices were found"
_VARIABLE = "CUDA_VISIBLE_DEVICES"
_MIG = "MIG-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, or a MIG device of one."""

    index: int
    """nvidia-smi's number of the GPU, by its place on the bus. CUDA counts the same way on a node of equal GPUs, and
    with CUDA_DEVICE_ORDER=PCI_BUS_ID on any."""
    uuid: str
    name: str
    memory: int
    """Bytes; 0 if nvidia-smi does not know, as where GPU and host share theirs."""
    driver: str
    """The driver's version, like `580.65.06`."""


def gpus() -> list[Gpu]:
    """The GPUs that CUDA shows to this process, in its order; none if there are none, or no `nvidia-smi`.

    Raises EngineError if `nvidia-smi` fails."""
    found = _installed()
    if (names := named_devices()) is None:
        return found
    if names and names[0].startswith(_MIG):
        found = _mig_devices(found)
    shown: list[Gpu] = []
    for name in names:
        matching = [gpu for gpu in found if (gpu.uuid.startswith(name) if "-" in name else str(gpu.index) == name)]
        if len(matching) != 1:  # unknown, or a UUID so short that it fits several
            break
        shown += matching
    return shown


def named_devices() -> list[str] | None:
    """The names in CUDA_VISIBLE_DEVICES that CUDA would take; None if the variable is not set. Whether there are such
    devices is not looked up."""
    if (text := os.environ.get(_VARIABLE)) is None:
        return None
    kind = next((kind for kind in ("GPU-", _MIG) if text.startswith(kind)), None)
    names: list[str] = []
    for part in text.split(","):
        if kind is not None:
            name = part if part.startswith(kind) else None
        else:
            digits = re.match(r"\s*\+?(\d+)", part)
            name = str(int(digits[1])) if digits else None
        if name is None:
            break
        if name in names:
            return []
        names.append(name)
    return names


def visible_devices(count: int, *, needed_for: str) -> list[str]:
    """The first `count` GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. UUIDs are completed, since
    vLLM does not know parts of them. `needed_for` says in the error what asks for them.

    Raises EngineError if there are fewer."""
    names = named_devices()
    if which("nvidia-smi") is not None:
        shown = gpus()
        are_uuids = names is not None and any("-" in name for name in names)
        names = [gpu.uuid if are_uuids else str(gpu.index) for gpu in shown]
    elif names is None:  # a container without it
        import torch

        names = [str(number) for number in range(torch.cuda.device_count())]
    if len(names) < count:
        raise EngineError(f"{count} GPUs are needed ({needed_for}), {len(names)} are visible{_why()}; ask for fewer")
    return names[:count]


def devices_of_ranks(count: int) -> list[str]:
    """The GPUs of `count` processes that train together on this machine, one for each, as CUDA_VISIBLE_DEVICES names
    them. Raises EngineError if there are fewer, or if they are MIG devices: CUDA shows a process only one of those."""
    names = visible_devices(count, needed_for=f"one for each of trainer.ranks={count}")
    if count > 1 and names[0].startswith(_MIG):
        raise EngineError(
            f"trainer.ranks={count}, but CUDA shows only one MIG device to a process ({_VARIABLE}="
            f"{os.environ[_VARIABLE]}); set trainer.ranks=1, or give whole GPUs"
        )
    return names


def _why() -> str:
    text = os.environ.get(_VARIABLE)
    return "" if text is None else f" with {_VARIABLE}={text!r}"


def _installed() -> list[Gpu]:
    """All GPUs of this machine, by index."""
    if which("nvidia-smi") is None:
        return []
    found = []
    for line in ask_nvidia_smi(_QUERY, CSV).splitlines():
        if not line.strip() or _NO_DEVICES in line:
            continue
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_FIELDS) or not values[0].isdigit():
            raise EngineError(
                f"nvidia-smi {_QUERY} printed {line!r}, not an index, a UUID, a name, MiB of memory and a driver; "
                "repair the driver first"
            )
        index, uuid, name, mebibytes, driver = values
        memory = int(mebibytes) * 2**20 if mebibytes.isdigit() else 0
        found.append(Gpu(index=int(index), uuid=uuid, name=name, memory=memory, driver=driver))
    return sorted(found, key=lambda gpu: gpu.index)


def _mig_devices(parents: Sequence[Gpu]) -> list[Gpu]:
    """The MIG devices of all GPUs. A profile `1g.10gb` has at least 10 GB."""
    by_uuid, parent, found = {gpu.uuid: gpu for gpu in parents}, None, []
    for line in ask_nvidia_smi("-L").splitlines():
        if whole := re.match(r"GPU \d+: .*\(UUID: (\S+)\)", line):
            parent = by_uuid.get(whole[1])
        part = re.match(r"\s+MIG (\S*?(\d+)gb\S*)\s.*\(UUID: (\S+)\)", line)
        if part and parent is not None:
            name, memory = f"{parent.name} MIG {part[1]}", int(part[2]) * 10**9
            found.append(Gpu(index=parent.index, uuid=part[3], name=name, memory=memory, driver=parent.driver))
    return found


def ask_nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints. Raises EngineError if it is not there, fails, or does not answer within a minute."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"nvidia-smi does not answer ({error}); is the driver healthy?") from error
    if done.returncode != 0 and _NO_DEVICES not in done.stdout:
        told = " ".join((done.stdout + done.stderr).split())[:300]
        raise EngineError(f"nvidia-smi ended with status {done.returncode}: {told}; repair the driver first")
    return done.stdout

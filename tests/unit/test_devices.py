"""The GPUs of this machine, from what `nvidia-smi` printed on real nodes."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_smi import A100S

from kdrl_core.boxes.preflight import check_devices
from kdrl_core.config import load_recipe
from kdrl_core.errors import EngineError, RecipeError
from kdrl_core.look.planning.machine import require_fit
from kdrl_core.models.devices import Gpu, devices_of_ranks, gpus, named_devices, visible_devices
from kdrl_core.models.gpu_share import engine_share
from kdrl_core.training import rank_group


def test_the_gpus_of_a_node(smi: Any) -> None:
    smi()
    found = gpus()
    assert [gpu.index for gpu in found] == [0, 1, 2, 3]
    uuid = "GPU-0c8f6de6-41b1-4b6e-a5a7-0c2e2f6f3a10"
    assert found[0] == Gpu(index=0, uuid=uuid, name="NVIDIA A100-SXM4-80GB", memory=80 * 2**30, driver="580.65.06")


@pytest.mark.parametrize(
    ("names", "indices"),
    [
        ("2,0", [2, 0]),
        (" 1 , 3", [1, 3]),
        ("GPU-3c8f,GPU-1c8f6de6-41b1-4b6e-a5a7-0c2e2f6f3a11", [3, 1]),
        ("0,-1,2", [0]),
        ("1,7,2", [1]),  # there is no GPU 7
        ("1,1", []),
        ("", []),
        ("-1", []),
        ("GPU-", []),  # fits all four
        ("none", []),
    ],
)
def test_only_visible_gpus_count_and_in_their_order(smi: Any, names: str, indices: list[int]) -> None:
    smi(names=names)
    assert [gpu.index for gpu in gpus()] == indices
    taken = visible_devices(len(indices), needed_for="the test")
    assert taken == [gpu.uuid if "GPU" in names else str(gpu.index) for gpu in gpus()]
    with pytest.raises(EngineError, match=rf"5 GPUs are needed \(the test\), {len(indices)} are visible with CUDA_VIS"):
        visible_devices(5, needed_for="the test")


@pytest.mark.parametrize(
    "names",
    [
        *("0", "2,0", " 3", "0,0", "", "-1", "1,-1,2", "1gpu2,2ampere", "+1", "x", "0,,1", "GPU-a,GPU-b"),
        *("GPU-a, GPU-b", "GPU-a,GPU-a", "GPU-a,1", "1,GPU-a", "MIG-a,MIG-b", "MIG-GPU-a/1/0", "gpu-a"),
    ],
)
def test_names_are_read_as_torch_reads_them(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert named_devices() == [str(name) for name in torch.cuda._parse_visible_devices()]


def test_parts_of_a_gpu_have_their_own_memory_and_are_no_ranks(smi: Any) -> None:
    names = ["MIG-1ab0b8a1-51e8-5ca3-aa1c-5d5a1c4a8c55", "MIG-2ee5a2f1-cf05-5c7d-9a0f-d9ab2a0f0f10"]
    smi(names=",".join(names))
    assert [(gpu.uuid, gpu.name, gpu.memory) for gpu in gpus()] == [
        (names[0], "NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40 * 10**9),
        (names[1], "NVIDIA A100-SXM4-80GB MIG 1g.10gb", 10 * 10**9),
    ]
    assert devices_of_ranks(1) == names[:1]
    with pytest.raises(EngineError, match=r"trainer.ranks=2, but CUDA shows only one MIG device to a process"):
        devices_of_ranks(2)


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
            9,
            "status 9: NVIDIA-SMI has",
        ),
        ("Unable to determine the device handle\n", 0, "printed 'Unable to determine the device handle', not an index"),
    ],
)
def test_what_nvidia_smi_does_not_know_is_an_error(smi: Any, query: str, status: int, message: str) -> None:
    smi(query, status=status)
    with pytest.raises(EngineError, match=message):
        gpus()


def test_memory_that_nvidia_smi_does_not_know_is_none(smi: Any) -> None:
    smi("0, GPU-1, NVIDIA GB10, [N/A], 580.95.05\n")
    assert gpus()[0].memory == 0
    recipe = load_recipe("paper-1.5b", ["student.path=builtin:miniature/student"])
    with pytest.raises(EngineError, match=r"memory of the GPUs is not known, .* set vllm.gpu_memory_utilization"):
        engine_share(recipe)
    require_fit(recipe)  # nothing can be said


def test_a_machine_without_gpus(smi: Any) -> None:
    smi("No devices were found\n", status=6)
    assert gpus() == []


def test_local_rank_i_gets_the_ith_gpu_that_is_named(smi: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes of DeepSpeed's launcher. Each rank takes the GPU of its LOCAL_RANK among those that it sees."""
    smi(names="GPU-3c8f6de6,GPU-1c8f6de6,GPU-0c8f6de6")
    (tmp_path / "shows.py").write_text(
        "import os\nwith open(f\"{os.environ['PLACE']}/{os.environ['LOCAL_RANK']}\", 'w') as file:\n"
        "    file.write(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    monkeypatch.setattr(rank_group, "WORKER", "shows")
    command = rank_group.launch_command(
        tmp_path / "spec", num_ranks=2, hostfile=None, master_port=29_000, device="cuda"
    )
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PLACE": str(tmp_path), "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    seen = [(tmp_path / str(rank)).read_text().split(",")[rank] for rank in range(2)]
    assert seen == [f"GPU-{n}c8f6de6-41b1-4b6e-a5a7-0c2e2f6f3a1{n}" for n in (3, 1)]  # in full, as vLLM needs them


@pytest.mark.parametrize(
    ("overrides", "names", "message"),
    [
        (
            [],
            "0,1",
            r"'trainer.ranks': 8 GPUs are needed \(one for each of trainer.ranks=8\), 2 are visible with CUDA_",
        ),
        (
            ["trainer.ranks=2", "vllm.tensor_parallel=4"],
            None,
            r"'vllm.replicas': 4 GPUs .*vllm.tensor_parallel=4\), 3 a",
        ),
        (["trainer.ranks=2", "vllm.replicas=2", "vllm.tensor_parallel=2"], None, "'vllm.replicas': 4 GPUs are needed"),
        (
            ["trainer.hostfile=hosts"],
            "1,0",
            r"'trainer.hostfile': DeepSpeed gives .*, not those of CUDA_VISIBLE_DEVICES=1,0",
        ),
        (["trainer.ranks=2"], "2,0", None),
        (["trainer.hostfile=hosts"], "0,1", None),
        (["runtime.device=cpu"], "", None),
    ],
)
def test_a_recipe_with_more_ranks_or_engines_than_gpus_is_refused(
    smi: Any, overrides: list[str], names: str | None, message: str | None
) -> None:
    smi("".join(A100S.splitlines(keepends=True)[:3]), names=names)
    recipe = load_recipe("paper-1.5b", ["vllm.replicas=1", *overrides])
    with pytest.raises(RecipeError, match=message) if message else nullcontext():
        check_devices(recipe)

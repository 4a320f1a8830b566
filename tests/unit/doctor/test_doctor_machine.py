"""What the doctor finds without loading anything: each fault is named, with what to do about it."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import small_disk

from kdrl_core.config import load_recipe
from kdrl_core.errors import EngineError
from kdrl_core.look.doctor import machine, needs, versions
from kdrl_core.look.doctor.checks import CheckFailed, CheckStatus, NotApplicable, Observed, Recorder
from kdrl_core.look.doctor.examine import Diagnosis, doctor_folder, examine
from kdrl_core.look.doctor.remedies import remedy_for_text
from kdrl_core.models.devices import gpus

PAPER = load_recipe("paper-1.5b")
MINIATURE = load_recipe("miniature")
TOPOLOGY = """\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity
GPU0\t X \t{link}\t0-31\t0
GPU1\t{link}\t X \t0-31\t0

Legend:
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an `nvidia-smi` on PATH that tells of GPUs which are not there."""

    def make(*, count: int = 8, mebibytes: int = 81559, driver: str = "580.65.06", link: str = "NV18") -> None:
        rows = "\n".join(f"{i}, GPU-{i}{i}{i}{i}, NVIDIA H100 80GB HBM3, {mebibytes}, {driver}" for i in range(count))
        (tmp_path / "rows").write_text(rows + "\n")
        (tmp_path / "topology").write_text(TOPOLOGY.format(link=link))
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f'#!/bin/sh\nif [ "$1" = topo ]; then cat {tmp_path}/topology; else cat {tmp_path}/rows; fi\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 MiB."""
    with small_disk(tmp_path / "disk", mib=64) as folder:
        yield folder


def result(diagnosis: Diagnosis, check: str) -> Any:
    return next(each for each in diagnosis.checks if each.check == check)


def test_a_driver_that_is_too_old_is_named_with_the_driver_that_is_needed(
    smi: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(driver="550.54.15")
    monkeypatch.setattr(versions, "torch_cuda", lambda: (13, 0))
    diagnosis = examine(PAPER, folder=tmp_path, on_event=lambda event: None)
    driver = result(diagnosis, "driver")
    assert driver.status == CheckStatus.FAILED
    assert driver.says == "driver 550.54.15, CUDA 13.0 of torch needs 580 or later"
    assert driver.remedy.startswith("update the driver to 580 or later")
    assert diagnosis.to_json()["machine"]["gpus"][0]["driver"] == "550.54.15"


def test_a_node_with_what_the_paper_needs(smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    smi()
    found = gpus()
    monkeypatch.setattr(versions, "torch_cuda", lambda: (13, 0))
    assert versions.check_driver(PAPER, found).figures == {"driver": "580.65.06"}
    assert machine.check_visible_gpus(PAPER, found).says == "8 × NVIDIA H100 80GB HBM3 80 GiB, 8 used"
    assert machine.check_links(PAPER, found).says == "NVLink"
    assert needs.check_plan(PAPER, found).says.startswith("fits: at most ")


def test_vllm_needs_a_compiler_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gcc").write_text("")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(versions.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(CheckFailed, match=r"^not there: /.*/Python\.h$") as fault:
        versions.check_compiler(PAPER)
    assert "python3-dev" in str(fault.value.remedy)
    (tmp_path / "Python.h").touch()
    assert versions.check_compiler(PAPER).says == f"{tmp_path}/gcc, {tmp_path}/Python.h"
    (tmp_path / "gcc").unlink()
    with pytest.raises(CheckFailed, match=r"^not there: a C compiler$"):
        versions.check_compiler(PAPER)
    with pytest.raises(NotApplicable):
        versions.check_compiler(MINIATURE)


def test_too_few_gpus_too_small_ones_and_slow_links(smi: Callable[..., None]) -> None:
    smi(count=4, link="SYS")
    with pytest.raises(CheckFailed, match=r"4 GPUs are visible \(.*\), the recipe uses 8: trainer.ranks=8") as fault:
        machine.check_visible_gpus(PAPER, gpus())
    assert "or use these: --set trainer.ranks=4 --set vllm.replicas=4; whether" in str(fault.value.remedy)
    assert "PCIe, across sockets; collectives are slow" in machine.check_links(PAPER, gpus()).says
    smi(mebibytes=16_000)
    with pytest.raises(CheckFailed, match=r"stage2: .* does not fit, because") as cramped:
        needs.check_plan(PAPER, gpus())
    assert "would fit with stage2: --set" in str(cramped.value.remedy)


def test_links_are_read_between_gpus_only() -> None:
    table = "\tGPU0\tGPU1\tNIC0\nGPU0\t X \tNV12\tSYS\nGPU1\tNV12\t X \tSYS\nNIC0\tSYS\tSYS\t X\n"
    assert machine.links_in(table) == {"NVLink"}


def test_a_package_of_another_release_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("transformers", "4.57.1"), ("vllm", "0.31.0")):
        place = tmp_path / f"{name}-{version}.dist-info"
        place.mkdir()
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    diagnosis = examine(load_recipe("miniature-vllm"), folder=tmp_path / "artifacts", on_event=lambda event: None)
    packages = result(diagnosis, "packages")
    assert packages.status == CheckStatus.FAILED
    assert "transformers 4.57.1 is installed, kdrl works with <5.20,>=5.16.1" in packages.says
    assert "vllm 0.31.0 is installed, kdrl works with 0.32" in packages.says
    assert packages.remedy == "pip install 'transformers<5.20,>=5.16.1'; make setup"
    real = result(diagnosis, "a step for real")
    assert (real.status, real.says) == ("skipped", "nothing can be loaded before this is mended: packages")
    assert diagnosis.failed == ["packages"]
    assert not (tmp_path / "artifacts").exists()


def test_a_full_and_a_read_only_disk(disk: Path) -> None:
    with (disk / "ballast").open("wb") as file:
        file.write(b"\0" * (60 * 2**20))
    full = examine(MINIATURE, folder=disk, on_event=lambda event: None)
    assert result(full, "disk").says == "only 4 MiB are free"
    assert result(full, "a step for real").status == CheckStatus.SKIPPED
    (disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    read_only = examine(MINIATURE, folder=disk, on_event=lambda event: None)
    assert "cannot be written" in result(read_only, "disk").says
    assert "--folder DIR" in result(read_only, "disk").remedy
    assert read_only.failed == ["disk"]
    assert not list(disk.iterdir())


def test_shared_memory_of_a_container(disk: Path) -> None:
    with pytest.raises(CheckFailed, match=r"0\.06 GiB free, about 0\.53 needed") as fault:
        machine.check_shared_memory(PAPER, place=disk)
    assert "--shm-size" in str(fault.value.remedy)


@pytest.mark.parametrize(
    ("overrides", "mebibytes"),
    [
        (["vllm.replicas=8"], 0),
        (["vllm.replicas=1"], 3 * (160 + 240)),  # student, reference and teacher
        (["vllm.replicas=4", "vllm.tensor_parallel=2"], 3 * 4 * (160 + 2 * 240)),
        (["vllm.replicas=1", "teacher.engine=transformers"], 2 * (160 + 240)),
        (["vllm.replicas=1", "runtime.device=cpu"], 0),
    ],
)
def test_shared_memory_of_vllms_workers(
    overrides: list[str], mebibytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))
    found = machine.check_shared_memory(load_recipe("paper-1.5b", overrides), place=tmp_path).figures
    assert found["needed"] == (8 * 68 + mebibytes) * 2**20


def test_too_little_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a control group counts, though the machine has more. Memory of cached files is free."""
    (tmp_path / "memory.max").write_text(f"{30 * 2**20}\n")
    (tmp_path / "memory.current").write_text(f"{26 * 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon {20 * 2**20}\nactive_file {4 * 2**20}\ninactive_file {2 * 2**20}\n")
    monkeypatch.setattr(needs, "_CGROUP", tmp_path)
    with pytest.raises(CheckFailed, match=r"10\.5 MB free, about [\d.]+ MB needed for weights") as fault:
        needs.check_host_memory(MINIATURE, [])
    assert "give the job more memory" in str(fault.value.remedy)


def test_space_for_the_checkpoints_of_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.78B parameters · 12 bytes · (2 last, 5 and 2 of every 100th, the newest of each stage) and two exports."""
    student = 1_777_088_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10**9))
    with pytest.raises(CheckFailed) as fault:
        needs.check_space(PAPER, tmp_path)
    assert fault.value.figures["run"] == student * (12 * (2 + 5 + 1 + 2 + 2 + 1) + 8)


def test_a_cpu_recipe_needs_no_gpu() -> None:
    for check in (machine.check_visible_gpus, versions.check_driver, needs.check_plan):
        with pytest.raises(NotApplicable, match=r"runtime\.device=cpu"):
            check(MINIATURE, [])


def test_folders_of_killed_doctors_are_swept_and_those_of_others_kept(tmp_path: Path) -> None:
    for name in ("dead", "alive"):
        (tmp_path / f".doctor-{name}").mkdir()
        (tmp_path / f".doctor-{name}" / "lock").touch()
    with (tmp_path / ".doctor-alive" / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with doctor_folder(tmp_path) as place:
            assert {each.name for each in tmp_path.iterdir()} == {".doctor-alive", place.name}
    assert [each.name for each in tmp_path.iterdir()] == [".doctor-alive"]


def test_a_check_inside_of_another_counts_its_own_time_and_its_failure_once() -> None:
    events: list[dict[str, Any]] = []
    recorder = Recorder(events.append)

    def inner() -> Observed:
        raise CheckFailed("broken", "mend it", volts=3)

    def outer() -> Observed:
        try:
            recorder.run("inner", inner)
        except CheckFailed as error:
            raise RuntimeError("without it nothing works") from error
        raise AssertionError("the failure goes on to the outer check")

    assert not recorder.run("outer", outer)
    assert not recorder.run("after", lambda: Observed(says="never"), needs=["outer"])
    assert recorder.run("other", lambda: Observed(says="fine"))
    ends = [(each["check"], each["status"], each["says"], each["remedy"]) for each in events if each["event"] == "end"]
    assert ends == [
        ("inner", "failed", "broken", "mend it"),
        ("outer", "skipped", "needs: inner", None),
        ("after", "skipped", "needs: outer", None),
        ("other", "ok", "fine", None),
    ]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "a GPU's memory ran out"),
        ("rank 3 ended with signal SIGKILL, which the kernel sends", "the host's memory ran out"),
        ("NCCL error in ncclCommInitRank", "the ranks cannot talk to each other"),
        ("signal SIGSEGV", "compiled code crashed"),
        ("RecipeError: field x is wrong; set it to 1", None),
    ],
)
def test_remedies_of_errors_that_tell_none(text: str, remedy: str | None) -> None:
    found = remedy_for_text(text)
    assert found == remedy if remedy is None else str(found).startswith(remedy)


def test_an_error_of_several_lines_is_told_by_its_first() -> None:
    recorder = Recorder(lambda event: None)

    def fail(error: Exception) -> Any:
        raise error

    recorder.run("known", lambda: fail(EngineError("update: rank 1 failed: out\nof its log")))
    recorder.run("unknown", lambda: fail(MemoryError("no more")))
    known, unknown = recorder.results
    assert (known.says, known.figures) == ("update: rank 1 failed: out", {"log": "of its log"})
    assert unknown.says == "MemoryError: no more"
    assert unknown.figures["log"].endswith("MemoryError: no more")
    assert str(unknown.remedy).startswith("the host's memory ran out")

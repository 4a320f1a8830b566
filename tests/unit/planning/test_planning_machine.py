"""A plan for this machine's GPUs, and runs that do not fit them."""

import logging
from typing import Any

import pytest
from fake_smi import A100S

from kdrl_core.config import load_recipe
from kdrl_core.errors import RecipeError
from kdrl_core.look.planning.machine import cluster_of, misfits, require_fit
from kdrl_core.models.devices import gpus
from kdrl_core.models.gpu_share import engine_share

EIGHT = "".join(f"{n}, GPU-{n}, NVIDIA A100-SXM4-80GB, 81920, 580.65.06\n" for n in range(8))
SMALL = "".join(f"{n}, GPU-{n}, NVIDIA A10G, 23028, 580.65.06\n" for n in range(8))


def test_the_cluster_of_a_node_has_its_data_sheet_and_its_smallest_gpu(smi: Any) -> None:
    smi(A100S.replace("A100-SXM4-80GB", "H100 80GB HBM3").replace("81920", "81559", 1), names="1,0")
    cluster = cluster_of(gpus())
    assert (cluster.gpus, cluster.gpus_per_node, cluster.gpu_memory) == (2, 2, 81_559 * 2**20)
    assert (cluster.peak_flops, cluster.memory_bandwidth) == (989e12, 3.35e12)


def test_the_papers_recipe_fits_its_node(smi: Any, caplog: pytest.LogCaptureFixture) -> None:
    smi(EIGHT)
    require_fit(load_recipe("paper-1.5b"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("query", "overrides", "parts"),
    [
        (
            SMALL.replace("A10G, 23028", "L40S, 46068"),
            ["trainer.activation_checkpointing=false"],
            [
                "8 × NVIDIA L40S with 48 GB",
                "stage2: ",
                "update needs",
                "trainer.activation_checkpointing=true",
            ],
        ),
        (
            SMALL,
            [],
            ["8 × NVIDIA A10G with 24 GB", "teacher-score needs", "vllm.tensor_parallel=4; or GPUs with 40 GB"],
        ),
        (
            EIGHT,
            ["vllm.gpu_memory_utilization=0.97"],
            ["an engine of rollout takes 83.3 GB", "beside 6.2 GB of others"],
        ),
    ],
)
def test_what_cannot_fit_is_told_with_settings_that_make_it_fit(
    smi: Any, query: str, overrides: list[str], parts: list[str]
) -> None:
    smi(query)
    with pytest.raises(RecipeError) as error:
        require_fit(load_recipe("paper-1.5b", overrides))
    for part in parts:
        assert part in str(error.value)
    cluster = cluster_of(gpus())
    for wrong in misfits(load_recipe("paper-1.5b", overrides), cluster):
        for remedy in wrong.remedies:
            if remedy.startswith("--set "):
                settings = remedy.removeprefix("--set ").split(" --set ")
                left = misfits(load_recipe("paper-1.5b", [*overrides, *settings]), cluster)
                assert wrong.stage not in [each.stage for each in left], remedy


def test_what_is_tight_is_a_warning(smi: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An update of stage 1 needs 14.6 GB: less than these GPUs have, 16.0, but more than 0.9 of it."""
    smi(SMALL.replace("23028", "15300"))
    with caplog.at_level(logging.WARNING):
        require_fit(load_recipe("paper-1.5b", ["stage2=null", "vllm.gpu_memory_utilization=null"]))
    assert any("memory will be tight: stage1" in record.message for record in caplog.records)


def test_nothing_is_checked_on_a_cpu_or_without_gpus(smi: Any) -> None:
    smi("No devices were found\n", status=6)
    require_fit(load_recipe("paper-1.5b"))
    smi(SMALL)
    require_fit(load_recipe("paper-1.5b", ["runtime.device=cpu"]))


def test_a_share_that_is_left_open_is_computed_for_the_smallest_gpu(smi: Any, tmp_path: Any) -> None:
    """(2 + 12 / 8) bytes a parameter of the student, beside nothing else."""
    smi(EIGHT)
    student = "student.path=builtin:miniature/student"
    recipe = load_recipe("paper-1.5b", [student, "vllm.gpu_memory_utilization=null"])
    assert engine_share(recipe) == 0.89  # 0.9 less a few hundred kB
    assert engine_share(load_recipe("paper-1.5b", ["vllm.gpu_memory_utilization=0.5"])) == 0.5

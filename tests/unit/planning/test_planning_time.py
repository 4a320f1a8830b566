"""The plan's seconds: decoding step by step, by hand; and phase by phase against runs on this CPU."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from crash.tiny_run import open_tiny, train_step
from transformers import AutoConfig, AutoModelForCausalLM

from kdrl_core.boxes import make
from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.session import close_sessions
from kdrl_core.boxes.stage import open_stage
from kdrl_core.config import load_recipe, resolve_path
from kdrl_core.ledger import Run
from kdrl_core.look.planning.cluster import CPU_BANDWIDTH, Cluster, Engines, engines_of, work_of
from kdrl_core.look.planning.conditions import conditions
from kdrl_core.look.planning.cost import Rates, rollout_s, step_time
from kdrl_core.look.planning.decode import DecodingCost, decoding_cost, generation
from kdrl_core.look.planning.lengths import cut, mean_square, response_lengths
from kdrl_core.look.planning.measured import lengths_for, rates_of, rates_of_run
from kdrl_core.look.planning.placement import Placement
from kdrl_core.look.planning.shapes import KNOWN_SHAPES
from kdrl_core.look.planning.stage_plan import plan_stage
from kdrl_core.tables.files import load_metrics

NODE = Cluster(gpus=8, gpus_per_node=8, gpu_memory=80e9)
COST = DecodingCost(overhead=1.0, weights=2.0, cached=0.01, arithmetic=0.5)


def test_a_decoding_step_by_hand() -> None:
    """Per step: 1 + max(2, 0.5 n) + 0.01 · cached."""
    alone = generation(COST, [3.0], prompt=10, slots=4, is_continuous=True)
    assert alone.steps == 3
    assert alone.seconds == pytest.approx(3 * (1 + 2) + 0.01 * (10 + 11 + 12))
    two = generation(COST, [1.0, 3.0], prompt=10, slots=4, is_continuous=True)  # the batch shrinks after one step
    assert two.seconds == pytest.approx(3 * (1 + 2) + 0.01 * (20 + 11 + 12))
    many = generation(COST, [2.0] * 8, prompt=0, slots=8, is_continuous=True)
    assert many.seconds == pytest.approx(2 * (1 + 4) + 0.01 * (0 + 8))


def test_the_next_response_starts_when_one_ends_or_with_the_next_batch() -> None:
    """Two at a time, of 1, 3, 2 tokens: the third runs in steps 2-3; or after the batch, in steps 4-5."""
    lengths = [1.0, 3.0, 2.0]
    assert generation(COST, lengths, prompt=0, slots=2, is_continuous=True).steps == 3
    assert generation(COST, lengths, prompt=0, slots=2, is_continuous=False).steps == 5


@pytest.mark.parametrize(("average", "longest"), [(8192, 20_480), (1000, 20_480), (15_000, 20_480), (64, 64)])
def test_lengths_have_the_mean_and_the_longest_that_are_given(average: float, longest: float) -> None:
    found = response_lengths(4096, mean=average, longest=longest)
    assert mean(found) == pytest.approx(average, rel=0.005)
    assert mean(length**2 for length in found) == pytest.approx(mean_square(average, longest), rel=0.01)
    assert max(found) <= longest
    limit = longest / 3
    assert mean(min(length, limit) for length in found) == pytest.approx(cut(average, longest, limit)[0], rel=0.01)
    busiest = response_lengths(4096, mean=average, longest=longest, engines=512)
    assert len(busiest) == 8
    assert max(busiest) == max(found)


def test_the_papers_rollout_is_the_sum_of_its_steps_and_not_the_longest_response() -> None:
    """128 responses on each of 8 GPUs. Had all the mean length: 8,192 steps of 5 + 3.6 + 16 = 24.6 ms, 201 s. But the
    batch shrinks until only the longest is left, whose 20,480 steps alone would take 181 s."""
    work = work_of(load_recipe("paper-1.5b"), "stage2")
    found = rollout_s(work, Engines(), NODE, 8, Rates())
    assert 345 < found < 400
    equal = replace(work, longest_response=work.mean_response)
    assert rollout_s(equal, Engines(), NODE, 8, Rates()) == pytest.approx(201.4, rel=0.01)
    cost = decoding_cost(KNOWN_SHAPES["DeepSeek-R1-Distill-Qwen-1.5B"], Engines(), NODE)
    assert generation(cost, [20_480.0], prompt=256, slots=1, is_continuous=True).seconds == pytest.approx(181, rel=0.01)


def test_sync_sleep_and_checkpoint_by_hand() -> None:
    """N = 1.777 G in bfloat16: 3.554 GB are written at 5 GB/s, 0.711 s; then read (0.711) and copied to a GPU at 20
    GB/s (0.178) while their digest is made, at 3.2 GB/s 1.111 s. Student and teacher (15.231 GB) go to the host and
    come back."""
    work = work_of(load_recipe("paper-1.5b"), "stage2")
    found = step_time(work, Engines(), NODE, Placement(student_gpus=8), Rates())
    assert found.weight_sync == pytest.approx(0.711 + 1.111, abs=0.002)
    assert found.offload == pytest.approx(2 * (3.554 + 15.231) / 20, abs=0.002)
    assert found.checkpoint == 0.0  # 21.3 GB in 14.2 s, while responses are sampled
    alone = step_time(work, Engines(trainer="torch"), NODE, Placement(student_gpus=8), Rates())
    assert alone.checkpoint == pytest.approx(14.2 / 10, abs=0.01)  # every tenth step; torch saves at once
    short = replace(work, mean_response=10.0, longest_response=10.0, mean_prompt=1.0, max_response=10)
    assert step_time(short, Engines(), NODE, Placement(student_gpus=8), Rates()).checkpoint > 1.0


def test_sft_samples_the_teacher_first_and_the_plan_says_what_fewer_problems_save() -> None:
    recipe = load_recipe("paper-1.5b", ["stage2.objective=sft", "vllm.replicas=8"])
    plan = plan_stage(work_of(recipe, "stage2"), engines_of(recipe), NODE)
    assert plan.work.sampled == 8 * 61_000 == 488_000
    assert [phase.phase for phase in plan.candidates[0].memory][:2] == ["teacher-sample", "update"]
    assert plan.hours is not None
    assert plan.hours > plan.sampling_s / 3600 > 100
    told = conditions(plan, recipe)
    assert "488,000 in all" in told[0]
    assert "280 steps train on 35,840" in told[0]
    assert "--set stage2.data.max_problems=8960" in told[1]
    fewer = load_recipe("paper-1.5b", ["stage2.objective=sft", "stage2.data.max_problems=8960", "vllm.replicas=8"])
    again = plan_stage(work_of(fewer, "stage2"), engines_of(fewer), NODE)
    assert again.sampling_s == pytest.approx(plan.sampling_s * 8960 / 61_000)
    assert len(conditions(again, fewer)) == 1


def test_the_last_stage_has_the_final_evaluation() -> None:
    """AIME24, AIME25 and AMC23 16 times, the others once; the student before and after both stages, and the teacher."""
    recipe = load_recipe("paper-1.5b")
    once = (30 + 30 + 40) * 16 + 500 + 272 + 675
    assert work_of(recipe, "stage1").final_responses == {}
    work = work_of(recipe, "stage2")
    assert work.final_responses == {"rollout": 3 * once, "teacher": once}
    gpus = Cluster(gpus=8, gpus_per_node=8, gpu_memory=80e9)
    plan, without = (plan_stage(one, Engines(), gpus) for one in (work, replace(work, final_responses={})))
    assert plan.hours is not None
    assert without.hours is not None
    assert plan.hours - without.hours == pytest.approx(plan.final_evaluation_s / 3600)
    assert 0 < plan_stage(replace(work, teacher=None), Engines(), gpus).final_evaluation_s < plan.final_evaluation_s


def test_lengths_under_another_limit() -> None:
    measured = work_of(load_recipe("paper-1.5b"), "stage2", mean_response=4000, longest_response=20_480)
    assert lengths_for(measured, limit=40_960) == (8000, 40_960)  # they reached the limit: they grow with it
    assert lengths_for(replace(measured, longest_response=15_000), limit=40_960) == (4000, 15_000)
    mean_cut, longest = lengths_for(measured, limit=8192)
    assert 2500 < mean_cut < 4000
    assert longest == 8192


# --- against runs on this CPU -----------------------------------------------------------------------------------------


PHASES = {
    "rollout": "time/rollout_s",
    "teacher_score": "time/teacher_score_s",
    "update": "time/update_s",
}
SHOWN = ("time/verify_s", "throughput/rollout_tokens_per_s")


def random_model(folder: Path, role: str, *, hidden: int, layers: int) -> Path:
    """A random model with the miniature's tokenizer."""
    source = resolve_path(f"builtin:miniature/{role}")
    config = AutoConfig.from_pretrained(source)
    config.update({"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers})
    config.update({"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 32})
    config.layer_types = ["full_attention"] * layers
    torch.manual_seed(0)
    place = folder / role
    shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForCausalLM.from_config(config).float().save_pretrained(place)
    return place


@pytest.fixture
def cpu_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases are timed in CPU seconds of this process, which other programs on the machine disturb less."""
    monkeypatch.setattr(make, "time", SimpleNamespace(**{**vars(time), "perf_counter": time.process_time}))


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_seconds")
def test_a_run_predicts_the_phases_of_another_within_a_quarter(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student of 3.6M and a teacher of 13M parameters, `transformers` and `torch`: from 8 × 8 responses of up to 24
    tokens to twice as many, and to up to 64 tokens. The runs come one after the other: in turns, every step would load
    its models anew. What the policy samples is not the plan's: the lengths are those of each run."""
    monkeypatch.setenv("KDRL_ARTIFACTS", str(artifacts))
    student = random_model(tmp_path, "student", hidden=192, layers=6)
    teacher = random_model(tmp_path, "teacher", hidden=320, layers=8)
    settings = ["stage1=null", f"student.path={student}", f"teacher.path={teacher}", "runtime.num_threads=1"]

    def open_run(name: str, *, prompts: int, limit: int) -> Run:
        sizes = [f"prompts_per_step={prompts}", f"mini_batch_prompts={prompts}", f"max_response_tokens={limit}"]
        sizes += ["steps=8", "group_size=8", "learning_rate=1.0e-6"]
        run = open_tiny(artifacts, name, [*settings, *(f"stage2.{size}" for size in sizes)])
        filter_run(run)
        return run

    runs = [
        open_run("base", prompts=8, limit=24),
        open_run("twice", prompts=16, limit=24),
        open_run("longer", prompts=8, limit=64),
    ]
    try:
        for run in runs:
            for step in open_stage(run, "stage2"):
                train_step(run, "stage2", step)
    finally:
        close_sessions()
    _, measured = rates_of_run("base")
    rates = rates_of(runs[0].recipe, measured, [quietest(runs[0])])
    cluster = Cluster(gpus=1, gpus_per_node=1, gpu_memory=80e9, memory_bandwidth=CPU_BANDWIDTH)
    wrong = []
    for run in runs[1:]:
        rows = load_metrics(run, "stage2")[1:]
        work = work_of(
            run.recipe,
            "stage2",
            mean_response=mean(row["response/length_mean"] for row in rows),
            mean_prompt=measured.mean_prompt,
            longest_response=mean(row["response/length_max"] for row in rows),
        )
        time_s = step_time(work, engines_of(run.recipe), cluster, Placement(student_gpus=1), rates)
        for phase, name in PHASES.items():
            planned, found = getattr(time_s, phase), quietest(run)[name]
            print(f"{run.name:7} {phase:14} {planned:.3f} s planned, {found:.3f} measured, {planned / found:.2f}")
            if not 0.75 <= planned / found <= 1.25:
                wrong.append((run.name, phase, planned, found))
    assert not wrong


def quietest(run: Run) -> dict[str, float]:
    """Of each figure the smallest over the steps after the first: other programs only make a phase longer."""
    rows = load_metrics(run, "stage2")[1:]
    return {name: min(row[name] for row in rows) for name in (*PHASES.values(), *SHOWN)}

"""What is found out about the trainer before anything is loaded."""

from pathlib import Path

import pytest

from kdrl_core.boxes import preflight
from kdrl_core.config import load_recipe
from kdrl_core.engines import vllm_support
from kdrl_core.errors import ModelError, RecipeError

SERVABLE = "student.path=builtin:miniature/student-vllm"
SETTINGS = ["trainer.engine=deepspeed", "trainer.ranks=4"]


def test_a_missing_deepspeed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    preflight.check_inputs(load_recipe("miniature"))
    with pytest.raises(RecipeError, match=r"'trainer.engine': deepspeed is not installed; .* 'kdrl\[deepspeed\]'"):
        preflight.check_inputs(load_recipe("miniature", SETTINGS))


def test_an_adapter_is_looked_at_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(lora: str) -> None:
        preflight.check_inputs(load_recipe("miniature", [f"student.lora={lora}"]))

    check("{}")
    check("{rank: 2, alpha: 4, targets: [self_attn.q_proj, down_proj]}")
    told = r"'student\.lora\.targets': Qwen2ForCausalLM has no linear layer 'c_attn' .*; give some of down_proj, gate_"
    with pytest.raises(ModelError, match=told):
        check("{targets: [q_proj, c_attn]}")
    with pytest.raises(ModelError, match="no linear layer 'lm_head' below its output layer"):
        check("{targets: [lm_head]}")
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"'student\.lora': peft is not installed; .* 'kdrl\[lora\]', or set student"):
        check("{}")


@pytest.mark.parametrize("field", ["rollout.engine", "teacher.engine"])
def test_a_missing_vllm_is_named_with_its_extra(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_support, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=rf"'{field}': vllm is not installed; install it with make setup, or set {field}=t"
    ):
        preflight.check_inputs(load_recipe("miniature", [f"{field}=vllm"]))


def test_another_release_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_support, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_support, "vllm_version", lambda: "0.33.1")
    with pytest.raises(RecipeError, match=r"'rollout.engine': vllm 0.33.1 is installed, kdrl works with 0.32; .*=tr"):
        preflight.check_inputs(load_recipe("miniature", ["rollout.engine=vllm"]))
    for fine in ("0.32.0", "0.32.1+cpu"):
        monkeypatch.setattr(vllm_support, "vllm_version", lambda fine=fine: fine)
        preflight.check_inputs(load_recipe("miniature", [SERVABLE, "rollout.engine=vllm"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rollout.engine=vllm"],
            r"'rollout.engine': builtin:miniature/student has attention heads of size 12; vLLM on a CPU knows 32, 64",
        ),
        (["teacher.engine=vllm"], r"'teacher.engine': builtin:miniature/teacher has attention heads of size \d+; "),
        ([SERVABLE, "rollout.engine=vllm", "vllm.tensor_parallel=2"], r"'vllm.tensor_parallel': 2 needs as many GPUs"),
        (
            [SERVABLE, "rollout.engine=vllm", "vllm.batch_invariant=true"],
            r"'vllm.batch_invariant': true, but only vLLM's CUDA kernels have this mode.*, or runtime.device=cuda",
        ),
        (  # 2 layers x 2 heads x 32 x 4 bytes x keys and values = 1 KiB a token
            [SERVABLE, "rollout.engine=vllm", "vllm.kv_cache_gb=0.00005"],
            r"'vllm.kv_cache_gb': 5e-05 GiB, but keys and values of one sequence of \d+ tokens take \S+; raise",
        ),
        (  # enough for a stage, not for the evaluation's context
            [SERVABLE, "rollout.engine=vllm", "vllm.kv_cache_gb=0.00009"],
            r"'vllm.kv_cache_gb': 9e-05 GiB, but keys and values of one sequence of 96 tokens take 9.16e-05; raise",
        ),
    ],
)
def test_what_vllm_cannot_run_is_told_before_any_work(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_support, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_support, "vllm_version", lambda: "0.32.0")
    with pytest.raises(RecipeError, match=message):
        preflight.check_inputs(load_recipe("miniature", overrides))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-1 slots=2\nnode-2 slots=1\n", r"'trainer.ranks': 4, but .* has 3 slots; set trainer.ranks=3"),
        ("# hosts\n\nnode-1 slots=2\nnode-2\n", r"line 4: 'node-2' is not `HOST slots=N`"),
        ("-oProxyCommand=x slots=4\n", "line 1: "),
        (None, r"'trainer.hostfile': .* cannot be read"),
    ],
)
def test_a_hostfile_gives_the_ranks(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: object())
    monkeypatch.setattr(preflight, "which", lambda tool: f"/usr/bin/{tool}")
    hostfile = tmp_path / "hosts"
    if text is not None:
        hostfile.write_text(text)
    recipe = load_recipe("miniature", [*SETTINGS, f"trainer.hostfile={hostfile}"])
    with pytest.raises(RecipeError, match=message):
        preflight.check_trainer(recipe)
    hostfile.write_text("# two hosts\nnode-1 slots=2\nnode-2 slots=2\n")
    preflight.check_trainer(recipe)
    monkeypatch.setattr(preflight, "which", lambda tool: None if tool == "pdsh" else f"/usr/bin/{tool}")
    with pytest.raises(
        RecipeError, match=r"'trainer.hostfile': DeepSpeed starts ranks on other hosts with pdsh, which"
    ):
        preflight.check_trainer(recipe)

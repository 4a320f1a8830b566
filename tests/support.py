"""Values that several tests share."""

TINY = [
    "stage1.steps=2",
    "stage2.steps=3",
    *(f"{stage}.{field}" for stage in ("stage1", "stage2") for field in ("prompts_per_step=4", "mini_batch_prompts=4")),
    *(f"{stage}.{field}" for stage in ("stage1", "stage2") for field in ("group_size=4", "evaluate_every=2")),
    *(f"evaluation.benchmarks.{index}.{field}" for index in range(3) for field in ("samples=1", "max_problems=8")),
]
"""Overrides that make the miniature a matter of seconds."""

"""Functions as rewards through a real step: the files hold what they return, and training uses it."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from crash.tiny_run import open_tiny, train, train_step

from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.boxes.session import close_sessions
from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, open_run
from kdrl_core.look.rollouts.query import RolloutStore
from kdrl_core.tables.files import load_metrics

CODE = '''
from kdrl_core.rewards import Score

def even(response, answer, problem, scale):
    """Pays for the length of a response, if its problem's answer is even; does not apply to the others."""
    if int(answer) % 2 == 0:
        return Score(scale * (problem["length"] % 5), parts={"tokens": problem["length"]})
'''
SOURCES = [
    "verification.workers=1",
    "stage1=null",
    "stage2.steps=2",
    "stage2.kd_masking=response",
    "reward.success_above=0.3",
]


def rewards_of(run: Run, step: int) -> list[dict]:
    folder = run.paths.step("stage2", step)
    rollouts = pq.ParquetFile(folder / "rollouts.parquet").read(["ground_truth", "length"]).to_pylist()
    rewards = pq.ParquetFile(folder / "rewards.parquet").read().to_pylist()
    return [{**one, **other} for one, other in zip(rollouts, rewards, strict=True)]


def values_of(row: dict) -> dict[str, float | None]:
    return {one["name"]: one["value"] for one in row["reward_values"]}


@pytest.mark.usefixtures("fast_sessions")
def test_the_weighted_sum_trains_masks_and_is_recorded_and_other_code_is_refused(tmp_path: Path) -> None:
    (code := tmp_path / "mine.py").write_text(CODE)
    own = f"{{function: '{code}:even', weight: 2.0, arguments: {{scale: 0.1}}}}"
    run = open_tiny(
        tmp_path,
        "r",
        [*SOURCES, "reward.success_above=0.3", f"reward.functions=[{{function: math, weight: 0.5}}, {own}]"],
    )
    train(run, until=("stage2", 1))
    seen = []
    for step, metrics in enumerate(load_metrics(run, "stage2")):
        rows = rewards_of(run, step)
        update = pq.ParquetFile(run.paths.update("stage2", step)).read(["advantage", "kd_weight"]).to_pylist()
        for row, used in zip(rows, update, strict=True):
            values = values_of(row)
            applies = int(row["ground_truth"]) % 2 == 0
            assert values["even"] == (pytest.approx(0.1 * (row["length"] % 5)) if applies else None)
            assert values["math"] in (0.0, 1.0)
            total = 0.5 * values["math"] + 2.0 * (values["even"] or 0.0)
            assert row["reward"] == pytest.approx(total)
            assert row["accuracy_reward"] == float(total > 0.3)
            assert (row["verdict"] == "correct") == (total > 0.3)
            assert f"math {values['math']:g}: " in row["reason"]
            assert used["kd_weight"] == float(total <= 0.3)
        rewards = np.array([row["reward"] for row in rows]).reshape(-1, 4)
        advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)
        found = [used["advantage"] for used in update]
        np.testing.assert_allclose(found, advantages.reshape(-1), rtol=1e-4, atol=1e-5)
        known = [v for row in rows if (v := values_of(row)["even"]) is not None]
        assert metrics["reward/even/mean"] == pytest.approx(np.mean(known) if known else 0.0)
        assert metrics["reward/even/applies"] == len(known) / len(rows)
        lengths = [row["length"] for row in rows if "even.tokens" in values_of(row)]
        assert len(lengths) == len(known)
        if known:
            assert metrics["reward/even.tokens/mean"] == pytest.approx(np.mean(lengths))
        assert metrics["reward/mean"] == pytest.approx(rewards.mean(), abs=1e-6)
        seen += known
    assert len(set(seen)) > 1
    with RolloutStore([run.paths.root]) as store:
        even = "map_from_entries(reward_values)['even']"
        query = f"select sum({even})::double as even, count(reward_values) as known from rollouts"
        found = store.sql(query, limit=9).to_pylist()
        assert found == [{"even": pytest.approx(sum(seen)), "known": 16}]
        one = store.record(run="r", stage="stage2", step=0, prompt_id=rows[0]["prompt_id"], sample=0)
        assert one["reward_values"] == rows[0]["reward_values"]
    results = evaluate_model(run, "base", ["test"])["benchmarks"]["test"]
    responses = pq.ParquetFile(run.paths.evaluation("base") / "responses.parquet").read().to_pylist()
    assert any("even 0." in row["reason"] for row in responses)
    assert results["accuracy"] == pytest.approx(np.mean([row["accuracy_reward"] for row in responses]))
    close_sessions()
    code.write_text(CODE.replace("% 5", "% 4"))
    with pytest.raises(RunError, match=r"mine.py has sha256 \w{12}…, recorded was \w{12}…") as told:
        train_step(open_run("r", artifacts=tmp_path), "stage2", 1)
    assert "reward.functions.1.function" in str(told.value)

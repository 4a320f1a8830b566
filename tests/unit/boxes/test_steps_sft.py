"""SFT by rejection sampling: what is kept, the order of batches, and a stage killed anywhere ends in the same bytes."""

import shutil
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from crash.tiny_run import TINY, differing, results, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_core.boxes import make as make_module
from kdrl_core.boxes import stage as stage_module
from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.make import Product, make
from kdrl_core.boxes.session import close_sessions, stage_session
from kdrl_core.boxes.sft import batch_of_step, select, sft_step, teacher_sample, verify_samples
from kdrl_core.boxes.shards import num_shards, open_shards
from kdrl_core.boxes.sharing import adopt_parts
from kdrl_core.boxes.stage import open_stage
from kdrl_core.config import load_recipe, resolve_path
from kdrl_core.errors import DataError
from kdrl_core.ledger import Run, create_run, derive_seed, manifest_of, open_run, run_lock, sweep_temporaries
from kdrl_core.look.reporting.run_summary import sft_table, summarize
from kdrl_core.models.loading import load_model
from kdrl_core.tables.files import load_metrics

SFT = [
    *TINY,
    "stage1=null",
    "stage2.objective=sft",
    "stage2.max_response_tokens=40",  # so that some answers of the teacher are right
    "stage2.temperature=1.3",  # of the teacher; the likelihood is at 1
    "stage2.data.max_problems=8",
    "stage2.sft.samples=3",
    "stage2.sft.shard_prompts=3",
    "stage2.sft.batch_size=5",
    "stage2.checkpoint.every=2",
]
BEFORE = {"keep": "reward", "temperature": 1.3, "aggregation": "token_mean"}
"""The form of SFT before these were fields of a recipe."""


def open_sft(artifacts: Path, overrides: list[str] | None = None) -> Run:
    close_sessions()
    return create_run("r", load_recipe("miniature", [*SFT, *(overrides or [])]), artifacts=artifacts)


def train_sft(run: Run, *, until: int | None = None) -> None:
    """What `flows.sft_stage` does, without Prefect; before step `until` the sessions are dropped, as a crash does."""
    with run_lock(run.paths.lock):
        sweep_temporaries(run.paths.root)
        filter_run(run)
        steps = open_stage(run, "stage2")
        session = stage_session(run.paths.root, "stage2")
        for shard in open_shards(run, "stage2"):
            make(session, teacher_sample, shard)
            make(session, verify_samples, shard)
        make(session, select)
        for step in steps:
            if step == until:
                break
            sft_step(session, step)
        close_sessions()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = open_sft(tmp_path_factory.mktemp("sft"))
    train_sft(run)
    return run


def test_every_problem_is_sampled_and_right_responses_alone_are_kept(whole: Run) -> None:
    assert num_shards(whole, "stage2") == 3  # 8 problems by 3
    sampled, right = [], []
    for shard in range(3):
        responses, verdicts = (
            rows(path(("stage2"), shard)) for path in (whole.paths.sample_rollouts, whole.paths.sample_rewards)
        )
        assert {r["policy_version"] for r in responses} == {-1}
        sampled += [(r["prompt_id"], r["sample"]) for r in responses]
        right += [
            (r["prompt_id"], r["sample"], shard, r["token_ids"])
            for r, v in zip(responses, verdicts, strict=True)
            if v["accuracy_reward"] == 1.0
        ]
    assert len(sampled) == len(set(sampled)) == 8 * 3
    assert [p for p, _ in sampled] == sorted(p for p, _ in sampled)
    kept = rows(whole.paths.sft_dataset("stage2"))
    assert [(r["prompt_id"], r["sample"], r["shard"], r["token_ids"]) for r in kept] == right
    counts = manifest_of(whole.paths.sft_dataset("stage2")).metadata
    expected = {"sampled": 24, "kept": len(right), "problems": 8, "problems_covered": len({r[0] for r in right})}
    assert {name: counts[name] for name in expected} == expected


def test_samples_and_training_do_not_depend_on_the_shard_size(whole: Run, tmp_path: Path) -> None:
    other = open_sft(tmp_path, ["stage2.sft.shard_prompts=8"])
    train_sft(other)
    left, right = (pq.read_table(r.paths.sft_dataset("stage2")).drop_columns("shard") for r in (whole, other))
    assert left.equals(right)
    final = "checkpoints/stage2/step-000004/model.safetensors"
    assert results(other)[final] == results(whole)[final]


def test_steps_record_loss_and_nothing_they_do_not_know(whole: Run) -> None:
    metrics = load_metrics(whole, "stage2")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert all(row["loss/sft"] == row["loss/total"] > 0 for row in metrics)
    kept = len(rows(whole.paths.sft_dataset("stage2")))
    assert metrics[3]["sft/epoch"] == pytest.approx(4 * 5 / kept)
    assert not {"reward/mean", "beta", "kd/kl_unmasked"} & set(metrics[0])
    (first, *_) = rows(whole.paths.update("stage2", 0))
    assert first["entropies"] is None
    assert first["advantage"] is first["kd_weight"] is first["kl_sum"] is None


def test_the_loss_is_the_model_s_own_likelihood_with_equal_weight_for_each_response(whole: Run) -> None:
    """B.2, (14): at T = 1, although the teacher sampled at 1.3."""
    model = load_model(resolve_path("builtin:miniature/student"))
    taken = {(row["prompt_id"], row["sample"]): row for row in rows(whole.paths.sft_dataset("stage2"))}
    means = []
    for row in rows(whole.paths.update("stage2", 0)):
        trained = taken[row["prompt_id"], row["sample"]]
        prompt, response = (torch.tensor(trained[name]) for name in ("prompt_token_ids", "token_ids"))
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        assert np.allclose(row["logprobs"], expected, atol=1e-4)
        means.append(np.mean(row["logprobs"]))
    assert len({len(row["logprobs"]) for row in rows(whole.paths.update("stage2", 0))}) > 1
    assert load_metrics(whole, "stage2")[0]["loss/sft"] == pytest.approx(-np.mean(means), rel=1e-5)


def test_a_run_of_before_goes_on_as_it_began_and_shares_its_samples(whole: Run, tmp_path: Path) -> None:
    """Its recipe.yaml lacks what SFT has had fields for since. The samples do not depend on those."""
    close_sessions()
    shutil.copytree(whole.paths.root, tmp_path / "runs" / "r")
    recipe = load_recipe("miniature", [*SFT, *(f"stage2.sft.{name}={value}" for name, value in BEFORE.items())])
    told, frozen = (create_run(name, recipe, artifacts=tmp_path) for name in ("told", "frozen"))
    values = yaml.safe_load(frozen.paths.recipe.read_text())
    for name in BEFORE:
        del values["stage2"]["sft"][name]
    frozen.paths.recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    assert open_run("frozen", artifacts=tmp_path).recipe == told.recipe

    assert adopt_parts(told, ["r"]) == {"data": "r", "samples of stage2": "r"}
    train_sft(told)
    for until in (1, None):
        train_sft(open_run("frozen", artifacts=tmp_path), until=until)
        close_sessions()
    assert differing(frozen, told) == []
    tokens = [value for row in rows(told.paths.update("stage2", 0)) for value in row["logprobs"]]
    assert load_metrics(told, "stage2")[0]["loss/sft"] == pytest.approx(-np.mean(tokens), rel=1e-5)
    assert (
        results(told)["checkpoints/stage2/step-000004/model.safetensors"]
        != results(whole)["checkpoints/stage2/step-000004/model.safetensors"]
    )


@pytest.mark.parametrize(("keep", "kept"), [("accuracy", ["right", "no format"]), ("reward", ["right"])])
def test_what_is_kept(whole: Run, keep: str, kept: list[str]) -> None:
    """Three samples of a problem: right; right in a wrong format; wrong in the right format."""
    names = ["right", "no format", "wrong"]
    blank = {name: [0] * 3 for name in ("sample", "length")}
    samples = pa.table({"prompt_id": names, **blank, "prompt_token_ids": [[1]] * 3, "token_ids": [[2]] * 3})
    rewards = pa.table({"accuracy_reward": [1.0, 1.0, 0.0], "reward": [1.0, 0.0, 0.0]})
    config = whole.recipe.stage("stage2")
    config = config.model_copy(update={"sft": config.sft.model_copy(update={"keep": keep, "batch_size": 1})})
    session: Any = SimpleNamespace(stage="stage2", config=config)
    made = select.function(session, iter([samples]), iter([rewards]), {})
    assert isinstance(made, Product)
    assert isinstance(made.content, pa.Table)
    assert made.content["prompt_id"].to_pylist() == kept
    # Of functions a success is kept, whatever it earns.
    rewards = pa.table({"accuracy_reward": [1.0, 0.0, 1.0], "reward": [0.7, 1.0, 2.0], "reward_values": [None] * 3})
    made = select.function(session, iter([samples]), iter([rewards]), {})
    assert isinstance(made, Product)
    assert isinstance(made.content, pa.Table)
    assert made.content["prompt_id"].to_pylist() == ["right", "wrong"]


def test_summary_tells_what_was_kept(whole: Run) -> None:
    kept = len(rows(whole.paths.sft_dataset("stage2")))
    (row,) = sft_table(summarize(whole)).rows
    assert row[1] == f"{kept} of 24 ({100 * kept / 24:.0f} %)"


@pytest.mark.parametrize("until", [0, 1, 3])
def test_steps_after_the_last_checkpoint_are_replayed(whole: Run, tmp_path: Path, until: int) -> None:
    run = open_sft(tmp_path)
    train_sft(run, until=until)
    train_sft(open_sft(tmp_path))
    assert differing(run, whole) == []


def test_crash_after_each_publication(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_sft(tmp_path / "whole")
    taken: list[Path] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            taken.append(tmp_path / f"{len(taken):02d}")
            shutil.copytree(run.paths.root, taken[-1] / "runs" / "r")
            return result

        return wrapper

    with monkeypatch.context() as patched:
        for module in (make_module, stage_module):
            for name in ("publish_file", "publish_directory", "append_metrics"):
                if hasattr(module, name):
                    patched.setattr(module, name, noting(getattr(module, name)))
        train_sft(run)
    assert len(taken) == 2 + 3 * 2 + 1 + 4 * 2 + 2
    assert differing(run, whole) == []
    for artifacts in taken:
        again = open_sft(artifacts)
        train_sft(again)
        assert differing(again, whole) == [], artifacts.name


def test_more_steps_go_on(whole: Run, tmp_path: Path) -> None:
    train_sft(open_sft(tmp_path, ["stage2.steps=2"]))
    run = open_sft(tmp_path)
    train_sft(run)
    assert differing(run, whole) == []


def test_too_few_right_samples_are_refused_before_training(tmp_path: Path) -> None:
    run = open_sft(tmp_path, ["stage2.sft.batch_size=24"])
    with pytest.raises(DataError, match=r"stage2: \d+ of 24 teacher samples are right, fewer than .*batch_size=24; "):
        train_sft(run)
    assert not run.paths.sft_dataset("stage2").exists()


def test_a_batch_that_no_samples_could_fill_is_refused_before_sampling(tmp_path: Path) -> None:
    """8 problems, 3 samples each: 24 may do, 25 cannot."""
    run = open_sft(tmp_path, ["stage2.sft.batch_size=25"])
    with pytest.raises(
        DataError,
        match=r"stage2: 8 problems .* stage2\.sft\.samples=3 each 24 teacher samples, fewer than "
        r"stage2\.sft\.batch_size=25; start a new run with a smaller batch_size, more stage2\.sft\.samples, or more",
    ):
        train_sft(run)
    assert not run.paths.pool.exists()
    assert not list(run.paths.root.rglob("rollouts.parquet"))


@pytest.mark.parametrize("name", ["dataset.parquet", "shard=000001/rollouts.parquet"])
def test_altered_samples_are_made_again(tmp_path: Path, name: str) -> None:
    run = open_sft(tmp_path)
    train_sft(run, until=1)
    path = run.paths.sft_dataset("stage2").parent / name
    if "shard" in name:  # they are read while the dataset is made
        run.paths.sft_dataset("stage2").with_name("_dataset.manifest.json").unlink()
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    before = path.read_bytes()
    path.write_bytes(content)
    train_sft(open_sft(tmp_path))
    assert path.read_bytes() == before


def table(count: int) -> pa.Table:
    return pa.table({"prompt_id": [f"p{i // 2}" for i in range(count)], "sample": [i % 2 for i in range(count)]})


def test_batches_are_slices_of_one_hashed_pass_after_another() -> None:
    """Three responses, batches of two. The first pass is the keys in the order of their hashes, a b c: step 0 is a b,
    step 1 is c and the first of the second pass, which has c, already in the step, at its end."""
    dataset = table(3)
    keys = [("p0", 0), ("p0", 1), ("p1", 0)]

    def ordered(epoch: int) -> list[tuple[str, int]]:
        return sorted(keys, key=lambda key: derive_seed(7, "stage2/sft-order", "epoch", epoch, f"{key[0]}\x1f{key[1]}"))

    a, b, c = ordered(0)
    second = [key for key in ordered(1) if key != c]
    batches = [batch_of_step(dataset, seed=7, stage="stage2", step=k, batch_size=2).to_pylist() for k in range(3)]
    found = [[(row["prompt_id"], row["sample"]) for row in batch] for batch in batches]
    assert found == [[a, b], [c, second[0]], [second[1], c]]


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 30), batch=st.integers(1, 30), steps=st.integers(1, 12), seed=st.integers(0, 9))
def test_every_response_is_seen_equally_often(count: int, batch: int, steps: int, seed: int) -> None:
    batch = min(batch, count)
    dataset = table(count)
    seen: Counter[tuple[str, int]] = Counter({(r["prompt_id"], r["sample"]): 0 for r in dataset.to_pylist()})
    for step in range(steps):
        rows_ = batch_of_step(dataset, seed=seed, stage="stage2", step=step, batch_size=batch).to_pylist()
        keys = [(r["prompt_id"], r["sample"]) for r in rows_]
        assert len(set(keys)) == batch
        seen.update(keys)
        shuffled = dataset.take(list(reversed(range(count))))
        assert batch_of_step(shuffled, seed=seed, stage="stage2", step=step, batch_size=batch).to_pylist() == rows_
    assert set(seen.values()) <= {steps * batch // count, -(-steps * batch // count)}

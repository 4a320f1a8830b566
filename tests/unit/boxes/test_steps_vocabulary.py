"""Runs with models whose embeddings are padded differently, and whose generation_config transformers will not write."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from crash.tiny_run import open_tiny, train

from kdrl_core.boxes.completion import student
from kdrl_core.boxes.make import make
from kdrl_core.boxes.preflight import check_inputs
from kdrl_core.boxes.session import close_sessions
from kdrl_core.config import ModelConfig, load_recipe
from kdrl_core.config.paths import ASSETS
from kdrl_core.errors import ModelError
from kdrl_core.ledger import Run
from kdrl_core.models.loading import check_model_dir, load_model, load_tokenizer, stop_token_ids
from kdrl_core.models.prepare import bake_temperature
from kdrl_core.models.tokenizer import num_token_ids
from kdrl_core.tables.files import load_metrics

MINIATURE = ASSETS / "miniature"
TOKENS = 27
STEPS = {"stage1": 1, "stage2": 2}
REFUSED = '{"eos_token_id": 1, "temperature": 0.6, "top_p": 0.9}\n'
"""As Llama 2 ships it: transformers reads it and refuses to write it."""


def padded(name: str, rows: int, path: Path) -> Path:
    """A model of the miniature with so many rows; the rows beyond the tokenizer's are copies, so they are likely."""
    model, tokenizer = load_model(MINIATURE / name), load_tokenizer(MINIATURE / name)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        for row in range(TOKENS, rows):
            head[row] = head[4 + row % 20]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("rows", [(28, 32), (64, 27), (27, 32)], ids=str)
def test_no_padding_is_sampled_and_the_source_decides_how_to_generate(
    rows: tuple[int, int], tmp_path: Path, fast_sessions: None
) -> None:
    source, teacher = padded("student", rows[0], tmp_path / "s"), padded("teacher", rows[1], tmp_path / "t")
    (source / "generation_config.json").write_text(REFUSED)
    (source / "preprocessor_config.json").write_text("{}")
    options = [f"student.path={source}", f"teacher.path={teacher}", "stage2.kl_estimator=topk"]
    options += [f"{stage}.steps={steps}" for stage, steps in STEPS.items()]

    def opened() -> Run:
        return open_tiny(tmp_path / "a", "r", options)

    check_inputs(opened().recipe)
    train(opened(), until=("stage2", 1))
    run = opened()
    train(run)
    make(run, student)
    close_sessions()
    for stage, steps in STEPS.items():
        assert all(row["engine/logprob_gap_max"] < 1e-4 for row in load_metrics(run, stage))
        for step in range(steps):
            table = pq.ParquetFile(run.paths.step(stage, step) / "rollouts.parquet").read()
            assert max(max(row) for row in table["token_ids"].to_pylist()) < TOKENS
    for place in (run.paths.checkpoint("stage1", 1), run.paths.checkpoint("stage2", 2), run.paths.student):
        assert (place / "generation_config.json").read_text() == REFUSED
        assert (place / "preprocessor_config.json").read_text() == "{}"
        assert stop_token_ids(place, load_tokenizer(place)) == (1,)
        assert json.loads((place / "config.json").read_text())["vocab_size"] == rows[0]


def test_a_baked_teacher_keeps_its_generation_config(tmp_path: Path) -> None:
    source = tmp_path / "teacher"
    shutil.copytree(MINIATURE / "teacher", source)
    (source / "generation_config.json").write_text(REFUSED)
    bake_temperature(source, tmp_path / "baked", 0.6)
    assert (tmp_path / "baked" / "generation_config.json").read_text() == REFUSED


def edited(path: Path, name: str, **changes: Any) -> Path:
    values = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps({**values, **changes}))
    return path


@pytest.fixture
def larger(tmp_path: Path) -> Path:
    """The student with one token more in its tokenizer than rows in its embedding."""
    path = tmp_path / "larger"
    shutil.copytree(MINIATURE / "student", path)
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    return edited(path, "tokenizer.json", model={**model, "vocab": {**model["vocab"], "<extra>": TOKENS + 3}})


def test_a_token_beyond_the_embedding_is_refused_before_any_work(larger: Path, tmp_path: Path) -> None:
    message = r"token '<extra>' has the id 30, which needs an embedding of 31 rows, but the model has 27 \(vocab_size\)"
    with pytest.raises(ModelError, match=rf"student\.path=.*{message}"):
        check_model_dir(ModelConfig(path=str(larger)), role="student")
    with pytest.raises(ModelError, match=message):
        load_tokenizer(larger)
    for role in ("student", "teacher"):
        with pytest.raises(ModelError, match=rf"{role}\.path=.*{message}"):
            check_inputs(load_recipe("miniature", [f"{role}.path={larger}"]))


def test_a_teacher_without_a_tokenizer_file_needs_rows_for_the_students_tokens(larger: Path, tmp_path: Path) -> None:
    edited(
        padded("student", 40, tmp_path / "s"), "tokenizer.json", **json.loads((larger / "tokenizer.json").read_text())
    )
    shutil.copytree(MINIATURE / "teacher", tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").unlink()  # kept in another way
    recipe = load_recipe("miniature", [f"{role}.path={tmp_path / role[0]}" for role in ("student", "teacher")])
    with pytest.raises(ModelError, match=r"teacher\.path=.*, the student's tokenizer: .*'<extra>' has the id 30"):
        check_inputs(recipe)


def test_ids_that_are_left_out_count(larger: Path) -> None:
    """The largest id decides, not the number of tokens: no token that the tokenizer has may be forbidden."""
    tokenizer = load_tokenizer(edited(larger, "config.json", vocab_size=31))
    assert (len(tokenizer), num_token_ids(tokenizer)) == (28, 31)


@pytest.mark.parametrize("content", ["{", "[1]", "null"])
def test_a_broken_generation_config_is_told_before_any_work(content: str, tmp_path: Path) -> None:
    """transformers takes it for a missing one, and the ids that end a response would be lost."""
    shutil.copytree(MINIATURE / "student", tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read .*; download it again"):
        check_model_dir(ModelConfig(path=str(tmp_path / "m")), role="student")

"""A value where a section belongs (`--set stage2.beta=0.1`): the message names the section's fields and what to set."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from kdrl_core.config import Recipe, load_recipe
from kdrl_core.errors import RecipeError

Load = Callable[..., Recipe]


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], bool]]:
    """Path, model and whether null is legal, of every section below a model; of a list of sections its first entry."""
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is dict:  # its sections have names that a recipe gives
            continue
        kinds = {kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)}
        for kind in kinds:
            if issubclass(kind, BaseModel):
                is_list = field.annotation == list[kind]  # type: ignore[valid-type]
                path = f"{prefix}{name}" + (".0" if is_list else "")
                yield path, kind, NoneType in kinds
                yield from sections(kind, f"{path}.")


SECTIONS = list(sections(Recipe))
PATHS = [path for path, _, _ in SECTIONS]


def faults(load: Load, *overrides: str) -> str:
    """What is wrong with a recipe; empty if nothing is."""
    try:
        load(*overrides)
    except RecipeError as error:
        return str(error)
    return ""


def message(load: Load, *overrides: str) -> str:
    text = faults(load, *overrides)
    assert text
    assert "\n" not in text
    return text


def test_the_sections_are_found() -> None:
    assert len(PATHS) > 40
    assert {"stage2.beta", "stage1.data.decontamination", "teacher.server", "evaluation.benchmarks.0"} <= set(PATHS)
    assert {"teacher", "stage2.beta", "stage1.data.decontamination"} <= {path for path, _, null in SECTIONS if null}


@pytest.mark.parametrize(("path", "kind", "may_be_null"), SECTIONS, ids=PATHS)
@pytest.mark.parametrize("value", ["7", "word"])
def test_a_value_for_a_section_is_told_by_its_fields(
    path: str, kind: type[BaseModel], may_be_null: bool, value: str, load: Load
) -> None:
    found = message(load, f"{path}={value}")
    assert f"field '{path}': it has fields of its own ({', '.join(kind.model_fields)})" in found
    assert "Input should be" not in found.partition(f"'{path}'")[2].partition("; field")[0]
    assert any(f"{path}.{name}" in found for name in kind.model_fields)
    assert (f"{path}=null for none" in found) == may_be_null


@pytest.mark.parametrize(("path", "may_be_null"), [(path, null) for path, _, null in SECTIONS], ids=PATHS)
def test_null_is_a_value_where_the_section_may_be_left_out(path: str, may_be_null: bool, load: Load) -> None:
    # The recipe may be wrong for other reasons then, such as a missing teacher.
    assert (f"'{path}': it has fields of its own" in faults(load, f"{path}=null")) != may_be_null


@pytest.mark.parametrize("path", PATHS)
def test_a_remedy_with_a_value_takes_that_value(path: str, load: Load) -> None:
    """Whatever is proposed, the field itself then has no fault."""
    for value in ("0.5", "cpu"):
        remedy = message(load, f"{path}={value}").partition(f"set {path}.")[2].partition(",")[0]
        name, equals, _ = remedy.partition("=")
        if equals:
            assert f"'{path}.{name}'" not in faults(load, f"{path}={{}}", f"{path}.{remedy}")


REMEDIES = {
    "stage2.beta=0.1": "set stage2.beta.init=0.1, or stage2.beta=null for none",
    "stage2.topk=20": "set stage2.topk.k=20",
    "stage2.topk=-10": "set stage2.topk.floor=-10",
    "stage2.sft=8": "got 8; set one of them, such as stage2.sft.samples",
    "stage2.checkpoint=5": "got 5; set one of them, such as stage2.checkpoint.every",
    "stage2.checkpoint=null": "got None; set one of them, such as stage2.checkpoint.every",
    "stage1=3": "set stage1.steps=3, or stage1=null for none",
    "student=models/mine": "set student.path=models/mine",
    "student='12'": 'set student.path="12"',
    "teacher=models/mine": "set teacher.path=models/mine, or teacher=null for none",
    "teacher=vllm": "set teacher.engine=vllm",
    "stage1.data=problems.json": 'set stage1.data.files=["problems.json"]',
    "stage1.data.decontamination=false": "or stage1.data.decontamination=null for none",
    "rollout=server": "set rollout.engine=server",
    "runtime=cuda": "set runtime.device=cuda",
    "trainer=deepspeed": "set trainer.engine=deepspeed",
    "tracking=mlflow": 'set tracking.trackers=["mlflow"]',
    "reward=false": "got False; set one of them, such as reward.require_format",
    "alarms.clip_ratio=0.3": "set alarms.clip_ratio.above=0.3",
    "evaluation.benchmarks.1=aime24": "set evaluation.benchmarks.1.name=aime24",
    "evaluation.also.weak=models/mine": "set evaluation.also.weak.path=models/mine",
    "evaluation.also.weak.pth=models/mine": "field 'evaluation.also.weak.pth': unknown field, did you mean 'path'?",
    "evaluation.also.teacher.path=models/mine": "'teacher' begins like the name of a model of the run; rename it",
    "stage2.beta=[0.1]": "(init, decay, minimum); set one of them, such as stage2.beta.init",
}


@pytest.mark.parametrize(("override", "remedy"), REMEDIES.items(), ids=REMEDIES)
def test_the_remedy_is_exact_where_one_field_is_meant(override: str, remedy: str, load: Load) -> None:
    assert remedy in message(load, override)


@pytest.mark.parametrize("path", PATHS)
def test_a_file_gets_the_same_message(path: str, load: Load, values: dict[str, Any], tmp_path: Path) -> None:
    told = message(load, f"{path}=0.1")
    *parents, leaf = path.split(".")
    values = json.loads(json.dumps(values))  # its two stages share their `data`
    section: Any = values
    for part in parents:
        section = section[int(part)] if part.isdigit() else section.setdefault(part, {})
    section[int(leaf) if leaf.isdigit() else leaf] = 0.1
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert f"field '{path}': it has fields of its own" in str(caught.value)
    assert str(caught.value) == told


def test_what_may_be_a_key_is_not_shown(load: Load) -> None:
    found = message(load, "teacher.server=sk-123456789")
    assert "sk-1234" not in found
    assert "set one of them, such as teacher.server.urls" in found
    assert "http" not in message(load, "teacher.server=http://sk-123456789:1/v1")

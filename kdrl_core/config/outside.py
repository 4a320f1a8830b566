"""The files outside of a run that its recipe names: models, problems, benchmarks, plugged-in code.

A *slot* is a place in the recipe that names such files: `teacher.path`, `stage1.data.files.0`, `stage2.kl_estimator`,
`reward.functions.0.function`.
"""

import fnmatch
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdrl_core.config.entries import expanded
from kdrl_core.config.hub import HubPath, is_remote
from kdrl_core.config.load import validate_recipe
from kdrl_core.config.models import ModelConfig
from kdrl_core.config.paths import SCHEMES, WEIGHTS, resolve_path, shards
from kdrl_core.config.recipe import Recipe
from kdrl_core.objectives.plugins import is_reference, parse_reference

_MODELS = ("student.path", "teacher.path", "evaluation.also.*.path")
_DATA = ("stage?.data.files.*", "stage?.data.decontamination.files.*", "evaluation.benchmarks.*.file")
_CODE = (
    "stage?.kl_estimator", "stage?.ref_kl_estimator", "stage?.terms.*.function", "reward.functions.*.function",
)  # fmt: skip
_NO_CONTENT = ("trainer.hostfile",)
"""Paths that are made absolute, but whose content changes no result."""
READ_WITH_WEIGHTS = (
    *("config*.json", "generation_config.json", "adapter_config.json"),
    *("*token*.json", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.codes"),  # tokenizers
    *("chat_template*", "*.jinja", "additional_chat_templates/*"),
)
"""What transformers may read in a model's folder beside weights and code."""


def slots_of(recipe: Recipe) -> dict[str, str]:
    """Slot → what the recipe says there."""
    return {
        slot: holder[key] for slot, holder, key in _places(recipe.model_dump(mode="json"), (*_MODELS, *_DATA, *_CODE))
    }


def with_slots(recipe: Recipe, told: Callable[[str, str], str]) -> Recipe:
    """The recipe with `told(slot, text)` in place of each slot's text."""
    values = filled(recipe, told)
    return recipe if values == recipe.model_dump(mode="json") else validate_recipe(values, origin=recipe.name)


def filled(recipe: Recipe, told: Callable[[str, str], str]) -> dict[str, Any]:
    """As `with_slots`, as plain values."""
    values: dict[str, Any] = recipe.model_dump(mode="json")
    for slot, holder, key in _places(values, (*_MODELS, *_DATA, *_CODE, *_NO_CONTENT)):
        holder[key] = told(slot, holder[key])
    return values


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that it means the same files from every folder. `builtin:…`, `package:…` and
    `run:…` stay; code has an absolute path already. A repository of a hub gets its commit on this
    machine."""

    def told(slot: str, text: str) -> str:
        if is_remote(text):
            return str(HubPath.of(text).pinned())
        return text if is_code(slot) or text.partition(":")[0] in SCHEMES else str(resolve_path(text))

    return with_slots(recipe, told)


def is_code(slot: str) -> bool:
    """Whether a slot names an estimator, a term or a reward: one of kdrl's own, or a function in a file or module."""
    return _matches(slot, _CODE)


def function_of(slot: str, text: str) -> str:
    """The name of the function that `text` means in a slot; empty in a slot of files."""
    return text.rpartition(":")[2] if is_code(slot) else ""


def files_of(recipe: Recipe, slot: str, text: str) -> dict[str, Path]:
    """The files that `text` means in a slot of the recipe, by a name that stays when they move together. Empty: there
    are none.

    Raises:
        ModelError: the index of a model's weights cannot be read.
        RecipeError: a `package:` path names a package that is not installed.
    """
    if (model := named_models(recipe).get(slot)) is not None:
        return model_files(model.model_copy(update={"path": text}))
    if is_code(slot):
        code = parse_reference(text).located() if is_reference(text) else None
        paths = [] if code is None else [code]
    else:
        paths = expanded(text)
    if not (found := [path for path in paths if path.is_file()]):
        return {}
    root = os.path.commonpath([path.parent for path in found])
    return {path.relative_to(root).as_posix(): path for path in found}


def named_models(recipe: Recipe) -> dict[str, ModelConfig]:
    """Slot → the model that the recipe names there."""
    teacher = {} if recipe.teacher is None else {"teacher.path": recipe.teacher}
    also = {f"evaluation.also.{name}.path": model for name, model in recipe.evaluation.also.items()}
    return {"student.path": recipe.student, **teacher, **also}


def model_files(model: ModelConfig) -> dict[str, Path]:
    """The files that decide what is loaded from a model's folder: config, tokenizer, weights; code if it is trusted."""
    folder = resolve_path(model.path)
    if not folder.is_dir():
        return {}
    if model.gguf_file is not None:
        found = {folder / model.gguf_file}
    else:
        patterns = [*READ_WITH_WEIGHTS, *(["**/*.py"] if model.trust_remote_code else [])]
        split = shards(folder)
        found = {path for pattern in patterns for path in folder.glob(pattern)}
        found |= {folder / name for name in ([WEIGHTS[1], *split] if split else WEIGHTS[:1])}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found) if path.is_file()}


def code_sources(recorded: Mapping[str, Mapping[str, Any]], recipe: Recipe) -> dict[str, str]:
    """Python file or module of each plugged-in function → sha256 of its recorded file."""
    found = {}
    for slot, text in slots_of(recipe).items():
        if slot in recorded and is_code(slot):
            (file,) = recorded[slot]["files"].values()
            found[parse_reference(text).source] = file["sha256"]
    return found


def _places(value: Any, patterns: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(child, str) and _matches(f"{prefix}{key}", patterns):
            yield f"{prefix}{key}", value, key
        else:
            yield from _places(child, patterns, f"{prefix}{key}.")


def _matches(slot: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(slot, pattern) for pattern in patterns)

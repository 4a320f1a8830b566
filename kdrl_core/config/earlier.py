"""Recipes that an earlier kdrl wrote out: what fields that it did not have yet mean there.

A new field's default is what kdrl did before, so that old recipes need no care. The fields of `sft` below are the
exception: their defaults are the paper's form (B.2), which kdrl did not have at first. A run's recipe.yaml is written
out in full; so an SFT stage that is written out, but lacks these fields, keeps the form that it was trained with.
"""

from collections.abc import Mapping
from typing import Any

from kdrl_core.config.recipe import Recipe

_WRITTEN_OUT = {"samples", "batch_size", "shard_prompts"}
"""The fields of `sft` at that time."""


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain values, with the form of before in every SFT stage that was written out without it."""
    return {name: _completed(value) if _is_earlier(value) else value for name, value in values.items()}


def hashed(recipe: Recipe) -> dict[str, Any]:
    """The plain values that `config_hash` counts: those that are not at their defaults. Of the fields that changed
    their meaning in SFT stages, those that are not at the earlier one, so that recipes of before keep their hashes."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    for name in recipe.stages:
        stage = recipe.stage(name)
        if stage.objective == "sft":
            sft, before = stage.sft.model_dump(mode="json"), _before(stage.temperature)
            counted = {key: value for key, value in values[name].pop("sft", {}).items() if key not in before}
            counted |= {key: sft[key] for key, value in before.items() if sft[key] != value}
            values[name] |= {"sft": counted} if counted else {}
    return values


def _before(temperature: object) -> dict[str, Any]:
    return {"keep": "reward", "temperature": temperature, "aggregation": "token_mean"}


def _is_earlier(stage: object) -> bool:
    """`topk` says that kdrl wrote the stage: SFT does not read it, so nobody would write it by hand."""
    if not isinstance(stage, Mapping) or stage.get("objective") != "sft" or "topk" not in stage:
        return False
    return isinstance(stage.get("sft"), Mapping) and stage["sft"].keys() == _WRITTEN_OUT


def _completed(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {**stage, "sft": {**stage["sft"], **_before(stage.get("temperature"))}}

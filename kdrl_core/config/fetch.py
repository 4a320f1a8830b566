"""What a recipe names on a hub → this machine, at a commit that stays the same."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from kdrl_core.config.hub import HubPath, as_data, is_remote
from kdrl_core.config.models import ModelConfig
from kdrl_core.config.outside import READ_WITH_WEIGHTS, named_models, slots_of, with_slots
from kdrl_core.config.paths import WEIGHTS
from kdrl_core.config.recipe import Recipe

_OTHER_WEIGHTS = ("*/*.safetensors", "consolidated*.safetensors")
"""Copies of the weights in other formats, beside those that transformers reads."""
_DATA_FILES = ("*.parquet", "*.arrow", "*.json", "*.jsonl", "*.ndjson", "*.csv", "*.gz")


def fetched(recipe: Recipe, *slots: str, weights: bool = True) -> Recipe:
    """The recipe with each `hf://` path at its commit, once the files that it means are in the cache of the hub.

    Without such a path nothing happens, and the network is not used.

    Args:
        slots: patterns of the places in the recipe that are needed; none: all.
        weights: also download the weights of models, not only their tokenizer and config.json.

    Raises:
        DataError, ModelError: as `HubPath.download`.
        RecipeError: an `hf://` path is not well formed.
    """
    needed = {
        slot: text
        for slot, text in slots_of(recipe).items()
        if is_remote(text) and (not slots or any(fnmatchcase(slot, pattern) for pattern in slots))
    }
    models = named_models(recipe)

    def told(slot: str, text: str) -> str:
        if slot not in needed:
            return text
        if (model := models.get(slot)) is None:
            return fetched_files([text])[0]
        return str(HubPath.of(text).download(_model_files(model, weights=weights), _OTHER_WEIGHTS))

    return with_slots(recipe, told) if needed else recipe


def fetched_files(entries: Sequence[str]) -> list[str]:
    """The same for entries of data files. Raises as `fetched`."""
    found = list(entries)
    for place, entry in enumerate(map(as_data, entries)):
        if is_remote(entry):
            path = HubPath.of(entry)
            inner = path.inner.rstrip("/")
            found[place] = str(path.download((inner, f"{inner}/*") if inner else _DATA_FILES))
    return found


def _model_files(model: ModelConfig, *, weights: bool) -> tuple[str, ...]:
    code = ("*.py",) if model.trust_remote_code else ()
    stored = (model.gguf_file,) if model.gguf_file is not None else (*WEIGHTS, "*.safetensors")
    return (*READ_WITH_WEIGHTS, *code, *(stored if weights or model.gguf_file is not None else ()))

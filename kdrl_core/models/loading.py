"""Find, check and compare model directories before anything expensive begins; then load them through transformers.

The checks read JSON only, so that a wrong path or a foreign teacher is reported in a second, not after minutes.

Weights are read from safetensors files of the directory itself and nothing else: `*.bin` and `*.pt` are pickles, which
run code when they are loaded, and an adapter names another model to fetch. Code that comes with a model is run only
where the recipe says `trust_remote_code: true`.
"""

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrl_core.config import ModelConfig, Recipe, resolve_path
from kdrl_core.config.paths import WEIGHTS, read_json, shards
from kdrl_core.errors import ModelError, RecipeError
from kdrl_core.models.tokenizer import check_embedding, read_object, read_tokenizer, trust_hint, vocabulary_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ADAPTER = "adapter_config.json"
GENERATION = "generation_config.json"


def check_device(recipe: Recipe) -> None:
    """Raise RecipeError if the recipe asks for a GPU that is not there."""
    if recipe.runtime.device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise RecipeError(
            f"recipe {recipe.name}, field 'runtime.device': cuda is asked for, but torch sees no GPU; "
            "set runtime.device=cpu or install a CUDA build of torch"
        )


def check_model_dir(config: ModelConfig, *, role: str) -> dict[str, Any]:
    """Check the files of a model directory and return its parsed config.json; for a GGUF model, an empty dict.

    Args:
        role: `student` or `teacher`, named in errors.

    Raises:
        ModelError: the directory, its config.json, its weights or its tokenizer is missing or unreadable.
    """
    path = resolve_path(config.path)
    where = f"{role}.path={config.path}"
    if not path.is_dir():
        if config.path.startswith("run:"):
            name = config.path.removeprefix("run:")
            raise ModelError(
                f"{where}: run {name} has no finished student ({path}); run it first: kdrl run --recipe … --name {name}"
            )
        raise ModelError(f"{where}: no such directory {path}; give a local Hugging Face model directory")
    if config.gguf_file is not None:
        if not (path / config.gguf_file).is_file():
            raise ModelError(f"{where}: no file {config.gguf_file} in {path}; correct {role}.gguf_file")
        return {}
    try:
        values = read_json(path / "config.json", follow_links=True)
    except FileNotFoundError as error:
        what = "is not a model directory, it has no config.json; give the folder that save_pretrained wrote"
        if (path / "adapter" / _ADAPTER).is_file():
            what = "is a checkpoint of an adapter without its model; give the run's folder student, or a checkpoint "
            what += "that was evaluated or ends its stage: those have the merged model"
        raise ModelError(f"{where}: {path} {what}") from error
    except (ValueError, OSError, RecursionError) as error:
        file = path / "config.json"
        raise ModelError(f"{where}: {file} cannot be read ({error}); download the model again") from error
    if (path / _ADAPTER).is_file():
        raise ModelError(
            f"{where}: {path} is an adapter to another model ({_ADAPTER}); merge it into that model, save the result "
            "with save_pretrained and give its folder"
        )
    if not any((path / name).is_file() for name in WEIGHTS):
        raise ModelError(
            f"{where}: {path} has no {WEIGHTS[0]}; only safetensors weights are loaded, convert them first"
        )
    if missing := [name for name in shards(path) if not (path / name).is_file()]:
        raise ModelError(f"{where}: {path} lacks {missing[0]}, which its weight index names; download the model again")
    if not (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        raise ModelError(f"{where}: {path} has no tokenizer files; copy the model's tokenizer.json beside its weights")
    if not isinstance(values, dict):
        raise ModelError(f"{where}: {path / 'config.json'} is not a JSON object; download the model again")
    _check_weight_files(path)
    check_embedding(vocabulary_of(path), values, where=where)
    read_object(path / GENERATION)  # transformers would take a broken one for a missing one, and lose its eos_token_id
    if not config.trust_remote_code and (_needs_own_code(values) or _tokenizer_needs_own_code(path)):
        raise ModelError(
            f"{where}: {path} comes with code of its own (auto_map), which is not run unasked; "
            f"read that code, and set {role}.trust_remote_code=true if you trust it"
        )
    return values


def _check_weight_files(path: Path) -> None:
    """Raise ModelError if transformers could read weights from anything but safetensors files of this directory."""
    shards(path)  # a file that an index names would be opened as a pickle unless it is called safetensors
    values: Any = {}
    with suppress(OSError, ValueError, RecursionError):  # reported where the file is read
        values = read_json(path / "config.json", follow_links=True)
    if isinstance(values, dict) and values.get("transformers_weights") is not None:
        raise ModelError(
            f"{path / 'config.json'} names weights of its own choice (transformers_weights); "
            f"remove that entry: weights are read from {WEIGHTS[0]}, or the files of its index"
        )


def _needs_own_code(values: dict[str, Any]) -> bool:
    """Whether config.json names a class in the model's directory, and transformers has none for this model type."""
    if "auto_map" not in values:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # costs a second: rarely used

    return values.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _tokenizer_needs_own_code(path: Path) -> bool:
    is_plain = (path / "tokenizer.json").is_file()  # which needs no code
    return not is_plain and "auto_map" in (read_object(path / "tokenizer_config.json") or {})


def context_limit(config: dict[str, Any]) -> int | None:
    """Longest context (prompt + response) of a model with this config.json; None if it does not say."""
    text = config.get("text_config")  # of a vision-language model
    for part in (config, text if isinstance(text, dict) else {}):
        for name in ("max_position_embeddings", "n_positions"):  # GPT-2 has the latter
            if isinstance(limit := part.get(name), int):
                return limit
    return None


def compare_tokenizers(student: Path, teacher: Path) -> None:
    """Raise ModelError if the teacher's tokens differ from the student's.

    It compares the token → id maps with the special tokens, and the token that ends a response. It does not compare
    vocabulary sizes: Qwen pads its embedding differently per model size, but the tokenizers are the same. If one of the
    directories has no tokenizer.json, or no eos_token, that part is not compared.
    """
    ours, theirs = vocabulary_of(student), vocabulary_of(teacher)
    if ours is not None and theirs is not None and ours != theirs:
        ids = {**theirs, **ours}
        token = min((t for t in ids if ours.get(t) != theirs.get(t)), key=lambda t: ids[t])
        raise ModelError(
            f"student and teacher tokenizers differ: token {token!r} is {ours.get(token, 'unknown')} for the student "
            f"and {theirs.get(token, 'unknown')} for the teacher; "
            "distillation needs a teacher with the student's tokenizer"
        )
    our_end, their_end = _eos_token(student), _eos_token(teacher)
    if our_end is not None and their_end is not None and our_end != their_end:
        raise ModelError(
            f"student and teacher tokenizers differ: the student ends with {our_end!r}, the teacher with "
            f"{their_end!r}; it would unteach stopping, so give a teacher with the student's eos_token "
            "(tokenizer_config.json)"
        )


def _eos_token(path: Path) -> str | None:
    eos = (read_object(path / "tokenizer_config.json") or {}).get("eos_token")
    if isinstance(eos, dict):  # an AddedToken, written out
        eos = eos.get("content")
    return eos if isinstance(eos, str) else None


def load_tokenizer(path: Path, *, chat_template: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a directory; `chat_template` replaces its own.

    Raises ModelError if it cannot be loaded, or has an id beyond the embedding of the model in that directory.
    """
    tokenizer: PreTrainedTokenizerBase = read_tokenizer(path, trust_remote_code=trust_remote_code)
    if (path / "config.json").is_file():
        check_embedding(tokenizer.get_vocab(), read_config(path), where=str(path))
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_model(
    path: Path, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> "PreTrainedModel":
    """The causal language model of a directory, in eval mode. Raises ModelError if it cannot be loaded."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    _check_weight_files(path)
    # transformers imports DeepSpeed where it is installed; DeepSpeed would print the device that it guesses.
    os.environ.setdefault("DS_ACCELERATOR", device)
    disable_progress_bar()  # a bar per load and save would bury the run's own progress
    model: PreTrainedModel
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # each kind of broken file fails in its own way
        raise ModelError(f"no model can be loaded from {path}: {_first_line(error)}{trust_hint(error)}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would use random numbers in their place
        raise ModelError(
            f"{path} lacks {len(missing)} weights of a {type(model).__name__}, the first is {missing[0]}; "
            "download the model again, or correct its config.json"
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model._tied_weights_keys and head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False  # the files hold a head of their own: an export must say so
    return model.to(device).eval()


def free_cached_memory(device: "torch.device") -> None:
    """Give back the memory of a GPU that torch has freed and keeps for later: whoever works next there needs it."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def watch_memory(device: "torch.device") -> Callable[[], dict[str, float]]:
    """Watch torch's memory on a GPU from now on. The result gives the most so far, in GiB: `memory/peak_gib` in use and
    `memory/reserved_gib` taken from the GPU; nothing on a CPU."""
    if device.type != "cuda":
        return dict
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    most = {"memory/peak_gib": torch.cuda.max_memory_allocated, "memory/reserved_gib": torch.cuda.max_memory_reserved}
    return lambda: {name: count(device) / 2**30 for name, count in most.items()}


def load_weights_into(model: "torch.nn.Module", checkpoint_dir: Path) -> None:
    """Copy the safetensors weights of `checkpoint_dir` into `model`; tied weights stay tied.

    Raises ModelError if a weight is missing, unknown, or of another shape, or a file cannot be read.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for name in shards(checkpoint_dir) or [WEIGHTS[0]]:
        try:
            weights.update(load_file(checkpoint_dir / name))
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{checkpoint_dir / name} cannot be read ({_first_line(error)}); write or copy the checkpoint again"
            ) from error
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name, source in tied.items():
        if name in weights and source in weights and not torch.equal(weights[name], weights[source]):
            raise ModelError(
                f"{checkpoint_dir} does not fit the model: {name} differs from {source}, which the model ties to it; "
                "set tie_word_embeddings in its config.json"
            )
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{checkpoint_dir} does not fit the model: {reason}") from error
    if unexpected or set(missing) - set(tied):
        raise ModelError(
            f"{checkpoint_dir} does not fit the model: missing {sorted(set(missing) - set(tied))}, unknown {unexpected}"
        )


def export_model(model: "PreTrainedModel", folder: Path) -> None:
    """`save_pretrained`, which also writes a generation_config.json that transformers finds invalid."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = own
    if own is not None:
        own.to_json_file(folder / GENERATION, use_diff=True, keys_to_pop=["compile_config"])  # as transformers does


def export_weights(model: "PreTrainedModel", weights: "Mapping[str, torch.Tensor]", folder: Path) -> None:
    """`export_model` with these weights, in their dtype, in place of the model's own. A weight that is tied to another
    may be left out."""
    import torch

    config = copy.deepcopy(model.config)
    config.dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):
        shell = type(model)(config)
    shell.load_state_dict(weights, strict=False, assign=True)
    shell.tie_weights()
    shell.generation_config = model.generation_config
    export_model(shell, folder)


def stop_token_ids(model: "PreTrainedModel | Path", tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response: from the generation config of a model or its directory, and from the tokenizer.

    Raises ModelError if there are none.
    """
    if isinstance(model, Path):
        values = read_object(model / GENERATION)  # as in transformers: else config.json
        configured = (read_config(model) if values is None else values).get("eos_token_id")
    else:
        configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = set(configured if isinstance(configured, list) else [] if configured is None else [configured])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        where = tokenizer.name_or_path
        raise ModelError(f"{where}: no end-of-sequence token; set eos_token in its tokenizer_config.json")
    return tuple(sorted(ids))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory that was checked by `check_model_dir`."""
    values: dict[str, Any] = read_json(path / "config.json", follow_links=True)
    return values


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

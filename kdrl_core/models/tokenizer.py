"""Read tokenizers as their files define them, and tell which ids they have.

A tokenizer.json is not read through AutoTokenizer: transformers 5 picks a class by the model's architecture, and that
class rebuilds the tokenizer from vocabulary and merges by its own rules. A Qwen2 model with a tokenizer of another kind
(the miniature) would lose its handling of unknown characters and gain a special token when saved.

Embeddings are padded, Qwen's differently per model size. Engines sample no id beyond the tokenizer's, so student and
teacher may be padded as they like. A tokenizer with an id beyond the embedding is refused here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrl_core.config.paths import read_json
from kdrl_core.errors import ModelError


def read_tokenizer(path: Path, *, trust_remote_code: bool = False, gguf_file: str | None = None) -> Any:
    """The tokenizer of a model directory, from disk only. Raises ModelError if none can be read from there."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # costs seconds: only where a tokenizer is read

    options: dict[str, Any] = {"local_files_only": True}
    is_plain = gguf_file is None and not trust_remote_code and (path / "tokenizer.json").is_file()
    if not is_plain:
        options |= {"trust_remote_code": trust_remote_code}
        options |= {} if gguf_file is None else {"gguf_file": gguf_file}
    reader = PreTrainedTokenizerFast if is_plain else AutoTokenizer
    try:
        return reader.from_pretrained(str(path), **options)
    except Exception as error:  # each tokenizer class fails in its own way, some with a bare Exception
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path} has no usable tokenizer ({reason}); give a folder with tokenizer.json{trust_hint(error)}"
        ) from error


def read_object(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file of a model directory; None without the file. Raises ModelError if it cannot be read."""
    try:
        return dict(read_json(file, follow_links=True))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as error:
        raise ModelError(f"{file} cannot be read ({error}); download it again") from error


def num_token_ids(tokenizer: Any) -> int:
    """1 + the highest id of a tokenizer, `len(tokenizer)` unless ids are left out. Ids of a model from there on are
    padding of its embedding."""
    return 1 + max(tokenizer.get_vocab().values())


def vocabulary_of(path: Path) -> dict[str, int] | None:
    """token → id with added tokens, or None where the tokenizer is not kept as tokenizer.json."""
    values = read_object(path / "tokenizer.json")
    if values is None:
        return None
    try:
        vocabulary = values["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [[token, score], …]
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{added["content"]: added["id"] for added in values.get("added_tokens", [])}}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path / 'tokenizer.json'} cannot be read ({error!r}); download it again") from error


def check_embedding(tokens: Mapping[str, int] | None, config: Mapping[str, Any], *, where: str) -> None:
    """Raise ModelError if a tokenizer has an id beyond the embedding. What is not known is not checked.

    Args:
        tokens: token → id.
        config: the model's config.json.
        where: names the model in the error.
    """
    text = config.get("text_config")  # of a vision-language model
    rows = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    if not tokens or not isinstance(rows, int):
        return
    token = max(tokens, key=lambda each: tokens[each])
    if tokens[token] >= rows:
        raise ModelError(
            f"{where}: the tokenizer's token {token!r} has the id {tokens[token]}, which needs an embedding of "
            f"{tokens[token] + 1} rows, but the model has {rows} (vocab_size); give the tokenizer that belongs to the "
            "model, or resize the embedding (resize_token_embeddings) and save both"
        )


def trust_hint(error: Exception) -> str:
    """What to add to the remedy if transformers refused to run code that it found beside the files."""
    if "trust_remote_code" not in str(error):
        return ""
    return "; or read that code, and set trust_remote_code=true beside path in the recipe if you trust it"

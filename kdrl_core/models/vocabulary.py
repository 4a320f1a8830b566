"""The ids of a tokenizer and the embedding of a model: which ids exist, and whether the embedding has rows for them.

Embeddings are padded, Qwen's differently per model size. Engines sample no id beyond the tokenizer's, so student and
teacher may be padded as they like. An id beyond the embedding is refused here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrl_core.config.paths import read_json
from kdrl_core.errors import ModelError


def vocabulary_of(path: Path) -> dict[str, int] | None:
    """token → id with added tokens, or None where the tokenizer is not kept as tokenizer.json."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        values = read_json(file, follow_links=True)
        vocabulary = values["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [[token, score], …]
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{added["content"]: added["id"] for added in values.get("added_tokens", [])}}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read ({error}); download the tokenizer again") from error


def embedding_rows(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding of a model with this config.json; None if it does not say."""
    text = config.get("text_config")  # of a vision-language model
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(size := part.get("vocab_size"), int):
            return size
    return None


def check_embedding(tokens: Mapping[str, int] | None, config: Mapping[str, Any], *, where: str) -> None:
    """Raise ModelError if a tokenizer has an id beyond the embedding. What is not known is not checked.

    Args:
        tokens: token → id.
        config: the model's config.json.
        where: names the model in the error.
    """
    rows = embedding_rows(config)
    if not tokens or rows is None:
        return
    token = max(tokens, key=lambda each: tokens[each])
    if tokens[token] >= rows:
        raise ModelError(
            f"{where}: the tokenizer's token {token!r} has the id {tokens[token]}, which needs an embedding of "
            f"{tokens[token] + 1} rows, but the model has {rows} (vocab_size); give the tokenizer that belongs to the "
            "model, or resize the embedding (resize_token_embeddings) and save both"
        )

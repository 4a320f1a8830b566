"""Read tokenizers as their files define them.

A tokenizer.json is not read through AutoTokenizer: transformers 5 picks a class by the model's architecture, and that
class rebuilds the tokenizer from vocabulary and merges by its own rules. A Qwen2 model with a tokenizer of another kind
(the miniature) would lose its handling of unknown characters and gain a special token when saved.
"""

from pathlib import Path
from typing import Any

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


def num_token_ids(tokenizer: Any) -> int:
    """1 + the highest id of a tokenizer, `len(tokenizer)` unless ids are left out. Ids of a model from there on are
    padding of its embedding."""
    return 1 + max(tokenizer.get_vocab().values())


def trust_hint(error: Exception) -> str:
    """What to add to the remedy if transformers refused to run code that it found beside the files."""
    if "trust_remote_code" not in str(error):
        return ""
    return "; or read that code, and set trust_remote_code=true beside path in the recipe if you trust it"

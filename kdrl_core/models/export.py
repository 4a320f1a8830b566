"""Write model directories: weights and config from memory, everything else as the source directory has it.

transformers refuses to write some files that it reads, such as a generation_config.json with a temperature and without
do_sample (Llama 2), and it leaves out others. So these files are copied.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GENERATION = "generation_config.json"
_COPIED = (_GENERATION, "*.py", "*processor_config.json")
"""Files of the source that an export has as well: how to generate, code of the model's own, and what servers read."""


def export_model(model: "PreTrainedModel", folder: Path) -> None:
    """`save_pretrained`, which also writes a generation_config.json that transformers finds invalid."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = own
    if own is not None and (folder / _GENERATION).is_file():
        own.to_json_file(folder / _GENERATION, use_diff=True, keys_to_pop=["compile_config"])  # as transformers does


def companions(source: Path | None, tokenizer: Any) -> Callable[[Path], None]:
    """Writes what lies beside weights and config into a folder: the tokenizer, and the files of `source` that are
    copied."""

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        for file in [] if source is None else [file for pattern in _COPIED for file in source.glob(pattern)]:
            shutil.copyfile(file, folder / file.name)

    return write


def source_of(model: "PreTrainedModel") -> Path | None:
    """The directory that a model was loaded from; None if it was made from a config."""
    return Path(model.name_or_path) if model.name_or_path else None

"""Models that transformers cannot train from as they are: GGUF files, turned once into plain model directories."""

import hashlib
from pathlib import Path

from kdrl_core.config import ModelConfig, resolve_path
from kdrl_core.errors import ModelError
from kdrl_core.ledger import digest, is_published, publish_directory
from kdrl_core.models.loading import check_model_dir

_verified: set[Path] = set()
"""Converted models whose bytes this process has compared: they are large, and asked for often."""


def prepared_model(config: ModelConfig, run_root: Path) -> Path:
    """The Hugging Face model directory of a recipe's model.

    A GGUF file is converted on first use into `<artifacts>/models/<stem>-<hash of its path>/`, beside the runs and
    shared by them.

    Raises:
        ModelError: the files are missing, or reading GGUF needs a package that is not installed.
    """
    check_model_dir(config, role="model")
    source = resolve_path(config.path)
    if config.gguf_file is None:
        return source
    file = source / config.gguf_file
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]  # two files may have one name
    target = run_root.parent.parent / "models" / f"{file.stem}-{place}"
    if target not in _verified or not is_published(target):
        gguf_file = config.gguf_file
        _, sha256 = digest(file)
        publish_directory(
            target,
            lambda folder: _convert(source, gguf_file, folder),
            inputs={gguf_file: sha256},
            metadata={"source": gguf_file},
        )
        _verified.add(target)
    return target


def _convert(source: Path, gguf_file: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # Unless told, transformers would ask on the terminal whether to run code found beside the file.
        loaded = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf_file, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(
            source, gguf_file=gguf_file, trust_remote_code=False, local_files_only=True
        )
    except ImportError as error:
        raise ModelError(f"reading {gguf_file} needs more packages: pip install 'kdrl[gguf]' ({error})") from error
    # save_pretrained of a model that came from GGUF raises; a plain one with its weights does not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dequantised: nothing may take the copy for a quantised model
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.config.eos_token_id = tokenizer.eos_token_id
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

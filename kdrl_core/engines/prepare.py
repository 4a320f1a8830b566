"""Models that transformers cannot train from as they are: GGUF files, turned once into plain model directories."""

from pathlib import Path

from kdrl_core.config import ModelConfig, resolve_path
from kdrl_core.engines.models import check_model_dir
from kdrl_core.errors import ModelError
from kdrl_core.ledger import is_published, publish_directory


def prepared_model(config: ModelConfig, run_root: Path) -> Path:
    """The Hugging Face model directory of a recipe's model.

    A GGUF file is converted on first use into `<artifacts>/models/<stem>/`, beside the runs and shared by them.

    Raises:
        ModelError: the files are missing, or reading GGUF needs a package that is not installed.
    """
    check_model_dir(config, role="model")
    source = resolve_path(config.path)
    if config.gguf_file is None:
        return source
    target = run_root.parent.parent / "models" / Path(config.gguf_file).stem
    if not is_published(target):
        gguf_file = config.gguf_file
        publish_directory(target, lambda folder: _convert(source, gguf_file, folder), metadata={"source": gguf_file})
    return target


def _convert(source: Path, gguf_file: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
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

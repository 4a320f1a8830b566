"""Model directories that kdrl writes: exported from a trainer, made from GGUF files, and with a temperature baked in.

An export has weights and config from memory, and everything else as the source directory has it. transformers refuses
to write some files that it reads, such as a generation_config.json with a temperature and without do_sample (Llama 2),
and it leaves out others. So these files are copied.

Servers give the logprobs of softmax(z) at any sampling temperature. But KDRL needs the teacher's logprobs of
softmax(z / T), since T is the temperature of the policy that is sampled and distilled. So kdrl serves a copy of the
teacher with the output layer W / T. Tied embeddings are untied, since the input side keeps its scale.
"""

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrl_core.config import ModelConfig, resolve_path
from kdrl_core.errors import ModelError
from kdrl_core.ledger import Manifest, digest, is_published, publish_directory
from kdrl_core.models.loading import (
    GENERATION,
    check_model_dir,
    export_model,
    export_weights,
    load_model,
    load_tokenizer,
    load_weights_into,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_COPIED = (GENERATION, "*.py", "*processor_config.json")
"""Files of the source that an export has as well: how to generate, code of the model's own, and what servers read."""
_verified: set[Path] = set()
"""Converted models that this process has verified: they are large, and used often."""


def prepared_model(config: ModelConfig, run_root: Path) -> Path:
    """The Hugging Face model directory of a recipe's model.

    A GGUF file is converted on first use into `<artifacts>/models/<stem>-<hash of its path>/`, beside the runs and
    shared by them. Raises ModelError if files are missing, or reading GGUF needs a package that is not installed.
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
        importlib.import_module("accelerate")  # without it transformers raises a plain ValueError
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
    export_model(plain, folder)
    tokenizer.save_pretrained(folder)


def bake_temperature(model_dir: Path, output: Path, temperature: float) -> Manifest:
    """Publish the copy of `model_dir` as `output`: an ordinary model directory in the model's own dtype.

    Raises ModelError if the model cannot be loaded or its output layer is not a plain linear one, and ValueError if the
    temperature is not above 0.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature: expected a number above 0, given {temperature}")
    import torch

    model = load_model(model_dir, dtype="auto")
    head = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    if not isinstance(head, torch.nn.Linear) or softcap:
        raise ModelError(
            f"{model_dir}: its output layer is no plain linear one, so no temperature can be baked into it"
        )
    with torch.no_grad():
        head.weight = torch.nn.Parameter((head.weight.float() / temperature).to(head.weight.dtype))
        if head.bias is not None:
            head.bias = torch.nn.Parameter((head.bias.float() / temperature).to(head.bias.dtype))
    model.config.tie_word_embeddings = False
    tokenizer = load_tokenizer(model_dir)

    def write(folder: Path) -> None:
        export_model(model, folder)
        companions(model_dir, tokenizer)(folder)

    return publish_directory(output, write, metadata={"source": str(model_dir), "temperature": temperature})


def companions(source: Path | str, tokenizer: Any) -> Callable[[Path], None]:
    """Writes what lies beside weights and config into a folder: the tokenizer, and files copied from the directory
    `source` (empty: there is none)."""

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        for pattern in _COPIED if source else ():
            for file in Path(source).glob(pattern):
                shutil.copyfile(file, folder / file.name)

    return write


class FullWeights:
    """All weights of a model, which a trainer changes in place."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self._model = model

    def save(self, folder: Path) -> None:
        """Write the model into `folder`."""
        export_model(self._model, folder)

    def load(self, folder: Path) -> None:
        """Take the weights in `folder`. Raises ModelError as `load_weights_into`."""
        load_weights_into(self._model, folder)

    def export(self, folder: Path, dtype: str) -> None:
        """Write the model into `folder`, with weights of this dtype."""
        import torch

        if dtype == "float32":
            export_model(self._model, folder)
        else:
            kind, state = getattr(torch, dtype), self._model.state_dict()
            weights = {name: value.to(kind) if value.is_floating_point() else value for name, value in state.items()}
            export_weights(self._model, weights, folder)


def float32_file(tensors: "Mapping[str, torch.Tensor]") -> Iterator[memoryview | bytes]:
    """The content of a safetensors file of float32 tensors, part by part. `save_file` writes the same bytes, but the
    file has to be read again for its hash, and no other thread of the process runs meanwhile."""
    import torch

    header, end = {}, 0
    for name in sorted(tensors):
        assert tensors[name].dtype == torch.float32
        start, end = end, end + 4 * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in header:
        yield tensors[name].detach().cpu().contiguous().numpy().reshape(-1).data.cast("B")

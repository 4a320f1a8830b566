"""A teacher whose plain logits are those of the student's temperature: z' = z / T, by an output layer divided by T.

Servers give the logprobs of softmax(z) whatever temperature they sample at, while the teacher's have to be those of
softmax(z / T) (the policy that is sampled and distilled). A copy of the model whose
output layer W is W / T gives just these. Tied embeddings are untied, since the input side keeps its scale.
"""

from pathlib import Path

from kdrl_core.errors import ModelError
from kdrl_core.ledger import Manifest, publish_directory
from kdrl_core.models.loading import load_model, load_tokenizer


def bake_temperature(model_dir: Path, output: Path, temperature: float) -> Manifest:
    """Publish the copy of `model_dir` as `output`: an ordinary model directory in the model's own dtype.

    Raises:
        ModelError: the model cannot be loaded, or its output layer is not a plain linear one.
        ValueError: the temperature is not above 0.
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
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return publish_directory(output, write, metadata={"source": str(model_dir), "temperature": temperature})

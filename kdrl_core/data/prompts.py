"""Questions → prompts: the recipe's template as one user turn of the student's chat template, tokenised.

The text is put in by `str.replace`, never `str.format`: questions and the template itself are full of LaTeX braces.
The chat template writes every special token that the prompt has, so that tokenising adds none.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from kdrl_core.config import ModelConfig, Recipe, resolve_path
from kdrl_core.errors import ModelError

_BATCH_ROWS = 512


class ChatTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(
        self,
        conversation: list[list[dict[str, str]]],
        *,
        chat_template: str | None,
        add_generation_prompt: bool,
        tokenize: bool,
    ) -> Any: ...


def load_tokenizer(model: ModelConfig, *, role: str = "student") -> ChatTokenizer:
    """The tokenizer of a model directory, read from disk only.

    Args:
        role: the recipe's section that `model` comes from, for errors.

    Raises:
        ModelError: no such directory, or no tokenizer in it.
    """
    path = resolve_path(model.path)
    if not path.is_dir():
        raise ModelError(f"{role}.path {model.path} is no directory; download the model and give its folder")
    from transformers import AutoTokenizer  # costs seconds: only where a tokenizer is read

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": model.trust_remote_code}
    if model.gguf_file is not None:
        options["gguf_file"] = model.gguf_file
    try:
        tokenizer: ChatTokenizer = AutoTokenizer.from_pretrained(str(path), **options)
    except Exception as error:  # each tokenizer class fails in its own way, some with a bare Exception
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{role}.path {model.path} has no usable tokenizer ({reason}); give a folder with tokenizer.json"
        ) from error
    return tokenizer


def render_prompts(questions: Sequence[str], tokenizer: ChatTokenizer, recipe: Recipe) -> list[tuple[str, list[int]]]:
    """Render and tokenise every question.

    Returns:
        (prompt text, token ids) per question, in order. The text ends where the response begins.

    Raises:
        ModelError: the tokenizer has no chat template, or the template cannot be rendered.
    """
    chat_template = recipe.student.chat_template
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ModelError("the student's tokenizer has no chat template; set student.chat_template to a Jinja template")
    prompts: list[tuple[str, list[int]]] = []
    for start in range(0, len(questions), _BATCH_ROWS):
        turns = [
            [{"role": "user", "content": recipe.prompt.template.replace("{question}", question)}]
            for question in questions[start : start + _BATCH_ROWS]
        ]
        texts: list[str] = _render(turns, tokenizer, chat_template)
        token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompts += [(text, list(ids)) for text, ids in zip(texts, token_ids, strict=True)]
    return prompts


def think_opened(prompt: str, recipe: Recipe) -> bool:
    """Whether the rendered prompt has already opened `<think>` (R1-Distill's chat template does), so that the
    response starts inside it. `prompt.think_opened` of the recipe overrides what the prompt shows."""
    if recipe.prompt.think_opened is not None:
        return recipe.prompt.think_opened
    return prompt.rstrip().endswith("<think>")


def _render(turns: list[list[dict[str, str]]], tokenizer: ChatTokenizer, chat_template: str | None) -> list[str]:
    from jinja2 import TemplateError

    try:
        texts: list[str] = tokenizer.apply_chat_template(
            turns, chat_template=chat_template, add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, TypeError) as error:  # TypeError: the template treats a turn as what it is not
        reason = " ".join(str(error).split())
        raise ModelError(f"the chat template cannot be rendered ({reason}); correct student.chat_template") from error
    return texts

"""Questions → prompts: the recipe's template as one user turn of the student's chat template, tokenised.

The question is put in by `str.replace`, never by `str.format`: questions and the template are full of LaTeX braces.
The chat template writes every special token of the prompt, so tokenising adds none.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from kdrl_core.config import ModelConfig, Recipe, resolve_path
from kdrl_core.errors import ModelError
from kdrl_core.models.tokenizer import read_tokenizer
from kdrl_core.types import ThinkOpened

_BATCH_ROWS = 512


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    chat_template: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(
        self,
        conversation: list[list[dict[str, str]]],
        *,
        chat_template: str | None,
        add_generation_prompt: bool,
        tokenize: bool,
        **variables: Any,
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
    try:
        tokenizer: ChatTokenizer = read_tokenizer(
            path, trust_remote_code=model.trust_remote_code, gguf_file=model.gguf_file
        )
    except ModelError as error:
        raise ModelError(f"{role}.path {model.path}: {error}") from error
    return tokenizer


def render_prompts(
    questions: Sequence[str], tokenizer: ChatTokenizer, recipe: Recipe, *, chat_template: str | None = None
) -> list[tuple[str, list[int]]]:
    """Render and tokenise every question.

    Args:
        chat_template: used instead of the student's, for a tokenizer of another model.

    Returns:
        (prompt text, token ids) per question, in order. The text ends where the response begins.

    Raises:
        ModelError: the tokenizer has no chat template, the student's lacks a variable of the recipe, the template
            cannot be rendered, or decoding would remove the `</think>` of a response.
    """
    _check_thought_is_kept(tokenizer)
    is_of_student = chat_template is None
    chat_template = chat_template or recipe.student.chat_template
    text = chat_template or getattr(tokenizer, "chat_template", None)
    if not text:
        raise ModelError("the student's tokenizer has no chat template; set student.chat_template to a Jinja template")
    for name in recipe.prompt.chat_template_kwargs:
        if is_of_student and name not in str(text):  # the template would ignore it
            raise ModelError(
                f"prompt.chat_template_kwargs.{name}: the student's chat template has no such variable; "
                "correct the name, or leave it out"
            )
    prompts: list[tuple[str, list[int]]] = []
    for start in range(0, len(questions), _BATCH_ROWS):
        turns = [
            [{"role": "user", "content": recipe.prompt.template.replace("{question}", question)}]
            for question in questions[start : start + _BATCH_ROWS]
        ]
        texts: list[str] = _render(turns, tokenizer, chat_template, recipe)
        token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompts += [(text, list(ids)) for text, ids in zip(texts, token_ids, strict=True)]
    return prompts


def think_opened(prompt: str, recipe: Recipe) -> ThinkOpened:
    """How the rendered prompt ends: True with `<think>` (as R1-Distill's chat template does), so that the response
    starts inside the thought; "closed" with `</think>` (as Qwen3's does with enable_thinking=false), so that it has no
    thought; else False. The recipe's `prompt.think_opened` overrides this.

    The chat template ends every prompt in the same way, so the answer for one prompt holds for all.
    """
    if recipe.prompt.think_opened is not None:
        return recipe.prompt.think_opened
    if prompt.rstrip().endswith("</think>"):
        return "closed"
    return prompt.rstrip().endswith("<think>")


def _check_thought_is_kept(tokenizer: ChatTokenizer) -> None:
    """Refuse a tokenizer with `</think>` as a special token: decoding drops it, and no response would be valid."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    for token in added.values():
        if token.content in ("<think>", "</think>") and token.special:
            raise ModelError(
                f"the student's tokenizer drops {token.content} from responses, since it is a special token; "
                f'set "special": false for it in tokenizer.json and tokenizer_config.json, as R1-Distill has it'
            )


def _render(
    turns: list[list[dict[str, str]]], tokenizer: ChatTokenizer, chat_template: str | None, recipe: Recipe
) -> list[str]:
    try:
        texts: list[str] = tokenizer.apply_chat_template(
            turns,
            chat_template=chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **recipe.prompt.chat_template_kwargs,
        )
    except Exception as error:  # transformers renders in a sandbox, but a template may raise anything
        reason = " ".join(str(error).split())
        also = " or prompt.chat_template_kwargs" if recipe.prompt.chat_template_kwargs else ""
        raise ModelError(
            f"the chat template cannot be rendered ({reason}); correct student.chat_template{also}"
        ) from error
    return texts

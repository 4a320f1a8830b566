"""The repairs before math-verify: each rule with what it must and must not change, and hostile input in linear time."""

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_core.verify.normalise import normalise
from kdrl_core.verify.numbers import as_based_integer, decimal_comma
from kdrl_core.verify.objections import lost_digits, objection
from kdrl_core.verify.words import same_words, word_items

REPAIRS = {
    "unicode": [
        ("x²", "x^{2}"),
        ("x¹⁰", "x^{10}"),
        ("a₁", "a_{1}"),
        ("½", "1/2"),
        ("3½", r"3\frac{1}{2}"),
        ("√2", r"\sqrt{2}"),
        ("2√3", r"2\sqrt{3}"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("∛2", r"\sqrt[3]{2}"),
        ("５", "5"),
        ("（1，2）", "(1,2)"),
        ("–5", "-5"),
        ("1⁄2", "1/2"),
        ("30°", r"30^{\circ}"),
        ("12\u00a0345", "12345"),
    ],
    "marks": [
        ("**5**", "5"),
        ("$5$", "5"),
        (r"\(5\)", "5"),
        ("$$ 5 $$", "5"),
        ("5.", "5"),
        ("5\\", "5"),
        ("5~", "5"),
        (r"**$\frac{1}{2}$.**", r"\frac{1}{2}"),
        (r"\boldsymbol{5}", "5"),
        ("€5", "€5"),  # a currency is a unit
        ("$1$ and $2$", "1 and 2"),
        ("$5 and $10", "$5 and $10"),  # dollars of money
        ("0.33...", "0.33..."),  # a period must stand there three times
        ("5!", "5!"),
        (r"1 \\ 2", r"1 \\ 2"),
    ],
    "sentence": [
        ("The answer is 5", "5"),
        ("the final answer is $5$.", "5"),
        ("Final Answer: The final answer is $(-6, 10)$. I hope it is correct.", "(-6, 10)"),
        (r"\text{The answer is } \frac{1}{2}", r"\frac{1}{2}"),
        (r"\text{The sum is }5", "5"),
        ("so $x+y = 1000$ therefore answer is $1$", "1"),
        ("We find that $x < 3$.", "x < 3"),
        ("答案：5", "5"),
        ("比例为13/28", "13/28"),
        ("Die Antwort lautet 24.", "24"),
        ("La respuesta es 24.", "24"),
        ("The answer is not 5", "The answer is not 5"),
        ("The answer isn't 5", "The answer isn't 5"),
        ("The answer is less than 5", "The answer is less than 5"),
        ("The answer is 3, no, the answer is 5", "The answer is 3, no, the answer is 5"),
        ("The answer may be 5", "The answer may be 5"),
        ("the value is larger than $5$", "the value is larger than $5$"),
        ("答案不是5", "答案不是5"),
    ],
    "numbers": [
        ("4.5e33", r"4.5 \cdot 10^{33}"),
        ("1.5 x 10^3", r"1.5 \times 10^3"),
        ("12 345", "12345"),
        (r"12\,345.5", "12345.5"),
        ("3 1/2", r"3\frac{1}{2}"),
        ("-3 1/2", r"-3\frac{1}{2}"),
        (".5", "0.5"),
        ("2 = x", "x=2"),
        ("33.5 percent", r"33.5\%"),
        ("32 dollars", "32 dollars"),
        ("4.5e3 Hz", r"4.5 \cdot 10^{3} Hz"),
        ("5 million dollars", r"5 \cdot 10^{6} dollars"),
        (r"12^{\text{th}}", "12"),
        (r"0.\dot3\dot6", r"\frac{36}{99}"),
        ("0.1(6)", r"\frac{15}{90}"),
        ("0.333...", r"\frac{3}{9}"),
        (r"17 \bmod 5", "2"),
        ("x**2", "x^{2}"),
        ("12 34", "12 34"),
        ("3 or 5", "3 or 5"),
    ],
    "names": [
        ("4*sqrt(29)/29", r"4*\sqrt{29}/29"),
        ("7*sin(x)", r"7*\sin (x)"),
        (r"\sin 30^\circ", r"\sin (30\pi/180)"),
        (r"\varnothing", r"\emptyset"),
        (r"\langle 1,2\rangle", "( 1,2)"),
        (r"\mathbb{R}", r"(-\infty,\infty)"),
        (r"x\in\mathbb{R}", r"(-\infty,\infty)"),
        ("no real solutions", r"\emptyset"),
        ("[[1,2],[3,4]]", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
        (r"\begin{cases} x=1 \\ y=2 \end{cases}", "x=1, y=2"),
        (r"(\pm 3, 2)", "(3, 2), (- 3, 2)"),
        ("spin", "spin"),
    ],
}


@pytest.mark.parametrize(("content", "expected"), [pair for pairs in REPAIRS.values() for pair in pairs])
def test_each_repair_changes_what_it_should_and_no_more(content: str, expected: str) -> None:
    assert normalise(content) == expected
    assert normalise(expected) == expected


@given(st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_it(content: str) -> None:
    assert isinstance(normalise(content), str)
    decimal_comma(content)
    as_based_integer(content)
    objection(content, content)


@pytest.mark.parametrize(
    "content",
    [
        "$" * 4096,
        "\\" * 4096,
        "." * 4095,
        "~ " * 2048,
        "a" * 4096,
        "answer " * 585,
        "a is " * 819,
        ". a" * 1365,
        "√(" * 2048,
        "½" * 4096,
        "²" * 4096,
        r"\text{" * 682,
        "1 " * 2048,
        "1," * 2048,
        "(or" * 1365,
        "1{" * 2048,
    ],
)
def test_hostile_contents_take_no_time(content: str) -> None:
    """The longest content that is compared at all has 4,096 characters. (It takes a hundredth of this.)"""
    started = time.process_time()
    normalise(content)
    objection(content, "5")
    lost_digits(content, "5")
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize("truth", ["0" * 32_768, "1" + " " * 32_766 + "!", "1 " * 16_384, "a=" * 16_384, "x" * 32_768])
def test_truths_of_any_length_take_no_time(truth: str) -> None:
    """A truth may have 32,768 characters; it is repaired only if it is no longer than an answer may be."""
    started = time.process_time()
    assert normalise(truth) == truth.strip()
    objection("5", truth)
    word_items(truth)
    as_based_integer(truth)
    decimal_comma(truth, is_truth=True)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (r"\text{Even}", ["even"]),
        (r"\text{the second  option}.", ["second option"]),
        ("even", ["even"]),
        (r"\text{A,B}", ["a", "b"]),
        ("Mrs. Smith", ["mrs smith"]),
        ("abc", None),  # a product
        ("xy", None),
        (r"5 \text{ cm}", None),
        (r"\frac{a}{b}", None),
    ],
)
def test_words_are_told_from_products(content: str, words: list[str] | None) -> None:
    assert word_items(content) == (None if words is None else Counter(words))


def test_words_are_compared_as_words() -> None:
    assert same_words("Even.", r"\text{even}")
    assert same_words(r"\textbf{an ellipse}", "ellipse")
    assert same_words("neve", r"\text{even}") is False
    assert same_words("5", "5") is None


def test_bases_are_kept() -> None:
    assert as_based_integer("1011_2") == ("1011", 2) == as_based_integer(r"1011_{\text{two}}")
    assert as_based_integer("(0FF)_{16}") == ("FF", 16)
    assert as_based_integer("1012_2") is None  # no such number
    assert as_based_integer("x_1") is None


@pytest.mark.parametrize(
    ("content", "answer", "truth"),
    [
        ("1,22", "1.22", "1.22"),
        ("1000,99", "1000.99", "1000.99"),
        ("2,5", "2.5", None),
        ("1,000", None, None),
        ("12,345", None, None),
        ("1,2,3", None, None),
        ("-0,75", "-0.75", "-0.75"),
    ],
)
def test_a_comma_is_decimal_where_it_cannot_part_thousands(content: str, answer: str | None, truth: str | None) -> None:
    assert decimal_comma(content) == answer
    assert decimal_comma(content, is_truth=True) == truth


@pytest.mark.parametrize(
    ("answer", "truth", "word"),
    [
        (r"\leq 5", "5", "bound"),
        ("> 5", "5", "bound"),
        ("!= 7", "7", "bound"),
        (r"\neq 7", r"x \neq 7", None),
        ("x>5", "x>5", None),
        ("(3 or 4)", "(3,4)", "alternatives"),
        ("3 or 4", "3,4", None),
        (r"\minus 5", "5", "minus"),
        ("5_6", "5", "subscript"),
        (r"[-\infty,0]", r"(-\infty,0]", "infinity"),
        ("2 hrs", "2 hours", None),
        ("5 cm", "5", None),
        ("5", "5 cm", None),
        ("2m", "2n", None),  # no unit is known on one side
    ],
)
def test_objections(answer: str, truth: str, word: str | None) -> None:
    found = objection(answer, truth)
    assert (found is None) if word is None else (found is not None and word in found)


def test_digits_that_were_not_read_are_noticed() -> None:
    assert lost_digits(r"3 \text{ or so, or } 4 \text{ m}", "3")
    assert not lost_digits(r"\frac12", r"\frac{1}{2}")
    assert not lost_digits("12,345", "12345")
    assert not lost_digits(r"10 \text{ cm}^2", r"10\,")

"""Recipes and data of others: nothing in them is executed, and a hostile recipe costs little before it is refused."""

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdrl_core.config import DataConfig, dump_recipe, load_recipe
from kdrl_core.data import read_problems
from kdrl_core.errors import RecipeError

MAX_S = 10.0
"""Of processor time, for what takes at most a third of it here; unbounded, the bombs take hours."""

TAGS = [
    "!!python/object/apply:os.mkdir [MARKER]",
    "!!python/object/new:os.mkdir [MARKER]",
    "!!python/object/apply:subprocess.check_call [[mkdir, MARKER]]",
    "!!python/object/apply:builtins.eval [\"__import__('os').mkdir('MARKER')\"]",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!python/object:kdrl_core.ledger.names.RunPaths {root: MARKER}",
    "!!javascript/function 'x'",
]
ODD_VALUES = [
    *("!!int x", "!!int ''", "!!float x", "!!bool x", "!!timestamp x", "!!binary ü", "!!set [a]", "!!map [a]"),
    *("{? [a] : b}", "{? {a: 1} : b}", "{<<: 3}", "*nobody", "&a [*a]", "&a {x: *a}", "=", "\x00", "\ud800"),
    *("9" * 5_000, "9" + ":59" * 2_000 + ".5", "0x" + "f" * 5_000, "[" * 1_500, "{a: " * 1_500),
]


def refusals(value: str, tmp_path: Path) -> list[str]:
    """What is said about a value, given by --set and in a file."""
    said = []
    with pytest.raises(RecipeError) as caught:
        load_recipe("miniature", [f"seed={value}"])
    said.append(str(caught.value))
    path = tmp_path / "hostile.yaml"
    path.write_bytes(b"seed: " + value.encode("utf-8", errors="surrogatepass") + b"\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return [*said, str(caught.value)]


@pytest.mark.parametrize("value", TAGS)
def test_yaml_tags_make_no_objects(value: str, tmp_path: Path, marker: Path) -> None:
    for message in refusals(value.replace("MARKER", str(marker)), tmp_path):
        assert "could not determine a constructor for the tag" in message
    assert not marker.exists()
    assert "antigravity" not in sys.modules


def test_a_tag_directive_makes_no_objects(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(f"%TAG ! tag:yaml.org,2002:python/\n---\nseed: !object/apply:os.mkdir [{marker}]\n")
    with pytest.raises(RecipeError, match="could not determine a constructor"):
        load_recipe(path)
    assert not marker.exists()


@pytest.mark.parametrize("value", ODD_VALUES, ids=range(len(ODD_VALUES)))
def test_odd_values_are_told_in_one_short_line(value: str, tmp_path: Path) -> None:
    for message in refusals(value, tmp_path):
        assert "\n" not in message
        assert len(message) < 1_000


def aliases(of: str, levels: int) -> str:
    """Ten times the level before, on each level: billion laughs."""
    lines = [f"a0: &a0 {of}"]
    for level in range(1, levels):
        former = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} [{former}]")
    return "\n".join(lines)


def merges(levels: int) -> str:
    """The same with merge keys, which PyYAML writes out before anybody can look."""
    lines = ["a0: &a0 {k: 1}"]
    for level in range(1, levels):
        former = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} {{<<: [{former}]}}")
    return "\n".join(lines)


LARGE = 2**17 - 100
BOMBS: dict[str, Callable[[], str]] = {
    "aliases of lists": lambda: aliases("[x, x, x, x, x, x, x, x, x, x]", 12),
    "aliases of a long text": lambda: aliases("x" * 100_000, 4),
    "merge keys": lambda: merges(12),
    "recipe of 100 MB": lambda: "a: " + "x" * 100_000_000,
    "endless lists": lambda: "a: " + "[" * 200_000,
    "as many values as fit": lambda: "a: [" + "1," * (LARGE // 2) + "]",
    "as many keys as fit": lambda: "\n".join(f"k{index}: 1" for index in range(LARGE // 12)),
    "a large number": lambda: "a: 9" + ":59" * (LARGE // 3),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_in_little_time_and_memory(bomb: Callable[[], str], tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(bomb())
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert time.process_time() - started < MAX_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    assert len(str(caught.value)) < 5_000


def test_a_bomb_in_an_override_is_refused() -> None:
    former = "[x, x, x, x, x, x, x, x, x, x]"
    for level in range(12):
        name = chr(ord("b") + level)
        former = f"[&{name} {former}, " + ", ".join([f"*{name}"] * 9) + "]"
    with pytest.raises(RecipeError, match="more than 131,072 characters, aliases written out"):
        load_recipe("miniature", [f"description={former}"])


def test_a_recipe_too_long_to_be_read_again_is_not_frozen() -> None:
    recipe = load_recipe("miniature", ["description=" + "\u00e9" * 60_000])
    with pytest.raises(RecipeError, match="written out it has more than 131,072 characters"):
        dump_recipe(recipe.model_copy(update={"description": recipe.description + "\u2028"}))


def test_aliases_of_ordinary_size_are_written_out(tmp_path: Path) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text("a: &a {x: [1]}\nb: *a\nc: {<<: *a}\n")
    with pytest.raises(RecipeError, match=r"field 'a': unknown field.*field 'b': unknown field.*field 'c'"):
        load_recipe(path)


def test_a_parquet_file_brings_no_objects(tmp_path: Path, bait: bytes, marker: Path) -> None:
    """Once, pyarrow unpickled the types that a file claimed to have (CVE-2023-47248)."""
    claim = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bait}
    schema = pa.schema([pa.field("problem", pa.string(), metadata=claim), pa.field("answer", pa.string())])
    pq.write_table(pa.table([["1+1"], ["2"]], schema=schema), tmp_path / "p.parquet")
    problems = read_problems(DataConfig(files=[str(tmp_path / "p.parquet")]))
    assert problems["question"].to_pylist() == ["1+1"]
    assert not marker.exists()


ANSWERS = [
    "__import__('os').mkdir('MARKER')",
    "1+__import__('os').mkdir('MARKER')",
    "(1).__class__.__base__.__subclasses__()",
    "eval(\"__import__('os').mkdir('MARKER')\")",
    r"\text{__import__('os').mkdir('MARKER')}",
    r"\operatorname{exec}(\"import os\")",
    r"\input{/etc/passwd}",
    r"\immediate\write18{mkdir MARKER}",
    "1/(lambda: __import__('os').mkdir('MARKER'))()",
    "2**3;__import__('os').mkdir('MARKER')",
    "１＋__import__('os').mkdir('MARKER')",
]


def test_answers_are_read_as_mathematics_and_never_as_python(marker: Path) -> None:
    """sympy reads plain expressions with `eval`: whatever comes to it must be numbers and operators alone."""
    attack = f"""
import builtins, sys
import sympy.physics.units  # evaluates names of its own
from contextlib import suppress
evaluate = builtins.eval
seen = []
def spy(source, *scope):
    if sys._getframe(1).f_globals["__name__"] == "sympy.parsing.sympy_parser":
        seen.append(source)
    return evaluate(source, *scope)
from kdrl_core.verify.accuracy import compare_answer, compare_text
compare_answer("1+2", "3")
builtins.eval = spy
compare_answer("2 + 3 * 7", "23 ")
assert seen, "nothing was evaluated: the spy is blind"
for answer in {ANSWERS!r}:
    answer = answer.replace("MARKER", {str(marker)!r})
    for given in (answer, f"${{answer}}$", answer.replace("_", r"\\_")):
        text = f"The final answer is {{given}}. I hope it is right. The answer is 1+{{given}}"
        for compare, one, other in (
            (compare_answer, given, "42/7"),
            (compare_answer, "42/7", given),
            (compare_text, text, "42/7"),
        ):
            with suppress(Exception):  # what cannot be read is a verdict of the worker
                compare(one, other)
names = set()
for source in seen:
    with suppress(SyntaxError):
        names |= set((compile(source.strip(), "", "eval") if isinstance(source, str) else source).co_names)
assert names <= {{"Integer", "Float", "Rational", "Add", "Mul", "Pow"}}, names
"""
    done = subprocess.run([sys.executable, "-c", attack], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()

"""Estimators of one's own: registered under a name, or named in a recipe as file.py:name or package.module:name."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from kdrl_core.config import load_recipe
from kdrl_core.errors import RecipeError
from kdrl_core.objectives import kdrl_loss, kl_estimate, recorded_kl, register_estimator
from kdrl_core.objectives.kinds import AGGREGATIONS, ESTIMATORS, MASKINGS, OBJECTIVES
from kdrl_core.objectives.plugins import expect_code, parse_reference

pytestmark = pytest.mark.usefixtures("own_estimators")

STUDENT = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
TEACHER = torch.tensor([[-0.5, -4.0]], dtype=torch.float64)  # R = 0.5, −2
HINGE = "def hinge(log_ratio):\n    return (-log_ratio).clamp(min=0)\n\n\nnothing = 3\n"


def hinge(log_ratio: torch.Tensor) -> torch.Tensor:
    return (-log_ratio).clamp(min=0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(HINGE)
    return path


def test_a_registered_estimator_is_at_once_legal_everywhere() -> None:
    with pytest.raises(ValueError, match=r"^estimator: expected one of k1, k2, k3, k3_k2grad, given 'mine'"):
        kl_estimate(STUDENT, TEACHER, "mine")
    with pytest.raises(
        RecipeError, match=r"'stage2.kl_estimator': Input should be 'k1', .* or 'topk', or file.py:name .*, got 'mine'"
    ):
        load_recipe("miniature", ["stage2.kl_estimator=mine"])
    register_estimator("mine", hinge)
    assert kl_estimate(STUDENT, TEACHER, "mine").tolist() == recorded_kl(STUDENT, TEACHER, "mine").tolist() == [[0, 2]]
    assert load_recipe("miniature", ["stage2.kl_estimator=mine"]).stage("stage2").kl_estimator == "mine"
    with pytest.raises(RecipeError, match=r"Input should be .* 'topk' or 'mine', or file.py:name .*, got 'k4'"):
        load_recipe("miniature", ["stage2.kl_estimator=k4"])


def test_the_loss_differentiates_the_registered_function() -> None:
    register_estimator("mine", hinge)
    logprobs = STUDENT.clone().requires_grad_()
    loss, metrics = kdrl_loss(
        logprobs,
        advantages=torch.zeros(1, dtype=torch.float64),
        teacher_logprobs=TEACHER,
        response_mask=torch.ones(1, 2),
        rewards=None,
        group_size=None,
        beta=0.1,
        kl_estimator="mine",
    )
    loss.backward()
    assert metrics["kd/kl"].item() == pytest.approx(1.0)  # (0 + 2) / 2
    assert loss.item() == pytest.approx(0.1)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.0, pytest.approx(0.05)]]  # 0.1 · 1 / 2 tokens


@pytest.mark.parametrize(
    ("expectation", "expected"), [("k3", [[0.148721, 1.135335]]), (torch.square, [[0.25, 4.0]]), (None, [[0.0, 2.0]])]
)
def test_what_is_recorded_is_the_expectation(expectation: object, expected: list[list[float]]) -> None:
    register_estimator("mine", hinge, expectation=expectation)  # type: ignore[arg-type]
    torch.testing.assert_close(
        recorded_kl(STUDENT, TEACHER, "mine"), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "same"), [("k1", "k1"), ("k2", "k2"), ("k3", "k3"), ("k3_k2grad", "k3"), ("topk", "k2")]
)
def test_what_is_recorded_of_kdrls_own(name: str, same: str) -> None:
    assert torch.equal(recorded_kl(STUDENT, TEACHER, name), kl_estimate(STUDENT, TEACHER, same))


@pytest.mark.parametrize("name", ["k2", "topk", "", "mine.py:hinge"])
def test_names_of_kdrl_and_references_cannot_be_registered(name: str) -> None:
    with pytest.raises(ValueError, match=r"^name: expected a new name without a colon, given"):
        register_estimator(name, hinge)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^function: expected a function"):
        register_estimator("mine", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^expectation: expected"):
        register_estimator("mine", hinge, expectation=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^expectation: expected one of k1, k2"):
        register_estimator("mine", hinge, expectation="k9")
    assert "mine" not in ESTIMATORS


def test_an_estimator_must_keep_the_shape() -> None:
    register_estimator("mine", torch.sum)
    with pytest.raises(ValueError, match=r"KL estimator returns: expected shape \[B, T\] = \(1, 2\), given \(\)"):
        kl_estimate(STUDENT, TEACHER, "mine")


def test_a_registered_name_is_refused_for_ranks_that_do_not_know_it() -> None:
    register_estimator("mine", hinge)
    with pytest.raises(RecipeError, match=r"stage2.kl_estimator=mine is registered in this process alone.*file.py"):
        load_recipe("miniature", ["stage2.kl_estimator=mine", "trainer.engine=deepspeed"])


def test_a_recipe_names_a_function_in_a_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the current folder; the recipe keeps the absolute path, so a run resumes from anywhere."""
    monkeypatch.chdir(tmp_path)
    stage = load_recipe("miniature", ["stage2.kl_estimator=mine.py:hinge"]).stage("stage2")
    assert stage.kl_estimator == f"{file}:hinge"
    assert stage.kl_estimator not in ESTIMATORS  # nothing was run
    assert kl_estimate(STUDENT, TEACHER, stage.kl_estimator).tolist() == [[0.0, 2.0]]
    load_recipe("miniature", [f"stage2.kl_estimator={file}:hinge", "trainer.engine=deepspeed"])


def test_a_recipe_names_a_function_in_a_module() -> None:
    stage = load_recipe("miniature", ["stage2.kl_estimator=torch.nn.functional:relu"]).stage("stage2")
    assert kl_estimate(STUDENT, TEACHER, stage.kl_estimator).tolist() == [[0.5, 0.0]]


def test_reading_a_recipe_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("raise SystemExit('run')")
    load_recipe("miniature", [f"stage2.kl_estimator={tmp_path / 'loud.py'}:f"])


@pytest.mark.parametrize("text", ["mine.py:", ":hinge", "mine.py:a.b", "a b:f", "a..b:f", "x\ny.py:f"])
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is no reference to a function; give file.py:name or package.module:name"):
        load_recipe("miniature", [f'stage2.kl_estimator="{text}"'.replace("\n", "\\n")])


def test_a_relative_path_to_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"'stage2.kl_estimator': .*nowhere.py does not exist; correct the path"):
        load_recipe("miniature", ["stage2.kl_estimator=nowhere.py:f"])


@pytest.mark.parametrize(
    ("code", "function", "message"),
    [
        (HINGE, "nothing", r"nothing is not callable in .*mine.py; name a function"),
        (HINGE, "absent", r"absent is not there in .*mine.py"),
        (
            "import no_such_module",
            "f",
            r"mine.py cannot be imported: ModuleNotFoundError: No module",
        ),
        ("def f(:", "f", r"mine.py cannot be imported: SyntaxError"),
    ],
)
def test_a_reference_that_cannot_be_loaded_is_told(tmp_path: Path, code: str, function: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(RecipeError, match=message):
        kl_estimate(STUDENT, TEACHER, f"{tmp_path / 'mine.py'}:{function}")


@pytest.mark.parametrize("reference", ["/nowhere/mine.py:f", "no_such_package.module:f"])
def test_a_missing_file_or_package_is_told(reference: str) -> None:
    with pytest.raises(RecipeError, match=r"does not exist|is not installed"):
        kl_estimate(STUDENT, TEACHER, reference)


@pytest.mark.parametrize(
    ("field", "table"),
    [
        ("objective", OBJECTIVES),
        ("kl_estimator", ESTIMATORS),
        ("kd_masking", MASKINGS),
        ("aggregation", AGGREGATIONS),
        ("ref_kl_estimator", [name for name, row in ESTIMATORS.items() if row.is_for_reference]),
    ],
)
def test_the_recipes_legal_values_are_the_tables(field: str, table: Iterable[str]) -> None:
    for name in table:
        assert getattr(load_recipe("miniature", [f"stage2.{field}={name}"]).stage("stage2"), field) == name
    with pytest.raises(RecipeError) as caught:
        load_recipe("miniature", [f"stage2.{field}=nonsense"])
    *most, last = map(repr, table)
    own = ", or file.py:name for one of your own" if field.endswith("kl_estimator") else ""
    assert f"Input should be {', '.join(most)} or {last}{own}, got 'nonsense'" in str(caught.value)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_other_code_than_expected_is_not_run(file: Path, tmp_path: Path) -> None:
    began = sha256(file)
    file.write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n{HINGE}")
    expect_code({str(file): began})
    with pytest.raises(RecipeError) as caught:
        kl_estimate(STUDENT, TEACHER, f"{file}:hinge")
    told = f"{file} has sha256 {sha256(file)[:12]}…, the run began with {began[:12]}…; restore that file"
    assert told in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_each_run_of_a_process_has_the_code_that_it_began_with(file: Path) -> None:
    """Also if the file has the same size and time as before, where Python would run its cached bytecode."""
    name, before = f"{file}:hinge", file.stat()
    expect_code({str(file): sha256(file)})
    assert kl_estimate(STUDENT, TEACHER, name).tolist() == [[0.0, 2.0]]
    file.write_text(HINGE.replace("-log_ratio", "+log_ratio"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kl_estimate(STUDENT, TEACHER, name).tolist() == [[0.0, 2.0]]  # the run goes on with what it has loaded
    expect_code({str(file): sha256(file)})
    assert kl_estimate(STUDENT, TEACHER, name).tolist() == [[0.5, 0.0]]


def test_a_module_is_found_without_running_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "kdrl_test_located"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError\n")
    (package / "losses.py").write_text(HINGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert parse_reference("kdrl_test_located.losses:hinge").located() == package / "losses.py"
    assert parse_reference("kdrl_test_located:hinge").located() == package / "__init__.py"
    assert parse_reference("kdrl_test_located.none:hinge").located() is None
    assert parse_reference("kdrl_no_such_package:hinge").located() is None

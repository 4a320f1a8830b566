"""Terms of one's own in the joint loss, and the names that installed packages give to functions."""

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_core.config import load_recipe
from kdrl_core.errors import RecipeError
from kdrl_core.objectives import Objective, Responses, Totals, joint_loss, plugins

TERMS = """
import torch

def certain(responses):
    return responses.logprobs.exp() * responses.advantages[:, None]

def flat(responses):
    return responses.logprobs.mean()

def ratio(responses):
    return (responses.logprobs - responses.old_logprobs).exp()

def root(responses):
    return (-responses.logprobs).sqrt()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(TERMS)
    return path


def test_value_and_gradient_by_hand(file: Path) -> None:
    """Probabilities ½, ¼; 1/5 and padding. Â = 1, −1. The term is (½ + ¼ − 1/5) / 3; its gradient by log π is p Â / 3.

    Beside it −Â log π / 3, by log π −Â / 3; with the coefficient 2 the sum is (−1 + 2 p) Â / 3."""
    logprobs = torch.tensor([[0.5, 0.25], [0.2, 1.0]], dtype=torch.float64).log().requires_grad_()
    responses = Responses(
        logprobs=logprobs,
        response_mask=torch.tensor([[1, 1], [1, 0]]),
        advantages=torch.tensor([1.0, -1.0], dtype=torch.float64),
    )
    plain, _ = joint_loss(responses, Objective(kind="grpo"), Totals())
    loss, metrics = joint_loss(responses, Objective(kind="grpo", terms=((f"{file}:certain", 2.0),)), Totals())
    assert metrics["term/certain"].item() == pytest.approx(0.55 / 3)
    assert loss.item() == pytest.approx(plain.item() + 2 * 0.55 / 3)
    assert metrics["loss/total"].item() == loss.item()
    (found,) = torch.autograd.grad(loss, logprobs)
    assert found.flatten().tolist() == pytest.approx([0.0, -0.5 / 3, 0.6 / 3, 0.0])
    measured, metrics = joint_loss(responses, Objective(kind="grpo", terms=((f"{file}:certain", 0.0),)), Totals())
    assert (measured.item(), metrics["term/certain"].item()) == (plain.item(), pytest.approx(0.55 / 3))


def test_a_term_must_give_a_value_for_each_token(file: Path) -> None:
    responses = Responses(
        logprobs=torch.zeros(2, 3), response_mask=torch.ones(2, 3), advantages=torch.zeros(2), teacher_logprobs=None
    )
    told = rf"{file}:flat: ValueError: what it returns: expected shape \[B, T\] = \(2, 3\), given \(\); correct it"
    with pytest.raises(RecipeError, match=told):
        joint_loss(responses, Objective(kind="grpo", terms=((f"{file}:flat", 1.0),)), Totals())
    with pytest.raises(RecipeError, match=r"absent is not there in .*mine.py"):
        joint_loss(responses, Objective(kind="grpo", terms=((f"{file}:absent", 1.0),)), Totals())


def test_on_policy_a_term_has_the_ratio_1_with_its_gradient(file: Path) -> None:
    """ρ = exp(log π − log π_old): value 1, gradient 1 by log π; the mean is over three tokens."""
    logprobs = torch.full((2, 2), -1.0, requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    responses = Responses(logprobs=logprobs, response_mask=mask, advantages=torch.zeros(2))
    loss, metrics = joint_loss(responses, Objective(kind="grpo", terms=((f"{file}:ratio", 1.0),)), Totals())
    assert metrics["term/ratio"].item() == pytest.approx(1.0)
    (found,) = torch.autograd.grad(loss, logprobs)
    assert found.flatten().tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])


def test_what_a_term_makes_of_padding_does_not_matter(file: Path) -> None:
    logprobs = torch.tensor([[-4.0, -1.0], [-1.0, 0.0]], requires_grad=True)  # √ has no gradient at 0
    mask = torch.tensor([[1, 1], [1, 0]])
    responses = Responses(logprobs=logprobs, response_mask=mask, advantages=torch.zeros(2))
    loss, _ = joint_loss(responses, Objective(kind="grpo", terms=((f"{file}:root", 1.0),)), Totals())
    (found,) = torch.autograd.grad(loss, logprobs)
    assert found.flatten().tolist() == pytest.approx([-0.25 / 3, -0.5 / 3, -0.5 / 3, 0.0])


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What installed packages would declare."""
    found = {
        "kdrl.estimators": [("hinge", "torch.nn.functional:relu"), ("k2", "torch:abs"), ("both", "torch:abs")],
        "kdrl.terms": [("square", "parity.ranks:square")],
    }
    found["kdrl.estimators"].append(("both", "torch:square"))

    def entry_points(*, group: str) -> list[Any]:
        return [EntryPoint(name, value, group) for name, value in found[group]]

    monkeypatch.setattr(plugins, "entry_points", entry_points)


@pytest.mark.usefixtures("declared")
def test_an_entry_point_is_the_function_that_it_names() -> None:
    """The recipe keeps the reference, so that hash, manifest and ranks know the function. kdrl's own names stay."""
    terms = "stage2.terms=[{function: square, coefficient: 0.5}]"
    stage = load_recipe("miniature", ["stage2.kl_estimator=hinge", "stage2.ref_kl_estimator=k2", terms]).stage("stage2")
    assert (stage.kl_estimator, stage.ref_kl_estimator) == ("torch.nn.functional:relu", "k2")
    assert stage.objective_at(0).terms == (("parity.ranks:square", 0.5),)
    with pytest.raises(RecipeError, match=r"'both' of kdrl.estimators is torch:abs and torch:square; give the one"):
        load_recipe("miniature", ["stage2.kl_estimator=both"])

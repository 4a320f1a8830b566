"""The commands of docs/*.md that start servers: long enough for the recipe that is run with them, and no longer list.

tests/parity starts them for real.
"""

from pathlib import Path

import pytest
from documented import is_server, option, serving, settings
from replica import replica

from kdrl_core.config import load_recipe, resolve_path
from kdrl_core.engines.http_rollout import HTTPRolloutEngine
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.engines.server_client import ServedModel
from kdrl_core.errors import EngineError
from kdrl_core.models.loading import load_tokenizer

MODEL = Path(resolve_path("builtin:miniature/student"))


def connect(recipe_settings: list[str], url: str) -> None:
    """Connect to a server as each phase of a run of paper-1.5b does. Raises EngineError if its context is too short."""
    recipe = load_recipe("paper-1.5b", recipe_settings)
    served = ServedModel(urls=[url], retry_for_s=0.0)
    stages = [recipe.stage(name) for name in recipe.stages]
    if recipe.rollout.engine == "server":
        context = recipe.evaluation.max_context_tokens
        lengths = [(stage.max_prompt_tokens, stage.max_response_tokens) for stage in stages]
        for prompt, response in [*lengths, (1024, context - 1024)]:
            HTTPRolloutEngine(
                served,
                load_tokenizer(MODEL),
                stop_ids=[1],
                temperature=0.6,
                max_prompt_tokens=prompt,
                max_response_tokens=response,
            ).close()
    if recipe.teacher is not None and recipe.teacher.server is not None:
        for stage in stages:
            if stage.scores_teacher:
                HTTPScorer(served, max_tokens=stage.max_prompt_tokens + stage.max_response_tokens).close()


def test_the_docs_start_servers() -> None:
    assert len(serving()) >= 3


@pytest.mark.parametrize(("page", "block"), serving(), ids=[page for page, _ in serving()])
def test_a_documented_server_has_room_for_the_recipe_that_it_is_started_for(page: str, block: list[list[str]]) -> None:
    (server,) = [words for words in block if is_server(words)]
    (run,) = [words for words in block if words[:2] == ["kdrl", "run"]]
    assert option(run, "--recipe") == "paper-1.5b"
    length = int(option(server, "--max-model-len"))
    with replica(MODEL) as fake:
        fake.context = length
        connect(settings(run), fake.url)
        fake.context = length - 1
        with pytest.raises(EngineError, match=rf"too short .* --max-model-len {length}"):
            connect(settings(run), fake.url)

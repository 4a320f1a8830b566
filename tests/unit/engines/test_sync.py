"""A weight sync is proved by digest and probe: what loads nothing, or half, is noticed, started anew, or refused."""

from pathlib import Path

import pytest
import torch

from kdrl_core.config.paths import ASSETS
from kdrl_core.engines.sync import PROBE_TOKENS, sync_weights
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine, TransformersScorer
from kdrl_core.engines.weight_digest import folder_digest, model_digest
from kdrl_core.errors import EngineError
from kdrl_core.models.loading import load_model, load_tokenizer, stop_token_ids
from kdrl_core.types import RolloutRequest

OLD, NEW = ASSETS / "miniature" / "student", "new"
PROBE = [RolloutRequest(prompt_id="p", sample=i, prompt_token_ids=[2, 8, 17, 9, 3], seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The next policy: every weight a little off."""
    path = tmp_path_factory.mktemp("models") / NEW
    model = load_model(OLD)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(path)
    load_tokenizer(OLD).save_pretrained(path)
    return path


class Engine(TransformersRolloutEngine):
    """Loads all, nothing, or all but the output layer. `says` its digest: its weights', the new ones', or none."""

    def __init__(self, loads: str, *, rebuilds: bool = True, says: str = "its own") -> None:
        model, tokenizer = load_model(OLD), load_tokenizer(OLD)
        stop_ids = stop_token_ids(model, tokenizer)
        super().__init__(model, tokenizer, stop_ids=stop_ids, temperature=1.0, max_response_tokens=64, batch_size=8)
        self.loads, self.rebuilds, self.num_rebuilt = loads, rebuilds, 0
        self.says, self.loaded = says, OLD

    def digests(self) -> dict[str, str]:
        if self.says == "its own":
            return {"the engine": model_digest(self._model, torch.float32)}
        return {"the engine": folder_digest(self.loaded, "float32") if self.says == "the new" else ""}

    def load_weights(self, checkpoint_dir: Path) -> None:
        self.loaded = checkpoint_dir
        if self.loads == "nothing":
            return
        kept = self._model.get_output_embeddings().weight.detach().clone()
        super().load_weights(checkpoint_dir)
        if self.loads == "half":
            with torch.no_grad():
                self._model.get_output_embeddings().weight.copy_(kept)

    def rebuild(self, checkpoint_dir: Path) -> None:
        self.num_rebuilt += 1
        if self.rebuilds:
            super().load_weights(checkpoint_dir)


def score_of(path: Path) -> TransformersScorer:
    return TransformersScorer(load_model(path), temperature=1.0, batch_tokens=2048)


def test_a_sync_that_works_shows_no_gap(new: Path) -> None:
    engine = Engine("all")
    report = sync_weights(engine, new, PROBE, score_of(new).score, tolerance=1e-3)
    assert (report.rebuilt, engine.num_rebuilt) == (False, 0)
    assert report.gap_mean <= report.gap_max < 1e-4
    assert report.digest == folder_digest(new, "float32") != folder_digest(OLD, "float32")
    assert report.seconds > 0.0


@pytest.mark.parametrize(
    ("loads", "says", "told"),
    [
        ("half", "its own", "other weights than those that were exported: the digest of these is float32:"),
        ("half", "the new", "the engine's logprobs are"),  # right weights, wrong numbers: the probe is what notices
        ("nothing", "nothing", "the engine's logprobs are"),
    ],
)
def test_weights_that_did_not_arrive_are_noticed_and_mended(
    loads: str, says: str, told: str, new: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(loads, says=says)
    report = sync_weights(engine, new, PROBE, score_of(new).score, tolerance=1e-3)
    assert (report.rebuilt, engine.num_rebuilt) == (True, 1)
    assert report.gap_max < 1e-4
    assert told in caplog.text
    assert report.digest == ("" if says == "nothing" else folder_digest(new, "float32"))
    assert ("the probe alone tests the sync" in caplog.text) == (says == "nothing")


def test_what_cannot_be_mended_is_refused_with_what_differs(new: Path) -> None:
    with pytest.raises(
        EngineError, match=r"has other weights .* the engine has float32:.*Its copy is old, or a mixture"
    ):
        sync_weights(Engine("nothing", rebuilds=False), new, PROBE, score_of(new).score, tolerance=1e-3)
    with pytest.raises(
        EngineError,
        match=r"nats from the trainer's in the mean, .* rollout\.sync_tolerance is 0\.001\. Its weights are those",
    ):
        sync_weights(Engine("nothing", rebuilds=False, says="the new"), new, PROBE, score_of(new).score, tolerance=1e-3)


def test_one_update_behind_is_found_by_the_digest_and_not_by_the_probe(tmp_path: Path) -> None:
    """An update of 1e-6 a weight, in float32: far below any tolerance."""
    model = load_model(OLD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-6)
    model.save_pretrained(tmp_path)
    score = score_of(tmp_path).score
    behind = sync_weights(Engine("nothing", says="the new"), tmp_path, PROBE, score, tolerance=1e-4)
    assert not behind.rebuilt  # the probe alone
    assert 0.0 < behind.gap_max < 1e-4
    report = sync_weights(Engine("nothing"), tmp_path, PROBE, score, tolerance=1e-4)
    assert report.rebuilt
    assert report.gap_mean < behind.gap_mean


def test_the_probe_is_short(new: Path) -> None:
    assert all(len(r.token_ids) <= 3 for r in Engine("all").generate(PROBE, max_response_tokens=3))
    assert all(
        len(r.token_ids) <= PROBE_TOKENS for r in Engine("all").generate(PROBE, max_response_tokens=PROBE_TOKENS)
    )

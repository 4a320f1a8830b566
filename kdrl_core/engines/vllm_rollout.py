"""Rollouts by vLLM in this process: one engine per stage, which loads the new weights after each update."""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_core.engines.protocols import OnFinished
from kdrl_core.engines.vllm_engine import VLLMEngine, VLLMSettings
from kdrl_core.errors import EngineError
from kdrl_core.models.tokenizer import num_token_ids
from kdrl_core.types import FinishReason, Rollout, RolloutRequest

_MAX_SEED = 2**63


class VLLMRolloutEngine:
    """`RolloutEngine` over vLLM. `model` is the directory of the first policy. Raises EngineError as `VLLMEngine`.

    Each request has a seed of its own. A response depends on the others only where vLLM's kernels depend on the batch.
    """

    def __init__(
        self,
        model: Path,
        tokenizer: Any,
        settings: VLLMSettings,
        *,
        stop_ids: Sequence[int],
        temperature: float,
        max_response_tokens: int,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._engine = self._started(model)
        self._stop_ids = list(stop_ids)
        self._temperature = temperature
        self._max_response_tokens = max_response_tokens

    def load_weights(self, checkpoint_dir: Path) -> None:
        self._engine.load_weights(checkpoint_dir)

    def digests(self) -> dict[str, str]:
        return {"the engine": self._engine.digest()}

    def rebuild(self, checkpoint_dir: Path) -> None:
        """Start the engine again from a checkpoint. Raises EngineError as `VLLMEngine`."""
        self._engine.close()
        self._engine = self._started(checkpoint_dir)

    def _started(self, model: Path) -> VLLMEngine:
        engine = VLLMEngine(model, self._settings)
        engine.sample_below(num_token_ids(self._tokenizer))
        return engine

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        on_finished: OnFinished | None = None,
        max_response_tokens: int | None = None,
    ) -> list[Rollout]:
        """Raises EngineError if a request does not fit the context, logits are not finite, or vLLM fails."""
        limit = min(max_response_tokens or self._max_response_tokens, self._max_response_tokens)
        rollouts: dict[int, Rollout] = {}

        def parameters(row: int) -> dict[str, Any]:
            return {
                "temperature": self._temperature,
                "seed": requests[row].seed % _MAX_SEED,
                "max_tokens": limit,
                "stop_token_ids": self._stop_ids,
                "ignore_eos": True,  # EOS is among the stop tokens
                "logprobs": 0,
            }

        def finish(row: int, output: Any) -> None:
            rollouts[row] = self._rollout(requests[row], output.outputs[0])
            if on_finished is not None:
                on_finished([rollouts[row]])

        self._engine.run([request.prompt_token_ids for request in requests], parameters, finish)
        return [rollouts[row] for row in range(len(requests))]

    def sleep(self) -> None:
        self._engine.sleep()

    def close(self) -> None:
        self._engine.close()

    def _rollout(self, request: RolloutRequest, completion: Any) -> Rollout:
        logprobs = array("f", completion.logprobs.logprobs)
        if not np.isfinite(logprobs).all():
            raise EngineError("the policy's logits are not finite: training has diverged; lower learning_rate")
        token_ids = list(completion.token_ids)
        return Rollout(
            prompt_id=request.prompt_id,
            sample=request.sample,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=token_ids,
            logprobs=logprobs,
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
            finish_reason=FinishReason(completion.finish_reason),
        )

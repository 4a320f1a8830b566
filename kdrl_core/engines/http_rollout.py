"""Rollouts by servers: vLLM replicas of `kdrl serve`, or those that the run starts itself.

Before a replica samples, it loads the checkpoint from a disk that it shares with the trainer. A replica that was away
loads it again. A replica that restarted during a call had its initial weights, so its responses of this call are
sampled again. So all returned responses come from the loaded policy.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_core.engines.protocols import OnFinished
from kdrl_core.engines.server import Server
from kdrl_core.engines.server_client import ROUTES, ServedModel, TransientError, completion_of
from kdrl_core.engines.server_pool import WHOLE_DISTRIBUTION, ServerPool
from kdrl_core.errors import EngineError
from kdrl_core.models.tokenizer import num_token_ids
from kdrl_core.types import FinishReason, Rollout, RolloutRequest

_MAX_ROUNDS = 3
_MAX_SEED = 2**63
_logger = logging.getLogger("kdrl")

Sampled = tuple[Rollout, str, str]
"""A response, the URL of the server that sampled it, and the incarnation of that server at the time."""


class HTTPRolloutEngine:
    """`RolloutEngine` over replicas; `max_prompt_tokens`: of the longest prompt to come. Raises as `ServerPool`."""

    def __init__(
        self,
        served: ServedModel,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        temperature: float,
        max_response_tokens: int,
        max_prompt_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_token_ids(tokenizer)
        self._is_own = served.own is not None
        self._stop_ids = list(stop_ids)
        self._temperature = temperature
        self._max_response_tokens = max_response_tokens
        self._weights = ""
        self._incarnations: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self._is_loaded = False
        self._locks = {url.rstrip("/"): threading.Lock() for url in served.urls}
        max_tokens = max_prompt_tokens + max_response_tokens
        self._pool = ServerPool(served, role="rollout", field="rollout.server", max_tokens=max_tokens)

    def load_weights(self, checkpoint_dir: Path) -> None:
        """Have every replica that answers load the weights; the others load them when they are back."""
        self._weights = str(checkpoint_dir.resolve())
        self._incarnations.clear()
        self._digests.clear()
        self._is_loaded = False
        self._pool.each(f"loading {checkpoint_dir}", self._bring_up_to_date)
        self._is_loaded = True

    def digests(self) -> dict[str, str]:
        """Of every replica that has loaded the weights."""
        return {f"replica {url}": digest for url, digest in self._digests.items()}

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        on_finished: OnFinished | None = None,
        max_response_tokens: int | None = None,
    ) -> list[Rollout]:
        """Raises EngineError if a request is given up, or replicas are restarted again and again."""
        limit = min(max_response_tokens or self._max_response_tokens, self._max_response_tokens)
        told = threading.Lock()

        def hear(rollout: Rollout) -> None:
            if on_finished is not None:
                with told:
                    on_finished([rollout])

        rollouts: dict[int, Rollout] = {}
        missing = list(range(len(requests)))
        for round_ in range(_MAX_ROUNDS):
            heard = hear if round_ == 0 else None  # each response is reported once
            asked = [(f"response {row}", partial(self._sample, requests[row], limit, heard)) for row in missing]
            found = dict(zip(missing, self._pool.ask_all(asked), strict=True))
            current = self._confirmed()
            rollouts.update({row: rollout for row, (rollout, _, _) in found.items()})
            missing = [row for row, (_, url, incarnation) in found.items() if current.get(url) != incarnation]
            if not missing:
                return [rollouts[row] for row in range(len(requests))]
            _logger.warning("%d responses may be of a replica that was started anew; sampled again", len(missing))
        raise EngineError(
            f"rollout servers were away or started anew {_MAX_ROUNDS} times while they sampled one step; look at their "
            "logs, then resume the run"
        )

    def rebuild(self, checkpoint_dir: Path) -> None:
        """Start the run's own replicas again, and have every replica load the weights. Raises as `load_weights`."""
        self._pool.restart()
        self.load_weights(checkpoint_dir)

    def sleep(self) -> None:
        self._pool.sleep()

    def close(self) -> None:
        self._pool.close()

    def _sample(
        self, request: RolloutRequest, limit: int, heard: Callable[[Rollout], None] | None, server: Server
    ) -> Sampled:
        self._pool.wake(server)
        incarnation = self._bring_up_to_date(server)
        try:
            has_routes = self._is_own or self._pool.has_routes(server)
            ask = self._sampled_binary if has_routes else self._sampled_json
            token_ids, logprobs, reason = ask(request, limit, server)
        except TransientError:
            self._incarnations.pop(server.url, None)  # it may return with other weights
            raise
        if (highest := max(token_ids)) >= self._num_tokens:
            self._incarnations.pop(server.url, None)  # one of our own was just started again
            raise (TransientError if self._is_own else EngineError)(
                f"rollout server {server.url} sampled the id {highest}, but the tokenizer ends at "
                f"{self._num_tokens - 1}; start it anew with this release's kdrl serve, which samples no padding"
            )
        rollout = Rollout(
            prompt_id=request.prompt_id,
            sample=request.sample,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=token_ids,
            logprobs=logprobs,
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
            finish_reason=FinishReason(reason),
        )
        if heard is not None:
            heard(rollout)
        return rollout, server.url, incarnation

    def _sampled_json(self, request: RolloutRequest, limit: int, server: Server) -> tuple[list[int], list[float], str]:
        body = {
            "model": self._pool.model,
            "prompt": request.prompt_token_ids,
            "max_tokens": limit,
            "temperature": self._temperature,
            **WHOLE_DISTRIBUTION,
            "seed": request.seed % _MAX_SEED,
            "stop_token_ids": self._stop_ids,
            "ignore_eos": True,  # EOS is among the stop tokens; vLLM would leave it out of the tokens
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
        return completion_of(self._pool.answer(server, "POST", "/completions", body), server.url)

    def _sampled_binary(
        self, request: RolloutRequest, limit: int, server: Server
    ) -> tuple[list[int], list[float], str]:
        """As `_sampled_json`, from the addresses of `server_routes`."""
        stop, seed = ",".join(map(str, self._stop_ids)), request.seed % _MAX_SEED
        query = f"max_tokens={limit}&temperature={self._temperature!r}&seed={seed}&stop={stop}"
        prompt = np.array(request.prompt_token_ids, "<i4").tobytes()
        content, reason = self._pool.binary(server, f"{ROUTES}/sample?{query}", prompt, most=8 * limit)
        count = len(content) // 8
        if not count or len(content) % 8 or reason not in ("stop", "length"):
            raise TransientError(f"rollout server {server.url} sent {len(content)} bytes as a response ({reason!r})")
        logprobs = np.frombuffer(content, "<f4", count)
        if not np.isfinite(logprobs).all():
            raise TransientError(f"rollout server {server.url} sent a logprob that is not a finite number")
        return np.frombuffer(content, "<i4", offset=4 * count).tolist(), logprobs.tolist(), reason

    def _bring_up_to_date(self, server: Server) -> str:
        """Have a replica load the weights unless it has them. Returns its incarnation."""
        with self._locks[server.url]:
            known = self._incarnations.get(server.url)
            if known is None:
                if self._weights:
                    state = self._pool.ask_workers(server, "kdrl_load", [self._weights, self._num_tokens])
                else:
                    state = self._state(server)
                self._compare(server, state["digest"])
                known = self._incarnations[server.url] = state["incarnation"]
            return known

    def _compare(self, server: Server, digest: str) -> None:
        """Note the digest of a replica's weights. Raises TransientError if it loads them later than the others, whose
        digests were compared with the exported files, and has other weights than they."""
        others = set(filter(None, self._digests.values())) if self._is_loaded else set()
        if digest and others and digest not in others:
            raise TransientError(
                f"{self._pool.where(server)} has loaded other weights from {self._weights} than the other replicas: "
                f"digest {digest}, not {' or '.join(sorted(others))}"
            )
        self._digests[server.url] = digest

    def _confirmed(self) -> dict[str, str]:
        """The incarnation of each replica that sampled, without those that do not answer or have other weights."""
        found = {}
        for server in self._pool.servers:
            if server.url in self._incarnations:
                try:
                    state = self._state(server)
                except TransientError:
                    continue
                if state["weights"] == self._weights:
                    found[server.url] = state["incarnation"]
                else:
                    self._incarnations.pop(server.url)
        return found

    def _state(self, server: Server) -> dict[str, str]:
        return self._pool.ask_workers(server, "kdrl_state")

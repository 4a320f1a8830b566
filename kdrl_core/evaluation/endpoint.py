"""A model behind an OpenAI-compatible API, `/v1/chat/completions`: whatever serves it, and however it is prompted.

Nothing is known there of tokens, weights or the chat template: the question goes as a user's message, the text that
comes back is judged, its length is what the server counts. So its figures are those of the endpoint as a whole.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from kdrl_core.config import ServersConfig
from kdrl_core.data.text import as_unicode
from kdrl_core.engines.server_client import TransientError
from kdrl_core.engines.server_pool import WHOLE_DISTRIBUTION, Server, ServerPool, served_model
from kdrl_core.errors import EngineError
from kdrl_core.sampling.responses import OnResponses, Response
from kdrl_core.types import FinishReason, RolloutRequest

_MAX_SEED = 2**63
_CUT_SHARE = 0.9
"""A response that ends for its length with fewer of its tokens was cut by something else."""
_logger = logging.getLogger("kdrl")


class ChatEndpoint:
    """What answers chat completions; faults that may pass are tried again.

    Args:
        config: how it is reached.
        temperature: of sampling.
        max_context_tokens: of prompt and response, compared with the server's context where it tells that.

    Raises:
        EngineError: it cannot be reached, serves another model, or has too short a context.
        SecretError: no key where the configuration says.
    """

    def __init__(self, config: ServersConfig, *, temperature: float, max_context_tokens: int) -> None:
        self._temperature = temperature
        self._limit_field = "max_tokens"
        self._pool = ServerPool(
            served_model(config),
            role="model",
            field="MODEL",
            max_tokens=max_context_tokens - 1,
            options={
                "model": "--served-as",
                "api_key": "--api-key",
                "retry_for_s": "--retry-for",
                "remedy": "Once it answers, give the same command: responses that came are kept",
            },
        )

    @property
    def model(self) -> str:
        """The name under which it is served."""
        return self._pool.model

    def respond(
        self,
        requests: Sequence[RolloutRequest],
        on_finished: OnResponses,
        *,
        messages: Mapping[str, str],
        max_response_tokens: int,
    ) -> list[Response]:
        """One response per request, in order, as `Source`; `on_finished` hears one at a time.

        Args:
            requests: their prompt_token_ids are not used.
            messages: what the user says, by `prompt_id`.
            max_response_tokens: longer ones are cut.

        Raises:
            EngineError: a request is given up, or cut before it had its tokens.
        """
        told = threading.Lock()

        def one(request: RolloutRequest, server: Server) -> Response:
            answer = self._chat(server, request, messages[request.prompt_id], max_response_tokens)
            text, length, reason, is_counted = _chat_of(answer, server.url)
            if reason is FinishReason.LENGTH and is_counted and length < _CUT_SHARE * max_response_tokens:
                raise EngineError(
                    f"model server {server.url} cut a response after {length} tokens, of {max_response_tokens} that it "
                    "was allowed: its context or a limit of its own is shorter; raise it there, or lower "
                    "evaluation.max_context_tokens, for every model that is compared"
                )
            response = Response(
                prompt_id=request.prompt_id,
                sample=request.sample,
                text=text,
                length=length,
                finish_reason=reason,
                seed=request.seed,
            )
            with told:
                on_finished([response])
            return response

        asked = [(f"response {row}", partial(one, request)) for row, request in enumerate(requests)]
        return self._pool.ask_all(asked)

    def _chat(self, server: Server, request: RolloutRequest, message: str, max_response_tokens: int) -> Any:
        field = self._limit_field
        body = {
            "model": self._pool.model,
            "messages": [{"role": "user", "content": message}],
            field: max_response_tokens,
            "temperature": self._temperature,
            "seed": request.seed % _MAX_SEED,
            # Others may not know its fields: what their model sets itself beside top-p holds there.
            **(WHOLE_DISTRIBUTION if self._pool.are_vllm else {"top_p": 1.0}),
        }
        try:
            return self._pool.answer(server, "POST", "/chat/completions", body)
        except EngineError as error:
            if field == "max_tokens" and "max_completion_tokens" in str(error):  # as OpenAI's newer models have it
                self._limit_field = "max_completion_tokens"
                return self._chat(server, request, message, max_response_tokens)
            raise

    def close(self) -> None:
        """Let go of the connections."""
        self._pool.close()


def with_thought_tags(text: str, *, think_opened: bool) -> str:
    """The response with the `<think>` that a chat template put into the prompt, whose end the text may show."""
    if "<think>" in text or not (think_opened or "</think>" in text):
        return text
    return f"<think>{text}"


def _chat_of(answer: Any, url: str) -> tuple[str, int, FinishReason, bool]:
    """Text, tokens and finish reason of the only choice, and whether the tokens are those of all of the text: a thought
    that the server has taken out is put back, and some leave it out of their count."""
    try:
        choice = answer["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        text = message.get("content") or ""
        length = answer["usage"]["completion_tokens"]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TransientError(f"model server {url} sent an answer without message, finish_reason or usage") from None
    if reason == "content_filter":
        _logger.warning("model server %s: a filter ended a response; it counts as it is", url)
        reason = "stop"
    if reason == "abort":
        raise TransientError(f"model server {url} broke a response off")
    if reason not in ("stop", "length"):
        raise EngineError(f"model server {url} ended a response for {str(reason)[:40]!r}, neither `stop` nor `length`")
    if not isinstance(text, str) or not isinstance(thought, str) or not isinstance(length, int):
        raise TransientError(f"model server {url} sent a message that is no text, or tokens that are no number")
    if thought:
        closing = "</think>" if text or reason == "stop" else ""  # cut in the middle of the thought
        text = f"<think>{thought}{closing}{text}"
    return as_unicode(text), length, FinishReason(reason), not thought

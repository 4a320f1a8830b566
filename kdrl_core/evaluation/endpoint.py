"""A model behind an OpenAI-compatible API (`/v1/chat/completions`), with any server and any chat template.

kdrl sees no token ids, weights or chat template here. It sends the question as a user's message, judges the text that
comes back and takes its length from the server's count. So the figures describe the endpoint as a whole.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from kdrl_core.config import ServersConfig
from kdrl_core.data.text import as_unicode
from kdrl_core.engines.server import Server
from kdrl_core.engines.server_client import TransientError, served_model
from kdrl_core.engines.server_pool import WHOLE_DISTRIBUTION, ServerPool
from kdrl_core.errors import EngineError
from kdrl_core.sampling.responses import OnResponses, Response
from kdrl_core.types import FinishReason, RolloutRequest

_MAX_SEED = 2**63
_CUT_SHARE = 0.9
"""A response cut for its length below this share of its token limit was cut by another limit."""
_logger = logging.getLogger("kdrl")


class ChatEndpoint:
    """Client of an endpoint for chat completions; it tries again after faults that may pass.

    Args:
        config: how to reach the endpoint.
        temperature: of sampling.
        max_context_tokens: of prompt and response; compared with the server's context if the server reports it.
        chat_template_kwargs: variables of the server's chat template; sent if there are any (vLLM takes them).

    Raises:
        EngineError: the endpoint cannot be reached, serves another model, or has too short a context.
        SecretError: no key where the configuration says.
    """

    def __init__(
        self,
        config: ServersConfig,
        *,
        temperature: float,
        max_context_tokens: int,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._temperature = temperature
        self._variables = {"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {}
        self._limit_field = "max_tokens"
        self._pool = ServerPool(
            served_model(config),
            role="model",
            field="MODEL",
            max_tokens=max_context_tokens,
            options={
                "model": "--served-as",
                "api_key": "--api-key",
                "retry_for_s": "--retry-for",
                "remedy": "Once it answers, give the same command: responses that came are kept",
            },
        )

    @property
    def model(self) -> str:
        """Name under which the model is served."""
        return self._pool.model

    def respond(
        self,
        requests: Sequence[RolloutRequest],
        on_finished: OnResponses,
        *,
        messages: Mapping[str, str],
        max_response_tokens: int,
    ) -> list[Response]:
        """One response per request, in order (see `Source`); `on_finished` gets one response at a time.

        Args:
            requests: their prompt_token_ids are not used.
            messages: what the user says, by `prompt_id`.
            max_response_tokens: longer ones are cut.

        Raises:
            EngineError: a request is given up, or its response is cut well before its token limit.
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
            # Other servers may not know vLLM's fields: except for top-p, their model's own sampling defaults apply.
            **self._variables,
            **(WHOLE_DISTRIBUTION if self._pool.are_vllm else {"top_p": 1.0}),
        }
        try:
            return self._pool.answer(server, "POST", "/chat/completions", body)
        except EngineError as error:
            if field == "max_tokens" and "max_completion_tokens" in str(error):  # OpenAI's newer models want it
                self._limit_field = "max_completion_tokens"
                return self._chat(server, request, message, max_response_tokens)
            raise

    def close(self) -> None:
        """Let go of the connections."""
        self._pool.close()


def with_thought_tags(text: str, *, think_opened: bool) -> str:
    """Prepend the `<think>` that the chat template put into the prompt; a lone `</think>` shows that it did."""
    if "<think>" in text or not (think_opened or "</think>" in text):
        return text
    return f"<think>{text}"


def _chat_of(answer: Any, url: str) -> tuple[str, int, FinishReason, bool]:
    """Text, tokens and finish reason of the only choice, and whether the tokens surely cover the whole text. A thought
    that the server has split off is put back into the text; some servers leave it out of their count."""
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

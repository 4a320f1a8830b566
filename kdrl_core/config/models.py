"""Where models come from, and the servers that can share their work."""

import re
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from kdrl_core.config.section import LocalEngine, Positive, Section

ALL_LINEAR = "all-linear"
"""The target of an adapter that stands for every linear layer but the output layer."""


class ModelConfig(Section):
    """Where a model comes from."""

    path: str = Field(
        min_length=1, description="Hugging Face model directory, `builtin:…`, `package:…` or `run:NAME` (see docs)"
    )
    gguf_file: str | None = Field(None, description="GGUF file inside `path`; converted once to a plain model")
    chat_template: str | None = Field(None, description="Jinja template used in place of the tokenizer's own")
    trust_remote_code: bool = Field(False, description="run code shipped with the model; off unless you trust it")


class LoraConfig(Section):
    """LoRA: the layers of `targets` compute W x + (alpha / rank) · B A x, and only A and B are trained."""

    rank: Positive = Field(16, description="rows of A and columns of B; kdrl's choice")
    alpha: float = Field(32.0, gt=0.0, description="B A is multiplied by alpha / rank; kdrl's choice")
    targets: list[str] = Field(
        [ALL_LINEAR],
        min_length=1,
        description="names of linear layers, [q_proj, v_proj]; [all-linear]: all except the output layer",
    )
    dropout: float = Field(0.0, description="0, since the policy that is trained must be the one that was sampled")

    @field_validator("targets")
    @classmethod
    def _names(cls, targets: list[str]) -> list[str]:
        if len(set(targets)) < len(targets) or not all(targets):
            raise ValueError("a name is empty or stands twice; name each layer once")
        if ALL_LINEAR in targets and len(targets) > 1:
            raise ValueError(f"{ALL_LINEAR} stands beside other names; give it alone, or leave it out")
        return targets

    @field_validator("dropout")
    @classmethod
    def _without_dropout(cls, dropout: float) -> float:
        if dropout != 0.0:
            raise ValueError(
                "dropout makes the policy that is trained another one than the policy that was sampled, so updates "
                "would not be on-policy; set dropout=0, and weight_decay of the stage to hold the adapter back"
            )
        return dropout


class StudentConfig(ModelConfig):
    """The student: a model directory, all of whose weights are trained, or an adapter to it."""

    lora: LoraConfig | None = Field(None, description="train an adapter in place of all weights; null: train these")


class ServersConfig(Section):
    """Servers of one model that share its work: `kdrl serve`, or any server with vLLM's API."""

    urls: list[str] = Field(min_length=1, description="of each server, up to and with /v1: http://127.0.0.1:8000/v1")
    model: str | None = Field(None, description="name under which they serve it; null: the only one that they serve")
    api_key: str | None = Field(None, description="where the key is, env:NAME or block:NAME (Prefect); never the key")
    timeout_s: float = Field(600.0, gt=0.0, description="of one request")
    retry_for_s: float = Field(
        600.0, ge=0.0, description="how long a request is retried after its first fault, if the fault may pass"
    )
    first_pause_s: float = Field(1.0, gt=0.0, description="before the second try; doubled with each, up to 30 s")
    concurrency: Positive | None = Field(None, description="requests in flight, over all servers; null: 32 for each")
    sleep: bool = Field(False, description="they share GPUs with other phases and sleep during those (kdrl serve)")

    @field_validator("urls")
    @classmethod
    def _plain_urls(cls, urls: list[str]) -> list[str]:
        for number, url in enumerate(urls, start=1):
            try:
                parts = urlsplit(url)
                is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # its message shows what may be a key
                raise ValueError(f"URL {number} is not an http(s) URL; give http://HOST:PORT/v1") from None
            if parts.username or parts.password or parts.query or parts.fragment:
                raise ValueError(
                    f"URL {number} carries a user, a password, a query or a fragment; a key does not belong in a "
                    "recipe: set api_key=env:NAME and export NAME"
                )
            if not is_url:
                raise ValueError(f"URL {number} is not an http(s) URL; give http://HOST:PORT/v1")
        return urls

    @field_validator("api_key")
    @classmethod
    def _a_reference(cls, reference: str | None) -> str | None:
        if reference is not None and not re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*|block:[A-Za-z0-9_-]+", reference):
            raise ValueError(
                "a key does not belong in a recipe; say where it is, env:NAME (an environment variable) or "
                "block:NAME (a Prefect Secret block)"
            )
        return reference


class ReplicasConfig(ServersConfig):
    """Replicas of the student, which sample (kdrl serve)."""

    timeout_s: float = Field(7_200.0, gt=0.0, description="of one response, to its last token")
    concurrency: Positive | None = Field(1_024, description="responses in flight, over all replicas")


class ServerConfig(ServersConfig):
    """Servers that score with the teacher's weights in place of this process."""

    temperature: float = Field(
        1.0, gt=0.0, le=10.0, description="baked into the served weights (kdrl bake-teacher); must equal the stage's"
    )


class TeacherConfig(ModelConfig):
    """The teacher: a model directory, which is loaded here unless servers score in its place."""

    engine: LocalEngine = Field("transformers", description="what scores if the model is loaded here")
    server: ServerConfig | None = Field(None, description="servers of its weights; path then gives its tokenizer")

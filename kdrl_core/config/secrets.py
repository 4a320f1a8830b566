"""API keys: a recipe names the place of a key and never holds the key itself.

`env:NAME` is an environment variable. Outer rings add schemes of their own (`block:NAME`, a Prefect Secret block).
"""

import os
from collections.abc import Callable

from kdrl_core.errors import SecretError

_MAY_HOLD_KEY = ("server", "api_key", "mlflow_uri")
"""Fields in which somebody may write a key by mistake. Their values are never shown."""
_MAX_SHOWN_CHARS = 200

resolved: set[str] = set()
"""The keys that this process has looked up."""

SecretSource = Callable[[str], str]
"""Name → secret. Raises SecretError if there is none."""


def resolve_secret(reference: str) -> str:
    """The secret at `reference` (scheme:NAME).

    Raises:
        SecretError: the scheme is unknown, or there is no secret. The message never holds a secret.
    """
    scheme, _, name = reference.partition(":")
    source = _sources.get(scheme)
    if source is None:
        raise SecretError(
            f"a secret is named by {' or '.join(f'{known}:NAME' for known in sorted(_sources))}, not by {scheme}:…"
        )
    secret = source(name).strip()
    if not secret:
        raise SecretError(f"{reference} is empty; set it to the key")
    if not (secret.isascii() and secret.isprintable()):
        raise SecretError(
            f"{reference} holds a line break or another character that no key has; set it to the key alone"
        )
    resolved.add(secret)
    return secret


def register_secret_source(scheme: str, source: SecretSource) -> None:
    """From now on `scheme:NAME` is looked up in `source`."""
    _sources[scheme] = source


def is_known(reference: str) -> bool:
    """Whether this process can look up references of this scheme."""
    return reference.partition(":")[0] in _sources


def may_hold_key(text: str) -> bool:
    """Whether a text names a field in which somebody may have written a key."""
    return any(name in text for name in _MAY_HOLD_KEY)


def shown(text: str) -> str:
    """A user's text as messages show it: cut if long, and only the field of a `FIELD=VALUE` that may hold a key."""
    if may_hold_key(text):
        name, equals, _ = text.partition("=")
        return name if equals else "(not shown, as it may hold a key)"
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"


def _from_environment(name: str) -> str:
    if name not in os.environ:
        raise SecretError(f"env:{name}: there is no environment variable {name}; export it where the run is started")
    return os.environ[name]


_sources: dict[str, SecretSource] = {"env": _from_environment}

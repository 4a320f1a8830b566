"""`block:NAME` in a recipe: a key that is kept in a Prefect Secret block."""

from httpx import HTTPError
from prefect.blocks.system import Secret
from prefect.exceptions import PrefectException

from kdrl_core.config.secrets import register_secret_source
from kdrl_core.errors import SecretError


def load_block(name: str) -> str:
    """The secret in a Prefect Secret block. Raises SecretError if the server has no block of that name."""
    try:
        return str(Secret.load(name).get())  # type: ignore[union-attr]
    except ValueError:
        raise SecretError(
            f"block:{name}: the Prefect server has no Secret block of that name; make one in its UI (Blocks, Secret), "
            "or name an environment variable, env:NAME"
        ) from None
    except (HTTPError, PrefectException) as error:
        raise SecretError(
            f"block:{name}: the Prefect server cannot be asked ({type(error).__name__}); start it, "
            "or name an environment variable, env:NAME"
        ) from error


def register_blocks() -> None:
    """Let recipes name Prefect's Secret blocks."""
    register_secret_source("block", load_block)

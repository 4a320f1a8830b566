"""The work of kdrl: objectives, data, verification, engines, training, ledger. Never imports Prefect.

From Python, `import kdrl_core as kdrl` gives `kdrl.run`, `kdrl.open_run` and `kdrl.runs` (docs/python.md). Each is
imported when it is first used, so the import itself takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdrl_core.look.python.program import run as run
    from kdrl_core.look.python.reader import RunReader as RunReader
    from kdrl_core.look.python.reader import open_run as open_run
    from kdrl_core.look.python.reader import runs as runs

__version__ = "0.1.0"
__all__ = ["RunReader", "open_run", "run", "runs"]

_MODULES = {"run": "program", "RunReader": "reader", "open_run": "reader", "runs": "reader"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.look.python.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

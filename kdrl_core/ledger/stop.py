"""A wish to stop, and the places where work may stop: between two publications, so that nothing in hand is lost.

Whoever gets the wish (a signal, a cancelled flow run) calls `request_stop`. Work asks between two pieces.
"""

from kdrl_core.errors import Stopped

_why: str | None = None


def request_stop(why: str) -> None:
    """Ask this process to stop at the next place where it may; the first reason counts."""
    global _why
    _why = _why or why


def stop_requested() -> str | None:
    """Why this process is to stop; None if it is not."""
    return _why


def forget_stop() -> None:
    """Take the wish back, before other work begins in this process."""
    global _why
    _why = None


def stop_if_requested() -> None:
    """Call where everything in hand is published. Raises Stopped if this process is to stop."""
    if _why is not None:
        raise Stopped(_why)

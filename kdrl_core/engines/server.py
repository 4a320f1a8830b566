"""One of the servers of a model, as its pool sees it: how busy it is, and whether others go first after a fault."""

import threading
import time
from dataclasses import dataclass, field

_MAX_OUT_S = 60.0
_MAX_DOUBLINGS = 16


@dataclass(slots=True, eq=False)
class Server:
    """One server and its state."""

    url: str
    """Up to and with `/v1`."""
    in_flight: int = 0
    asked: int = 0
    """Requests so far. Among equally busy servers the one with the fewest goes first, so that a probe reaches each."""
    faults: int = 0
    """Faults in a row. Faults of requests that were in flight together count once."""
    out_until: float = 0.0
    is_asleep: bool = False
    has_routes: bool | None = None
    """Whether it has the addresses of `server_routes`; None: not known yet."""
    wakes: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def is_out(self, now: float) -> bool:
        """Whether other servers go first: for a while after a fault, then while one request tests if it is back."""
        return self.out_until > now or (self.faults > 0 and self.in_flight > 0)

    def leave_out(self, first_pause_s: float) -> None:
        """Let others go first after a fault: twice `first_pause_s`, doubled with each fault in a row, up to 60 s."""
        now = time.monotonic()
        if now >= self.out_until:  # else another request in flight has left it out already
            self.faults += 1
            self.out_until = now + min(2.0 ** min(self.faults, _MAX_DOUBLINGS) * first_pause_s, _MAX_OUT_S)

    def take_back(self) -> None:
        """Forget its faults: it has answered, or was started again."""
        self.faults, self.out_until = 0, 0.0

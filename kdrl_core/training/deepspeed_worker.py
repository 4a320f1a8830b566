"""One rank of a `DeepSpeedTrainer`: started by DeepSpeed's launcher, waits for commands and carries them out.

Every rank gets the same commands in the same order. Between two of them it only waits, so a model is loaded once per
stage. A thread reads the socket: when it closes, or the launcher dies, the rank ends at once, even inside a collective
that would wait for ever.
"""

import ctypes
import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kdrl_core.training.messages import pack, unpack
from kdrl_core.training.rank_group import call_back

_PR_SET_PDEATHSIG = 1
_SHOW_AT = 0.9
"""Share of a time limit after which a rank prints what it is doing."""


def main() -> int:
    """Answer commands until the connection closes."""
    with suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program ends its ranks itself
    spec = json.loads(Path(sys.argv[1]).read_text())
    os.environ["DS_ACCELERATOR"] = spec["settings"]["device"]  # launchers do not pass it on to other hosts
    if spec["settings"]["device"] == "cuda":
        let_segments_grow(os.environ)
    connection = call_back(spec)
    commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, commands), daemon=True).start()
    rank: Any = None
    message = b""
    limit_s = spec["settings"]["start_timeout_s"]
    while True:
        faulthandler.dump_traceback_later(_SHOW_AT * limit_s)  # to the group's log, which the time-out error quotes
        try:
            if rank is None:
                from kdrl_core.training.deepspeed_rank import Rank  # takes seconds: after the call back

                rank = Rank(spec["settings"])
                header, arrays = rank.state()
            else:
                header, arrays = rank.answer(*unpack(message))
            connection.send_bytes(pack(header, arrays))
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            connection.send_bytes(pack(told))
        faulthandler.cancel_dump_traceback_later()
        message = commands.get()
        limit_s = spec["settings"]["step_timeout_s"]


def let_segments_grow(environment: MutableMapping[str, str]) -> None:
    """Have torch, which is not imported yet, take a GPU's memory in segments that can grow. Micro-batches have many
    sizes, and fixed segments leave gaps between them. A setting of the user's stays. For ranks alone: vLLM's sleep mode
    cannot live with it."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _read(connection: Connection, commands: "queue.SimpleQueue[bytes]") -> None:
    """Pass commands on; end the process when there can be no more."""
    try:
        while True:
            commands.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())

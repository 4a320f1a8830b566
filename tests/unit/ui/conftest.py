"""Two real runs, hand-made ones, the app served on loopback, and pages of it in Chromium."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from crash.tiny_run import open_tiny, train
from fastapi import FastAPI
from support import KeptVerifier
from unit.ui import handmade

from kdrl_core.look.rollouts.query import RolloutStore
from kdrl_core.look.ui.app import create_app, server_of, url_of

GROUP_SIZE = 16
_FIELDS = (f"group_size={GROUP_SIZE}", "max_response_tokens=40")
SETTINGS = [f"{stage}.{field}" for stage in ("stage1", "stage2") for field in _FIELDS]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, kept_verifier: KeptVerifier) -> tuple[Path, Path]:
    """Folders of a trained KDRL run and a GRPO run over the same prompts. Not to be changed."""
    folder = tmp_path_factory.mktemp("ui")
    with pytest.MonkeyPatch.context() as patch:
        kept_verifier.share(patch)
        opened = open_tiny(folder, "kdrl", SETTINGS), open_tiny(folder, "grpo", [*SETTINGS, "stage2.objective=grpo"])
        for run in opened:
            train(run)
    return opened[0].paths.root, opened[1].paths.root


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of hostile texts."""
    root = tmp_path_factory.mktemp("hostile") / "hostile"
    handmade.write_hostile(root)
    return root


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app on a free port of loopback; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = server_of(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield url_of(listening)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def app_of() -> Iterator[Callable[..., str]]:
    """`app_of(*run folders)`: the address of the app over them, which serves until the file's tests are done."""
    with ExitStack() as stack:

        @cache
        def address(*roots: Path) -> str:
            store = stack.enter_context(RolloutStore.open(list(roots)))
            return stack.enter_context(served(create_app(store, look_every_s=0.0)))

        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium. Closed after each file: while it is open, nothing in this process can start an event loop."""
    with chromium() as opened:
        yield opened


Visit = Any


@pytest.fixture
def visit(browser: Any, app_of: Callable[..., str]) -> Iterator[Visit]:
    """`visit(*run folders, at="#/trends", width=1280)`: a page of the app over those runs, once its view is drawn.

    After the test the console has to be empty, but for lines that hold a text of `visit.excused`."""
    said: list[str] = []
    excused: list[str] = []
    with ExitStack() as stack:

        def open_page(
            *roots: Path, at: str = "", width: int = 1280, height: int = 900, clock: bool = False, **options: Any
        ) -> Any:
            context = browser.new_context(viewport={"width": width, "height": height}, **options)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(10_000)
            if clock:
                page.clock.install()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("dialog", lambda dialog: (said.append(f"dialog {dialog.message}"), dialog.dismiss()))
            page.goto(f"{app_of(*roots)}{at}")
            page.wait_for_selector("main > .view")
            return page

        open_page.excused = excused  # type: ignore[attr-defined]
        yield open_page
    assert [line for line in said if not any(part in line for part in excused)] == []

"""Repositories of a Hugging Face hub: `hf://owner/name@revision` for models, `hf://datasets/owner/name@revision/path`.

`huggingface_hub` downloads into its own cache (HF_HOME), from the hub of HF_ENDPOINT; HF_HUB_OFFLINE=1 keeps it from
the network. `download` alone may use the network. Everything else looks into the cache.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdrl_core.errors import DataError, KdrlError, ModelError, RecipeError

HUB = "hf"
"""The scheme of paths to repositories."""

_PATH = re.compile(r"hf://(?P<kind>datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<inner>.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 10.0
_logger = logging.getLogger("kdrl")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPath:
    """A repository at a revision, or files in it."""

    name: str
    """`owner/name`."""
    is_data: bool
    revision: str
    """Branch, tag or commit."""
    inner: str
    """A path or glob in the repository; empty: all of it."""

    @classmethod
    def of(cls, text: str) -> "HubPath":
        """The path that a text means. Raises RecipeError if it is none."""
        found = _PATH.fullmatch(text)
        inner = "" if found is None else found["inner"] or ""
        if found is None or (inner and not found["kind"]) or ".." in inner.split("/"):
            raise RecipeError(
                f"path '{text}': give hf://OWNER/NAME@REVISION for a model, "
                "or hf://datasets/OWNER/NAME@REVISION/PATH for data"
            )
        return cls(
            name=found["name"],
            is_data=found["kind"] is not None,
            revision=found["revision"] or "main",
            inner=inner,
        )

    def __str__(self) -> str:
        kind = "datasets/" if self.is_data else ""
        inner = f"/{self.inner}" if self.inner else ""
        return f"{HUB}://{kind}{self.name}@{self.revision}{inner}"

    @property
    def repo_type(self) -> str:
        """What the hub calls the kind of repository."""
        return "dataset" if self.is_data else "model"

    def pinned(self) -> "HubPath":
        """The same at the commit that its revision had when it was last downloaded. Raises as `local`."""
        if _COMMIT.fullmatch(self.revision):
            return self
        try:
            commit = (_cache(self) / "refs" / self.revision).read_text(encoding="utf-8").strip()
        except OSError:
            raise self._error("is not on this machine", _how_to_get(self)) from None
        return replace(self, revision=commit)

    def local(self) -> Path:
        """Where it is in the cache, whether or not it has been downloaded.

        Raises:
            DataError, ModelError: its revision is no commit, and was never downloaded.
        """
        return _cache(self) / "snapshots" / self.pinned().revision / self.inner

    def _error(self, problem: str, remedy: str) -> KdrlError:
        return (DataError if self.is_data else ModelError)(f"{self}: {problem}; {remedy}")

    def download(self, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> "HubPath":
        """Bring the files that match `wanted` into the cache, unless they are there. Returns the path at its commit.

        A commit whose files are all there needs no network: huggingface_hub keeps the list of its files. For a branch
        or tag the hub is asked what it is now.

        Raises:
            DataError, ModelError: no such repository or revision, no access, or neither network nor files in the cache.
        """
        from huggingface_hub import errors, snapshot_download

        login = "log in: hf auth login"
        told = (
            (errors.GatedRepoError, "you have no access to it", f"ask for it on its page, then {login}"),
            (
                errors.RepositoryNotFoundError,
                "the hub has no such repository, or it is not open to you",
                f"check the name, or {login}",
            ),
            (errors.RevisionNotFoundError, "the repository has no such revision", "give a branch, tag or commit of it"),
            (
                errors.LocalEntryNotFoundError,
                "the hub cannot be reached, and not all of it is on this machine",
                _how_to_get(self),
            ),
        )
        network_error: type[BaseException] = errors.HfHubHTTPError.__bases__[0]  # of the httpx that it uses
        try:
            folder = snapshot_download(
                self.name,
                repo_type=self.repo_type,
                revision=self.revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(unwanted),
                etag_timeout=_TIMEOUT_S,
            )
        except (OSError, network_error, ValueError, RuntimeError) as error:
            for kind, problem, remedy in told:
                if isinstance(error, kind):
                    raise self._error(problem, remedy) from None
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self._error(f"cannot be downloaded ({reason})", _how_to_get(self)) from error
        found = replace(self, revision=Path(folder).name)
        if not (_cache(found) / "trees" / f"{found.revision}.json").is_file():
            _logger.warning("%s: taken as it is in the cache; without a network, missing files go unnoticed", found)
        return found


def is_remote(text: str) -> bool:
    """Whether a path means a repository of a hub."""
    return text.startswith(f"{HUB}:")


def as_data(entry: str) -> str:
    """An entry of data files; of `hf://owner/name` it is the repository of data."""
    if not is_remote(entry):
        return entry
    return str(HubPath.of(f"{HUB}://datasets/{entry.removeprefix(f'{HUB}://').removeprefix('datasets/')}"))


def _cache(path: HubPath) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{path.repo_type}s--{path.name.replace('/', '--')}"


def _how_to_get(path: HubPath) -> str:
    kind = " --repo-type dataset" if path.is_data else ""
    return (
        f"download it where there is a network, hf download {path.name}{kind} --revision {path.revision}, "
        "and copy its folder in HF_HOME/hub here"
    )

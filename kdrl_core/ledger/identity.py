"""Which model a directory holds, wherever it lies."""

import hashlib
from pathlib import Path

from kdrl_core.ledger.manifest import is_published, manifest_of


def model_identity(path: Path) -> str:
    """Name and sha256 of a model directory: two models of one name are told apart, a moved one is the same."""
    if is_published(path):
        return f"{path.name} sha256 {manifest_of(path).sha256[:16]}"
    listing = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")):
        with file.open("rb") as stream:
            listing.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return f"{path.name} sha256 {listing.hexdigest()[:16]}"

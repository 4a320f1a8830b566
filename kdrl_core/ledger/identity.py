"""Which model a directory holds, wherever it lies."""

import hashlib
from pathlib import Path

from kdrl_core.ledger.manifest import DIRECTORY_MANIFEST, digest


def model_identity(path: Path) -> str:
    """Name and sha256 of the files of a model directory as they are: two models of one name are told apart, a moved or
    copied one is the same, one with another tokenizer or chat template is another."""
    listing = hashlib.sha256()
    files = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    for file in sorted(file for file in files if file.name != DIRECTORY_MANIFEST):
        listing.update(f"{file.name} {digest(file)[1]}\n".encode())
    return f"{path.name} sha256 {listing.hexdigest()[:16]}"

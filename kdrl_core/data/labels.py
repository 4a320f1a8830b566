"""Columns of a table as numbers: difficulty labels, and codes of texts."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

MISSING_LABEL = -1

Rows = npt.NDArray[np.int64]
"""Positions in the table."""

Labels = npt.NDArray[np.int32]
"""Failures by row; −1 where the label is missing."""


def text_codes(texts: pa.ChunkedArray) -> Rows:
    """One number per distinct text."""
    if not len(texts):
        return np.zeros(0, dtype=np.int64)
    encoded = texts.dictionary_encode()  # one dictionary for all chunks; unify_dictionaries would only copy it
    assert len({len(chunk.dictionary) for chunk in encoded.chunks}) == 1
    codes: Rows = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks]).astype(np.int64)
    return codes


def label_column(problems: pa.Table, name: str) -> Labels:
    """One label as numbers; −1 where it is missing."""
    values = np.full(problems.num_rows, MISSING_LABEL, dtype=np.int32)  # `map_lookup` has a third of the speed
    first = 0
    for chunk in problems["failures"].chunks:
        offsets = chunk.offsets.to_numpy()  # into `keys` and `items`, which are not sliced
        within = slice(offsets[0], offsets[-1])
        is_named = pc.equal(chunk.keys, name).to_numpy(zero_copy_only=False)[within]
        rows = np.repeat(np.arange(first, first + len(chunk)), np.diff(offsets))
        values[rows[is_named]] = pc.fill_null(chunk.items, MISSING_LABEL).to_numpy()[within][is_named]
        first += len(chunk)
    return values


def label_names(problems: pa.Table) -> set[str]:
    """The names of all labels in the table."""
    return {name for chunk in problems["failures"].chunks for name in pc.unique(chunk.keys).to_pylist()}

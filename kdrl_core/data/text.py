"""Normal form of a question, for ids and duplicates: NFC, runs of white space as one blank, ends trimmed.

Letter case, LaTeX spelling and punctuation are kept, so two rows are duplicates only if a reader sees the same text.
Decontamination matches more loosely.

JSON can hold halves of surrogate pairs. UTF-8 cannot, so such texts fit neither into files nor into requests.
"""

import hashlib
import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_BLANKS = (
    r"[\s\p{Z}\x{85}]{2,}|[\t\n\v\f\r\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
)
"""Runs of blanks, and single blanks other than the plain one, which needs no replacement."""


def normalize_questions(questions: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The normal form of each question, in the input's shape; null stays null."""
    if isinstance(questions, pa.ChunkedArray):
        return pa.chunked_array([normalize_questions(chunk) for chunk in questions.chunks], questions.type)
    # Each step is slow, and few rows need it.
    composed = _where(pc.invert(pc.string_is_ascii(questions)), partial(pc.utf8_normalize, form="NFC"), questions)
    join_blanks = partial(pc.replace_substring_regex, pattern=_BLANKS, replacement=" ")
    joined = _where(pc.match_substring_regex(composed, _BLANKS), join_blanks, composed)
    has_blank_end = pc.or_(pc.starts_with(joined, " "), pc.ends_with(joined, " "))
    return _where(has_blank_end, pc.utf8_trim_whitespace, joined)


def _where(mask: pa.Array, change: Callable[[pa.Array], pa.Array], texts: pa.Array) -> pa.Array:
    mask = pc.fill_null(mask, False)
    return pc.replace_with_mask(texts, mask, change(texts.filter(mask))) if pc.any(mask).as_py() else texts


def question_hashes(normal: pa.Array) -> npt.NDArray[np.uint64]:
    """[questions] the first 8 bytes of the sha256 of each question, which is in normal form and not null.

    Among 10 million different questions, two have the same hash with probability 3e-6.
    """
    _, offsets, content = normal.buffers()
    ends = np.frombuffer(offsets, np.int32, len(normal) + 1, 4 * normal.offset).tolist()
    data = memoryview(content or b"")
    sha256 = hashlib.sha256
    digests = b"".join([sha256(data[start:end]).digest()[:8] for start, end in itertools.pairwise(ends)])
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def question_ids(hashes: npt.NDArray[np.uint64]) -> pa.Array:
    """`q-` and the 16 hex digits of each hash: the same question gets the same id everywhere."""
    return pa.array([f"q-{number:016x}" for number in hashes.tolist()], pa.string())


def question_digests(questions: pa.ChunkedArray) -> pa.ChunkedArray:
    """16 bytes of the sha256 of each question, not normalised, in the input's chunks."""
    kind = pa.binary(16)
    chunks = [
        pa.array([hashlib.sha256(text.encode()).digest()[:16] for text in chunk.to_pylist()], kind)
        for chunk in questions.chunks
    ]
    return pa.chunked_array(chunks, kind)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_unicode(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()

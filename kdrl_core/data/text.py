"""Normal form of a question, for ids and duplicates: NFC, runs of white space as one blank, ends trimmed.

Letter case, LaTeX spelling and punctuation are kept: two rows are duplicates only when a reader would see the same
text. Looser matching is decontamination's work.
"""

import hashlib
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

_BLANKS = (
    r"[\s\p{Z}\x{85}]{2,}|[\t\n\v\f\r\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
)
"""Runs of blanks, and single ones that are not the plain blank (which needs no replacing)."""


def normalize_questions(questions: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The normal form of each question, in the input's shape; null stays null."""
    if isinstance(questions, pa.ChunkedArray):
        return pa.chunked_array([normalize_questions(chunk) for chunk in questions.chunks], questions.type)
    # Both steps are slow on every row and needed on few.
    composed = _where(pc.invert(pc.string_is_ascii(questions)), _compose, questions)
    return pc.utf8_trim_whitespace(_where(pc.match_substring_regex(composed, _BLANKS), _join_blanks, composed))


def _compose(texts: pa.Array) -> pa.Array:
    return pc.utf8_normalize(texts, form="NFC")


def _join_blanks(texts: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(texts, pattern=_BLANKS, replacement=" ")


def _where(mask: pa.Array, change: Callable[[pa.Array], pa.Array], texts: pa.Array) -> pa.Array:
    mask = pc.fill_null(mask, False)
    return pc.replace_with_mask(texts, mask, change(texts.filter(mask))) if pc.any(mask).as_py() else texts


def question_ids(questions: pa.Array) -> pa.Array:
    """`q-` and 16 hex digits of the sha256 of each question's normal form: the same wherever the question stands."""
    keys = normalize_questions(questions).to_pylist()
    ids = [None if key is None else f"q-{hashlib.sha256(key.encode()).hexdigest()[:16]}" for key in keys]
    return pa.array(ids, pa.string())


def question_digests(questions: pa.ChunkedArray) -> pa.ChunkedArray:
    """16 bytes of the sha256 of each question as it stands, in the input's chunks."""
    kind = pa.binary(16)
    chunks = [
        pa.array([hashlib.sha256(text.encode()).digest()[:16] for text in chunk.to_pylist()], kind)
        for chunk in questions.chunks
    ]
    return pa.chunked_array(chunks, kind)

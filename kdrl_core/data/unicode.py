"""Texts that UTF-8 can hold. JSON can hold others: halves of surrogate pairs, which no file or request takes."""


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_unicode(text: str) -> str:
    """With a question mark for each half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode()

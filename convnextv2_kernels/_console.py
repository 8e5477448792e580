"""Text from outside, fit for a terminal."""


def visible(text: str) -> str:
    r"""Return ``text`` with its control characters written as escapes (``\x1b``): a file name must not steer a
    terminal. Newlines count among them, bytes that are no UTF-8 (surrogates) too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

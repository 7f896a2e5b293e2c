"""Text from data made fit to be shown: cut to a readable length, and without characters that move the cursor."""

import re
import unicodedata

_SHOWN = 60
_LONGEST_LINE = 1000
_MOST_LINES = 40
# terminal controls, halves of characters, line separators, and what turns the direction of the text after it; joiners
# stay, because emoji and several scripts are written with them
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: it is empty, or white space and signs of no width alone."""
    return all(sign.isspace() or unicodedata.category(sign) in ("Cf", "Cc") for sign in text)


def printable(text: str) -> str:
    """Write terminal controls and direction marks as escapes: a name may be right-to-left, its surroundings not."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(value: object) -> str:
    """Return the beginning of a value's repr, for a message about it."""
    try:
        return f"{value!r:.{_SHOWN}}"
    except (ValueError, RecursionError):  # integers of thousands of digits, lists in lists without end
        return f"{type(value).__name__} too large to be shown"


def message(text: str) -> str:
    """Return an error's text as the command line prints it: bounded, whatever a file put into it."""
    lines = [_cut(line) for line in printable(text).split("\n")]
    more = len(lines) - _MOST_LINES
    return "\n".join([*lines[:_MOST_LINES], *([f"... and {more} more lines"] if more > 0 else [])])


def _cut(line: str) -> str:
    half = _LONGEST_LINE // 2
    return line if len(line) <= _LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"

"""The one place that prints: whatever comes from outside is text on the terminal, never markup or an escape sequence.

Names of data sources and folders, messages of exceptions and what a model wrote can hold anything.
"""

import sys
import unicodedata
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_KEPT = "\n\t"


def plain(text: str) -> str:
    """The text with control and format characters, bidi overrides and lone surrogates as Python writes them."""
    return text if text.isprintable() else "".join(map(_visible, text))


def one_line(text: str) -> str:
    """The same, line breaks too."""
    return plain(text).replace("\n", "\\n")


def _visible(character: str) -> str:
    if character.isprintable() or character in _KEPT or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


def say(text: object, to: TextIO | None = None) -> None:
    """Print a line, at once; ``to``: standard output where it is not given."""
    print(plain(str(text)), file=to or sys.stdout, flush=True)


def warn(text: object) -> None:
    """The same to standard error."""
    say(text, sys.stderr)


def console(**settings: Any) -> "Console":
    """rich's console without markup, emoji codes and highlighting, whose every text is :func:`plain`."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(plain(text), **options)

    return PlainConsole(highlight=False, markup=False, emoji=False, **settings)

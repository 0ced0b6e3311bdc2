"""Fonts for names in any script.

Pillow's own font knows ASCII and little more. What it lacks is written in an installed font, which matplotlib finds.
What no font has becomes a question mark.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

NO_CHARACTER = "\uffff"
"""What no font has, and so is drawn as all that a font lacks."""

_PLAIN = frozenset("Aa0.")  # stands beside every name
_SIZE = 20.0
_USUAL = ("400", "normal", "regular")  # weights


class _Face(NamedTuple):
    """A font's file and family, both empty for Pillow's own, and which of the characters in question it lacks."""

    path: str
    family: str
    lacking: frozenset[str]


def font_of(size: float, text: str = "") -> Font:
    """The font for a text: Pillow's own, or an installed one that has more of its characters.

    Args:
        size: in pixels.
        text: what is to be written.
    """
    return _opened(_face(_characters(text)).path, size)


def family_of(text: str) -> str:
    """The family of that font, as matplotlib knows it; empty for Pillow's own."""
    return _face(_characters(text)).family


def written(text: str) -> str:
    """A text in one line, with question marks for the characters that no single font has."""
    lacking = _face(_characters(text)).lacking
    return "".join("?" if one in lacking else one for one in " ".join(text.split()))


def unwritable(names: Sequence[str]) -> list[str]:
    """What to say of names that pictures and plots cannot show: one sentence, or none."""
    lost = [name for name in names if _face(_characters(name)).lacking]
    if not lost:
        return []
    listed = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
    remedy = "Install one, such as Noto Sans" + ("" if _installed() else ", and the extra 'plot', which finds it")
    return [
        f"Pictures and plots show question marks in names, since no font here has their characters: {listed}. {remedy}."
    ]


def _characters(text: str) -> frozenset[str]:
    """What a font has to have for a text; nothing that Pillow's own lacks, if all of it is ASCII."""
    if text.isascii():
        return frozenset()
    return _PLAIN.union(one for one in text if not one.isascii())


@functools.lru_cache(4096)
def _face(characters: frozenset[str]) -> _Face:
    """The first face that has all of the characters, else the one that lacks fewest."""
    best = _Face("", "", _lacking("", characters))
    for path, family in _installed() if best.lacking else ():
        lacking = _lacking(path, characters)
        if len(lacking) < len(best.lacking):
            best = _Face(path, family, lacking)
        if not best.lacking:
            break
    return best


def _lacking(path: str, characters: frozenset[str]) -> frozenset[str]:
    return frozenset(one for one in characters if not _has(path, one))


@functools.lru_cache(1 << 17)
def _has(path: str, character: str) -> bool:
    try:
        return bytes(_probe(path)[0].getmask(character)) != _probe(path)[1]
    except OSError:  # a damaged file, or pictures of one size only
        return False


@functools.lru_cache(256)
def _probe(path: str) -> tuple[Font, bytes]:
    """A font of some size, and what it draws for what it lacks."""
    font = _opened(path, _SIZE)
    return font, bytes(font.getmask(NO_CHARACTER))


def _opened(path: str, size: float) -> Font:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size=size)


@functools.cache
def _installed() -> tuple[tuple[str, str], ...]:
    """File and family of the installed fonts, the plainest first; none without matplotlib, which brings some itself."""
    try:
        from matplotlib.font_manager import fontManager
    except ImportError:
        return ()
    faces = [one for one in fontManager.ttflist if "lastresort" not in one.name.replace(" ", "").lower()]
    faces.sort(
        key=lambda one: (one.name != "DejaVu Sans", one.style != "normal", str(one.weight) not in _USUAL, one.fname)
    )
    return tuple((one.fname, one.name) for one in faces)

"""Reads the large lists of a JSON object piece by piece, so that a file of half a gigabyte needs a few megabytes.

The standard parser builds the whole tree: 4 GB for COCO's training annotations, nearly all of it polygon corners that
a detector never looks at. Here a window slides over the file; items are decoded one by one by the same parser, and
lists that nobody asked for are cut out of the text before they become objects. Where it is known which members of the
items are wanted, and the extra `fast` is installed, `msgspec` makes these alone and steps over all else; what it does
not take (NaN, half a surrogate) goes the other way.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypedDict

from detrkit.documents import opened
from detrkit.errors import DataError

CHUNK_BYTES = 1 << 20

# Polygons (a list of flat lists) and run lengths (a flat list). No quote can stand inside either, so the cut can never
# begin or end within a string; possessive quantifiers keep the search linear in whatever a broken file holds.
_POLYGONS = re.compile(r'"segmentation"\s*+:\s*+\[\s*+(?:\[[^]["]*+\]\s*+,?+\s*+)*+\]')
_RUN_LENGTHS = re.compile(r'"counts"\s*+:\s*+\[[^]\["]*+\]')
_SEPARATOR = re.compile(r"[ \t\r\n]*([,\]])[ \t\r\n]*")
_SPACE = re.compile(r"[ \t\r\n]*")
_BOUNDARY = re.compile(r"\},[ \t\r\n]*\{")
_BOUNDARIES_TRIED = 8
_LONGEST_LITERAL = 16

_Decode = Callable[[str], list[dict[str, Any]] | None]


class _Window:
    """The part of the text that is in memory, and how far it has been read."""

    def __init__(self, file: IO[bytes], whole: bool = False, decode: _Decode | None = None):
        self.file = file
        self.whole = whole
        self.decode = decode
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
        self.parser = json.JSONDecoder()
        self.text = ""
        self.position = 0
        self.ended = False
        self.chunk = CHUNK_BYTES

    def grow(self) -> bool:
        """Forget what was read and append the next piece of the file; False at the end of the file."""
        if self.ended:
            return False
        # A value longer than the window would be scanned again for each piece; doubling keeps that linear.
        self.chunk = CHUNK_BYTES if self.position else self.chunk * 2
        piece = self.file.read(self.chunk)
        self.ended = not piece
        text = self.text[self.position :] + self.decoder.decode(piece, self.ended)
        self.text, self.position = text if self.whole or self.decode else _shortened(text), 0
        return True

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""

    def expect(self, characters: str) -> str:
        """The next character, which must be one of `characters`, and a step past it."""
        found = self.peek()
        if not found or found not in characters:
            raise ValueError(
                f"{' or '.join(characters)} is missing" + (f" before {found!r}" if found else " at the end")
            )
        self.position += 1
        return found

    def value(self) -> Any:
        """Decode the next value, whole, however long it is."""
        while True:
            rest = self.text[self.position :]  # an error counts the lines of all that it is shown
            try:
                value, end = self.parser.raw_decode(rest)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos >= len(rest) - _LONGEST_LITERAL
                if not (cut_off and self.grow()):
                    raise
            else:
                # A number at the end of the window ("1", "1.", "1e+") may go on in the next piece.
                if end > len(rest) - _LONGEST_LITERAL and not self.ended:
                    self.grow()
                    continue
                self.position += end
                return value

    def items(self) -> Iterator[list[Any]]:
        """The items of the list that begins here, in batches of what one window holds."""
        self.expect("[")
        more = self.peek() != "]"
        if not more:
            self.position += 1
        while more:
            batch = self._together() or self._singly()
            more = self.expect(",]") == ","
            self.peek()
            yield batch

    def _together(self) -> list[Any] | None:
        """All items but the last of this window, decoded at once, which is twice as fast; None where that fails.

        What lies before a boundary is a number of whole items exactly if it is a list once it stands in brackets.
        """
        end = len(self.text)
        for _ in range(_BOUNDARIES_TRIED):
            end = self.text.rfind("},", self.position, end)
            if end < 0:
                return None
            if _BOUNDARY.match(self.text, end):
                break
        else:
            return None
        text = f"[{self.text[self.position : end + 1]}]"
        batch: list[Any] | None = self.decode(text) if self.decode else None
        if batch is None:
            try:
                batch = self.parser.decode(text)
            except ValueError:
                return None
            if self.decode:  # it is JSON that was not taken, and so may be the rest
                self.decode, self.text, end = None, _shortened(self.text[end + 1 :]), -1
        self.position = end + 1
        return batch

    def _singly(self) -> list[Any]:
        """The items to the end of this window; or the one that goes beyond it."""
        before = self.text
        batch = [self.value()]
        if self.text is not before:  # a new window, which may be decoded at once
            return batch
        match = _SEPARATOR.match(self.text, self.position)
        while match and match.group(1) == "," and match.end() < len(self.text):
            try:
                item, end = self.parser.raw_decode(self.text, match.end())
            except json.JSONDecodeError:
                break
            following = _SEPARATOR.match(self.text, end)
            if following is None:  # it may be a number that goes on beyond the window
                break
            batch.append(item)
            self.position, match = end, following
        return batch


def _shortened(text: str) -> str:
    """Text without polygons and run lengths."""
    if '"segmentation"' in text:
        text = _POLYGONS.sub('"segmentation":0', text)
    return _RUN_LENGTHS.sub('"counts":0', text) if '"counts"' in text else text


@functools.cache
def _decoder(members: tuple[str, ...]) -> _Decode | None:
    """Makes of a list of objects those with these members alone; None where the extra `fast` is not installed.

    What it makes, for its part, is None where it does not take the text.
    """
    try:
        import msgspec
    except ImportError:
        return None
    kind = TypedDict("Item", dict.fromkeys(members, Any), total=False)  # type: ignore[misc]
    decode: Any = msgspec.json.Decoder(list[kind]).decode

    def made(text: str) -> list[dict[str, Any]] | None:
        try:
            return decode(text)
        except (msgspec.MsgspecError, RecursionError, ValueError):
            return None

    return made


def read_lists(
    path: Path, keys: tuple[str, ...], *, whole: bool = False, members: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[Any]]]:
    """The items of some lists of a JSON object, in batches, in the order of the file.

    Values named "segmentation" that are polygons, and "counts" that are numbers, arrive as 0 unless `whole`.

    Args:
        path: a JSON file whose outermost value is an object, UTF-8 with or without a byte order mark.
        keys: the lists that are wanted; other members are decoded and forgotten.
        whole: whether polygons and runs are wanted, which takes several times as long.
        members: of the items, if no others are wanted; whether others come all the same depends on what is installed.

    Yields:
        The key and some of its items; each key that the object has comes at least once, if with no items.

    Raises:
        DataError: the file cannot be read, is not JSON, is not an object, or a wanted member is not a list.
    """
    place = "the beginning"
    try:
        with opened(path) as file:
            window = _Window(file, whole, _decoder(members) if members else None)
            if window.peek() != "{":
                raise ValueError("the outermost value is not an object {…}")
            window.position += 1
            more = window.peek() != "}"
            if not more:
                window.position += 1
            while more:
                if window.peek() != '"':
                    raise ValueError("a key in quotes is missing")
                key = window.value()
                window.expect(":")
                place = f"{key!r}"
                if key in keys:
                    if window.peek() != "[":
                        raise ValueError(f"{key!r} is not a list")
                    count = 0
                    yield key, []
                    place = f"{key!r}, item 0"
                    for batch in window.items():
                        count += len(batch)
                        place = f"{key!r}, item {count}"
                        yield key, batch
                else:
                    window.peek()
                    window.value()
                more = window.expect(",}") == ","
            if window.peek():
                raise ValueError(f"{window.peek()!r} follows the end of the object")
    except OSError as error:
        raise DataError("The file cannot be read", where=path, got=error.strerror or error) from error
    except DataError:
        raise
    except RecursionError as error:
        raise DataError("The JSON is nested too deeply", where=path, got=f"trouble near {place}") from error
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            "malformed-file: the file is not the JSON that it should be",
            where=path,
            got=f"{reason}, near {place}",
            expected="a JSON object with the lists " + ", ".join(keys),
            remedy="Export the annotations again; a file that ends early was cut off while it was copied.",
        ) from error

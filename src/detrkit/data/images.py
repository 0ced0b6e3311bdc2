"""Open an image of any kind as upright 8-bit RGB, or say what is wrong with the file."""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from detrkit.data.colours import to_rgb
from detrkit.documents import opened
from detrkit.errors import DataError, UsageError

MAX_PIXELS = 178_000_000
"""Larger images are refused unread: a few kilobytes of header can ask for any amount of memory."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""The file formats that are tried. Few, since each decoder is a way in for a malicious file."""

MOST_SCANS = 100
"""Times that a progressive JPEG may paint over its whole area; real ones do so a dozen times. Each costs a few hundred
bytes, and as much time as the picture is large."""

LONGEST_PACKED = 65_535
"""Pixels of a side of a packed bitmap, whose runs may jump over hundreds of rows at once."""

_PIECE = 1 << 20
_Made = TypeVar("_Made")
Plan = TypeVar("Plan")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)
_ORIENTED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_COPY = "Copy or download it again."
_CONVERT = "Convert it to JPEG or PNG."
_LOOKALIKES = (
    (rb"\s*<", "The file holds a web page or XML, not an image", "Download the image again."),
    (rb"version https://git-lfs", "The file is a Git LFS pointer, not the image itself", "Run: git lfs pull"),
    (rb"GIF8", "GIF images are not read", _CONVERT),
    (rb"....ftyp(heic|heix|mif1|avif)", "HEIC and AVIF images are not read", _CONVERT),
    (rb"%PDF", "The file is a PDF, not an image", _CONVERT),
)


PICTURE = "a file, a PIL image or an RGB array (height, width, 3) of uint8"
"""What is expected where a picture is asked for."""


def check_picture(source: Any, name: str) -> None:
    """Refuse what is no picture, whatever lies in it.

    Args:
        source: what may be given to `open_image`, or anything else.
        name: what to call it in the message.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(source, str | Path | bytes | Image.Image | np.ndarray):
        raise UsageError("This is no picture", where=name, got=type(source).__name__, expected=PICTURE)


def open_image(
    source: str | Path | bytes | Image.Image | np.ndarray,
    *,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    coarse: int = 0,
) -> Image.Image:
    """Open an image as upright RGB of 8 bits, fully decoded.

    The EXIF orientation is applied, so height and width are those that a viewer shows. Of several frames or pages the
    first is taken. Transparent pixels are laid over white. Of integers of more than 8 bits the image's maximum becomes
    white, or 255 where that is more; of floats the maximum, or 1; and 0 becomes black, or the minimum where that is
    less. (A range of so many bits would be a guess from the maximum, and a series of images change its brightness where
    the guess does.) Values that are not finite count as 0.

    Args:
        source: a JPEG, PNG, WebP, BMP or TIFF file (a path, or its bytes), a Pillow image, or an array of uint8 or
            uint16 and shape (height, width, 3) in RGB order, (height, width, 4) with alpha, (height, width, 1) or
            (height, width).
        name: what to call the image in messages, where `source` is not a path.
        max_pixels: an image of more pixels is refused before it is decoded. Pillow's own limit holds as well.
        coarse: where it is not 0, a JPEG may be decoded at a half, a quarter or an eighth of its size, so long as both
            sides keep this many pixels. That takes a sixth of the time and judges the whole file all the same.

    Raises:
        DataError: no such file, not a file, empty, truncated, not an image, too many pixels, or an array of another
            shape or type.
    """

    def make(image: Image.Image) -> Image.Image:
        if coarse:
            image.draft(image.mode, (coarse, coarse))
        return _upright_rgb_of_file(image)

    if isinstance(source, (str, Path)):
        return _open_file(Path(source), name or str(source), max_pixels, make)
    if isinstance(source, bytes):
        return _open_stream(io.BytesIO(source), name, max_pixels, make)
    if isinstance(source, np.ndarray):
        return _from_array(source, name, max_pixels)
    return _decode(source, name, max_pixels, _upright_rgb)


def open_pixels(
    source: str | Path,
    plan: Callable[[int, int], tuple[int, Plan]],
    *,
    max_pixels: int = MAX_PIXELS,
) -> tuple[UInt8[np.ndarray, "h w 3"], Plan]:
    """The pixels of `open_image`, or of a smaller image where that is enough.

    A JPEG file is decoded at a half, a quarter or an eighth of its size, so long as each pixel is then exactly 2 × 2,
    4 × 4 or 8 × 8 of the image. Where the extra `fast` is installed, it is decoded straight into the array, which takes
    a third less time and gives the same bytes.

    Args:
        source: an image file.
        plan: asked once, of the upright image's height and width, before it is decoded: by how much it may be smaller
            (1, 2, 4 or 8), and whatever is to be handed back.
        max_pixels: an image of more pixels is refused before it is decoded.

    Raises:
        DataError: as of `open_image`.
    """
    return _open_file(Path(source), str(source), max_pixels, lambda image: _planned(image, plan))


def open_values(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture whose values mean something else than brightness, fully decoded: as it is stored, not converted,
    not turned, a palette's indices kept.

    Args:
        path: a file of one of the formats that images have.
        max_pixels: a picture of more pixels is refused before it is decoded.

    Raises:
        DataError: as of `open_image`.
    """
    return _open_file(path, str(path), max_pixels, Image.Image.copy)


def _open_file(path: Path, name: str, max_pixels: int, make: Callable[[Image.Image], _Made]) -> _Made:
    if re.match(r"https?:/", str(path)):
        raise DataError("Images are not fetched from the net", where=name, remedy="Download the image first.")
    try:
        if path.is_dir():
            raise DataError("This is a folder, not an image", where=name, remedy="Name the images in it.")
        with opened(path) as file:
            return _open_stream(file, name, max_pixels, make)
    except FileNotFoundError as error:
        raise DataError("There is no such image file", where=name, remedy="Check the path.") from error
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError("The image file cannot be read", where=name, got=error) from error


def _open_stream(
    file: io.BytesIO | io.BufferedReader, name: str, max_pixels: int, make: Callable[[Image.Image], _Made]
) -> _Made:
    with warnings.catch_warnings():
        # Pillow warns from half of its pixel limit on, and about odd metadata; neither says anything about the pixels.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with opened_header(file, name, max_pixels) as image:
            _refuse_costly(image, file, name)
            return _decode(image, name, max_pixels, make)


def opened_header(file: io.BytesIO | io.BufferedReader, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image of which the header is read and no pixel decoded.

    Args:
        file: the image file.
        name: what to call it in messages.
        max_pixels: what messages say of images that Pillow takes for a danger.

    Raises:
        DataError: the file is empty, no image of a known format, or one that Pillow takes for a danger.
    """
    try:
        return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise _too_large(f"{int(found[0]):,} pixels" if found else str(error), name, max_pixels) from error
    except Exception as error:  # the parsers let struct.error, SyntaxError and others through
        raise _not_an_image(file, name) from error


def _refuse_costly(image: Image.Image, file: io.BytesIO | io.BufferedReader, name: str) -> None:
    """Refuse what few pixels, by their number, would need unbounded time or memory for."""
    if image.info.get("progressive"):
        place, scans, last = file.tell(), 0, b""
        file.seek(0)
        while piece := file.read(_PIECE):
            scans += (last + piece).count(b"\xff\xda")
            last = piece[-1:]
        file.seek(place)
        if scans > MOST_SCANS:
            raise DataError(
                "The JPEG is painted over too often",
                where=name,
                got=f"{scans:,} scans",
                expected=f"at most {MOST_SCANS}",
            )
    if max(image.size) > LONGEST_PACKED and any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", ())):
        raise DataError(
            "The packed bitmap is too long", where=name, got=image.size, expected=f"sides of {LONGEST_PACKED:,} pixels"
        )


def _not_an_image(file: io.BytesIO | io.BufferedReader, name: str) -> DataError:
    file.seek(0)
    head = file.read(64)
    if not head:
        return DataError("The image file is empty", where=name, got="0 bytes", remedy=_COPY)
    for pattern, what, remedy in _LOOKALIKES:
        if re.match(pattern, head, re.DOTALL):
            return DataError(what, where=name, remedy=remedy)
    return DataError(
        "The file is not an image, or its header is damaged",
        where=name,
        got=f"a file that begins with {head[:12]!r}",
        expected=" or ".join([", ".join(FORMATS[:-1]), FORMATS[-1]]),
        remedy=_COPY,
    )


def _too_large(got: str, name: str, max_pixels: int) -> DataError:
    return DataError(
        "The image has too many pixels to be opened",
        where=name,
        got=got,
        expected=f"at most {max_pixels:,} pixels",
        remedy="Cut it into tiles, or scale it down.",
    )


def _decode(image: Image.Image, name: str, max_pixels: int, make: Callable[[Image.Image], _Made]) -> _Made:
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(f"{width} × {height} = {width * height:,} pixels", name, max_pixels)
    try:
        return make(image)
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, zlib.error, struct.error and others
        truncated = "truncated" in str(error) or isinstance(error, EOFError)
        what = "The image file is truncated" if truncated else "The image cannot be decoded"
        raise DataError(what, where=name, got=error, expected="a complete image", remedy=_COPY) from error


def _planned(
    image: Image.Image, plan: Callable[[int, int], tuple[int, Plan]]
) -> tuple[UInt8[np.ndarray, "h w 3"], Plan]:
    flag, (width, height) = orientation(image), image.size
    spare, planned = plan(width, height) if flag in _ON_ITS_SIDE else plan(height, width)
    factor = math.gcd(spare, width, height)
    if factor > 1:
        image.draft(image.mode, (width // factor, height // factor))
    pixels = _jpeg_pixels(image, factor) if flag == 1 else None
    return np.array(_upright_rgb_of_file(image)) if pixels is None else pixels, planned


def _jpeg_pixels(image: Image.Image, factor: int) -> UInt8[np.ndarray, "h w 3"] | None:
    """What Pillow makes of an ordinary JPEG file, straight into an array; None: let Pillow do it, or say why not."""
    decoder = _fast_decoder()
    if decoder is None or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    file: Any = getattr(image, "fp", None)
    height, width = image.height, image.width
    pixels = np.empty((height, width, 3), np.uint8)
    most = 4 * height * width * factor**2 + _PIECE  # of what a file may hold besides, nothing is taken into memory
    try:
        file.seek(0)
        content = file.read(most)
        found = decoder.decode_jpeg(content, min_height=height, min_width=width, min_factor=factor, buffer=pixels)
    except Exception:  # damage, even where some pixels are left, is judged in one place
        return None
    return pixels if len(content) < most and found.shape == pixels.shape else None


@functools.cache
def _fast_decoder() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    rgb, method = to_rgb(image), _UPRIGHT.get(orientation(image))
    return _turned(rgb, method)


def _upright_rgb_of_file(image: Image.Image) -> Image.Image:
    """The same of an image that nobody else holds, whose memory is free again before more is needed."""
    image.load()
    rgb, method = to_rgb(image), _UPRIGHT.get(orientation(image))
    image.close()
    return _turned(rgb, method)


def _turned(rgb: Image.Image, method: Image.Transpose | None) -> Image.Image:
    if method is None:
        return rgb
    upright = rgb.transpose(method)
    for name in _ORIENTED:  # or it would be turned once more where it is opened again
        upright.info.pop(name, None)
    return upright


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 where it says none that can be understood."""
    try:
        flag = int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata around good pixels: shown as stored, which is what viewers do
        return 1
    return flag if 1 <= flag <= 8 else 1


def _from_array(array: np.ndarray, name: str, max_pixels: int) -> Image.Image:
    if array.dtype == np.uint16 and array.size:
        array = np.rint(array * (255 / max(255, int(array.max())))).astype(np.uint8)
    if array.dtype != np.uint8:
        raise DataError(
            "The array of an image has the wrong type",
            where=name,
            got=array.dtype,
            expected="uint8 or uint16",
            remedy="Scale it to 0-255 and convert it: array.astype('uint8').",
        )
    plain = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if plain.size == 0 or not (plain.ndim == 2 or (plain.ndim == 3 and plain.shape[2] in (3, 4))):
        raise DataError(
            "The array of an image has the wrong shape",
            where=name,
            got=array.shape,
            expected="(height, width, 3), (height, width, 4), (height, width, 1) or (height, width)",
            remedy="Move the channels to the end: array.transpose(1, 2, 0)." if array.ndim == 3 else "",
        )
    return _decode(Image.fromarray(np.ascontiguousarray(plain)), name, max_pixels, _upright_rgb)

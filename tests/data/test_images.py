import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from detrkit.data import images
from detrkit.data.images import open_image, open_pixels
from detrkit.errors import DataError, printable


def picture(height=40, width=60):
    """Smooth, with four differently coloured corners."""
    y, x = np.mgrid[0 : 1 : complex(height), 0 : 1 : complex(width)]
    return Image.fromarray((np.stack([x, y, 1 - x], -1) * 255).astype(np.uint8))


def close(a, b, tolerance=8.0):
    a, b = np.asarray(a).astype(float), np.asarray(b).astype(float)
    return a.shape == b.shape and np.abs(a - b).mean() < tolerance


def whole(height, width):
    """Nothing is spared; hands the size back."""
    return 1, (height, width)


@pytest.fixture(params=["with", "without"])
def fast(request, monkeypatch):
    """With the extra `fast`, and as if it were not there."""
    if request.param == "without":
        monkeypatch.setattr(images, "_fast_decoder", lambda: None)
    else:
        assert images._fast_decoder() is not None, "the tests need the extra"
    return request.param == "with"


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("jpg", {"quality": 95}), ("png", {}), ("webp", {"lossless": True}), ("bmp", {}), ("tif", {})],
)
def test_formats_open_from_path_string_and_bytes(tmp_path, suffix, options):
    path = tmp_path / f"a.{suffix}"
    picture().save(path, **options)
    for source in (path, str(path), path.read_bytes()):
        image = open_image(source)
        assert image.mode == "RGB"
        assert close(image, picture())


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation, suffix):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned to the left; shown turned to the right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture().transpose(undo[orientation]) if orientation in undo else picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif.tobytes(), quality=95)
    assert close(open_image(path), picture())
    assert close(open_image(open_image(path)), picture()), "turned twice"
    with Image.open(path) as image:
        assert close(open_image(image), picture())


def test_damaged_exif_does_not_lose_the_image(tmp_path):
    path = tmp_path / "a.jpg"
    picture().save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x00", quality=95)
    assert close(open_image(path), picture())


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "HSV", "YCbCr"])
def test_modes_of_images_in_memory(mode):
    converted = picture().convert(mode)
    image = open_image(converted)
    assert image.mode == "RGB"
    assert close(image, converted.convert("RGB"), 0.01)


def test_cmyk_jpeg(tmp_path):
    path = tmp_path / "a.jpg"
    picture().convert("CMYK").save(path, quality=95)
    assert close(open_image(path), picture())


def test_transparency_shows_white(tmp_path):
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, 3:] = (200, 100, 0, 255)
    expected = np.full((4, 6, 3), 255)
    expected[:, 3:] = (200, 100, 0)
    rgba_path, palette_path, bytes_path = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    Image.fromarray(rgba).save(rgba_path)
    palette = Image.fromarray((np.arange(6) >= 3).astype(np.uint8)[None].repeat(4, 0)).convert("P")
    palette.putpalette([0, 0, 0, 200, 100, 0])
    palette.save(palette_path, transparency=0)
    palette.save(bytes_path, transparency=b"\x00\xff")
    for source in (rgba, rgba_path, palette_path, bytes_path):
        assert np.array_equal(np.asarray(open_image(source)), expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 30000, 65535]], np.uint16), [0, 117, 255]),
        (np.array([[0, 2048, 4095]], np.uint16), [0, 128, 255]),
        (np.array([[0, 2048, 4100]], np.uint16), [0, 127, 255]),  # a little brighter is no other image
        (np.array([[0, 100, 200]], np.uint16), [0, 100, 200]),
        (np.array([[0, 0, 0]], np.uint16), [0, 0, 0]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 0.25, 0.5]], np.float32), [0, 64, 128]),
        (np.array([[0, 50, 200]], np.float32), [0, 64, 255]),
        (np.array([[np.nan, np.inf, 1000]], np.float32), [0, 0, 255]),
    ],
)
def test_deep_greyscale_is_scaled_by_the_stated_rule(tmp_path, values, expected):
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    for source in (path, Image.fromarray(values)):
        assert np.asarray(open_image(source))[0].tolist() == [[value] * 3 for value in expected]


def test_16_bit_png(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 30000, 65535]], np.uint16)).save(path)
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 117, 255]


def test_first_of_several_frames(tmp_path):
    path = tmp_path / "a.webp"
    picture().save(path, save_all=True, append_images=[Image.new("RGB", (60, 40))], lossless=True)
    assert close(open_image(path), picture(), 0.01)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)])
def test_arrays_of_16_bits_are_read_as_files_of_16_bits_are(shape):
    assert np.asarray(open_image(np.array([0, 2048, 4100], np.uint16).reshape(shape)))[0, :, 0].tolist() == [
        0,
        127,
        255,
    ]
    assert np.asarray(open_image(np.array([0, 100, 200], np.uint16).reshape(shape)))[0, :, 0].tolist() == [0, 100, 200]


def test_arrays():
    array = np.asarray(picture())
    assert np.array_equal(np.asarray(open_image(array)), array)
    assert np.array_equal(np.asarray(open_image(array[::-1])), array[::-1])
    grey = array[..., 0]
    for source in (grey, grey[..., None]):
        assert np.array_equal(np.asarray(open_image(source)), grey[..., None].repeat(3, 2))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 9), np.uint8), r"wrong shape; got \(3, 8, 9\).*transpose\(1, 2, 0\)"),
        (np.zeros((8, 9, 2), np.uint8), "wrong shape"),
        (np.zeros((0, 9, 3), np.uint8), "wrong shape"),
        (np.zeros(9, np.uint8), "wrong shape"),
        (np.zeros((8, 9, 3)), "wrong type; got float64; expected uint8"),
    ],
)
def test_wrong_arrays_are_refused(array, message):
    with pytest.raises(DataError, match=f"(?s)frame 7: .*{message}"):
        open_image(array, name="frame 7")


def truncated(path):
    picture(200, 300).save(path, format="PNG" if path.suffix == ".png" else "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none.jpg", lambda path: None, "no such image file.*Check the path"),
        ("folder", lambda path: path.mkdir(), "a folder, not an image"),
        ("zero.jpg", lambda path: path.write_bytes(b""), "empty; got 0 bytes"),
        ("cut.jpg", truncated, "truncated.*download it again"),
        ("cut.png", truncated, "truncated"),
        ("stub.jpg", lambda path: path.write_bytes(b"\xff\xd8\xff"), "not an image, or its header is damaged"),
        ("html.jpg", lambda path: path.write_text("\n<!doctype html><html></html>"), "web page"),
        ("text.png", lambda path: path.write_text("hello"), "not an image.*begins with b'hello'.*JPEG.*or TIFF"),
        ("lfs.png", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
        ("a.gif", lambda path: picture().save(path), "GIF images are not read.*Convert"),
        ("https://a.b/c.jpg", lambda path: None, "not fetched"),
        ("nul\0.jpg", lambda path: None, "cannot be read"),
    ],
)
def test_bad_files_are_named_with_cause_and_remedy(tmp_path, name, make, message):
    path = name if name.startswith("http") else tmp_path / name
    make(path)
    with pytest.raises(DataError, match=f"(?s){re.escape(printable(name))}.*{message}") as caught:
        open_image(path)
    assert caught.value.where == str(path)
    if not name.startswith("http"):
        with pytest.raises(DataError) as again:
            open_pixels(path, whole)
        assert str(again.value) == str(caught.value)


def test_bad_bytes_carry_the_given_name():
    with pytest.raises(DataError, match=r"upload 3: .*empty"):
        open_image(b"", name="upload 3")


def bomb(width, height):
    """A PNG header that promises width × height pixels, followed by nothing that could be decoded."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"garbage") + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_from_the_header():
    # None of these could be decoded: that they are called too large shows that nobody tried.
    with pytest.raises(DataError, match=r"too many pixels.*got 10,000,000,000 pixels.*at most 178,000,000"):
        open_image(bomb(100_000, 100_000))
    with pytest.raises(DataError, match=r"too many pixels.*got 13375 × 13350"):
        open_image(bomb(13375, 13350))
    with pytest.raises(DataError, match=r"too many pixels.*10 × 11 = 110 pixels.*at most 100"):
        open_image(bomb(10, 11), max_pixels=100)
    with pytest.raises(DataError, match=r"cannot be decoded|truncated"):
        open_image(bomb(10_000, 9_000))  # above Pillow's warning, below our limit


def test_array_and_image_in_memory_obey_the_limit():
    for source in (picture(), np.asarray(picture())):
        with pytest.raises(DataError, match="too many pixels"):
            open_image(source, max_pixels=2399)
        assert open_image(source, max_pixels=2400).size == (60, 40)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *[("RGB", {"subsampling": sampling, "progressive": sampling == 1}) for sampling in (0, 1, 2)],
        ("RGB", {"keep_rgb": True}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
def test_pixels_of_a_jpeg_are_those_of_pillow_at_every_scale(tmp_path, fast, mode, options):
    path = tmp_path / "a.jpg"
    picture(80, 136).convert(mode).save(path, quality=90, **options)
    for factor in (1, 2, 4, 8):
        pixels, size = open_pixels(path, lambda height, width, factor=factor: (factor, (height, width)))
        assert size == (80, 136)
        with Image.open(path) as image:
            image.draft(image.mode, (136 // factor, 80 // factor))
            expected = np.asarray(image.convert("RGB"))
        assert expected.shape == (80 // factor, 136 // factor, 3)
        assert np.array_equal(pixels, expected)
        assert pixels.flags.writeable


def test_only_ordinary_files_go_to_the_fast_decoder(tmp_path, monkeypatch):
    seen = []
    decode = images._fast_decoder().decode_jpeg
    monkeypatch.setattr(images._fast_decoder(), "decode_jpeg", lambda *a, **k: seen.append(1) or decode(*a, **k))
    for name in ("a.jpg", "b.png"):
        picture().save(tmp_path / name)
        open_pixels(tmp_path / name, whole)
    picture().convert("CMYK").save(tmp_path / "c.jpg")
    open_pixels(tmp_path / "c.jpg", whole)
    assert len(seen) == 1


def test_a_smaller_image_has_whole_pixels_or_is_not_smaller(tmp_path, fast):
    for (height, width), expected in (((48, 64), 8), ((44, 64), 4), ((42, 64), 2), ((41, 64), 1), ((48, 61), 1)):
        smooth = picture(height, width)
        smooth.save(tmp_path / "a.jpg", quality=95)
        pixels, _ = open_pixels(tmp_path / "a.jpg", lambda *size: (8, size))
        assert pixels.shape == (height // expected, width // expected, 3)
        means = (
            np.asarray(smooth, float).reshape(height // expected, expected, width // expected, expected, 3).mean((1, 3))
        )
        assert np.abs(pixels - means).max() < 8
        smooth.save(tmp_path / "a.png")
        assert open_pixels(tmp_path / "a.png", lambda *size: (8, size))[0].shape == (height, width, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_upright(tmp_path, fast, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(32, 64).save(tmp_path / "a.jpg", exif=exif.tobytes(), quality=95)
    expected = open_image(tmp_path / "a.jpg")
    pixels, size = open_pixels(tmp_path / "a.jpg", whole)
    assert size == expected.size[::-1]
    assert np.array_equal(pixels, np.asarray(expected))
    smaller, _ = open_pixels(tmp_path / "a.jpg", lambda *size: (2, size))
    assert close(smaller, expected.reduce(2))


def test_damaged_files_are_judged_alike(tmp_path, fast):
    path = tmp_path / "a.jpg"
    picture().save(path, quality=90)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for turn in range(120):
        damaged = bytearray(content)
        if turn % 2:
            damaged = damaged[: rng.integers(2, len(content))]
        else:
            damaged[int(rng.integers(2, len(content)))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        answers = []
        for read in (lambda: np.asarray(open_image(path)), lambda: open_pixels(path, whole)[0]):
            try:
                answers.append(read())
            except DataError as error:
                answers.append(str(error))
        assert np.array_equal(*answers)
        outcomes.add(isinstance(answers[0], str))
    assert outcomes == {True, False}


def test_pixels_obey_the_limit(tmp_path):
    picture().save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="too many pixels"):
        open_pixels(tmp_path / "a.jpg", whole, max_pixels=2399)


def test_what_follows_an_image_in_its_file_is_not_taken_into_memory(tmp_path, monkeypatch):
    lengths = []
    decode = images._fast_decoder().decode_jpeg
    monkeypatch.setattr(images._fast_decoder(), "decode_jpeg", lambda c, **k: lengths.append(len(c)) or decode(c, **k))
    path = tmp_path / "a.jpg"
    picture().save(path)
    expected = open_pixels(path, whole)[0]
    path.write_bytes(path.read_bytes() + bytes(4 << 20))
    assert np.array_equal(open_pixels(path, whole)[0], expected)
    assert max(lengths) < 2 << 20

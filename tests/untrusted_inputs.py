"""Tiny sound inputs of every kind that the library reads, ways in which they are damaged, and who reads them."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import torch
import tyro
from fuzzing import Case, add_odd_files, damage_bytes, damage_json
from PIL import Image
from safetensors.torch import save_file

from detrkit import checkpoint, convert, models, sources
from detrkit.cli import doctor, inspect, main
from detrkit.cli import evaluate as evaluate_verb
from detrkit.data import formats
from detrkit.data.annotations import Annotations
from detrkit.data.doctor import Resolution, examine
from detrkit.data.files import upright_size
from detrkit.data.images import open_image, open_values
from detrkit.data.pictures import open_pictures
from detrkit.errors import Error
from detrkit.evaluation import evaluate, read_results
from detrkit.masks import RunLengths
from detrkit.nn.weights import read_weight_file
from detrkit.structures import Category
from detrkit.training import by_example, recipe, recovery
from detrkit.visualize import pictures as visualize

LOADED = (doctor, evaluate_verb, inspect, by_example, hotcoco, tyro)
"""What is loaded late, and would be loaded anew in each process that reads."""

SIZE = (12, 16)
CODES = {0, 2, 3, 4, 5, 6}
"""Exit codes of the command line, but for 1: what no one foresaw."""

QUICK = 16
STRIDE = 7
"""Crafted damage is taken in steps of this, so that a few inputs are of many sorts."""

Craft = Callable[[Path], None]


class Kind(NamedTuple):
    """A kind of input.

    Attributes:
        lay: makes a sound one in an empty folder.
        targets: files of it that are damaged.
        crafted: damage that no chance would find; each spoils a sound one.
        read: reads it.
        command: the command line that reads it too; `{}` stands for the folder.
        heavy: crafted damage that takes seconds, and is left to inputs of numbers from `QUICK` on.
    """

    lay: Callable[[Path], None]
    targets: Sequence[str]
    crafted: Sequence[Craft]
    read: Callable[[Path], object]
    command: Sequence[str] = ()
    heavy: Sequence[Craft] = ()


def case(kind: Kind, number: int, name: str, sound: Path, folder: Path) -> Case:
    """Make a damaged input: crafted damage and drawn damage take turns.

    Args:
        kind: what is damaged.
        number: of the input; the seed of its damage.
        name: of the kind.
        sound: a folder that `kind.lay` filled.
        folder: to be made.
    """
    rng = random.Random(f"{name} {number}")
    shutil.copytree(sound, folder, symlinks=True)
    if number % 2 and kind.crafted:
        crafted = kind.crafted if number < QUICK else [*kind.heavy, *kind.crafted]
        craft = crafted[number // 2 * STRIDE % len(crafted)]
        craft(folder)
        damage = getattr(craft, "func", craft).__name__.strip("_") + str(getattr(craft, "args", ""))[:60]
    else:
        target = folder / rng.choice(kind.targets)
        content = target.read_bytes()
        if target.suffix == ".json" and rng.random() < 0.75:
            text, damage = damage_json(content.decode(), rng)
            content = text.encode()
        else:
            content, damage = damage_bytes(content, rng, (folder / rng.choice(kind.targets)).read_bytes())
        target.write_bytes(content)
        damage = f"{target.name}: {damage}"
        if name in WITH_NAMES:
            add_odd_files(folder / "images")
    read = partial(kind.read, folder)
    if kind.command and number % 5 == 0:
        read = partial(by_command, kind.command, folder)
        damage += ", by the command line"
    return Case(f"{name} {number}: {damage}", read, str(folder))


def by_command(command: Sequence[str], folder: Path) -> None:
    """Run a command line in this process; what it should not do is an AssertionError."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([word.replace("{}", str(folder)) for word in command])
    said = err.getvalue()
    assert code in CODES, f"exit code {code}: {said[-1000:]}"
    assert "Traceback" not in said, said
    assert "should not happen" not in said, said
    assert code in (0, 5, 6) or str(folder) in said, f"does not name {folder}: {said[-1000:]}"


# --- data sets ---


def _images(folder: Path, names: Sequence[str] = ("0.png", "1.jpg", "2.png")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    for name in names:
        Image.fromarray(pixels).save(folder / name)


def _coco_document() -> dict[str, Any]:
    names = ("0.png", "1.jpg", "2.png")
    images = [{"id": row, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for row, name in enumerate(names, 1)]
    mask = np.zeros((1, *SIZE), bool)
    mask[0, 2:6, 3:9] = True
    (runs,) = RunLengths.encode(mask).to_coco()
    plain = {"size": list(SIZE), "counts": [26, 4, 8, 4, 150]}
    polygon = [[1.0, 1.0, 9.0, 1.5, 9.0, 8.0, 2.0, 7.0]]
    boxes = [(1, 1, [3, 2, 6, 4], runs), (1, 2, [1, 1, 8, 7], polygon), (2, 1, [2, 2, 2, 4], plain)]
    annotations = [
        {"id": row, "image_id": image, "category_id": label, "bbox": box, "segmentation": mask}
        | {"area": 12.5, "iscrowd": 0}
        for row, (image, label, box, mask) in enumerate(boxes, 1)
    ]
    categories = [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut", "isthing": 1}]
    return {"images": images, "annotations": annotations, "categories": categories}


def _lay_coco(folder: Path) -> None:
    _images(folder / "images")
    (folder / "all.json").write_text(json.dumps(_coco_document()))


def _lay_panoptic(folder: Path) -> None:
    _images(folder / "images")
    _images(folder / "panoptic_all", ())
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[2:6, 3:9, 0], colours[8:, :, 0] = 7, 9
    document, entries = _coco_document(), []
    for image in document["images"][:2]:
        name = f"{image['id']}.png"
        Image.fromarray(colours).save(folder / "panoptic_all" / name)
        segments = [
            {"id": number, "category_id": label, "bbox": box, "area": area, "iscrowd": 0}
            for number, label, box, area in ((7, 1, [3, 2, 6, 4], 24), (9, 2, [0, 8, 16, 4], 64))
        ]
        entries.append({"image_id": image["id"], "file_name": name, "segments_info": segments})
    (folder / "panoptic_all.json").write_text(json.dumps({**document, "annotations": entries}))


def _lay_voc(folder: Path) -> None:
    _images(folder / "images")
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n2\n")
    for name in ("0.png", "1.jpg", "2.png"):
        box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
        thing = f"<object><name>bolt</name><difficult>0</difficult>{box}</object>"
        size = f"<size><width>{SIZE[1]}</width><height>{SIZE[0]}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}</filename>{size}{thing}{thing}</annotation>"
        (folder / "Annotations" / f"{name[0]}.xml").write_text(text)


def _lay_yolo(folder: Path) -> None:
    _images(folder / "images")
    (folder / "labels").mkdir()
    (folder / "labels" / "0.txt").write_text("0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.9 0.1 0.9 0.9\n")
    (folder / "labels" / "1.txt").write_text("1 0.25 0.25 0.5 0.5\n")
    (folder / "list.txt").write_text("images/0.png\n./images/1.jpg\nimages/2.png\n")
    (folder / "data.yaml").write_text("path: .\ntrain: images\nval: list.txt\nnames:\n  0: bolt\n  1: nut\n")


def _lay_darknet(folder: Path) -> None:
    _images(folder / "obj_train_data")
    (folder / "obj_train_data" / "0.txt").write_text("0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.5 0.5\n")
    (folder / "train.txt").write_text("data/obj_train_data/0.png\nobj_train_data/1.jpg\n")
    (folder / "obj.names").write_text("bolt\nnut\n")
    (folder / "obj.data").write_text("classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n")


def _lay_instances(folder: Path) -> None:
    _images(folder / "images")
    (folder / "masks").mkdir()
    numbers = np.zeros(SIZE, np.uint16)
    numbers[2:6, 3:9], numbers[8:, :4] = 1, 300
    Image.fromarray(numbers).save(folder / "masks" / "0.png")
    Image.fromarray(numbers.astype(np.uint8)).save(folder / "masks" / "1_mask.png")
    (folder / "classes.txt").write_text("bolt\n")


def _read_data(folder: Path) -> None:
    for masks in (False, True):
        for part in formats.read(folder, masks="any" if masks else False).values():
            _use(part)
    examine(folder, Resolution("any", 5, 64, 96, 16))


def _use(part: Annotations) -> None:
    for index in range(len(part)):
        path, rows = part.path(index), part.rows(index)
        inside = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(part.root))
        assert inside, f"{path} is outside {part.root}"
        assert np.isfinite(part.boxes[rows]).all()
        if part.masks is not None:
            masks = part.masks.encoded(rows)
            if len(masks):
                masks.decode()
        open_image(path)


def _check_named(path: Path, error: Error) -> None:
    assert str(path) in str(error), f"{error} does not name {path}"


def put(name: str, content: str | bytes, folder: Path) -> None:
    """Replace a file."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def replaced(name: str, old: str, new: str, folder: Path) -> None:
    """Replace some text of a file."""
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new), encoding="utf-8", errors="surrogateescape")


def special(name: str, what: str, folder: Path) -> None:
    """Put what is no file in the place of one."""
    path = folder / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(what)


def _specials(*names: str) -> list[Craft]:
    kinds = ("pipe", "folder", "/dev/zero", "/nowhere/at/all", ".")
    return [partial(special, name, kind) for name in names for kind in kinds]


def _coco(**changes: Any) -> bytes:
    return json.dumps(_coco_document() | changes).encode()


def _many_texts(folder: Path) -> None:
    images = [{"id": f"image {row}", "file_name": f"{row}.png"} for row in range(6_000)]
    categories = [{"id": row, "name": str(row)} for row in range(6_000)]
    put("all.json", _coco(images=images, categories=categories), folder)


def _annotated(name: str, changes: Sequence[dict[str, Any]], folder: Path) -> None:
    """Annotations of an image with other fields."""
    first = _coco_document()["annotations"][0]
    put(name, _coco(annotations=[{**first, "id": row, **change} for row, change in enumerate(changes)]), folder)


_FAR = [[[0.0, 0.0, side, 0.0, side, side, 0.0, side]] for side in (1e5, 1e7, 1e9, 1e12, 1e300)]
_RUNS: list[Any] = [
    *({"size": list(SIZE), "counts": counts} for counts in ([-1, 5], [2**31, 2**31], [10**18], [0.5], ["a"], [[1]])),
    *({"size": list(SIZE), "counts": text} for text in ("\x00", "~~~~", "ooooooooooooooo", "\ud800", "ü", "1" * 9999)),
    *({"size": size, "counts": "1"} for size in ([], [10**9, 10**9], [-1, -1], ["12", "16"], None, [0, 0])),
    *({"size": [10**5, 10**5], "counts": [10**10]}, "text", 5, {"counts": 5}, [[1]], [[{}]], [[1, 2, 3, 4, 5, None]]),
]
_HEAVY_COCO: list[Craft] = [
    _many_texts,
    partial(put, "all.json", '{"images":[],"annotations":[' + "1," * 200_000 + "1]}"),
    partial(_annotated, "all.json", [{}] * 30_000 + [{"id": "x" * 500_000}]),
    partial(_annotated, "all.json", [{}] * 30_000 + [{"bbox": ["x" * 500_000, 1, 1, 1]}]),
    partial(_annotated, "all.json", [{"segmentation": _FAR[2] * 400}] * 20),
]
_CRAFTED_COCO: list[Craft] = [
    *(partial(replaced, "all.json", '"0.png"', json.dumps(name)) for name in ("../images/0.png", "/etc/passwd")),
    *(partial(replaced, "all.json", '"0.png"', json.dumps(f"{kind}.png")) for kind in ("pipe", "zero", "folder")),
    *(partial(_annotated, "all.json", [{"segmentation": mask}]) for mask in _FAR),
    partial(_annotated, "all.json", [{"segmentation": mask} for mask in _RUNS]),
    partial(_annotated, "all.json", [{"iscrowd": {}}, {"area": [1]}, {"bbox": {}}, {"image_id": []}]),
    partial(put, "all.json", b"\xef\xbb\xbf" + b"\xff" * 100),
    partial(put, "all.json", "[" * 1_000_000),
    partial(put, "all.json", '{"images": [], "annotations": [], "categories": []}'),
    partial(put, "all.json", '{"images": 1, "annotations": 2, "categories": 3}'),
    partial(put, "all.json", '{"images":[' + '{"a":' * 100_000 + "1" + "}" * 100_000 + '],"annotations":[]}'),
    partial(put, "all.json", '{"images":[' + '"' * 300_000 + '],"annotations":[]}'),
    partial(put, "all.json", '{"images":[],"annotations":[], "x":' + "1" * 2_000_000 + "}"),
    partial(replaced, "all.json", '"nut"', r'"\ud83d \u001b]0;x\u0007 \u0000"'),
    partial(put, "classes.txt", b"\xff\xfe"),
    *_specials("all.json", "images/0.png"),
]


def bomb(kind: str) -> str:
    rows = {
        "laughs": [f'<!ENTITY a{row} "{f"&a{row - 1};" * 10 if row else "ha" * 10}">' for row in range(12)],
        "quadratic": [f'<!ENTITY a11 "{"x" * 50_000}">'],
        "outside": ['<!ENTITY a11 SYSTEM "file:///etc/passwd">'],
        "net": ['<!ENTITY a11 SYSTEM "http://127.0.0.1:9/">'],
        "parameter": ['<!ENTITY % a SYSTEM "file:///etc/passwd"> %a; <!ENTITY a11 "x">'],
    }[kind]
    return f"<!DOCTYPE annotation [{''.join(rows)}]><annotation>{'&a11;' * 1000}</annotation>"


_XML = "Annotations/0.xml"
_CRAFTED_VOC: list[Craft] = [
    *(partial(put, _XML, bomb(kind)) for kind in ("laughs", "quadratic", "outside", "net", "parameter")),
    partial(put, _XML, "<a>" * 100_000 + "</a>" * 100_000),
    partial(put, _XML, "<annotation>" + "<object>" * 100_000 + "</object>" * 100_000 + "</annotation>"),
    partial(put, _XML, "<annotation " + " ".join(f'a{row}="1"' for row in range(50_000)) + "/>"),
    *(partial(put, _XML, f'<?xml version="1.0" encoding="{name}"?><annotation/>') for name in ("utf-7", "no", "zip")),
    *(partial(replaced, _XML, ">0.png<", f">{name}<") for name in ("../../x.png", "/etc/passwd", "a" * 9000 + ".png")),
    *(partial(replaced, _XML, ">9<", f">{value}<") for value in ("1e400", "nan", "-inf", "9" * 5000, "0x10", "1_0")),
    *(partial(replaced, _XML, f">{SIZE[1]}<", f">{value}<") for value in ("1e400", "nan", "-1", "9" * 5000, "1e300")),
    partial(replaced, _XML, ">bolt<", ">" + "b" * 100_000 + "<"),
    partial(put, "ImageSets/Main/train.txt", "../../x\n/etc/passwd\n0\n\0\n" + "a" * 100_000),
    partial(put, "ImageSets/Main/train.txt", b"\xff\xfe\x00"),
    partial(put, "Annotations/classes.txt", b"\xff\xfe\x00"),
    partial(put, "classes.txt", b"\xff\xfe\x00"),
    *_specials(_XML, "ImageSets/Main/train.txt", "images/0.png"),
]

_ALIASES = "".join(f"a{row}: &a{row} [{', '.join([f'*a{row - 1}'] * 10) if row else 'x'}]\n" for row in range(30))
_MERGES = "".join(f"m{row}: &m{row} {{<<: [{', '.join([f'*m{row - 1}'] * 10) if row else ''}]}}\n" for row in range(9))
_HEAD = "path: .\ntrain: images\nnames: [bolt, nut]\n"
_CRAFTED_YOLO: list[Craft] = [
    partial(put, "data.yaml", _ALIASES + "train: *a29\nnames: *a29\n"),
    partial(put, "data.yaml", _ALIASES + "train: images\nnames: {*a29 : 1}\n"),
    partial(put, "data.yaml", _ALIASES + "train: images\nnames: *a29\nkpt_shape: *a29\n"),
    partial(put, "data.yaml", "m0: &m0 {a: b}\n" + _MERGES.split("\n", 1)[1] + _HEAD),
    partial(put, "data.yaml", _HEAD + "x: &x [*x]\nval: *x\n"),
    *(
        partial(put, "data.yaml", _HEAD + f"x: {value}\n")
        for value in (
            *("!!python/object/apply:os.system ['touch HARMED']", "!!python/name:os.system", "!nothing 1", "&"),
            *("[" * 5000, "2020-99-99", "0x" + "f" * 100_000, "1" + ":1" * 20_000, "9" * 6000, "!!binary '?'", "\t"),
        )
    ),
    *(
        partial(put, "data.yaml", f"path: .\ntrain: images\nnames: {value}\n")
        for value in (
            *(
                "{.inf: a}",
                "{.nan: a}",
                "{-1: a}",
                "{1e400: a}",
                "{0x" + "f" * 99 + ": a}",
                "{[1]: a}",
                "{2020-01-01: a}",
            ),
            *("{0: [1], 1: {a: b}}", "[" + "a, " * 5000 + "a]", r'["\ud800", "\x00"]', "{9223372036854775808: a}", "1"),
            *("{a: b}", "{0: a, 0: b}", "{1: a, true: b}", "{'1': a, 1: b}", "null", "{99999999: a}"),
        )
    ),
    *(partial(put, "data.yaml", f"path: .\ntrain: images\nnc: {value}\n") for value in ("1e9", "-1", "true", "9" * 30)),
    *(
        partial(put, "data.yaml", f"path: {value}\ntrain: {value}\nval: images\nnames: [a, b]\n")
        for value in (
            "a" * 9000,
            r'"\0"',
            "/",
            "/dev/zero",
            "/proc/self",
            "../../..",
            "[[[a]]]",
            r'"\ud800"',
            "~",
            "1e400",
        )
    ),
    *(
        partial(put, "list.txt", text)
        for text in (
            *("../../../etc/passwd\n", "/etc/passwd\n", "a" * 9000, "\0\n", "images/../../x.png\n", "\udcff\n"),
            *("images/pipe.png\n", "images\n", ".\n", "list.txt\n", "images/0.png\n" * 5000),
        )
        if text.isascii()
    ),
    *(
        partial(put, "labels/0.txt", text)
        for text in (
            *(
                "0 1e400 0 0 0\n",
                "nan nan nan nan nan\n",
                "1e400 .5 .5 .1 .1\n",
                "0 " + "1 " * 200_001,
                "0 0.5\n" * 5000,
            ),
            *("0 0 0 1e300 0 1e300 1e300\n", "0 0 0 1e8 0 1e8 1e8 0 1e8\n", "0 " + "0 0 1e5 1e5 " * 1000, "\0" * 9999),
            *("9" * 5000 + " .5 .5 .1 .1\n", "-1 .5 .5 .1 .1\n", "1_0 .5 .5 .1 .1\n", "９ .5 .5 .1 .1\n"),
        )
    ),
    *_specials("data.yaml", "list.txt", "labels/0.txt", "images/0.png"),
]

_CRAFTED_DARKNET: list[Craft] = [
    *(
        partial(put, "obj.data", f"train = train.txt\nnames{value}\n")
        for value in (
            *("", " = /etc/passwd", " = ../../etc/passwd", " = .", " = \0", " = " + "a" * 9000, " = train.txt"),
            *(" = obj.data", " = obj_train_data/0.png"),
        )
    ),
    *(
        partial(put, "obj.data", f"names = obj.names\ntrain = {value}\n")
        for value in ("/", "/dev/zero", "data/", "data/..", "../data/..", "data/data/train.txt", "\0", "a" * 9000)
    ),
    partial(put, "train.txt", "data/../../../etc/passwd\ndata//etc/passwd\ndata/\n"),
    *_specials("obj.data", "obj.names", "train.txt"),
]


# --- images ---

_FILES = ("a.png", "a.jpg", "turned.jpg", "deep.png", "palette.png", "a.bmp", "a.tif", "packed.tif", "a.webp", "a.gif")


def _lay_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "a" * 40, {0x9003: "2020:01:01 00:00:00"}
    for name in ("a.png", "a.bmp", "a.tif", "a.webp", "a.jpg"):
        pixels.save(folder / name)
    pixels.save(folder / "turned.jpg", exif=exif, progressive=True)
    pixels.save(folder / "packed.tif", compression="tiff_deflate")
    pixels.save(folder / "a.gif")
    Image.fromarray(rng.integers(0, 2**16, SIZE).astype(np.uint16)).save(folder / "deep.png")
    pixels.quantize(8).save(folder / "palette.png", transparency=3)


def _read_images(folder: Path) -> None:
    """Every file has to be opened, or refused by its own name; the last refusal stands for all."""
    refusal: Error | None = None
    readers = (upright_size, open_image, open_values, partial(open_image, coarse=16), visualize.open_image)
    for path in sorted(folder.iterdir()):
        is_large = path.is_file() and path.stat().st_size > 100_000
        for read in readers[: 2 if is_large else None]:
            try:
                read(path)
            except Error as error:
                _check_named(path, error)
                refusal = error if path.suffix != ".gif" else refusal
    if refusal is not None:
        raise refusal


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, rows: bytes, *beside: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG file with the given header and packed rows, and with further chunks before these."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), *beside, _chunk(b"IDAT", rows), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _text_bomb(folder: Path) -> None:
    """Texts of two hundred megabytes in two hundred kilobytes each."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    texts = [_chunk(b"zTXt", b"a%d\0\0" % row + packed) for row in range(20)]
    texts += [_chunk(b"iTXt", b"b\0\1\0\0\0" + packed), _chunk(b"iCCP", b"c\0\0" + packed)]
    put("a.png", _png(1, 1, zlib.compress(b"\0\0"), *texts), folder)


def _pixel_bomb(width: int, height: int, depth: int, colour: int, folder: Path) -> None:
    """As many pixels as a file may have, in very few bytes, and the file is to be turned."""
    packer, channels = zlib.compressobj(9), {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + (width * channels * depth + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    exif = Image.Exif()
    exif[0x0112] = 6
    beside = [_chunk(b"PLTE", bytes(6)), _chunk(b"tRNS", b"\0")] if colour == 3 else []
    beside.append(_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    put("a.png", _png(width, height, packed, *beside, depth=depth, colour=colour), folder)


def scans(folder: Path) -> None:
    """A JPEG of many pixels that is painted over thousands of times, each time in a few hundred bytes."""
    side = 12_000
    tables = b"\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1] * 64)
    tables += b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1, *([0] * 15), 0xE0])
    frame = b"\xff\xc2" + struct.pack(">HBHHBBBB", 11, 8, side, side, 1, 1, 0x11, 0)
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 63, 0) + bytes(300)
    put("turned.jpg", b"\xff\xd8" + tables + frame + scan * 3000 + b"\xff\xd9", folder)


def rle_bomb(folder: Path) -> None:
    """A bitmap of one row, whose run lengths jump up by hundreds of them."""
    width, start = 170_000_000, 14 + 40 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, width, 1, 1, 8, 1, 0, 0, 0, 256, 0)
    data = bytes([0, 2, 255, 255]) * 4
    put("a.bmp", b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + bytes(1024) + data, folder)


def _lying_webp(folder: Path) -> None:
    """An animation whose header asks for four billion pixels."""
    content = (folder / "a.webp").read_bytes()[12:]
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + (65_000).to_bytes(3, "little") * 2
    body = b"WEBP" + extended + content
    put("a.webp", b"RIFF" + struct.pack("<I", len(body)) + body, folder)


def _tiff(row: int, count: int, value: int) -> bytes:
    """A small TIFF file, of which one entry of the directory has another count and value."""
    entries = [
        *((256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)),
        *((279, 4, 1, 64),),
    ]
    entries[row] = (*entries[row][:2], count, value)
    rows = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + rows + bytes(4) + bytes(64)


_HEAVY_IMAGES: list[Craft] = [partial(_pixel_bomb, 13_300, 13_300, *pair) for pair in ((8, 3), (16, 0), (8, 6), (8, 2))]
_CRAFTED_IMAGES: list[Craft] = [
    _text_bomb,
    scans,
    rle_bomb,
    _lying_webp,
    *(partial(put, "a.png", _png(side, side, b"")) for side in (0, 1, 70_000, 2**31 - 1, 2**32 - 1)),
    partial(put, "a.png", _png(5000, 5000, zlib.compress(bytes(100)))),
    *(partial(put, "a.tif", _tiff(row, *pair)) for row in range(7) for pair in ((2**32 - 1, 0), (1, 2**32 - 1))),
    *(partial(put, "a.tif", _tiff(3, 1, packing)) for packing in (5, 7, 8, 32773, 50000)),
    partial(put, "a.jpg", b"\xff\xd8\xff\xe1\xff\xff" + b"Exif\0\0MM\0*" + b"\xff" * 65_000),
    partial(put, "a.bmp", b"BM" + b"\xff" * 200),
    partial(put, "a.svg.png", "<svg xmlns='http://www.w3.org/2000/svg' width='1e9' height='1e9'/>"),
    *_specials("a.png"),
]


def _lay_pictures(folder: Path) -> None:
    _images(folder / "images")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name in ("0.png", "1.jpg"):
            tar.add(folder / "images" / name, f"in/{name}")


def _read_pictures(folder: Path) -> None:
    pictures = open_pictures(folder)
    for index in range(len(pictures)):
        pictures.open(index)


def _tar(members: Sequence[tuple[str, bytes, str, int]], folder: Path) -> None:
    """A shard of members: name, type, what a link leads to, stated size."""
    headers = b""
    for name, kind, link, size in members:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, size
        headers += info.tobuf(tarfile.GNU_FORMAT)
    put("shard.tar", headers + bytes(10_240), folder)


_CRAFTED_PICTURES: list[Craft] = [
    partial(_tar, [("a.png", b"2", "/etc/passwd", 0), ("b.png", b"1", "../../x", 0), ("../../c.png", b"0", "", 512)]),
    partial(_tar, [("a.png", b"0", "", 2**40), ("/etc/b.png", b"0", "", 10)]),
    partial(_tar, [(f"{row}.png", b"S", "", 8**10) for row in range(3)]),
    partial(_tar, [("x", b"x", "", 2**33), ("y", b"L", "", 2**33), ("a" * 90, b"K", "", 2**40)]),
    partial(_tar, [("a.png", b"3", "", 0), ("b.png", b"6", "", 0), ("c.png", b"5", "", 0)]),
    *_specials("shard.tar", "images/0.png"),
]


# --- models ---

SMALL: dict[str, Any] = {"dim": 8, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "feedforward": 8}
SMALL |= {"num_queries": 4, "num_classes": 2}
CATEGORIES = (Category(1, "bolt"), Category(2, "nut"))


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build("detr-nano", backbone="resnet-nano", stride=16, **SMALL)


def _lay_model(folder: Path) -> None:
    checkpoint.save_model(folder / "model", _model(), preset="detr-nano", categories=CATEGORIES, about={"AP": 0.5})


def _lay_huggingface(folder: Path) -> None:
    convert.to_huggingface(models.build("detr-r18", **SMALL), folder / "model", categories=CATEGORIES)
    # The backbone's weights are nearly all of the file, and would cost nearly all of the time.
    save_file({"a": torch.zeros(4)}, folder / "model" / "model.safetensors")


def _lay_run(folder: Path) -> None:
    state = checkpoint.TrainingState({"optimizer": {"0.step": torch.tensor(3.0)}}, {"step": 3, "best": None})
    for name in ("last", "within"):
        place = folder / "checkpoints" / name
        checkpoint.save_training(place, _model(), state, preset="detr-nano", categories=CATEGORIES)
    (folder / "recipe.toml").write_text(recipe.to_toml(recipe.Recipe()))
    status = {"state": "training", "step": 3, "total_steps": 9, "seconds": 1.5, "saved": 3}
    (folder / "status.json").write_text(json.dumps(status))
    counts = {"images": 3, "boxes": 4}
    data = {"path": "here", "splits": {"train": counts, "val": counts}, "categories": [[1, "bolt"]]}
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "environment.json").write_text('{"detrkit": "0.1.0"}')


def _read_model(folder: Path) -> None:
    sources.open_model(folder / "model")


def _read_run(folder: Path) -> None:
    sources.open_model(folder)
    found, _ = recovery.newest(folder)
    if found is not None:
        checkpoint.load_training(found)


def config(changes: dict[str, Any], folder: Path) -> None:
    """A model folder whose config says something else."""
    file = folder / _CONFIG
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"config": content["config"] | changes}))


def _about(changes: dict[str, Any], folder: Path) -> None:
    """A model folder that says something else of itself."""
    file = folder / _CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


_WEIGHTS = "model/model.safetensors"
_CONFIG = "model/config.json"


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_TENSOR: dict[str, Any] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
_ODD_TENSORS = [
    *(struct.pack("<Q", length) + b"{}" for length in (0, 1, 3, 2**31, 2**63, 2**64 - 1)),
    *(_safetensors({"a": _TENSOR | {"dtype": kind}}, bytes(4)) for kind in ("F8_E8M0", "no", 1)),
    *(_safetensors({"a": _TENSOR | {"shape": one}}, bytes(4)) for one in ([2**62, 4], [-1], [10**30], ["1"], [1] * 99)),
    *(_safetensors({"a": _TENSOR | {"data_offsets": pair}}, bytes(4)) for pair in ([4, 0], [0, 2**63], [-4, 0], [0])),
    _safetensors(b'{"a":' * 50_000),
    _safetensors({"__metadata__": {"a": "b" * 100_000}}),
    _safetensors({"__metadata__": [1]}),
    _safetensors({"\ud800": _TENSOR}, bytes(4)),
    _safetensors(b"\xff\xfe{}"),
]
_CRAFTED_MODEL: list[Craft] = [
    *(partial(config, {name: value}) for name in ("dim", "num_queries", "encoder_layers") for value in (10**9, 0, -1)),
    *(partial(config, {"num_queries": value}) for value in (10**7, 10**30, 1.5, "4", None, [4])),
    *(partial(config, {name: 10**6}) for name in ("dim", "feedforward", "decoder_layers", "query_groups", "heads")),
    *(partial(config, {"backbone": name}) for name in ("../../x", "transformers:/etc", "resnet101", "", "\0")),
    *(partial(config, {"stride": value}) for value in (0, -16, 10**9)),
    *(partial(_about, {"variant": name}) for name in ("os", "../detr", "_keys", "", None, 1, "detr.x", [], {"a": 1})),
    *(partial(_about, {"categories": value}) for value in (None, 1, [1], [[1]], [["a", "b"]] * 2)),
    *(partial(_about, {"about": value}) for value in ([1], 5, "text", {"segmentation": {"box": 1}}, {"one_shot": {}})),
    partial(_about, {"categories": [[1, "\ud800"], [2, "\u001b[2J"]]}),
    partial(_about, {"about": {"segmentation": {"attention": "joint", "box": True, "x": 1}}}),
    partial(_about, {"about": {"one_shot": {"options": {"width": 10**9, "cells": 10**6}}}}),
    partial(_about, {"categories": [[row, "a"] for row in range(100_000)]}),
    *(partial(put, _CONFIG, "[" * count) for count in (900, 100_000)),
    *(partial(put, _CONFIG, "[" * count + "]" * count) for count in (900, 100_000)),
    partial(put, _CONFIG, '{"format": 1, "variant": ' + "9" * 5000 + "}"),
    *(partial(put, _WEIGHTS, content) for content in _ODD_TENSORS),
    *_specials(_CONFIG, _WEIGHTS),
]
_ODD_JSON = ("", "[]", "{}", "[" * 100_000, "[" * 900 + "]" * 900, "9" * 5000, '{"position": {"step": 1e999}}')
_CRAFTED_RUN: list[Craft] = [
    *(
        partial(put, f"checkpoints/{place}/{name}", content)
        for place in ("last", "within")
        for name in ("checksums.json", "training.json", "config.json")
        for content in (*_ODD_JSON, '{"crc32": {"../../x": [1, "a"]}}', '{"crc32": {"config.json": [1e999, "a"]}}')
    ),
    *(partial(put, f"checkpoints/{place}/optimizer.safetensors", _ODD_TENSORS[1]) for place in ("last", "within")),
    *(
        partial(put, f"{name}.json", content)
        for name in ("status", "data", "environment")
        for content in (*_ODD_JSON, '{"splits": 1, "step": "x"}', '{"splits": {"a": 1}, "step": 1e999, "state": []}')
    ),
    *_specials("status.json", "recipe.toml", "checkpoints/within/training.json", "checkpoints/last/checksums.json"),
]


# --- weights of others ---


class _Harm:
    """Its pickle runs a command wherever it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch HARMED",)


def _lay_weights(folder: Path) -> None:
    (folder / "files").mkdir()
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int64)}
    torch.save({"model": state, "args": argparse.Namespace(nheads=8)}, folder / "files" / "new.pth")
    torch.save(state, folder / "files" / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "files" / "a.safetensors")
    np.savez_compressed(folder / "files" / "a.npz", **{name: value.numpy() for name, value in state.items()})


def _read_weights(folder: Path) -> None:
    """Every file has to be read, or refused by its own name; the last refusal stands for all."""
    refusal: Error | None = None
    before = Path.cwd()
    os.chdir(folder)
    try:
        for path in sorted((folder / "files").iterdir()):
            try:
                for tensor in read_weight_file(path).values():
                    tensor.isfinite().all()
            except Error as error:
                _check_named(path, error)
                refusal = error
    finally:
        os.chdir(before)
    assert not (folder / "HARMED").exists(), "code was executed"
    if refusal is not None:
        raise refusal


def _saved(content: object, modern: bool, folder: Path) -> None:
    torch.save(content, folder / "files" / "new.pth", _use_new_zipfile_serialization=modern)


def stretched(folder: Path) -> None:
    """One number that claims to be ten billion of them."""
    torch.save({"a.weight": torch.zeros(1).expand(100_000, 100_000)}, folder / "files" / "new.pth")


def _array_header(count: int) -> bytes:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    return head.getvalue()


def zip_bomb(name: str, inner: str, folder: Path) -> None:
    """Zeros, of which three megabytes become three gigabytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(_array_header(3 << 28)) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    packed, size = first + piece * (3 << 6) + packer.flush(), 128 + (3 << 30)
    about = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(packed), size, len(inner), 0)
    entry = b"PK\1\2" + struct.pack("<H", 20) + about + bytes(14) + inner.encode()
    local = b"PK\3\4" + about + inner.encode() + packed
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)
    put(f"files/{name}", local + entry + end, folder)


def _lying_npy(folder: Path) -> None:
    """An array of a few bytes whose header claims a terabyte."""
    with zipfile.ZipFile(folder / "files" / "a.npz", "w") as archive:
        archive.writestr("a.npy", _array_header(1 << 38) + bytes(64))


_PICKLES = (
    pickle.dumps(_Harm()),
    pickle.dumps({"model": _Harm()}, protocol=2),
    b"cos\nsystem\n(S'touch HARMED'\ntR.",
    b'cbuiltins\nexec\n(S\'open("HARMED","w")\'\ntR.',
    b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b".",
    b"\x80\x02]" + b"]a" * 100_000 + b".",
    b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
    b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"\xff.",
    b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    b"\x80\x02I" + b"9" * 100_000 + b"\n.",
)
_CRAFTED_WEIGHTS: list[Craft] = [
    *(partial(_saved, content, modern) for content in ({"model": _Harm()}, _Harm()) for modern in (True, False)),
    stretched,
    _lying_npy,
    *(partial(put, "files/old.pth", content) for content in _PICKLES),
    partial(zip_bomb, "a.npz", "a.npy"),
    partial(zip_bomb, "new.pth", "archive/data.pkl"),
    partial(_saved, {"a": [1, 2]}, True),
    partial(_saved, {1: torch.ones(1), None: torch.ones(1)}, True),
    *(partial(put, "files/a.safetensors", content) for content in _ODD_TENSORS),
    *_specials("files/a.safetensors", "files/new.pth", "files/a.npz"),
]
_THEIRS: list[Craft] = [
    *(
        partial(_about, {name: value})
        for name in ("d_model", "decoder_layers", "id2label", "backbone_config", "architectures", "model_type")
        for value in (10**9, -1, "text", [], {}, None, {"0": 1, "1": [2]}, 1e300)
    ),
    *(
        partial(put, "model/model.safetensors.index.json", json.dumps({"weight_map": value}))
        for value in (None, [], {"a": "../x.bin"}, {"a": "/etc/passwd"}, {"a": ".."}, {"a": 1}, {"a": "x" * 9999})
    ),
    *(
        partial(put, "model/preprocessor_config.json", text)
        for text in (*_ODD_JSON, '{"size": {"height": 1e999, "width": 1}}', '{"image_mean": [null, 1, 1e999]}')
    ),
    *(partial(put, _CONFIG, text) for text in _ODD_JSON),
    *_specials(_WEIGHTS, _CONFIG),
]


# --- recipes and results ---


def _lay_recipe(folder: Path) -> None:
    (folder / "recipe.toml").write_text(recipe.to_toml(recipe.Recipe()))


def _read_recipe(folder: Path) -> None:
    recipe.read(folder / "recipe.toml")
    recipe.task_of(folder / "recipe.toml")


_RECIPES = (
    *("", "x", "[data", "a = " + "[" * 100_000, "a = " + "[" * 300 + "]" * 300, "a" + ".a" * 50_000 + " = 1"),
    *("[optimization]\nlr = nan", "[optimization]\nlr = -inf", "[optimization]\nepochs = " + "9" * 5000),
    *("[optimization]\nepochs = " + "9" * 400, "[optimization]\nlr = " + "9" * 400, "[optimization]\nlr = 1e999"),
    *("[data]\nlimit = true", "data = 5", "[[data]]\nlimit = 5", "[data.limit]\na = 1", "task = [1]"),
    *('[model]\nmodel = "' + "x" * 500_000 + '"', "[" + "x" * 500_000 + "]\na = 1", "[data]\n" + "x" * 9999 + " = 1"),
    *("[model]\narchitecture = {a = [[[[1]]]]}", "[data]\ntrain_split = 2020-01-01", "[data]\nlimit = 2020-01-01"),
    *("x = 1979-05-27T07:32:00-99:99", "[model]\narchitecture = {a = 0x" + "f" * 9999 + "}", 'a = """\n'),
    *("[run]\nseed = 99999999999999999999999", "[optimization]\nschedule = []", "[optimization]\nschedule = {}"),
    *("task = 'x'", "[data]\nlimit = 0x" + "f" * 9999),
)
_CRAFTED_RECIPE: list[Craft] = [
    *(partial(put, "recipe.toml", text) for text in _RECIPES),
    partial(put, "recipe.toml", b"\xff\xfe"),
    *_specials("recipe.toml"),
]


def _lay_results(folder: Path) -> None:
    _lay_coco(folder)
    (runs,) = RunLengths.encode(np.ones((1, *SIZE), bool)).to_coco()
    entries = [
        {"image_id": image, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5, "segmentation": runs} | change
        for image, change in ((1, {}), (2, {}), (2, {"score": 1}))
    ]
    (folder / "results").mkdir()
    (folder / "results" / "found.json").write_text(json.dumps(entries))


def _read_results(folder: Path) -> None:
    (annotations,) = formats.read(folder, masks="any").values()
    evaluate(annotations, read_results(folder / _FOUND, annotations), voc=True)


def _found(changes: Sequence[dict[str, Any]], folder: Path) -> None:
    """Results with other fields."""
    first = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    put(_FOUND, json.dumps([first | change for change in changes]), folder)


_FOUND = "results/found.json"
_CRAFTED_RESULTS: list[Craft] = [
    *(partial(_found, [{"segmentation": mask}]) for mask in [*_RUNS[:19], *_FAR[:2]]),
    *(
        partial(_found, [{name: value}])
        for name in ("image_id", "category_id", "score", "bbox")
        for value in (math.inf, math.nan, 10**30, "1", None, [1e300] * 4, [math.nan] * 4, -5)
    ),
    *(partial(put, _FOUND, text) for text in (*_ODD_JSON, "[1]", "[" + "9" * 5000 + "]")),
    partial(put, _FOUND, "[{}" + ",{}" * 50_000 + "]"),
    *_specials(_FOUND),
]


KINDS = {
    "coco": Kind(
        _lay_coco, ["all.json"] * 3 + ["images/0.png"], _CRAFTED_COCO, _read_data, ["inspect", "{}"], _HEAVY_COCO
    ),
    "panoptic": Kind(
        _lay_panoptic,
        ["panoptic_all.json"] * 3 + ["panoptic_all/1.png"],
        _specials("panoptic_all/1.png", "panoptic_all.json"),
        _read_data,
        ["doctor", "{}"],
    ),
    "voc": Kind(
        _lay_voc, [_XML, "Annotations/1.xml", "ImageSets/Main/train.txt"], _CRAFTED_VOC, _read_data, ["inspect", "{}"]
    ),
    "yolo": Kind(
        _lay_yolo,
        ["data.yaml", "list.txt", "labels/0.txt", "images/0.png"],
        _CRAFTED_YOLO,
        _read_data,
        ["doctor", "{}"],
    ),
    "darknet": Kind(
        _lay_darknet,
        ["obj.data", "obj.data", "obj.names", "train.txt"],
        _CRAFTED_DARKNET,
        _read_data,
        ["inspect", "{}"],
    ),
    "instances": Kind(
        _lay_instances,
        ["masks/0.png", "masks/1_mask.png", "images/0.png", "classes.txt"],
        _specials("masks/0.png", "classes.txt", "images/0.png"),
        _read_data,
        ["inspect", "{}"],
    ),
    "images": Kind(_lay_images, _FILES, _CRAFTED_IMAGES, _read_images, (), _HEAVY_IMAGES),
    "pictures": Kind(_lay_pictures, ["shard.tar", "images/0.png"], _CRAFTED_PICTURES, _read_pictures),
    "model": Kind(_lay_model, [_CONFIG, _CONFIG, _WEIGHTS], _CRAFTED_MODEL, _read_model, ["inspect", "{}/model"]),
    "run": Kind(
        _lay_run,
        [
            *(f"checkpoints/last/{name}" for name in ("config.json", "checksums.json", "training.json")),
            *(f"checkpoints/within/{name}" for name in ("config.json", "training.json", "model.safetensors")),
            *("status.json", "data.json", "environment.json"),
        ],
        _CRAFTED_RUN,
        _read_run,
        ["inspect", "{}"],
    ),
    "theirs": Kind(_lay_huggingface, [_CONFIG, _CONFIG, _WEIGHTS], _THEIRS, _read_model, ["inspect", "{}/model"]),
    "weights": Kind(
        _lay_weights,
        [f"files/{name}" for name in ("new.pth", "old.pth", "a.safetensors", "a.npz")],
        _CRAFTED_WEIGHTS,
        _read_weights,
        ["inspect", "{}/files/new.pth"],
    ),
    "recipe": Kind(
        _lay_recipe,
        ["recipe.toml"],
        _CRAFTED_RECIPE,
        _read_recipe,
        ["train", "{}", "--out", "{}/run", "--recipe", "{}/recipe.toml"],
    ),
    "results": Kind(
        _lay_results,
        [_FOUND, _FOUND, "all.json"],
        _CRAFTED_RESULTS,
        _read_results,
        ["evaluate", "{}/results/found.json", "{}", "--split", "all"],
    ),
}

WITH_NAMES = ("coco", "panoptic", "voc", "yolo")
"""Kinds whose files name images."""


def cases(names: Sequence[str], numbers: range, folder: Path) -> Iterator[Case]:
    """Damaged inputs of some kinds, each in a folder of its own, which is deleted when the next one is asked for."""
    for name in names:
        kind, sound = KINDS[name], folder / f"{name}-sound"
        sound.mkdir()
        kind.lay(sound)
        for number in numbers:
            place = folder / f"{name}-{number}"
            yield case(kind, number, name, sound, place)
            shutil.rmtree(place)

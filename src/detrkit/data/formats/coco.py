"""COCO JSON (Lin et al., ECCV 2014): one file a split with the lists images, annotations and categories.

Boxes are x, y, width, height in pixels, 0-based. Layouts: `annotations/instances_{split}.json` with images in
`{split}/`, `{split}2017/`, `images/{split}/`, `images/` or beside; `{split}/_annotations.coco.json` (Roboflow); any
single JSON with those lists. Polygons and run-length masks are passed over without being parsed, unless masks are
asked for.

Writing keeps everything that `Annotations` holds, masks as compressed run lengths; `difficult`, which COCO does not
know, is written under that name, and categories of stuff say so as panoptic files do (`isthing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from detrkit.data.annotations import Annotations
from detrkit.data.files import CopyImages, place_images
from detrkit.data.formats import Source
from detrkit.data.formats import _coco_layout as layout
from detrkit.data.formats._coco_columns import Collector
from detrkit.data.formats._coco_reading import read_through
from detrkit.data.formats._coco_writing import object_item, write_lists
from detrkit.data.problems import Problems
from detrkit.data.segmentations import Segmentations

EXPECTED = (
    "a JSON file with images, annotations and categories, such as annotations/instances_train.json or "
    "train/_annotations.coco.json"
)
PRECEDENCE = 3


def recognise(root: Path) -> dict[str, Source]:
    """Find COCO files in a folder, its `annotations` folder and its folders of splits; or take a single file.

    Where official names stand beside others (`captions_…`), the `instances_…` files are meant.

    Raises:
        DataError: two files could be the same split.
    """
    return layout.sources(root, "coco", "objects", layout.OBJECTS)


def read(source: Source, *, check_files: bool = True, masks: bool = False) -> Annotations:
    """Read one COCO file.

    Ids of images and categories may be any integers, also written as strings; the category table is in the order of the
    ids. Where image ids are other strings, images are numbered from 1. Two categories may share a name. `area` is kept
    where it is positive, else it is the box's. Images without `width` and `height` are measured if `check_files`.

    Args:
        source: what `recognise` found.
        check_files: whether images must exist, see `formats.read`.
        masks: whether segmentations are read: polygons, and runs of both forms.

    Raises:
        DataError: the file is not JSON, lacks a list or what an image or category must have, two images or two
            categories share an id, a file name is unsafe, or not one image exists.
    """
    collector = Collector(source.path, Problems(), Segmentations() if masks else None)
    return read_through(
        source,
        collector,
        check_files=check_files,
        remedy="Export the annotations as COCO object detection (instances).",
    )


def write(splits: Mapping[str, Annotations], out: Path, *, copy_images: CopyImages = "link") -> None:
    """Write `annotations/instances_{split}.json` and the images into `{split}/`.

    Ids of images and categories are kept; annotations are numbered from 1 within each split.
    """
    (out / "annotations").mkdir()
    for split, part in splits.items():
        place_images(part, list(part.file_names), out / split, copy_images)
        path = out / "annotations" / f"{layout.OBJECTS}{split}.json"
        write_lists(path, part, _annotation_items(part), segments=False)


def _annotation_items(annotations: Annotations) -> Iterator[dict[str, object]]:
    for index in range(len(annotations)):
        rows = annotations.rows(index)
        masks = None if annotations.masks is None else annotations.masks.encoded(rows).to_coco()
        for row in range(rows.start, rows.stop):
            item = {"id": row + 1, "image_id": int(annotations.image_ids[index]), **object_item(annotations, row)}
            if masks is not None and masks[row - rows.start]["counts"]:
                item["segmentation"] = masks[row - rows.start]
            yield item | ({"difficult": 1} if annotations.difficult[row] else {})

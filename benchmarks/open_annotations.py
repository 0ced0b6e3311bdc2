"""Claim: a COCO-sized annotation file opens in a fifth of pycocotools' time and memory, and loader workers share it.

    python benchmarks/open_annotations.py [FOLDER] [--images 118000] [--boxes 860000] [--workers 8]

Makes `FOLDER/annotations/instances_train.json` with polygons as in COCO (about 450 MB; kept and used again) and empty
image files in `FOLDER/train`, reads it in a fresh process, and forks workers that walk through all of it. Linux only.
Then `pycocotools.coco.COCO(file)` opens the same file in a fresh process, in turns, `--rounds` times each. Told are
seconds of wall clock and of CPU, peak memory with and without what importing the library costs, the memory that the
workers hold for themselves, and the ratios, of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _report import machine, parser, show

MEGABYTE = 1 << 20


def make(folder: Path, images: int, boxes: int) -> Path:
    """A file of COCO's shape: 7 boxes an image, 8 to 32 polygon corners a box, ids with gaps."""
    path = folder / "annotations" / "instances_train.json"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    path.parent.mkdir()
    names = [f"{index * 5:012}.jpg" for index in range(images)]
    for name in names:
        (folder / "train" / name).touch()
    with path.open("w") as file:
        file.write('{"info": {"description": "made"}, "licenses": [], "images": [')
        for index, name in enumerate(names):
            url = f"http://images.cocodataset.org/train2017/{name}"
            item = {"license": 3, "file_name": name, "coco_url": url, "height": 480, "width": 640, "id": index * 5}
            file.write((", " if index else "") + json.dumps(item))
        file.write('], "annotations": [')
        for index in range(boxes):
            x, y, w, h = (rng.random(4) * (300, 200, 300, 250) + (0, 0, 5, 5)).round(2).tolist()
            corners = (rng.random(2 * int(rng.integers(8, 33))) * 480).round(2).tolist()
            item = {
                "segmentation": [corners],
                "area": w * h * 0.6,
                "iscrowd": int(index % 80 == 0),
                "image_id": int(rng.integers(images)) * 5,
                "bbox": [x, y, w, h],
                "category_id": 1 + int(rng.integers(80)),
                "id": index,
            }
            file.write((", " if index else "") + json.dumps(item))
        table = [{"supercategory": "thing", "id": number, "name": f"class {number}"} for number in range(1, 81)]
        file.write('], "categories": ' + json.dumps(table) + "}")
    return path


def memory(process: int | str = "self") -> dict[str, float]:
    """Unshared and proportional memory of a process in MB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {key: int(value.split()[0]) / 1024 for key, _, value in (line.partition(":") for line in lines)}
    unshared = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return {"unshared_mb": round(unshared, 1), "proportional_mb": round(sizes["Pss"], 1)}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def walk(annotations: object) -> int:
    """What a loader worker does with the annotations: every name and every box once."""
    from detrkit.data.annotations import Annotations

    assert isinstance(annotations, Annotations)
    total = 0
    for index in range(len(annotations)):
        total += len(annotations.file_names[index]) + len(annotations.boxes[annotations.rows(index)])
    return total


def measure(path: Path, workers: int) -> dict[str, object]:
    from detrkit.data import formats

    imported = peak()
    started, busy = time.perf_counter(), time.process_time()
    annotations = formats.read(path)["train"]
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    opened, before = peak(), memory()
    arrays = sum(value.nbytes for value in vars(annotations).values() if isinstance(value, np.ndarray))
    children, reports = [], []
    ready_in, ready_out = os.pipe()
    release_in, release_out = os.pipe()
    for _ in range(workers):
        child = os.fork()
        if child == 0:
            idle = memory()["unshared_mb"]
            walk(annotations)
            os.write(ready_out, f"{memory()['unshared_mb'] - idle:.1f}\n".encode())
            os.read(release_in, 1)
            os._exit(0)
        children.append(child)
    while len(reports) < workers:
        reports += os.read(ready_in, 4096).decode().split()
    shared = [memory(child)["proportional_mb"] for child in children]
    os.write(release_out, b"x" * workers)
    for child in children:
        os.waitpid(child, 0)
    return {
        "file_mb": round(path.stat().st_size / MEGABYTE),
        "images": len(annotations),
        "boxes": len(annotations.boxes),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mb": round(opened),
        "peak_after_import_mb": round(imported),
        "peak_growth_mb": round(opened - imported),
        "arrays_mb": round((arrays + annotations.file_names.bytes.nbytes) / MEGABYTE),
        "process_after_reading": before,
        "workers": workers,
        "unshared_growth_of_each_worker_mb": [float(report) for report in reports],
        "proportional_mb_of_all_workers": round(sum(shared)),
    }


def measure_peer(path: Path) -> dict[str, object]:
    """The same of pycocotools, without workers."""
    from pycocotools.coco import COCO

    imported = peak()
    started, busy = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        opened = COCO(path)
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    return {
        "images": len(opened.imgs),
        "boxes": len(opened.anns),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_growth_mb": round(peak() - imported),
    }


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("folder", type=Path, nargs="?", help="where to make the data set; a temporary folder by default")
    flags.add_argument("--images", type=int, default=118_000)
    flags.add_argument("--boxes", type=int, default=860_000)
    flags.add_argument("--workers", type=int, default=8)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--measure", choices=("ours", "pycocotools"), help="only read, in this process")
    options = flags.parse_args()
    if options.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            return compare(Path(folder), options)
    path = options.folder / "annotations" / "instances_train.json"
    if options.measure:
        print(json.dumps(measure(path, options.workers) if options.measure == "ours" else measure_peer(path)))
        return
    compare(options.folder, options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    scale = 0.02 if options.short else 1.0
    make(folder, int(options.images * scale), int(options.boxes * scale))
    found: dict[str, list[dict[str, float]]] = {"ours": [], "pycocotools": []}
    for _ in range(options.rounds):
        for side, told in found.items():
            command = [sys.executable, __file__, str(folder), "--workers", str(options.workers), "--measure", side]
            told.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    result: dict[str, Any] = dict(found["ours"][0]) | {"ratios": {}}
    for figure in ("seconds", "cpu_seconds", "peak_growth_mb"):
        ours, theirs = (statistics.median(one[figure] for one in told) for told in found.values())
        result[figure] = ours
        result[f"{figure} of pycocotools"] = theirs
        result["ratios"][figure] = round(theirs / ours, 2)
    result |= {"rounds": options.rounds, "machine": machine(("detrkit", "numpy", "torch", "pycocotools"))}
    show(result | {"all": found} if options.json else result, options.json)


if __name__ == "__main__":
    main()

"""Say what a run, a model, weights of others or a data set is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from detrkit.cli._options import CommonOptions
from detrkit.cli._terminal import Outcome, Terminal, count, duration, share, table
from detrkit.cli._weights import weights_document, weights_lines
from detrkit.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from detrkit.data.annotations import Annotations
    from detrkit.sources import Place

CLASSES_SHOWN = 40


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Say what a run, a model, weights of others or a data set is.

    Of a model: its architecture, categories, parameters and figures. Of weights of others: whose they are, the
    architecture that they show, and what would become of each tensor. Of a data set: what was recognised, how many
    images and boxes it has, and what is wrong with it.
    """

    path: tyro.conf.Positional[str]
    """Run folder, model folder, weight file, Hugging Face folder or name on its hub, data set folder or annotation
    file."""
    annotations: str = ""
    """Format of a data set's annotations that is meant where a folder holds several, such as coco_panoptic."""


def run(options: Options, terminal: Terminal) -> Outcome:
    """Look, and describe.

    Raises:
        DataError: nothing is there, or neither a model nor a data set is recognised.
        MissingExtraError: a name on the hub, and `huggingface_hub` is not installed.
        ModelError: a damaged model, weights that are no detector's, or a name that is not on the hub.
        UsageError: a format of annotations is named that does not exist, or for a model.
    """
    name, path = options.path, Path(options.path)
    if not path.exists() and not _is_on_hub(name):
        raise DataError("There is no such file or folder", where=name, remedy="Check the path.")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError("This is neither a file nor a folder", where=name, remedy="Check the path.")
    if path.exists() and not _is_model(path):
        document = _data_document(path, options.annotations)
        return Outcome(document, text=_data_text(document))
    if options.annotations:
        raise UsageError(
            "A model has no annotations", where="--annotations", got=options.annotations, remedy="Leave it out."
        )
    from detrkit.sources import locate

    place = locate(name)
    if not place.is_ours:
        return _foreign(place)
    document = _run_document(place.path)
    if place.hub:
        document["path"] = name
    try:
        return Outcome(document, text=_run_text(document))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise DataError(
            "What the files of the run say of it cannot be understood",
            where=place.path,
            got=f"no {error}" if isinstance(error, KeyError) else error,
            remedy="One of status.json, data.json and config.json is damaged; the weights may be sound all the same.",
        ) from error


def _is_on_hub(name: str) -> bool:
    from detrkit.sources import is_on_hub

    return is_on_hub(name)


def _is_model(path: Path) -> bool:
    """Whether it is a model or a run, and no data set; both may have weights lying in their folder."""
    if path.is_file():
        from detrkit.nn.weights import ENDINGS

        return path.suffix.lower() in ENDINGS or path.name == "config.json"
    parts = ("config.json", "model/config.json", "checkpoints", "status.json")
    if any((path / part).exists() for part in parts):
        return True
    from detrkit.data import formats
    from detrkit.sources import WEIGHTS

    if not any(file.suffix in WEIGHTS for file in path.iterdir()):
        return False
    try:
        return not formats.recognise(path)
    except DataError:
        return True


def _foreign(place: Place) -> Outcome:
    from detrkit.sources import read_weights

    found = read_weights(place)
    document = {"path": place.name, "kind": "weights", **weights_document(found)}
    lines = [f"{place.name}: weights of others", *weights_lines(found, document)]
    if found.categories:
        names = _shortened([category.name for category in found.categories])
        lines.append(f"Categories    {len(found.categories)}: {names}")
    rows = [("field", "value"), *((name, str(value)) for name, value in document["config"].items())]
    return Outcome(document, text="\n".join([*lines, "", table(rows, "ll")]))


def _run_document(path: Path) -> dict[str, Any]:
    from detrkit.checkpoint import model_folder
    from detrkit.sources import open_model

    document: dict[str, Any] = {"path": path, "kind": "run" if (path / "recipe.toml").is_file() else "model"}
    for name in ("status", "data", "environment"):
        if (file := path / f"{name}.json").is_file():
            document[name] = _read(file)
    if document["kind"] == "run" and not (path / "checkpoints").is_dir() and not (path / "model").is_dir():
        return {**document, "model": None}  # it has not come to its first checkpoint
    config = _read(model_folder(path) / "config.json")
    if "backbone" in config and "variant" not in config:
        return {**document, "model": None, "backbone": {"folder": model_folder(path), **config}}
    saved = open_model(path)
    numbers: dict[str, int] = {}
    for name, parameter in (saved.segmenter or saved.model).named_parameters():
        part = name.removeprefix("detector.").partition(".")[0]
        numbers[part] = numbers.get(part, 0) + parameter.numel()
    document["model"] = {
        "folder": model_folder(path),
        "written_by": config.get("detrkit"),
        "variant": saved.variant,
        "preset": saved.preset,
        "config": config["config"],
        "categories": [category.to_json() for category in saved.categories],
        "parameters": {"all": sum(numbers.values()), **numbers},
        "about": saved.about,
    }
    return document


def _read(file: Path) -> Any:
    from detrkit.documents import read_json

    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise DataError("The file cannot be read", where=file, got=error) from error


def _run_text(document: dict[str, Any]) -> str:
    lines = [f"{document['path']}: a {document['kind']}"]
    if status := document.get("status"):
        of = f"step {status['step']:,} of {status['total_steps']:,}"
        lines.append(f"State       {status['state']}, {of}, {duration(float(status['seconds']))}")
    if data := document.get("data"):
        splits = ", ".join(f"{name} {count(part['images'], 'image')}" for name, part in data["splits"].items())
        lines.append(f"Data        {data['path']} ({splits})")
    if backbone := document.get("backbone"):
        lines.append(f"Backbone    {backbone['backbone']} of {backbone['preset']}, alone, in {backbone['folder']}")
        return "\n".join([*lines, *_pretraining(backbone["about"])])
    if (model := document["model"]) is None:
        return "\n".join([*lines, "Model       none yet"])
    parameters = dict(model["parameters"])
    total = parameters.pop("all")
    lines += [
        f"Model       {model['preset'] or 'no preset'}, variant {model['variant']}, in {model['folder']}",
        f"Parameters  {total:,}: " + ", ".join(f"{name} {number:,}" for name, number in parameters.items()),
        f"Categories  {len(model['categories'])}: {_shortened([name for _, name, *_ in model['categories']])}",
    ]
    lines += [*_pretraining(model["about"]), *_by_example(model["about"]), *_masks(model["about"])]
    figures = model["about"].get("metrics", {})
    names = ("AP", "AP50", "AP75", "AP50_seen", "AP50_unseen", "mask_AP", "mask_AP50", "PQ")
    known = [f"{name} {share(figures[name])}" for name in names if figures.get(name) is not None]
    if known:
        lines.append(f"Validation  {', '.join(known)}, epoch {model['about'].get('epoch', '?')}")
    rows = [("field", "value"), *((name, str(value)) for name, value in model["config"].items())]
    return "\n".join([*lines, "", table(rows, "ll")])


def _pretraining(about: dict[str, Any]) -> list[str]:
    """What a model that was only pre-trained says of it."""
    if not isinstance(pretext := about.get("pretext"), dict):
        return []
    figures = about.get("metrics", {})
    names = ("recall50", "recall75", "consistency", "retrieval", "chance", "feature_rank")
    known = [f"{name} {share(figures[name])}" for name in names if figures.get(name) is not None]
    lines = [
        f"Pre-trained by {pretext.get('task', '?')}, on {count(pretext.get('images', 0), 'image')} without labels; "
        "no detector yet"
    ]
    return lines + ([f"Held out    {', '.join(known)}, epoch {about.get('epoch', '?')}"] if known else [])


def _by_example(about: dict[str, Any]) -> list[str]:
    """What a model that finds by example says of it."""
    if not isinstance(told := about.get("one_shot"), dict):
        return []
    calibrated = "its scores are probabilities" if told.get("calibration") else "its scores are not calibrated"
    return [f"By example  it finds what it is shown; trained on {_shortened(told.get('seen', []))}; {calibrated}"]


def _masks(about: dict[str, Any]) -> list[str]:
    """What a model with a mask head says of it."""
    if not isinstance(told := about.get("segmentation"), dict):
        return []
    box = ", and it is told the box" if told.get("box") else ""
    return [f"Masks       a mask head, its attention maps normalised {told.get('attention', '?')}{box}"]


def _data_document(path: Path, annotations: str) -> dict[str, Any]:
    import numpy as np

    from detrkit.data import formats

    sources = formats.recognise(path, annotations=annotations)
    found = formats.read(path, masks="any", annotations=annotations)
    order = [name for name in ("train", "val", "test") if name in found]
    splits = {name: found[name] for name in dict.fromkeys([*order, *found])}
    document: dict[str, Any] = {"path": path, "kind": "data", "splits": {}}
    for name, part in splits.items():
        sizes = part.image_sizes[(part.image_sizes > 0).all(1)]
        boxes = np.bincount(part.labels, minlength=len(part.categories))
        images = np.diff(part.offsets)
        document["splits"][name] = {
            "format": sources[name].format,
            "from": sources[name].path,
            "summary": part.summary(),
            "images": len(part),
            "boxes": len(part.boxes),
            "crowd": int(part.crowd.sum()),
            "masks": 0 if part.masks is None else int(part.masks.known.sum()),
            "things": _counted(part, boxes, is_thing=True),
            "stuff": _counted(part, boxes, is_thing=False),
            "most_boxes": int(images.max(initial=0)),
            "image_sizes": [sizes.min(0).tolist(), sizes.max(0).tolist()] if len(sizes) else [],
            "boxes_of": {category.name: int(number) for category, number in zip(part.categories, boxes, strict=True)},
            "problems": part.problems.counts,
            "problem_lines": list(part.problems.lines()),
        }
    return document


def _counted(part: Annotations, boxes: np.ndarray, *, is_thing: bool) -> dict[str, int]:
    """How many classes of things or of stuff there are, and how many objects of them."""
    chosen = [row for row, category in enumerate(part.categories) if category.is_thing == is_thing]
    return {"classes": len(chosen), "boxes": int(boxes[chosen].sum())}


def _data_text(document: dict[str, Any]) -> str:
    splits = document["splits"]
    formats = " and ".join(sorted({part["format"] for part in splits.values()}))
    lines = [f"{document['path']}: a data set, format {formats}"]
    for name, part in splits.items():
        lines += ["", f"{name}: {part['summary']}", f"  from {part['from']}"]
        if part["image_sizes"]:
            (low_h, low_w), (high_h, high_w) = part["image_sizes"]
            lines.append(f"  heights {low_h} to {high_h}, widths {low_w} to {high_w} pixels")
        if part["boxes"]:
            lines.append(f"  at most {count(part['most_boxes'], 'box', 'boxes')} in an image")
        if part["masks"]:
            lines.append(f"  masks of {part['masks']:,} of {count(part['boxes'], 'box', 'boxes')}")
        if part["stuff"]["classes"]:
            for kind in ("things", "stuff"):
                classes, boxes = (
                    count(part[kind]["classes"], "class", "classes"),
                    count(part[kind]["boxes"], "box", "boxes"),
                )
                lines.append(f"  {kind}: {boxes} of {classes}")
        lines += [f"  {line}" for line in part["problem_lines"]]
    names = list(dict.fromkeys(name for part in splits.values() for name in part["boxes_of"]))
    if names:
        rows = [[name, *(f"{part['boxes_of'].get(name, 0):,}" for part in splits.values())] for name in names]
        lines += ["", table([["boxes of", *splits], *rows[:CLASSES_SHOWN]])]
        if len(rows) > CLASSES_SHOWN:
            lines.append(f"and {len(rows) - CLASSES_SHOWN} more; --json lists all")
    return "\n".join(lines)


def _shortened(names: list[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

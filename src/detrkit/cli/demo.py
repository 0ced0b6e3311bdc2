"""See it work: detect handwritten digits on photographs, nothing to download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.cli._figures import figures_document, per_class_text
from detrkit.cli._options import CommonOptions, Switch
from detrkit.cli._terminal import Outcome, Terminal, count, duration, share, shell
from detrkit.errors import ModelError, UsageError
from detrkit.training import recipe as recipes

if TYPE_CHECKING:
    from detrkit.data.annotations import Annotations
    from detrkit.evaluation.run import Metrics
    from detrkit.structures import Detections

MODEL = Path(__file__).parent.parent / "assets" / "digits"
"""The model folder that comes with the package."""

RECIPE = "digits"
"""The recipe that it was trained with."""

VALIDATION_IMAGES = 60
SHOWN, COLUMNS, LONGEST_SIDE = 12, 4, 420


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """See it work: detect handwritten digits on photographs, nothing to download.

    Makes a small data set (needs scikit-learn: pip install 'detrkit[demo]'), lets the detector that comes with the
    package find the digits in images that it never saw, and writes figures and pictures.
    """

    out: Path = Path("runs/demo")
    """Folder to write into."""
    images: int = 100
    """Test images to make."""
    train: Switch = False
    """Train the detector that comes with the package a little further, to see a training."""
    train_images: int = 600
    """Images to train on, with --train."""


def run(options: Options, terminal: Terminal) -> Outcome:
    """Make the data, detect, and show.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ModelError: the installation lacks the model.
        UsageError: a number of images that makes no sense, or an output folder that holds something else.
    """
    from detrkit.data import formats
    from detrkit.evaluation import evaluate, write_report
    from detrkit.predict import load
    from detrkit.training.validation import detect

    began = terminal.clock()
    _check(options)
    data = _make_data(options, terminal)
    model = _train(options, data, terminal) if options.train else MODEL
    (annotations,) = formats.read(data, "test").values()
    detector = load(model)
    with terminal.counting(len(annotations), "Detecting") as tick:
        detections = detect(detector, annotations, ensemble=True, on_image=tick)
    metrics = evaluate(annotations, detections, voc=True)
    report = options.out / "report"
    write_report(metrics, annotations, detections, report, title="Handwritten digits")
    picture = options.out / "digits.jpg"
    _draw(annotations, detections, metrics.threshold, picture)
    document = {
        "model": model,
        "data": data,
        "picture": picture,
        "report": report / "report.html",
        **figures_document(metrics),
    }
    return Outcome(document, text=_text(metrics, options, model, data, terminal.clock() - began))


def _check(options: Options) -> None:
    for flag, number in (("--images", options.images), ("--train-images", options.train_images)):
        if number < 1:
            raise UsageError(f"Bad value for {flag}", got=number, expected="at least 1")
    if not (MODEL / "config.json").is_file():
        raise ModelError(
            "This installation lacks the demo's detector",
            where=MODEL,
            remedy="Install detrkit anew: pip install detrkit",
        )
    if options.train:
        recipes.find(RECIPE)
        if (options.out / "run").exists():
            raise UsageError(
                "A demo was trained here before", where=options.out / "run", remedy="Name another --out, or delete it."
            )


def _make_data(options: Options, terminal: Terminal) -> Path:
    """The data set; the one that an earlier demo made, where it has the same size."""
    from detrkit.data.digits import make_digits

    data = options.out / "data"
    train, val = (options.train_images, VALIDATION_IMAGES) if options.train else (0, 0)
    counts = {"train": train, "val": val, "test": options.images}
    if all((data / name).is_dir() and len(list((data / name).iterdir())) == number for name, number in counts.items()):
        return data
    terminal.note(f"Making {count(sum(counts.values()), 'photograph')} with handwritten digits …")
    make_digits(data, train=train, val=val, test=options.images)
    return data


def _train(options: Options, data: Path, terminal: Terminal) -> Path:
    from detrkit.cli._progress import training_progress
    from detrkit.training.run import train

    recipe = recipes.read(RECIPE)
    with training_progress(terminal, recipe.run.evaluate_every) as listener:
        return train(data, out=options.out / "run", recipe=recipe, init=str(MODEL), on_event=listener).folder


def _draw(annotations: Annotations, detections: list[Detections], threshold: float, file: Path) -> None:
    """Some images of the split, the same ones each time, with what was found in them."""
    import numpy as np

    from detrkit.visualize import draw, mosaic

    chosen = np.unique(np.linspace(0, len(annotations) - 1, min(SHOWN, len(annotations))).astype(int)).tolist()
    pictures = [
        draw(annotations.path(index), detections[index], threshold=threshold, longest_side=LONGEST_SIDE)
        for index in chosen
    ]
    mosaic(pictures, COLUMNS).save(file, quality=90)


def _text(metrics: Metrics, options: Options, model: Path, data: Path, seconds: float) -> str:
    figures = ", ".join(f"{name} {share(metrics.figures[name])}" for name in ("AP", "AP50", "AP75"))
    out, page = options.out, options.out / "report" / "report.html"
    seen = f"{count(metrics.boxes, 'digit')} in {count(metrics.images, 'image')} that the detector never saw"
    return f"""\
{per_class_text(metrics)}

{figures} on {seen}, in {duration(seconds)}

Look at:
  {out / "digits.jpg"!s:<{len(str(page))}}  what it found
  {page}  curves, confusions, best and worst images

Next:
  detrkit predict {shell(model)} {shell(data / "test")} --ensemble --out {shell(out / "found")}
  detrkit inspect YOUR_DATA                    a folder in COCO, Pascal VOC or YOLO format
  detrkit train YOUR_DATA --out runs/mine      a detector of your own"""

"""Turn weights of others into a model folder, or a model into a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from detrkit.cli._options import CommonOptions, Switch
from detrkit.cli._terminal import Outcome, Terminal, shell
from detrkit.cli._weights import Found, flag, weights_document, weights_lines
from detrkit.documents import read_text
from detrkit.errors import DataError, UsageError

if TYPE_CHECKING:
    from detrkit.structures import Category


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Turn weights of others into a model folder, or a model into a Hugging Face folder.

    Official checkpoints of DETR, Conditional DETR and UP-DETR are understood, and folders of the transformers library,
    each with its mask head where it has one.
    The architecture is read off the tensors; each must find its place, or the reason why it has none is said. Labels of
    official models are the ids of the data set itself, so that the categories say which of them are used: 91 for COCO,
    of which 80 are.
    """

    weights_or_folder: tyro.conf.Positional[str]
    """File of an official repository (.pth) or the same tensors as .safetensors or .npz, a folder with one such file,
    Hugging Face folder or name on its hub; to write for Hugging Face also a run or a model folder."""
    out: tyro.conf.Positional[Path]
    """Folder to make."""
    to: Literal["detrkit", "huggingface"] = "detrkit"
    """What to make: a model folder, or one that the transformers library loads."""
    report: Switch = False
    """Say of every tensor what became of it, not only of those that were not simply kept."""
    categories: str = ""
    """Where the names of the categories come from: an annotated data set, or a text file with one name a line, from
    label 0 on. Empty: from the Hugging Face folder, else COCO's where there are 91, or 250 with stuff, else numbers."""
    dilated: Switch = False
    """It is a DC5 model, where its file does not say so; tensors do not show it."""
    heads: int = 0
    """Attention heads, which tensors do not show; 0: as its file says, else 8."""
    mask_attention: Literal["usual", "joint", "per-head"] = "usual"
    """Over what a mask head normalises its attention maps, which tensors do not show; usual: joint, and per-head for
    official weights of a pre-norm model, as UP-DETR's are."""
    half: Switch = False
    """Store the weights of a model folder in 16 bits."""
    timm: Switch = False
    """In a Hugging Face folder name the backbone's tensors as timm does, which a DC5 model needs."""


def run(options: Options, terminal: Terminal) -> Outcome:
    """Convert and write.

    Raises:
        DataError: categories that cannot be read.
        MissingExtraError: a name on the hub, and `huggingface_hub` is not installed.
        ModelError: a file that cannot be read, that holds no such model, or a model that has no place in transformers.
        UsageError: an output folder that holds something, categories that do not fit, or flags that the model's own
            config answers.
    """
    out = options.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError("The output folder is not empty", where=out, remedy="Name a new folder.")
    if options.half and options.to == "huggingface":
        raise UsageError("Hugging Face folders are written in 32 bits", where="--half", remedy="Leave it out.")
    found = _open(options)
    config: Any = found.model.config
    categories = found.categories
    if options.categories or not categories:
        categories = _categories(options.categories, config.num_classes)
    _write(options, found, categories)
    document = {
        "model": out,
        **weights_document(found),
        "format": options.to,
        "categories": [category.to_json() for category in categories],
    }
    use = f"Use it:  detrkit predict {shell(out)} IMAGES --out found"
    if options.to == "huggingface":
        use = f"Use it:  transformers.{_auto_class(found)}.from_pretrained({str(out)!r})"
    lines = weights_lines(found, document, whole=options.report)
    return Outcome(document, text="\n".join([*lines, f"Written       {out}", use]))


def _auto_class(found: Found) -> str:
    """The class of `transformers` that loads what was written."""
    if found.segmenter is None:
        return "AutoModelForObjectDetection"
    from detrkit import models

    module: Any = models.variant(found.variant)
    return f"{module.HUGGINGFACE.family}ForSegmentation"


def _open(options: Options) -> Found:
    """What is to be converted."""
    from detrkit import sources

    place = sources.locate(options.weights_or_folder)
    overrides: dict[str, Any] = {"dilated": True} if options.dilated else {}
    if options.heads:
        overrides["heads"] = options.heads
    if options.mask_attention != "usual":
        overrides["mask_attention"] = options.mask_attention
    saved = sources.open_model(place.path) if place.is_ours else None
    if overrides and place.path.is_dir():
        raise UsageError(
            "The config beside the weights says this already",
            where=place.name,
            got=", ".join(map(flag, overrides)),
            remedy="Leave it out.",
        )
    if saved is None:
        found = sources.read_weights(place, **overrides)
        sources.refuse_plain_dc5(place, found)
        return found
    if options.to == "detrkit":
        raise UsageError("This is a model of detrkit already", where=place.name, remedy="Say --to huggingface.")
    return saved


def _write(options: Options, found: Found, categories: tuple[Category, ...]) -> None:
    from detrkit.checkpoint import save_model
    from detrkit.convert import to_huggingface
    from detrkit.holders import save_segmenter

    if options.to == "huggingface":
        model = found.model if found.segmenter is None else found.segmenter
        to_huggingface(model, options.out, categories=categories, timm=options.timm)
        return
    about = {"converted_from": Path(options.weights_or_folder).name, "origin": found.origin}
    described: dict[str, Any] = {"preset": found.preset, "categories": categories, "about": about, "half": options.half}
    if found.segmenter is None:
        save_model(options.out, found.model, **described)
    else:
        save_segmenter(options.out, found.segmenter, **described)


def _categories(source: str, num_classes: int) -> tuple[Category, ...]:
    """The table of a model whose labels are the ids of its data set."""
    from detrkit import sources
    from detrkit.structures import Category

    if not source:
        return sources.unnamed(num_classes)
    known = _known(source)
    if max(known, default=0) >= num_classes:
        raise UsageError(
            "The categories do not fit the model",
            where=source,
            got=f"an id or line number {max(known)}",
            expected=f"below {num_classes}, the number of the model's classes",
        )
    return tuple(known.get(label, Category(label, f"unused-{label}")) for label in range(num_classes))


def _known(source: str) -> dict[int, Category]:
    """The categories of a data set or of a text file, by id or line number."""
    from detrkit.structures import Category

    path = Path(source)
    if path.suffix.lower() in (".txt", ".names"):
        try:
            lines = read_text(path).splitlines()
        except (OSError, ValueError) as error:
            raise DataError("The names cannot be read", where=path, got=error) from error
        return {label: Category(label, line.strip()) for label, line in enumerate(lines) if line.strip()}
    from detrkit.data import formats

    splits = formats.read(path, check_files=False)
    return {category.id: category for part in splits.values() for category in part.categories}

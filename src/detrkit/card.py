"""A trained model made ready for others: its folder with a model card that tells what it is and how it came about.

The card (https://huggingface.co/docs/hub/model-cards) is written from what the run left behind. Of paths only the last
name is told.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from detrkit import hub
from detrkit.checkpoint import SavedModel, load_model, model_folder
from detrkit.convert import is_huggingface
from detrkit.documents import read_json
from detrkit.errors import ModelError, UsageError
from detrkit.holders import MASK_HEAD, has_mask_head
from detrkit.one_shot.saved import is_one_shot
from detrkit.pretrain.saved import is_pretrained
from detrkit.sources import architecture_of
from detrkit.structures import Category
from detrkit.training import recipe as recipes
from detrkit.training.recipe import AnyRecipe
from detrkit.training.tasks import of_task
from detrkit.whole import write_whole

CATEGORIES_SHOWN = 100

_OF_THE_MACHINE = {"device", "workers", "log_every", "save_every", "save_minutes", "tensorboard", "samples", "model"}
_PATHS = ("backbone_weights", "init")


class Story(NamedTuple):
    """What a run folder tells about its model; of a bare model folder only `model` is filled.

    `data`, `environment` and `status` are the run's files of these names; `pictures` are its curves and samples by what
    they show.
    """

    model: SavedModel
    folder: Path
    recipe: AnyRecipe | None
    data: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    pictures: dict[str, Path]

    @property
    def has_masks(self) -> bool:
        """Whether the model has a mask head."""
        return has_mask_head(self.model.about)


def push(source: str | Path, name: str, *, private: bool = False, license: str = "", pictures: bool = True) -> str:
    """Upload a model with its card to the Hugging Face hub.

    Args:
        source: a run folder, or a model folder of ours.
        name: what it is to be called: `organisation/name`.
        private: a new repository is visible to its owners only.
        license: as the hub spells it, such as `apache-2.0`; empty: the card names none.
        pictures: take the run's curves and samples along; samples show validation images.

    Returns:
        The address of the model's page.

    Raises:
        MissingExtraError: the extra `hub` is not installed.
        ModelError: no model there, or the hub cannot be reached or refuses.
        UsageError: no such name is possible, or there is no token.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        assemble(source, name, folder, license=license, pictures=pictures)
        return hub.upload(folder, name, private=private)


def assemble(source: str | Path, name: str, out: Path, *, license: str = "", pictures: bool = True) -> tuple[str, ...]:
    """Write the folder that `push` uploads, and return the names of its files; takes its arguments.

    Raises:
        ModelError: there is no model of ours.
        UsageError: a name that the hub cannot have, or an `out` that holds something.
    """
    if not hub.NAME.fullmatch(name):
        raise UsageError("This is no name for a model on the hub", got=repr(name), expected="organisation/name")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError("The folder is not empty", where=out, remedy="Name a new folder.")
    story = read(Path(source))
    shown = story.pictures if pictures else {}

    def write(to: Path) -> None:
        for file in ("config.json", "model.safetensors", *([f"{MASK_HEAD}.safetensors"] if story.has_masks else [])):
            shutil.copyfile(story.folder / file, to / file)
        for picture in shown.values():
            shutil.copyfile(picture, to / _file_name(picture))
        (to / "README.md").write_text(model_card(story, name, license=license, pictures=pictures), encoding="utf-8")

    write_whole(out, write)
    return tuple(sorted(file.name for file in out.iterdir()))


def read(source: Path) -> Story:
    """What a run folder or a model folder tells.

    Raises:
        ModelError: there is no model of ours, it was only pre-trained, or a file of the run is damaged.
        UsageError: the run's recipe cannot be read.
    """
    if is_huggingface(source):
        raise ModelError(
            "This is a Hugging Face folder, and only models of detrkit are uploaded",
            where=source,
            expected="a run folder or a model folder of detrkit",
            remedy=f"Make it one with: detrkit convert {shlex.quote(str(source))} MODEL "
            f"or train it further with: detrkit train DATA --init {shlex.quote(str(source))} --out RUN",
        )
    model, folder = load_model(source), model_folder(source)
    if is_pretrained(model.about):
        raise ModelError(
            "The model was only pre-trained, without labels, and only detectors are uploaded",
            where=source,
            expected="a run of detrkit train",
            remedy=f"Train it first: detrkit train DATA --init {shlex.quote(str(source))} --out RUN",
        )
    if is_one_shot(model.about):
        raise ModelError(
            "The model was trained to find by example, and only detectors of named classes are uploaded",
            where=source,
            remedy=f"Use it here: detrkit find {shlex.quote(str(source))} --example IMAGE LEFT TOP RIGHT BOTTOM IMAGES "
            f"--out FOUND, or train it further: detrkit train DATA --init {shlex.quote(str(source))} --out RUN",
        )
    if not (source / "recipe.toml").is_file():
        return Story(model, folder, None, {}, {}, {}, {})
    files = {name: _json(source / f"{name}.json") for name in ("data", "environment", "status")}
    pictures = {"Losses and AP during the training": source / "plots" / "history.png"}
    samples = sorted((source / "samples").glob("epoch-*.jpg"))
    best = source / "samples" / f"epoch-{int(model.about.get('epoch') or 0):04d}.jpg"
    if samples:
        pictures["Validation images: annotated on the left, detected on the right"] = (
            best if best in samples else samples[-1]
        )
    return Story(
        model,
        folder,
        recipes.read(source / "recipe.toml", of_task("", source / "recipe.toml")),
        **files,
        pictures={what: file for what, file in pictures.items() if file.is_file()},
    )


def model_card(story: Story, name: str, *, license: str = "", pictures: bool = True) -> str:
    """The card as Markdown with its YAML head; arguments as in `push`."""
    head = yaml.safe_dump(_head(story, name, license), sort_keys=False, allow_unicode=True)
    shown = story.pictures if pictures else {}
    parts = [
        f"---\n{head}---\n\n# {name.partition('/')[2]}",
        _what(story),
        _use(name, story),
        _categories(story.model.categories),
        _data(story),
        _figures(story),
        "\n\n".join(f"![{what}]({_file_name(file)})\n\n*{what}.*" for what, file in shown.items()),
        _training(story),
        _limits(story),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(story: Story, name: str, license: str) -> dict[str, Any]:
    tasks = {"object-detection": ""} | ({"image-segmentation": "mask_"} if story.has_masks else {})
    head: dict[str, Any] = {"library_name": "detrkit", "pipeline_tag": list(tasks)[-1]}
    head["tags"] = list(dict.fromkeys([*tasks, "detr", story.model.variant.replace("_", "-")]))
    if license:
        head["license"] = license
    if began := _hub_start(story):
        head["base_model"] = began[0]
    results = [_result(story, task, prefix) for task, prefix in tasks.items()] if story.data else []
    if results := [result for result in results if result["metrics"]]:
        head["model-index"] = [{"name": name.partition("/")[2], "results": results}]
    return head


def _result(story: Story, task: str, prefix: str) -> dict[str, Any]:
    """The figures of a task as the hub's tables read them; `prefix` is what their names begin with."""
    data, known = _data_name(story), _metrics(story)
    named = [(name, known.get(prefix + name)) for name in ("AP", "AP50", "AP75")]
    return {
        "task": {"type": task},
        "dataset": {"name": data, "type": re.sub(r"\W+", "-", data).lower(), "split": "validation"},
        "metrics": [
            {"type": "map", "name": name, "value": round(value, 4)} for name, value in named if value is not None
        ],
    }


def _what(story: Story) -> str:
    model = story.model
    config: Any = model.model.config
    number = sum(parameter.numel() for parameter in model.model.parameters())
    began, categories = _hub_start(story), "category" if len(model.categories) == 1 else "categories"
    return (
        f"An object detector of the DETR family: variant `{model.variant}`, preset {_preset(model)}, "
        f"{number / 1e6:.1f} million parameters. It finds up to {config.num_queries} objects of "
        f"{len(model.categories)} {categories}{', each with its mask,' if story.has_masks else ''} in images that it "
        f"resizes to {config.image_size} pixels on the shorter side and at most {config.longest} on the longer."
        + (f" Its training started from [{began[0]}](https://huggingface.co/{began[0]})." if began else "")
    )


def _preset(model: SavedModel) -> str:
    """The preset's name, and what the architecture has otherwise; a preset that is not known is only named."""
    preset, changed = architecture_of(model)
    listed = ", ".join(f"{name} {value}" for name, value in changed.items())
    return f"`{model.preset or 'none'}`" + (f" (changed: {listed})" if listed and preset == model.preset else "")


def _use(name: str, story: Story) -> str:
    threshold = story.model.about.get("threshold")
    said = (
        f"Detections count from a score of {threshold:.2f}, where F1 was best on the validation images; pass "
        "`threshold` for another."
        if isinstance(threshold, float)
        else "Detections count from a score of 0.5; pass `threshold` for another."
    )
    masks = ", masks" if story.has_masks else ""
    return f"""\
## Use

It needs detrkit with its extra `hub`.

```bash
detrkit predict {name} IMAGES --out found
```

```python
import detrkit

detector = detrkit.load("{name}")
found = detector.predict("image.jpg")  # boxes (x1, y1, x2, y2 in pixels), scores, labels, names{masks}
```

{said} To train it further on images of your own: `detrkit train DATA --init {name} --out RUN`."""


def _categories(categories: Sequence[Category]) -> str:
    names = ", ".join(_cell(category.name) for category in categories[:CATEGORIES_SHOWN])
    more = len(categories) - CATEGORIES_SHOWN
    return f"## Categories\n\n{names}{f' and {more} more, all in config.json' if more > 0 else ''}"


def _data(story: Story) -> str:
    if not story.data:
        return ""
    rows = [
        (name, f"{split['images']:,}", f"{split['boxes']:,}", f"`{split['fingerprint']}`")
        for name, split in story.data["splits"].items()
    ]
    chosen = "\n".join(f"{note}." for note in story.data["notes"] if note.startswith(("Validation:", "Limited")))
    table = _table([("split", "images", "boxes", "fingerprint"), *rows])
    return f"## Data\n\n{_cell(_data_name(story))}\n\n{table}\n\n{chosen}"


def _figures(story: Story) -> str:
    metrics = _metrics(story)
    if not metrics:
        return "## Figures\n\nIt was not evaluated."
    where = "On the validation images"
    if story.data:
        split = story.data["splits"]["val"]
        where += f" ({split['images']:,} images, {split['boxes']:,} boxes)"
    if (epoch := story.model.about.get("epoch")) is not None:
        where += f", after epoch {epoch}"
    rows = [(name, f"{value:.3f}") for name, value in metrics.items()]
    return f"## Figures\n\n{where}; COCO's definitions, from 0 to 1, undefined ones left out.\n\n" + _table(
        [("figure", "value"), *rows]
    )


def _training(story: Story) -> str:
    recipe = story.recipe
    if recipe is None:
        return ""
    base = recipes.of_preset(recipe.model.model, type(recipe)())
    rows = [("field", "this run", "recipe of the preset")]
    for name, (section, _, _) in recipes.fields(type(recipe)).items():
        here, there = (_told(name, getattr(getattr(one, section), name), story) for one in (recipe, base))
        if here != there and name not in _OF_THE_MACHINE:
            rows.append((f"`{name}`", here, there))
    differing = _table(rows) if len(rows) > 1 else "Nothing differs from it."
    public = {name: _told(name, getattr(recipe.model, name), story) for name in _PATHS}
    whole = recipes.to_toml(recipes.revise(recipe, public))
    where = story.environment
    by = f"detrkit {where['detrkit']}, torch {where['torch']}, on {where['gpu'] or where['device']}" if where else ""
    return (
        f"## Training\n\nPreset `{recipe.model.model}`; what differs from the recipe that comes with it:\n\n"
        f"{differing}\n\n<details><summary>The whole recipe</summary>\n\n```toml\n{whole}```\n\n</details>"
        + (f"\n\nTrained with {by}." if by else "")
    )


def _limits(story: Story) -> str:
    lines = ["It knows the categories above and images like those that it was trained on."]
    if _metrics(story):
        lines.append(
            "The checkpoint and the threshold were chosen on the validation images that the figures are from, which "
            "makes these a little too good. Evaluate it on images that had no part in either."
        )
    if any("learnt by heart" in note for note in story.data.get("notes", ())):
        lines.append("The validation images are the training images: the figures say nothing about other images.")
    status = story.status
    if status and status["state"] != "finished":
        lines.append(f"The training stands at step {status['step']:,} of {status['total_steps']:,}.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _metrics(story: Story) -> dict[str, float]:
    """The figures that are defined."""
    metrics: Mapping[str, Any] = story.model.about.get("metrics") or {}
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def _hub_start(story: Story) -> tuple[str, str] | None:
    """The name on the hub that a run's weights came from, and the revision."""
    for note in story.data.get("notes", ()):
        if found := re.match(r"Start from ([^\s@]+)\S* \(.*hub revision (\w+)\)", note):
            return found[1], found[2]
    return None


def _data_name(story: Story) -> str:
    return Path(story.data["path"]).resolve().name


def _told(name: str, value: Any, story: Story) -> str:
    """A recipe's value without the folders of a machine; where nothing is said, nothing."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    if name == "backbone_weights" or (name == "init" and _hub_start(story) is None):
        return Path(value).name
    return str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    heading, *body = ("| " + " | ".join(map(_cell, row)) + " |" for row in rows)
    return "\n".join([heading, "| " + " | ".join("---" for _ in rows[0]) + " |", *body])


def _cell(text: str) -> str:
    """A text that Markdown takes for nothing but text in its table."""
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") or "–"


def _file_name(picture: Path) -> str:
    return "history.png" if picture.name == "history.png" else "samples.jpg"


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(read_json(file))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError("The file of the run cannot be read", where=file, got=error) from error

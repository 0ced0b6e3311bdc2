"""Train a detector on an annotated data set."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from detrkit.cli._options import CommonOptions, Switch, glance, parse
from detrkit.cli._terminal import Outcome, Terminal, share, shell
from detrkit.errors import DataError, UsageError
from detrkit.training import recipe as recipes
from detrkit.training.episode_recipe import EpisodeRecipe
from detrkit.training.recipe import AnyRecipe, Recipe
from detrkit.training.tasks import TASKS, of_task, task_with

if TYPE_CHECKING:
    from detrkit.training.events import Event


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Train a detector on an annotated data set.

    With --task one-shot it learns to find whatever is like an example that it is shown (detrkit find). Every choice of
    the recipe is a flag. What is not given stands in the recipe: the one that --recipe names, else the
    one that comes with the model's preset. Without --recipe, --model and --init, the data and the machine decide on
    preset, resolution, queries, epochs and batches; the reasons are told, and the recipe stands in the run folder.
    """

    base: ClassVar[AnyRecipe] = Recipe()
    choices: ClassVar[tuple[Any, ...]] = ()

    data: tyro.conf.Positional[str]
    """Data set in COCO, Pascal VOC or YOLO format; which one is recognised."""
    out: Path
    """Run folder to make."""
    task: str = ""
    """What is trained for: detection (of the data's classes), segmentation (of these, with masks) or one-shot (of
    whatever an example shows). Empty: that of the recipe, else detection."""
    masks: Switch = False
    """Learn masks, too: the same as --task segmentation. Of panoptic data also those of stuff."""
    recipe_name: Annotated[str, tyro.conf.arg(name="recipe")] = ""
    """TOML file with the choices below, or the name of a recipe that comes with the package; flags override it."""
    resume: Switch = False
    """Go on with the run in --out where its last checkpoint stands, with its own recipe."""
    recipe: Annotated[AnyRecipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    """All choices of the run."""


@dataclass(frozen=True, kw_only=True)
class _Deciding:
    """The flags that the defaults of the others depend on."""

    task: str = ""
    masks: Switch = False
    recipe: str = ""
    model: str = ""
    init: str = ""
    out: str = ""
    resume: Switch = False


def options_for(arguments: Sequence[str]) -> type[Options]:
    """The options with the defaults of the recipe that the arguments name.

    Fields of the architecture are left out; `run` merges them with those given.

    Raises:
        ModelError: the weights to start from, which are to say the model, are not there or cannot be read.
        UsageError: there is no such recipe, or it cannot be read.
    """
    deciding = glance(_Deciding, arguments)
    helping = bool({"-h", "--help"} & set(arguments))
    base = _base(deciding, helping=helping)
    named = deciding.recipe or deciding.model or deciding.init or deciding.resume
    if named or helping or not isinstance(base, Recipe):
        return _options(base)
    return _advised(base, arguments)


def _options(base: AnyRecipe, choices: tuple[Any, ...] = ()) -> type[Options]:
    """The options with the defaults of a recipe, and why it is what it is."""
    model = dataclasses.replace(base.model, architecture={})
    bare: AnyRecipe = dataclasses.replace(base, model=model)
    kind: Any = type(base)
    recipe = ("recipe", Annotated[kind, tyro.conf.arg(name="")], field(default_factory=lambda: bare))
    told = f"{inspect.getdoc(Options)}\n\n{_further(kind)}"
    namespace = {"__doc__": told, "base": base, "choices": choices}
    return dataclasses.make_dataclass(
        "Options", [recipe], bases=(Options,), namespace=namespace, frozen=True, kw_only=True
    )


def _further(kind: type[AnyRecipe]) -> str:
    """A sentence on the choices of the other tasks, which the help of this one does not list."""
    known, parts = recipes.fields(kind), []
    for task, other in TASKS.items():
        flags = [f"--{name.replace('_', '-')}" for name in recipes.fields(other) if name not in known]
        if flags:
            parts.append(f"--task {task} has {', '.join(flags)}")
    return f"Further choices, explained by the help of each task: {'; '.join(parts)}."


def _advised(base: Recipe, arguments: Sequence[str]) -> type[Options]:
    """The options with the defaults that suit the data and the machine; without advice those of `base`."""
    plain = _options(base)
    try:
        first = parse(plain, "train", arguments, quiet=True)
    except UsageError:  # the full parse says what is wrong
        return plain
    from detrkit.training import advice

    choices = advice.advice_for(first.data, _whole(first))
    if not choices:
        return plain
    # Only what was given is the same under other defaults.
    before = _values(first.recipe)
    after = _values(parse(_options(advice.revised(choices)), "train", arguments, quiet=True).recipe)
    advised = {name for choice in choices for name in choice.fields}
    choices = advice.without(choices, {name for name in advised - {"model"} if before[name] == after[name]})
    return _options(advice.revised(choices), choices)


def _values(recipe: AnyRecipe) -> dict[str, Any]:
    """All fields of a recipe by their names."""
    return {
        name: getattr(getattr(recipe, section), name) for name, (section, _, _) in recipes.fields(type(recipe)).items()
    }


def _whole(options: Options) -> Any:
    """The recipe of the options, with the architecture that its defaults have."""
    given = options.recipe
    architecture = {**options.base.model.architecture, **given.model.architecture}
    model = dataclasses.replace(given.model, architecture=architecture)
    return dataclasses.replace(given, model=model)


def run(options: Options, terminal: Terminal) -> Outcome:
    """Train, and say what came out.

    Raises:
        DataError, ModelError, UsageError: as `detrkit.train`.
        KeyboardInterrupt: says how to go on.
    """
    from detrkit.cli._progress import how_to_go_on, training_progress
    from detrkit.training.advice import reasons
    from detrkit.training.events import Started
    from detrkit.training.recovery import has_checkpoint
    from detrkit.training.run import train

    recipe: AnyRecipe = _whole(options)
    again = f"detrkit train {shell(options.data)} --out {shell(options.out)} --resume"
    notes = reasons(options.choices, recipe) if isinstance(recipe, Recipe) else ()
    has_begun = False
    try:
        with training_progress(terminal, recipe.run.evaluate_every) as show:

            def listen(event: Event) -> None:
                nonlocal has_begun
                has_begun |= isinstance(event, Started)
                show(event)

            done = train(
                options.data, out=options.out, recipe=recipe, resume=options.resume, on_event=listen, notes=notes
            )
    except KeyboardInterrupt as error:
        error.args = (how_to_go_on(options.out, again),)
        raise
    except DataError:
        if has_begun and has_checkpoint(options.out):  # else going on was refused
            terminal.note(f"What was trained is saved. When that is mended, go on with: {again}")
        raise
    document = {"run": done.folder, "model": done.folder / "model", "figures": done.figures}
    return Outcome(document, text=_ending(options, done.figures))


def _base(deciding: _Deciding, *, helping: bool = False) -> AnyRecipe:
    """The recipe whose values are the defaults; to show them, no other model is looked up."""
    own = Path(deciding.out) / "recipe.toml"
    task = task_with(deciding.task, masks=deciding.masks)
    if not deciding.recipe and deciding.resume and deciding.out and own.is_file():
        return recipes.read(own, of_task(task, own))
    usual = of_task(task, deciding.recipe or None)
    named = recipes.read(deciding.recipe, usual) if deciding.recipe else None
    init = deciding.init or (named.model.init if named else "")
    if init and not deciding.model and not (named and named.model.model) and not helping:
        from detrkit.training.run import resolve

        return resolve(named, {"init": init}, usual, recipes.DEFAULT_MODEL)
    return named or recipes.of_preset(deciding.model or recipes.DEFAULT_MODEL, usual)


def _ending(options: Options, figures: dict[str, float]) -> str:
    out, data = shell(options.out), shell(options.data)
    if isinstance(options.recipe, EpisodeRecipe):
        return _ending_of_episodes(options, figures)
    if "mask_AP" in figures:
        parts = [("PQ", "PQ"), ("mask_AP", "mask AP"), ("mask_AP50", "mask AP50"), ("AP", "box AP")]
        found = "Best " + ", ".join(f"{said} {share(figures[name])}" for name, said in parts if name in figures)
    else:
        found = f"Best AP {share(figures['AP'])} (AP50 {share(figures['AP50'])})" if figures else "Trained"
    recipe: Any = options.recipe  # of boxes or of masks
    named = recipe.data.annotations
    meant = f" --annotations {shell(named)}" if named else ""
    return (
        f"{found}. The model lies in {options.out / 'model'}; plots, samples and metrics beside it.\n"
        f"Look at it:  detrkit evaluate {out} {data}{meant} --report {shell(options.out / 'report')}\n"
        f"Use it:      detrkit predict {out} IMAGES --out {shell(options.out / 'found')}"
    )


def _ending_of_episodes(options: Options, figures: dict[str, float]) -> str:
    out, data = shell(options.out), shell(options.data)
    found = f"By one example: AP50 {share(figures['AP50_seen'])} of classes seen in training" if figures else "Trained"
    unseen = figures.get("AP50_unseen", float("nan"))
    more = "" if unseen != unseen else f", {share(unseen)} of unseen ones"
    return (
        f"{found}{more}. The model lies in {options.out / 'model'}; plots, samples and metrics beside it.\n"
        f"Measure it:  detrkit evaluate {out} {data}\n"
        f"Use it:      detrkit find {out} --example IMAGE LEFT TOP RIGHT BOTTOM IMAGES --out "
        f"{shell(options.out / 'found')}"
    )

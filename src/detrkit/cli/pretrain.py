"""Train a detector, or its backbone, on images without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from detrkit.cli._options import CommonOptions, Switch, glance
from detrkit.cli._terminal import Outcome, Terminal, shell
from detrkit.training import pretext
from detrkit.training import recipe as recipes
from detrkit.training.pretext import BackboneRecipe, PatchRecipe, PretextRecipe

if TYPE_CHECKING:
    from detrkit.training.pretraining import PretrainedRun


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Train a detector, or its backbone, on images without labels.

    A detector learns to find pieces of an image in it (UP-DETR); a backbone learns to tell images apart (Barlow Twins).
    What comes out is a start for `detrkit train`. Every choice of the recipe is a flag. What is not given stands in the
    recipe: the one that --recipe names, else the one that comes with the task and the model's preset.
    """

    base: ClassVar[PretextRecipe] = PatchRecipe()

    images: tyro.conf.Positional[tuple[str, ...]]
    """Folders of images, in any nesting; also tar shards, and single images."""
    out: Path
    """Run folder to make."""
    task: str = ""
    """What is trained for: up-detr (a detector) or backbone (a backbone alone). Empty: that of the recipe, else
    up-detr."""
    recipe_name: Annotated[str, tyro.conf.arg(name="recipe")] = ""
    """TOML file with the choices below, or the name of a recipe that comes with the package; flags override it."""
    resume: Switch = False
    """Go on with the run in --out where its last checkpoint stands, with its own recipe."""
    recipe: Annotated[PretextRecipe, tyro.conf.arg(name="")] = field(default_factory=PatchRecipe)
    """All choices of the run."""


@dataclass(frozen=True, kw_only=True)
class _Deciding:
    """The flags that the defaults of the others depend on."""

    task: str = ""
    recipe: str = ""
    model: str = ""
    init: str = ""
    out: str = ""
    resume: Switch = False


def options_for(arguments: Sequence[str]) -> type[Options]:
    """The options of the task that the arguments name, with the defaults of the recipe that they name.

    Fields of the architecture are left out; `run` merges them with those given.

    Raises:
        ModelError: the weights to start from, which are to say the model, are not there or cannot be read.
        UsageError: there is no such task or recipe, or it cannot be read.
    """
    base = _base(glance(_Deciding, arguments), helping=bool({"-h", "--help"} & set(arguments)))
    bare = dataclasses.replace(base, model=dataclasses.replace(base.model, architecture={}))
    kind: Any = type(base)
    recipe = ("recipe", Annotated[kind, tyro.conf.arg(name="")], field(default_factory=lambda: bare))
    namespace = {"__doc__": Options.__doc__, "base": base}
    return dataclasses.make_dataclass(
        "Options", [recipe], bases=(Options,), namespace=namespace, frozen=True, kw_only=True
    )


def run(options: Options, terminal: Terminal) -> Outcome:
    """Train, and say what came out.

    Raises:
        DataError, ModelError, UsageError: as `detrkit.pretrain`.
        KeyboardInterrupt: says how to go on.
    """
    from detrkit.cli._progress import how_to_go_on, training_progress
    from detrkit.training.pretraining import pretrain

    given: PretextRecipe = options.recipe
    architecture = {**options.base.model.architecture, **given.model.architecture}
    recipe = dataclasses.replace(given, model=dataclasses.replace(given.model, architecture=architecture))
    try:
        with training_progress(terminal, recipe.run.evaluate_every) as listener:
            done = pretrain(options.images, out=options.out, recipe=recipe, resume=options.resume, on_event=listener)
    except KeyboardInterrupt as error:
        command = f"detrkit pretrain {' '.join(map(shell, options.images))} --out {shell(options.out)} --resume"
        error.args = (how_to_go_on(options.out, command),)
        raise
    document = {"run": done.folder, "model": done.folder / "model", "figures": done.figures}
    document |= {"conclusion": done.sentence, "alarms": done.alarms, "problems": done.problems, "page": done.page}
    return Outcome(document, text=_ending(options, done))


def _base(deciding: _Deciding, *, helping: bool) -> PretextRecipe:
    """The recipe whose values are the defaults; to show them, no other model is looked up."""
    own = Path(deciding.out) / "recipe.toml"
    if not deciding.recipe and deciding.resume and deciding.out and own.is_file():
        return recipes.read(own, pretext.of_task(deciding.task, own))
    usual = pretext.of_task(deciding.task, deciding.recipe or None)
    named = recipes.read(deciding.recipe, usual) if deciding.recipe else None
    init = deciding.init or (named.model.init if named else "")
    if init and not deciding.model and not (named and named.model.model) and not helping:
        from detrkit.training.run import resolve

        return resolve(named, {"init": init}, usual, pretext.DEFAULT_MODELS[usual.task])
    return named or recipes.of_preset(deciding.model or pretext.DEFAULT_MODELS[usual.task], usual)


def _ending(options: Options, done: PretrainedRun) -> str:
    lines = [done.sentence or "Trained.", *done.alarms, *done.problems]
    if done.page is not None:
        lines.append(f"What it finds:  {done.page}")
    lines.append(f"Train on it:    detrkit train DATA {_start(options)} --out RUN")
    return "\n".join(lines)


def _start(options: Options) -> str:
    """The flags with which a training starts from the run; a backbone alone does not say whose it is."""
    out, model = shell(options.out), options.recipe.model
    if not isinstance(options.recipe, BackboneRecipe):
        return f"--init {out}"
    changes = {**options.base.model.architecture, **model.architecture}
    fields = "".join(f" {name} {value}" for name, value in changes.items())
    preset = f"--model {model.model} " if model.model else ""
    return f"{preset}{f'--architecture{fields} ' if fields else ''}--backbone-weights {out}"

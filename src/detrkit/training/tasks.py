"""What annotated images are trained on for, and the recipe of each task. Importing this module is cheap."""

from __future__ import annotations

from pathlib import Path

from detrkit.errors import UsageError
from detrkit.training.episode_recipe import EpisodeRecipe
from detrkit.training.mask_recipe import SegmentationRecipe
from detrkit.training.recipe import AnyRecipe, Recipe, task_of

DETECTION = "detection"
"""The name of the task that recipes do not name: to detect the classes of a data set."""

TASKS: dict[str, type[Recipe] | type[EpisodeRecipe] | type[SegmentationRecipe]] = {
    DETECTION: Recipe,
    EpisodeRecipe.task: EpisodeRecipe,
    SegmentationRecipe.task: SegmentationRecipe,
}
"""Each task that annotated images are trained on for, with its kind of recipe."""


def of_task(task: str, recipe: AnyRecipe | str | Path | None = None) -> AnyRecipe:
    """The recipe of a task, all defaults.

    Args:
        task: its name. Empty: that which `recipe` is for, or, without it, `detection`.
        recipe: a recipe, a TOML file, or the name of one that comes with the package.

    Raises:
        UsageError: there is no such task or recipe.
    """
    if isinstance(recipe, AnyRecipe):
        return type(recipe)()
    if not task and recipe is not None and (named := task_of(recipe)) in TASKS:
        task = named  # any other is refused where the file is read
    task = task or DETECTION
    if task not in TASKS:
        raise UsageError("There is no such task", where="task", got=repr(task), expected=f"one of {', '.join(TASKS)}")
    return TASKS[task]()


def task_with(task: str, *, masks: bool) -> str:
    """The task that is meant where masks are asked for by a word of their own.

    Raises:
        UsageError: another task is named as well.
    """
    if masks and task not in ("", SegmentationRecipe.task):
        raise UsageError(
            "Masks are learnt in a task of their own", where="masks", got=repr(task), expected=SegmentationRecipe.task
        )
    return SegmentationRecipe.task if masks else task

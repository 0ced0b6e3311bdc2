"""Say what is wrong with a data set, and write a clean copy."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from detrkit.cli._book import check_report
from detrkit.cli._options import CommonOptions, Switch
from detrkit.cli._terminal import Outcome, Terminal, count, shell, table
from detrkit.errors import DataError, UsageError
from detrkit.training.recipe import DEFAULT_MODEL

if TYPE_CHECKING:
    from detrkit.data.doctor import Diagnosis, Finding
    from detrkit.data.doctor.fixing import Fixed

CLEAN, REPAIRABLE, BROKEN = 0, 5, 6
"""Exit codes: what the worst finding is."""

EXAMPLES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Say what is wrong with a data set, and write a clean copy.

    Each finding has a name, and is a note (worth knowing), repairable (--fix mends it or leaves it out) or broken (a
    person has to mend it). The exit code says the worst: 0 clean, 5 repairable, 6 broken. With --fix it is 0 where
    nothing is broken.
    """

    path: tyro.conf.Positional[Path]
    """Data set folder, or an annotation file."""
    annotations: str = ""
    """Format of the annotations that are meant where a folder holds several, such as coco_panoptic."""
    report: Path | None = None
    """Folder for a page with all findings and pictures of the worst."""
    fix: Path | None = None
    """New folder for a clean copy of the data set, the images as links, with changes.jsonl, a line for each change."""
    model: str = DEFAULT_MODEL
    """Preset that would be trained: objects are held against its queries and its tokens."""
    image_size: int = 0
    """Shorter side that images would be resized to, in pixels; 0: the preset's own."""
    quick: Switch = False
    """Decode no image: damaged images, copies and true sizes are not found then."""


def run(options: Options, terminal: Terminal) -> Outcome:
    """Examine, and write what was asked for.

    Raises:
        DataError: no data set is there or recognised, or an image cannot be linked.
        UsageError: an unknown preset or format, a folder that cannot be written to, or a copy inside the data set.
    """
    from detrkit.training.checkup import doctor
    from detrkit.visualize import write_diagnosis

    _check_folders(options)
    with ExitStack() as stack:
        told = doctor(
            options.path,
            model=options.model,
            image_size=options.image_size,
            decode=not options.quick,
            annotations=options.annotations,
            on_start=lambda total: stack.enter_context(terminal.counting(total, "Looking at images")),
        )
    document = told.to_json()
    lines = [_text(told)]
    fixed: Fixed | None = None
    if options.report is not None:
        document["report"] = write_diagnosis(told, options.report)
        lines.append(f"Report: {document['report']}")
    if options.fix is not None:
        fixed = told.fix(options.fix)
        document["fixed"] = {"out": fixed.out, "format": fixed.format, "changes": fixed.changes}
        lines.append(_fixed_text(fixed))
    elif told.verdict == "repairable":
        meant = f" --annotations {shell(options.annotations)}" if options.annotations else ""
        lines.append(f"A clean copy: detrkit doctor {shell(options.path)}{meant} --fix OUT")
    return Outcome(document, text="\n".join(lines), exit_code=_exit_code(told, fixed))


def _check_folders(options: Options) -> None:
    """Refuse before minutes of work what could not be written after them."""
    from detrkit.data.files import check_outside

    if not options.path.exists():
        raise DataError("There is no such file or folder", where=options.path, remedy="Check the path.")
    check_report(options.report)
    if options.fix is not None and options.fix.exists() and (not options.fix.is_dir() or any(options.fix.iterdir())):
        raise UsageError("The output folder is not empty", where=options.fix, remedy="Name a new folder for the copy.")
    if options.fix is not None:
        check_outside(options.fix, options.path)


def _exit_code(told: Diagnosis, fixed: Fixed | None) -> int:
    if told.verdict == "broken":
        return BROKEN
    return REPAIRABLE if told.verdict == "repairable" and fixed is None else CLEAN


def _text(told: Diagnosis) -> str:
    """What was found, as people read it: an overview, then each finding with examples and its remedy."""
    seen = told.resolution
    lines = [
        f"{told.path}: a data set, format {told.format}; held against {seen.model} ({seen.queries} queries, "
        f"{seen.image_size} pixels, tokens of {seen.token})"
    ]
    for name, figures in told.figures():
        lines.append(f"{name}: {figures['summary']}{_objects(figures, told)}")
    if not told.looked:
        lines.append("No image was decoded: damaged images, copies and true sizes are not found so.")
    if told.findings:
        rows = [(one.kind, one.severity, one.split, f"{one.count:,}") for one in told.findings]
        lines += ["", table([("finding", "severity", "split", "count"), *rows], "lllr")]
    for one in told.findings:
        lines += ["", *_finding_lines(one)]
    return "\n".join([*lines, "", _verdict(told)])


def _objects(figures: dict[str, Any], told: Diagnosis) -> str:
    if figures["median_side"] is None:
        return ""
    return (
        f"; at most {figures['most_boxes']} in an image; at {told.resolution.image_size} pixels their median side is "
        f"{figures['median_side']:.0f}, {figures['below_a_token']:.1%} are below one token"
    )


def _finding_lines(one: Finding) -> list[str]:
    lines = [f"{one.kind} ({one.severity}), {one.split}, {one.count:,}: {one.meaning}"]
    lines += [f"  {one.said}"] if one.said else []
    lines += [f"  {place}" for place in one.places[:EXAMPLES_SHOWN]]
    if len(one.places) > EXAMPLES_SHOWN:
        lines.append(f"  and {len(one.places) - EXAMPLES_SHOWN:,} more; --json and --report list them")
    return [*lines, f"  → {one.remedy}"]


def _verdict(told: Diagnosis) -> str:
    kinds = {
        name: len({one.kind for one in told.findings if one.severity == name}) for name in ("broken", "repairable")
    }
    if told.verdict == "clean":
        return "Clean: nothing is wrong with it." + (" The notes are for you to judge." if told.findings else "")
    if not kinds["broken"]:
        return f"Repairable: {count(kinds['repairable'], 'kind')} of finding."
    return (
        f"Broken: {count(kinds['broken'], 'kind')} of finding for a person to mend, {kinds['repairable']} that can be "
        "repaired."
    )


def _fixed_text(fixed: Fixed) -> str:
    from detrkit.data.doctor.fixing import LOG, summary

    said = summary(fixed.changes) or "nothing"
    return f"Clean copy, format {fixed.format}: {fixed.out}. Changed or left out: {said} ({fixed.out / LOG})"

"""Files that are damaged by accident or on purpose: read, or refused by name, within bounds of time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from fuzzing import MEMORY, Verdict, judge_apart
from untrusted_inputs import (
    KINDS,
    QUICK,
    bomb,
    cases,
    config,
    put,
    replaced,
    rle_bomb,
    scans,
    special,
    stretched,
    zip_bomb,
)

from detrkit.errors import DataError, Error

MANY = 154
"""Inputs of each kind in the long test: 2,002 in all."""

GROUPS = [list(KINDS)[:6], list(KINDS)[6:]]
"""Kinds that share a process, in which much is loaded when it is first used: data sets, and all else."""


def judged(names: Sequence[str], count: int, folder: Path) -> tuple[list[Verdict], int]:
    return judge_apart(partial(cases, names, range(count), folder))


def check(verdicts: Sequence[Verdict], count: int, peak: int) -> None:
    bad = [f"{verdict.name}: {verdict.outcome}" for verdict in verdicts if not verdict.is_good]
    assert not bad, f"{len(bad)} of {len(verdicts)}:\n" + "\n".join(bad[:8])
    assert len(verdicts) == count
    assert peak < MEMORY


def accepted(verdicts: Sequence[Verdict]) -> int:
    return sum(verdict.outcome == "accepted" for verdict in verdicts)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_damaged_was_sound_before(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    kind.lay(tmp_path)
    if name == "theirs":  # most of its weights are left out
        return
    kind.read(tmp_path)


@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_damaged_inputs_are_read_or_refused_by_name(names: Sequence[str], tmp_path: Path) -> None:
    verdicts, peak = judged(names, QUICK, tmp_path)
    check(verdicts, QUICK * len(names), peak)
    assert accepted(verdicts) < 0.9 * len(verdicts)  # the damage is more than what is repaired and left out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_damaged_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts: list[Verdict] = []
    largest = 0
    for name in KINDS:
        of_kind, peak = judged([name], MANY, tmp_path)
        verdicts, largest = verdicts + of_kind, max(largest, peak)
        slowest = max(of_kind, key=lambda verdict: verdict.seconds)
        with capsys.disabled():
            print(
                f"\n{name}: {len(of_kind)} inputs, {accepted(of_kind)} accepted, {len(of_kind) - accepted(of_kind)} "
                f"refused, longest {slowest.seconds:.1f} s ({slowest.name[:80]!r}), peak {peak / 1e6:,.0f} MB",
                end="",
            )
    longest = max(verdict.seconds for verdict in verdicts)
    with capsys.disabled():
        print(
            f"\nAll: {len(verdicts):,} inputs, {accepted(verdicts):,} accepted, "
            f"{len(verdicts) - accepted(verdicts):,} refused, longest {longest:.1f} s, peak {largest / 1e6:,.0f} MB"
        )
    check(verdicts, MANY * len(KINDS), largest)


@pytest.mark.parametrize(
    ("name", "craft", "said"),
    [
        ("coco", partial(replaced, "all.json", '"0.png"', '"../images/0.png"'), r"unsafe-path: .*'\.\./images/0\.png'"),
        ("voc", partial(put, "Annotations/0.xml", bomb("laughs")), "0.xml: malformed-file: .*Entit"),
        ("yolo", partial(put, "data.yaml", "a: &a [b]\ntrain: images\nnames: *a\n"), "aliases are not followed"),
        (
            "yolo",
            partial(put, "data.yaml", "train: /\nnames: [a]\n"),
            "data.yaml: unsafe-path: a split is a folder that",
        ),
        (
            "yolo",
            partial(special, "labels/0.txt", "pipe"),
            "0.txt: The file cannot be read; got It is a pipe or a device",
        ),
        ("images", scans, "turned.jpg: The JPEG is painted over too often; got 3,000 scans; expected at most 100"),
        ("images", rle_bomb, "a.bmp: The packed bitmap is too long"),
        ("model", partial(config, {"num_queries": 10**7}), "config.json: .*larger than its weights"),
        ("weights", stretched, "new.pth: .*claims 10,000,000,000 numbers"),
        ("weights", partial(zip_bomb, "a.npz", "a.npy"), "a.npz: The archive unpacks to many times its size"),
        ("recipe", partial(put, "recipe.toml", "a" + ".a" * 50_000), "recipe.toml: .*more than 32,768 bytes"),
        ("results", partial(put, "results/found.json", "[" * 100_000), "found.json.*nested too deeply"),
    ],
)
def test_what_is_said(name: str, craft: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    KINDS[name].lay(tmp_path)
    craft(tmp_path)
    with pytest.raises(Error, match=f"(?s){said}"):
        KINDS[name].read(tmp_path)


def test_a_message_is_short_and_commands_no_terminal() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    error = DataError("It is wrong", where="a\x1b[2J\u202e.png", got=deep, expected="x" * 9999, remedy="Mend it.")
    assert str(error).startswith(
        r"a\x1b[2J\u202e.png: It is wrong; got a list that is too large to be shown; expected xxx"
    )
    assert str(error).endswith("…. Mend it.")
    assert len(str(error)) < 1200

import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from detrkit import visualize
from detrkit.errors import DataError, MissingExtraError, UsageError
from detrkit.structures import Category, Detections
from detrkit.visualize import fonts
from detrkit.visualize.colours import PALETTE, ink_on
from detrkit.visualize.fonts import NO_CHARACTER, family_of, font_of, unwritable, written
from detrkit.visualize.labels import Label, place_labels, shorten
from detrkit.visualize.plots import plot_reliability

CATEGORIES = (Category(1, "cat"), Category(2, "a category of many words indeed"))
GREY = (128, 128, 128)


def found(boxes, scores, labels, size=(120, 160)):
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.array(labels, np.int64),
        CATEGORIES,
        size,
    )


def painted(picture, colour):
    return (np.asarray(picture) == colour).all(-1)


def test_draw_outlines_the_box_and_leaves_the_image_alone():
    image = Image.new("RGB", (160, 120), GREY)
    picture = visualize.draw(image, found([[20, 40, 60, 90]], [0.9], [0]))
    assert picture.size == (160, 120)
    assert image.getextrema() == ((128, 128),) * 3
    mask = painted(picture, PALETTE[0])
    assert mask[40, 30:60].all()
    assert mask[89, 20:60].all()
    assert mask[40:90, 20].all()
    assert mask[40:90, 59].all()
    assert tuple(np.asarray(picture)[70, 40]) == GREY


def test_threshold_hides_weak_detections():
    image = Image.new("RGB", (160, 120), GREY)
    weak = found([[20, 40, 60, 90]], [0.2], [0])
    assert visualize.draw(image, weak, threshold=0.5).tobytes() == image.tobytes()
    assert visualize.draw(image, weak, threshold=0.2).tobytes() != image.tobytes()


def test_boxes_scale_with_the_picture():
    picture = visualize.draw(
        Image.new("RGB", (160, 120), GREY), found([[20, 40, 60, 90]], [0.9], [0]), longest_side=640
    )
    assert picture.size == (640, 480)
    mask = painted(picture, PALETTE[0])
    assert mask[160, 200:240].all()
    assert mask[170:350, 80].all()


def test_lines_and_letters_grow_with_the_picture():
    small, large = (
        visualize.draw(Image.new("RGB", (side, side)), found([[0, side / 2, side, side]], [0.9], [0], (side, side)))
        for side in (100, 2000)
    )
    share = [painted(picture, PALETTE[0])[:, picture.width // 2 + 10].sum() for picture in (small, large)]
    assert share[1] >= 5 * share[0]


def test_dashed_boxes_are_broken_lines():
    image = Image.new("RGB", (160, 120), GREY)
    one = found([[20, 40, 140, 110]], [0.9], [0])
    whole = painted(visualize.draw(image, one), PALETTE[0])[109, 20:140]
    dashed = painted(visualize.draw(image, one, dashed=np.array([True])), PALETTE[0])[109, 20:140]
    assert whole.all()
    assert 0.4 < dashed.mean() < 0.85


@pytest.mark.parametrize("size", [(3, 3), (40, 12), (500, 20), (64, 64)])
def test_any_size_is_drawn(size):
    height, width = size[1], size[0]
    one = found(
        [[0, 0, width, height], [0, 0, 0, 0], [-5, -5, width + 9, 3]], [1, 0.5, 0.25], [1, 0, 1], (height, width)
    )
    assert visualize.draw(Image.new("L", size), one, dashed=np.array([True, True, False])).size == size


def test_labels_stay_inside_and_avoid_each_other():
    labels = [Label("x", (40, 12), (0, 0), (5 + k, 5 + k, 60, 60)) for k in range(3)]
    labels.append(Label("y", (40, 12), (0, 0), (150, 110, 170, 130)))
    corners = place_labels(labels, (160, 120), 2)
    frames = np.zeros((120, 160), int)
    for x, y in corners:
        assert 0 <= x <= 120
        assert 0 <= y <= 108
        frames[y : y + 12, x : x + 40] += 1
    assert frames.max() == 1


def test_long_names_are_shortened():
    font = font_of(10.0)
    assert shorten("cat 0.90", "cat", font, 1000) == "cat 0.90"
    assert shorten("cat 0.90", "cat", font, font.getlength("cat")) == "cat"
    cut = shorten("category 0.90", "category", font, 30)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 30
    assert shorten("cat", "", font, 1) == ""


def test_names_that_pillows_own_font_lacks_are_written_in_another():
    for text in ("clé", "клетка", "Ⓐ"):
        masks = [bytes(font_of(20.0, text).getmask(one)) for one in text]
        assert bytes(font_of(20.0, text).getmask(NO_CHARACTER)) not in masks
    assert (family_of("cell"), family_of("клетка"), family_of("Ⓐ")) == ("", "DejaVu Sans", "STIXGeneral")
    assert written("клетка\n0.90") == "клетка 0.90"
    assert unwritable(["cell", "клетка"]) == []


@pytest.mark.parametrize("installed", [True, False])
def test_what_no_font_has_is_a_question_mark_and_is_said(monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "matplotlib.font_manager", None)
    fonts._installed.cache_clear()
    fonts._face.cache_clear()
    try:
        assert written("\ue123 0.90") == "? 0.90"
        (note,) = unwritable(["cell", "\ue123", "a\ue124", "\ue125", "\ue126"])
        assert "a\ue124, \ue125 and 1 more" in note
        assert ("extra 'plot'" in note) == (not installed)
        assert (written("клетка") == "клетка") == installed
        one = replace(found([[20, 40, 60, 90]], [0.9], [0]), categories=(Category(1, "\ue123"),))
        other = replace(one, categories=(Category(1, "?"),))
        image = Image.new("RGB", (160, 120), GREY)
        assert visualize.draw(image, one).tobytes() == visualize.draw(image, other).tobytes()
    finally:
        fonts._installed.cache_clear()
        fonts._face.cache_clear()


def test_colours_differ_and_text_is_readable():
    colours = [visualize.colour_of(label) for label in range(21)]
    assert len(set(colours)) == 21
    assert visualize.colour_of(21) == colours[0]
    for colour in colours:
        light, dark = sorted(map(_luminance, (colour, ink_on(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def _luminance(colour):
    linear = [(v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4) for v in colour]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_images_of_every_kind_are_opened(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert visualize.open_image(tmp_path / "turned.jpg").size == (20, 30)
    assert visualize.open_image(str(tmp_path / "turned.jpg")).mode == "RGB"
    assert visualize.open_image(np.zeros((4, 6), np.uint8)).size == (6, 4)
    assert visualize.open_image(np.zeros((4, 6, 4), np.uint8)).mode == "RGB"


@pytest.mark.parametrize("flag", [1, 3, 6])
def test_an_image_is_drawn_as_it_is_seen_whatever_it_is_given_as(rng, tmp_path, flag):
    exif = Image.Exif()
    exif[0x0112] = flag
    Image.fromarray(rng.integers(0, 256, (100, 60, 3), np.uint8)).save(tmp_path / "phone.png", exif=exif)
    image = visualize.open_image(tmp_path / "phone.png")
    nothing = found([], [], [], (image.height, image.width))
    with Image.open(tmp_path / "phone.png") as opened:
        given = (tmp_path / "phone.png", opened, np.asarray(image))
        assert all(visualize.draw(one, nothing).tobytes() == image.tobytes() for one in given)


def test_images_of_other_modes_are_drawn_as_they_are_answered():
    nothing = found([], [], [])
    values = np.full((120, 160), 30_000, np.uint16)
    values[-1] = 65_535
    assert visualize.draw(Image.fromarray(values), nothing).getpixel((0, 0)) == (117, 117, 117)
    assert visualize.draw(Image.new("RGBA", (160, 120)), nothing).getpixel((0, 0)) == (255, 255, 255)
    assert visualize.draw(np.full((120, 160, 1), 9, np.uint8), nothing).getpixel((0, 0)) == (9, 9, 9)


def test_bad_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png.*not an image"):
        visualize.open_image(tmp_path / "text.png")
    with pytest.raises(DataError, match=r"none\.png.*no such image"):
        visualize.open_image(tmp_path / "none.png")
    with pytest.raises(DataError, match=r"wrong type.*float64"):
        visualize.open_image(np.zeros((4, 6)))


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(UsageError, match=r"80 × 60.*160 × 120"):
        visualize.draw(Image.new("RGB", (80, 60)), found([], [], []))


def test_side_by_side_and_mosaic():
    image = Image.new("RGB", (160, 120), GREY)
    one = found([[20, 40, 60, 90]], [0.9], [0])
    pair = visualize.side_by_side(image, one, one, threshold=0.95)
    assert pair.width > 320
    mask = painted(pair, PALETTE[0])
    assert mask[:, : pair.width // 2].any()
    assert not mask[:, pair.width // 2 :].any()
    sheet = visualize.mosaic([image] * 5, 2, [f"picture {k}" for k in range(5)])
    assert sheet.height > 3 * 120
    assert 320 < sheet.width < 360
    with pytest.raises(UsageError, match="needs pictures"):
        visualize.mosaic([], 2)
    with pytest.raises(UsageError, match="differ in number"):
        visualize.mosaic([image], 2, ["a", "b"])


STEPS = [
    {"event": "step", "step": k, "epoch": k // 10, "loss": 9.0 - k / 20, "class": 1.0, "l1": None} for k in range(120)
]
EVALUATED = [{"event": "evaluated", "step": 10 * k, "epoch": k, "AP": k / 20, "AP50": k / 12} for k in range(1, 6)]


@pytest.mark.parametrize(
    "lines", [STEPS + EVALUATED, STEPS[:1], EVALUATED[:1], [{"event": "evaluated", "step": 1, "AP": None}]]
)
def test_history_is_plotted(tmp_path, lines):
    out = visualize.plot_history([{"event": "saved"}, *lines], tmp_path / "new" / "history.png")
    with Image.open(out) as picture:
        assert picture.width > 500


def test_curves_of_methods_with_their_means(tmp_path):
    curves = {"fast": ([1.0, 2.0, 4.0], [[0.1, 0.3, 0.4], [0.2, 0.3, 0.5]]), "slow": ([1.0, 2.0], [[0.0, 0.1]])}
    out = visualize.plot_curves(curves, tmp_path / "new" / "curves.png", x="epoch", y="AP", level=0.3)
    assert len(np.unique(np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_an_empty_history_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing to plot"):
        visualize.plot_history([{"event": "saved"}], tmp_path / "history.png")


@pytest.mark.parametrize("classes", [1, 3, 30])
def test_curves_and_confusions_are_plotted(tmp_path, classes):
    names = [f"class {k}" for k in range(classes)]
    precision = np.tile(np.linspace(1, 0, 101), (classes, 1))
    precision[0] = np.nan
    for path in (
        visualize.plot_pr(np.linspace(0, 1, 101), precision, names, tmp_path / "pr.png"),
        visualize.plot_confusion(np.eye(classes + 1, dtype=np.int64), names, tmp_path / "confusion.png"),
    ):
        with Image.open(path) as picture:
            assert picture.width > 400


class Bins(NamedTuple):
    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray
    ece: float


def bins_of(accuracy, counts):
    edges = np.linspace(0, 1, len(accuracy) + 1)
    counts, accuracy = np.array(counts), np.array(accuracy)
    empty = np.where(counts > 0, 1.0, np.nan)
    return Bins(edges, (edges[1:] + edges[:-1]) / 2 * empty, accuracy * empty, counts, 0.1 if counts.any() else np.nan)


@pytest.mark.parametrize("name", ["Ⓐ клетка", "\ue123", "n" * 300, "W" * 300, "$x^2", "$\\frac{$"])
@pytest.mark.parametrize("classes", [2, 30])
def test_names_of_any_kind_are_plotted_without_a_warning(tmp_path, name, classes):
    recall = np.linspace(0, 1, 11)
    names = [name, *["cell"] * (classes - 1)]
    visualize.plot_pr(recall, np.ones((classes, 11)), names, tmp_path / "pr.png")
    visualize.plot_confusion(np.ones((classes + 1, classes + 1), int), names, tmp_path / "confusion.png")
    with Image.open(tmp_path / "pr.png") as curves, Image.open(tmp_path / "confusion.png") as confusion:
        assert max(curves.size + confusion.size) < 3200


def test_reliability_is_plotted_in_one_colour_for_each_curve(tmp_path):
    before, after = bins_of([0.0, 0.1, 0.2, 0.6], [900, 40, 9, 80]), bins_of([0.1, 0.4, 0.0, 0.9], [900, 40, 0, 3])
    seen = {}
    for name, curves in {"one": {"before": before}, "two": {"before": before, "after": after}}.items():
        out = plot_reliability(curves, tmp_path / "new" / f"{name}.png")
        with Image.open(out) as picture:
            assert picture.width > 500
            seen[name] = [int(painted(picture.convert("RGB"), colour).sum()) for colour in PALETTE[:2]]
    assert seen["one"][0] > 500
    assert seen["one"][1] == 0
    assert min(seen["two"]) > 500


def test_reliability_without_detections_is_plotted(tmp_path):
    out = plot_reliability({"nothing": bins_of([0.0, 0.0], [0, 0])}, tmp_path / "reliability.png")
    assert out.exists()


def test_reliability_of_nothing_or_of_ill_fitting_columns_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing to plot"):
        plot_reliability({}, tmp_path / "reliability.png")
    with pytest.raises(UsageError, match=r"before.*do not fit together"):
        plot_reliability({"before": bins_of([0.5], [3])._replace(counts=np.ones(2))}, tmp_path / "reliability.png")


def test_plots_of_ill_fitting_shapes_are_refused(tmp_path):
    with pytest.raises(UsageError, match="do not fit together"):
        visualize.plot_pr(np.zeros(101), np.zeros((2, 101)), ["a"], tmp_path / "pr.png")
    with pytest.raises(UsageError, match="do not fit together"):
        visualize.plot_confusion(np.zeros((2, 2)), ["a", "b"], tmp_path / "confusion.png")


def test_plots_without_matplotlib_name_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib.*detrkit\[plot\]"):
        visualize.plot_history(STEPS, tmp_path / "history.png")

"""The content of the pictures, and that curves are distinguishable."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from skill_fairseq.clustering.linkage import link
from skill_fairseq.clustering.plot import COLOURS, plot_clusters
from skill_fairseq.reporting import pictures
from skill_fairseq.reporting.pictures import STYLES, beyond, draw_curves, forest

# Machado, Oliveira and Fernandes 2009: linear RGB as seen without long, middle and short cones.
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])


def lab(colour: str, sight: Any) -> np.ndarray:
    """CIE L*a*b* of a colour, white at D65."""
    encoded = np.array(to_rgb(colour))
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(np.asarray(sight) @ linear, 0, 1) / [0.95047, 1.0, 1.08883]
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_are_told_apart_by_the_colour_blind_too(sight: str) -> None:
    """A difference of 2.3 is just noticeable; here it is 15, and no colour is too pale for white paper."""
    seen = [lab(colour, SIGHT[sight]) for colour in COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15
    assert max(colour[0] for colour in seen) < 80


def test_any_two_styles_differ_in_two_ways_or_more() -> None:
    assert len(STYLES) >= 24
    for one, other in itertools.combinations(STYLES, 2):
        assert sum(a != b for a, b in zip(one, other)) >= 2, (one, other)


@pytest.mark.parametrize("points", [13, 400])
def test_of_24_curves_no_two_look_alike(points: int) -> None:
    """Drawn at the same place, one at a time, any two pictures differ, also in black and white."""
    seen = []
    for number in range(24):
        lines = {str(i): (range(points), [0.0 if i == number else np.nan] * points) for i in range(24)}
        canvas = FigureCanvasAgg(Figure(figsize=(3, 1), dpi=100))
        draw_curves(canvas.figure.add_subplot(), lines)
        canvas.draw()
        seen.append(np.asarray(canvas.buffer_rgba())[..., :3] / 255)
    for one, other in itertools.combinations(seen, 2):
        assert np.abs(one - other).sum() > 100  # pixels that turn from white to black
        assert np.abs(one.mean(-1) - other.mean(-1)).sum() > 15


def test_a_target_takes_no_style_from_the_others() -> None:
    axes = Figure().add_subplot()
    draw_curves(axes, {"target": ([0, 1], [0, 1]), "expected": ([0, 1], [0, 1])}, dashed=["target"])
    target, expected = axes.get_lines()
    assert target.get_color() == pictures.GREY and expected.get_color() == COLOURS[0]


def drawn(monkeypatch: pytest.MonkeyPatch, path: Path, paint: Any) -> Any:
    """The axes of a picture."""
    kept = []
    save = Figure.savefig

    def spy(figure: Figure, *args: Any, **options: Any) -> None:
        kept.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    paint(path)
    return kept[0].axes[0]


PAINTERS = {
    "curves": lambda path: pictures.curves(path, {f"name {i}": ([0, 1], [1, 2]) for i in range(9)}, "L1", log=True),
    "two curves": lambda path: pictures.curves(path, {"a": ([0, 1], [1, 2]), "b": ([0, 1], [1, 2])}, "loss"),
    "forest": lambda path: forest(path, ROWS, "points", 0.0, zoom=True),
    "units": lambda path: pictures.kept_units(path, {"heads": [0.5, None], "FFN units": [0.1, 0.0]}),
    "clusters of 13": lambda path: clusters(path, 13),
    "clusters of 25": lambda path: clusters(path, 25),
}


def clusters(path: Path, layers: int) -> None:
    distances = np.abs(np.subtract.outer(np.arange(layers), np.arange(layers))) / layers
    groups = [[i] for i in range(layers)]
    plot_clusters(path, distances, link(distances), groups, 0.01, range(layers), "cka", "title")


@pytest.mark.parametrize("name", PAINTERS)
def test_words_can_be_read_on_a_phone(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """360 px less margins is 328; clusters scroll; 7.9 px is small text."""
    width = 860 if name.startswith("clusters") else 328
    figure = drawn(monkeypatch, tmp_path / "a.png", PAINTERS[name]).figure
    words = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert len(words) > 5
    for text in words:
        assert text.get_fontsize() / 72 / figure.get_figwidth() * width >= 7.9, text.get_text()


def test_distances_far_apart_have_a_logarithmic_axis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    far = {"near": ([0, 1], [0.02, 0.03]), "far": ([0, 1], [0.9, 1.0])}
    axes = drawn(monkeypatch, tmp_path / "a.png", lambda path: pictures.curves(path, far, "L1", log=True))
    assert axes.get_yscale() == "log"
    assert [label.get_text() for label in axes.get_yticklabels()].count("0.05") == 1
    zero = {"near": ([0, 1], [0.0, 0.03])}
    axes = drawn(monkeypatch, tmp_path / "b.png", lambda path: pictures.curves(path, zero, "L1", log=True))
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize("name", ["sixteen_letters_", "a_method_with_quite_a_long_name"])
def test_many_curves_are_named_below_the_axes(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = {f"{name}_{i:02d}": ([0, 1], [i, i]) for i in range(20)}
    axes = drawn(monkeypatch, tmp_path / "a.png", lambda path: pictures.curves(path, lines, "L1"))
    figure = axes.figure
    legend = figure.legends[0].get_window_extent()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)
    assert legend.y1 <= axes.get_tightbbox().y0 and legend.x0 >= 0 and legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize("label", ["verification, equal error rate: points above dphubert", "a word of many " * 8])
def test_long_labels_stay_within_the_picture(label: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [("a_method_with_quite_a_long_name", interval) for _, interval in ROWS]
    figure = drawn(monkeypatch, tmp_path / "a.png", lambda path: forest(path, rows, label, 0.0)).figure
    figure.canvas.draw()
    assert label.split() == figure.get_supxlabel().split()
    words = [*figure.texts, *figure.axes[0].get_yticklabels()]
    assert len(words) == 4
    for text in words:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1, text


ROWS = [("a", (0.5, -1.0, 2.0)), ("b", (-1.0, -3.0, 1.0)), ("c", (-30.0, -33.0, -27.0))]


def test_what_lies_beyond_the_axis() -> None:
    far = ROWS[2]
    assert beyond(ROWS, 0.0) == [2] and beyond([far, *ROWS[:2] * 2, far], 0.0) == [0, 5]
    assert beyond(ROWS[:2], 0.0) == []  # not three times as far
    assert beyond([far, *ROWS], 0.0) == []  # if half are far, all are shown
    assert beyond([far], 0.0) == [] and beyond(ROWS, -30.0) == []


def test_what_is_far_off_is_written_at_the_edge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    axes = drawn(monkeypatch, tmp_path / "a.png", lambda path: forest(path, ROWS, "points", 0.0, zoom=True))
    assert [text.get_text() for text in axes.texts] == ["◂ -30.0 [-33.0, -27.0]"]
    assert axes.texts[0].get_color() == COLOURS[1]
    left, right = axes.get_xlim()
    assert -4 < left < -3 and 2 < right < 3
    axes = drawn(monkeypatch, tmp_path / "b.png", lambda path: forest(path, ROWS, "points", 0.0))
    assert not axes.texts and axes.get_xlim()[0] < -33

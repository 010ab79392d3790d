"""Pictures: what is drawn is what was given."""

import io
import itertools
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from keras_ebft import BlockGeometry, plots

pytestmark = pytest.mark.backend_independent


def lines(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}


def test_training_curves():
    runs = {
        "EBFT": {"ce_loss": [3.0, 2.0], "val_ce_loss": [3.5, 2.5], "loss": [1, 1]},
        "SFT": type("History", (), {"history": {"val_ce_loss": [3.0]}})(),
    }
    figure = plots.training_curves(runs, metrics=("ce_loss",))
    (axis,) = figure.axes
    assert lines(axis) == {
        "EBFT, training": [[1, 3.0], [2, 2.0]],
        "EBFT": [[1, 3.5], [2, 2.5]],
        "SFT": [[1, 3.0]],
    }
    assert axis.get_ylabel() == "cross-entropy (nats/token)"
    before = {"EBFT": {"ce_loss": 4.0, "loss": 1.0}}
    (axis,) = plots.training_curves(runs, metrics=("ce_loss",), before=before).axes
    assert lines(axis)["EBFT"] == [[0, 4.0], [1, 3.5], [2, 2.5]]
    assert lines(axis)["EBFT, training"] == [[1, 3.0], [2, 2.0]]
    with pytest.raises(ValueError, match="Received: base"):
        plots.training_curves(runs, metrics=("ce_loss",), before={"base": {}})
    with pytest.raises(ValueError, match=r"'reward'.*val_ce_loss"):
        plots.training_curves(runs, metrics=("ce_loss", "reward"))


def test_accuracy_plane():
    points = {"SFT": (0.289, 0.483), "EBFT": [(0.3, 0.5), (0.207, 0.548)]}
    (axis,) = plots.accuracy_plane(points).axes
    assert lines(axis) == {
        "SFT": [[0.289, 0.483]],
        "EBFT": [[0.3, 0.5], [0.207, 0.548]],
    }
    assert {line.get_linestyle() for line in axis.lines} == {"-"}
    label = "cross-entropy of tests"
    (axis,) = plots.accuracy_plane(points, likelihood_label=label, joined=False).axes
    assert {line.get_linestyle() for line in axis.lines} == {"None"}
    assert axis.get_xlabel() == label
    figure = axis.figure
    figure.savefig(io.BytesIO())
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axis.get_window_extent())
    # Points at the same place: shapes of their own, open.
    assert len({line.get_marker() for line in axis.lines}) == len(points)
    assert {line.get_fillstyle() for line in axis.lines} == {"none"}
    with pytest.raises(ValueError, match=r"\(1, 3\) for 'SFT'"):
        plots.accuracy_plane({"SFT": (1, 2, 3)})


def test_labels_of_near_likelihoods_stand_apart():
    points = {"EBFT audit, gamma 0.03": [(0.3876, 0.59), (0.3915, 0.58)]}
    (axis,) = plots.accuracy_plane(points).axes
    axis.figure.savefig(io.BytesIO())
    boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
    assert len(boxes) > 2
    assert all(one.x1 < next_.x0 for one, next_ in itertools.pairwise(boxes))


def test_rollout_length_curves():
    (axis,) = plots.rollout_length_curves({"base": {8: 1.5, 2: 0.5}}).axes
    assert lines(axis) == {"base": [[2, 0.5], [8, 1.5]]}
    assert axis.get_xticks().tolist() == [2, 8]


def test_geometry():
    block_geometry = BlockGeometry(10, context_length=2, rollout_length=3, stride=4)
    layout, mask = plots.geometry(block_geometry).axes
    (image,) = mask.get_images()
    np.testing.assert_array_equal(image.get_array(), block_geometry.attention_mask())
    anchors = [line.get_xdata() for line in layout.get_lines()]
    assert [list(x) for x in anchors] == [[2, 2], [6, 6], []]
    with pytest.raises(TypeError, match="BlockGeometry"):
        plots.geometry(10)


def test_figures_can_be_saved():
    file = io.BytesIO()
    plots.geometry(BlockGeometry(24, 4, 4, 4)).savefig(file, dpi=50)
    file.seek(0)
    pixels = imread(file)
    assert pixels.std() > 0.05


@pytest.mark.parametrize(
    "draw",
    [plots.training_curves, plots.accuracy_plane, plots.rollout_length_curves],
)
def test_nothing_to_draw(draw):
    with pytest.raises(ValueError, match="at least one entry"):
        draw({})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib.*keras_ebft\[plots\]"):
        plots.rollout_length_curves({"EBFT": {2: 0.5}})

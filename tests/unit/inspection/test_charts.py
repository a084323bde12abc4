import xml.etree.ElementTree as ElementTree

import pytest

from m4train.inspection.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, line_chart


def drawn(figure):
    """The scale of a chart that is shown."""
    return next(svg for svg in ElementTree.fromstring(figure).iter("svg") if "hidden" not in svg.attrib)


def test_of_many_points_no_spike_is_lost():
    points = [(step, 1.0 + (7.0 if step == 4321 else 0.0)) for step in range(10_000)]
    figure = line_chart([Line("loss", points)], "step", "loss", log=True)
    assert len(figure) < 60_000
    assert "[4321, 8.0, " in figure
    assert [svg.get("data-scale") for svg in ElementTree.fromstring(figure).iter("svg")] == ["log", "linear"]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[3.0, 2.0, 1.5], [0.001, 50.0, 7.0], [2.0], [1.0, 1.0]])
def test_every_point_lies_inside_the_axes(values, log):
    svg = drawn(line_chart([Line("loss", list(enumerate(values)), dots=True)], "step", "loss", log))
    circles = svg.findall("circle")
    assert len(circles) == len(values)
    for circle in circles:
        assert LEFT - 0.1 <= float(circle.get("cx")) <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= float(circle.get("cy")) <= HEIGHT - BOTTOM + 0.1


def test_higher_values_are_drawn_higher():
    svg = drawn(line_chart([Line("x", [(0, 1.0), (1, 5.0)], dots=True)], "step", "y"))
    low, high = svg.findall("circle")
    assert float(high.get("cy")) < float(low.get("cy"))


def test_points_that_are_not_finite_are_left_out_and_no_points_give_nothing():
    svg = drawn(line_chart([Line("x", [(0, float("nan")), (1, 2.0)], dots=True)], "step", "y"))
    assert len(svg.findall("circle")) == 1
    assert line_chart([Line("x", [(0, float("inf"))])], "step", "y") == ""


def test_names_are_escaped():
    assert "<b>" not in line_chart([Line("<b>", [(0, 1.0)])], "step", "y")

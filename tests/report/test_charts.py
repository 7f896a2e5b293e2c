"""What a chart's data holds."""

from types import SimpleNamespace

from aimmerging.report.charts import score_curves


def test_a_curve_has_the_points_that_were_scored_and_one_empty_point_for_each_gap():
    tasks = ("a", "b", "c", "d", "e")
    first = (10.0, 90.0, None, None, None, 80.0)
    full = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0)
    scores = SimpleNamespace(tasks=tasks, matrix=(first, *[full] * 4), single_task=None)
    line, whole, *_ = score_curves(SimpleNamespace(scores=scores, stages=()))["data"]  # pyright: ignore[reportArgumentType]
    assert line["x"] == [0, 1, 2, 5]
    assert line["y"] == [10.0, 90.0, None, 80.0]
    assert [text.partition("<br>")[2] for text in line["hovertext"]] == [
        "before training: 10.0", "after a: 90.0", "after b: not scored", "after e: 80.0",
    ]  # fmt: skip
    assert line["marker"]["size"] == [5, 11, 5, 5]
    assert whole["x"] == list(range(6))

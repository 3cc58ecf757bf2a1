from nemo_like.observability.curves import Chart
from nemo_like.observability.plots import draw


def test_the_kinds_of_matrix_of_a_large_model_have_a_colour_each():
    drawing = draw(Chart("t", {f"kind_{i}": {1: float(i), 11: 2.0 * i} for i in range(12)}))
    assert len({colour for _, colour in drawing.legend}) == 12
    assert all(colour in drawing.svg for _, colour in drawing.legend)

import pytest

from nemo_like.environments.dapo_math import normalized, reward

SAME = [
    ("34", "34"),
    ("x = 34", "34"),
    ("$34$", "34"),
    ("the value is $34$, surely", "34"),
    ("$x+1=34$", "34"),
    ("$34.$", "34"),
    (r"\boxed{34}", "34"),
    (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\frac34x", r"\frac{3}{4}x"),
    (r"\sqrt2", r"\sqrt{2}"),
    (r"\sqrt3x", r"\sqrt{3}x"),
    (r"\sqrt[3]{5}", r"\sqrt[3]{5}"),
    ("1,234", "1234"),
    ("1,234,567", "1234567"),
    ("1{,}234", "1234"),
    (r"1,\!234", "1234"),
    ("(1, 2)", "(1,2)"),
    (r"1, 2, \text{and} 3", "1,2,3"),
    (r"1, 2 \text{ and } 3", "1,2,3"),
    ("34 degrees", "34"),
    (r"34^\circ", "34"),
    (r"34^{\circ}", "34"),
    ("34 square feet", "34"),
    (r"34 \text{ cm}", "34"),
    (r"34\text{ cm}^2", "34"),
    (r"34\mbox{ inches}", "34"),
    (r"34\text{m}", "34"),
    (r"34\text{.}", "34"),
    (r"5^{\mathrm{th}}", "5^{}"),
    (r"5\mathrm{th}", "5"),
    (r"\$34", "34"),
    ("34 dollars", "34"),
    (r"\text{blue}", "blue"),
    (r"\textbf{(B)}", "(B)"),
    ("a triangle", "triangle"),
    ("an octagon", "octagon"),
    (r"1\ 2\;3", "123"),
    ('"blue"', "blue"),
]
DIFFERENT = [
    ("34", "35"),
    ("34.", "34"),
    ("0.5", r"\frac{1}{2}"),
    ("(1,2)", "(12)"),
    ("1,2", "12"),
    ("-34", "34"),
    ("34%", "34"),
    ("Blue", "blue"),
    ("two", "2"),
    ("", "0"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    ("x^2", "x^3"),
    ("always", "al"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_answer_has_the_same_normal_form(one, other):
    assert normalized(one) == normalized(other) == other


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_texts_stay_different(one, other):
    assert normalized(one) != normalized(other)


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        ("Answer: 34", 1.0),
        ("So it is.\nAnswer: $34$\n", 1.0),
        ("ANSWER :34", 1.0),
        ("answer:\n34", 1.0),
        ("Answer: 33\nNo. Answer: 34", 1.0),
        ("Answer: 34\nNo. Answer: 33", 0.0),
        ("Answer: 34 or 33", 0.0),
        ("Answer: 34" + "." * 300, 0.0),
        ("Answer: 34\n" + "." * 289, 1.0),
        ("Answer: 34\n" + "." * 290, 0.0),
        ("34", 0.0),
        ("Answer:", 0.0),
        ("Answer: ", 0.0),
        ("Answer: \x00\ud800", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_answer_near_the_end_decides(answer, points):
    assert reward("", answer, "34") == points

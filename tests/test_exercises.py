"""check() tells right from wrong, says how wrong, and survives every answer."""

import copy
import itertools
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from oral4.exercises import Check, check

A = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]])
T = torch.tensor(A, dtype=torch.float32)


def message(answer, reference, **options):
    outcome = check(answer, reference, **options)
    assert not outcome and outcome.verdict == "wrong", outcome
    return outcome.message


RIGHT = [
    (1, 1), (4.0, 4), (4, 4.0), (0.1 + 0.2, 0.3), (np.float32(0.1), 0.1), (Fraction(1, 2), 0.5),
    (0.5, Fraction(1, 2)), (2, 2.0), (torch.tensor(0.1), 0.1), (np.array(3), 3), (10**30, 10**30),
    (2**63, 2**63), (1j, 1j), (float("nan"), float("nan")), (float("inf"), float("inf")), (True, True),
    (np.bool_(False), False), (torch.tensor(True), np.bool_(True)), ("a", "a"), (b"a", b"a"), (A, A.copy()),
    (A.astype(np.float32), A), (T, T.clone()), (T.bfloat16(), T), (T.requires_grad_(), T.detach()),
    (T.to_sparse(), T), (np.uint8([1, 2]), np.array([1, 2])),
    (torch.ones(2, dtype=torch.complex64), torch.ones(2) + 0j), (np.array(["a", "b"]), np.array(["a", "b"])),
    (np.zeros((0, 3)), np.zeros((0, 3))), (np.array([None, 1]), np.array([None, 1])), ([1, 2.5], [1, 2.5]),
    ((1, 2), [1, 2]), ([], []), (["a", None], ["a", None]), ([A, {"k": T}], (A, {"k": T})),
    ([10**30], [10**30]), ({"a": 1, "b": [2]}, {"b": [2], "a": 1}), ({1, 2}, {2, 1}),
    (frozenset("ab"), {"a", "b"}), (range(3), [0, 1, 2]),
    (np.array([np.nan, -np.inf]), np.array([np.nan, -np.inf])), (int, int), (slice(1), slice(1)),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), RIGHT, ids=lambda v: type(v).__name__)
def test_right(answer, reference):
    outcome = check(answer, reference)
    assert outcome and outcome.verdict == "right" and repr(outcome) == "answer: right"


@pytest.mark.parametrize("answer", [None, ...])
@pytest.mark.parametrize("reference", [1, "a", A, T, [1], {"a": 1}, {1}, True])
def test_not_attempted(answer, reference):
    outcome = check(answer, reference, name="weights")
    assert not outcome and outcome.verdict == "open" and repr(outcome) == "weights: not attempted"


def test_a_part_not_attempted_is_named():
    assert repr(check([1, None], [1, 2])) == "answer: [1]: not attempted"
    assert repr(check({"a": {"b": ...}}, {"a": {"b": 2}})) == "answer: ['a']: ['b']: not attempted"


WRONG = [
    (2, 1, "off by 1"),
    (1.5, 1.0, "off by 0.5"),
    (-2.0, 2.0, "off by 4; the sign is flipped"),
    (10**30 + 1, 10**30, "off by 1"),
    ("1", 1, "expected a number, got str"),
    (True, 1, "expected a number, got bool"),
    ([1], 1, "expected a number, got list of 1"),
    (np.ones(2), 1.0, "expected a number, got ndarray of shape (2,) and dtype float64"),
    (float("nan"), 1.0, "it is NaN, where it should not be"),
    (float("inf"), 1.0, "it is infinite, where it should not be"),
    (1.0, float("nan"), "it is finite, where it should not be"),
    (1, True, "expected True or False, got int"),
    (False, True, "False is not right"),
    ("ab", "abc", "it differs from character 2 on (expected 3 characters, got 2)"),
    ("axc", "abc", "it differs from character 1 on (expected 3 characters, got 3)"),
    ("a  b\n", "a b", "only the white space differs"),
    ("ABC", "abc", "only upper and lower case differ"),
    (b"a", "a", "expected str, got bytes"),
    (3, "a", "expected str, got int"),
    (A.T, A, "expected shape (2, 3), got (3, 2); its transpose is right"),
    (A.T + 1, A, "expected shape (2, 3), got (3, 2)"),
    (T, A, "expected ndarray of shape (2, 3) and dtype float64, got Tensor of shape (2, 3) and dtype float32"),
    (A.tolist(), T, "expected Tensor of shape (2, 3) and dtype float32, got list of 2"),
    (3.0, T, "expected Tensor of shape (2, 3) and dtype float32, got float"),
    (T.int(), T, "expected dtype float32, got int32"),
    (T > 1, T, "expected dtype float32, got bool"),
    (T.bool().float(), T.bool(), "expected dtype bool, got float32"),
    (T < 3, T > 3, "5 of 6 entries differ, first at [0, 0]"),
    (-A, A, "max difference 14 at [1, 2]; the sign is flipped"),
    (2 * A, A, "max difference 7 at [1, 2]; every value is 2 times the expected one"),
    (A / 8, A, "max difference 6.12 at [1, 2]; every value is 0.125 times the expected one"),
    (A - 0.25, A, "max difference 0.25 at [0, 0]; every value is off by the same -0.25"),
    (A[:, :2].T, A[:, :2], "max difference 2 at [0, 1]; the last two axes are swapped"),
    (A + np.array([[0, 0, 0.031], [0, 0, 0]]), A, "max difference 3.1e-2 at [0, 2]"),
    (np.where(A == 3, np.nan, A), A, "1 of 6 entries are NaN, first at [0, 2], where it should not be"),
    (np.array([1, 2]), np.array([1, 3]), "max difference 1 at [1]"),
    (np.uint8([0]), np.uint8([255]), "max difference 255 at [0]"),
    ([1, 2, 4], [1, 2, 3], "max difference 1 at [2]"),
    ([1, 2], [1, 2, 3], "expected 3 entries, got 2"),
    ("abc", ["a", "b", "c"], "expected list of 3, got str"),
    (7, [7], "expected list of 1, got int"),
    ([A, A], [A, A + 1], "[1]: max difference 1 at [0, 0]; every value is off by the same -1"),
    ({"a": 1}, {"a": 1, "b": 2}, "keys: missing 'b'"),
    ({"a": 1, "c": 1}, {"a": 1, "b": 2}, "keys: missing 'b'; unexpected 'c'"),
    ({"a": [1, "x"]}, {"a": [1, "y"]}, "['a']: [1]: it differs from character 0 on (expected 1 characters, got 1)"),
    ([("a", 1)], {"a": 1}, "expected dict of 1, got list of 1"),
    ({1, 2, 3}, {1, 5}, "1 missing; unexpected 2, 3"),
    ([1], {1}, "expected set of 1, got list of 1"),
    (set(range(20)), set(), "unexpected 0, 1, 10, 11, 12 and 15 more"),
    (slice(2), slice(1), "this slice differs from the expected one"),
    (3, slice(1), "expected slice, got int"),
]


@pytest.mark.parametrize(("answer", "reference", "expected"), WRONG, ids=map(str, range(len(WRONG))))
def test_wrong_says_how(answer, reference, expected):
    assert message(answer, reference) == expected
    inside = message({"key": answer}, {"key": reference})
    assert inside == f"['key']: {expected}"


@pytest.mark.parametrize("wrap", [np.asarray, torch.tensor, list])
def test_the_worst_entry_is_named_for_every_container(wrap):
    assert message(wrap([1.0, 2.0, 3.0]), wrap([1.0, 2.5, 4.5])) == "max difference 1.5 at [2]"


def test_tolerances_by_width():
    one = torch.ones(4)
    for kind, near, far in [(torch.float64, 5e-7, 3e-6), (torch.float32, 5e-5, 3e-4), (torch.bfloat16, 1e-2, 5e-2)]:
        assert check((one.double() * (1 + near)).to(kind), one.to(kind))
        assert not check((one.double() * (1 + far)).to(kind), one.to(kind))
    assert check(one.double() + 5e-5, one)  # the coarser type decides
    assert check(torch.tensor(1 + 5e-5), 1.0) and not check(1 + 5e-5, 1.0)


def test_tolerances_can_be_set():
    assert check(1.05, 1.0, atol=0.1) and check(1.05, 1.0, rtol=0.1) and not check(1.05, 1.0, atol=0.01)
    assert check(9, 10, atol=1) and not check(9, 10)
    assert not check(1 + 1e-12, 1.0, rtol=0)
    assert check([np.ones(2) * 1.05], [np.ones(2)], rtol=0.1)
    assert check(np.array([1, 5]), np.array([2, 4]), atol=1)


class TestFunctions:
    def test_right_and_wrong(self):
        assert check(lambda x: 2 * x, lambda x: x + x, inputs=[1, 2.5, np.ones(3)])
        assert message(lambda x: x**2, lambda x: 2 * x, inputs=[2, 3]) == "input 2: off by 3"
        assert message(lambda x: -x, np.abs, inputs=[np.ones(2)]) == "max difference 2 at [0]; the sign is flipped"

    def test_arguments_by_position_and_by_name(self):
        assert check(lambda a, b: a - b, lambda a, b: a - b, inputs=[(3, 1), {"b": 1, "a": 3}])

    @pytest.mark.parametrize("result", [None, ...])
    def test_a_starter_that_returns_nothing_is_not_attempted(self, result):
        assert check(lambda x: result, lambda x: x, inputs=[1]).verdict == "open"
        assert message(lambda x: x if x == 1 else result, lambda x: x, inputs=[1, 2]) == "input 2: nothing was returned"

    def test_none_can_be_right(self):
        assert check(lambda x: None, lambda x: None, inputs=[1])
        assert message(lambda x: 3, lambda x: None, inputs=[1]) == "expected None, got int"

    def test_a_starter_that_raises_not_implemented_is_not_attempted(self):
        def starter(x):
            raise NotImplementedError

        assert check(starter, abs, inputs=[1]).verdict == "open"
        assert check(None, abs, inputs=[1]).verdict == check(..., abs, inputs=[1]).verdict == "open"

    def test_what_the_function_raises_stands_in_one_line(self):
        def fails(x):
            raise ValueError("bad\n  thing " + 300 * "y")

        assert message(fails, abs, inputs=[1, 2]).startswith("input 1: raised ValueError: bad thing yyy")
        assert len(message(fails, abs, inputs=[1])) < 220
        assert message(lambda: 1, abs, inputs=[1]).startswith("raised TypeError: ")
        assert message(lambda x: next(iter(())), abs, inputs=[1]) == "raised StopIteration"

    def test_an_interrupt_is_not_swallowed(self):
        def interrupted(x):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            check(interrupted, abs, inputs=[1])

    def test_an_answer_that_works_in_place_changes_nothing_outside(self):
        given_input = np.ones(2)

        def in_place(x):
            x += 1
            return x

        assert check(in_place, lambda x: x + 1, inputs=[given_input, given_input])
        assert given_input.tolist() == [1, 1]

    def test_a_value_instead_of_a_function(self):
        assert message(3, abs, inputs=[1]) == "expected a function, got int"
        assert message(abs, 3) == "expected a number, got builtin_function_or_method"

    def test_a_module_of_pytorch_is_a_function(self):
        layer = torch.nn.Linear(2, 2)
        assert check(copy.deepcopy(layer), layer, inputs=[torch.ones(3, 2)])


class Hostile:
    """Everything about this object fails."""

    def __eq__(self, other):
        raise RuntimeError("never\ncompare")

    def __len__(self):
        raise RuntimeError("no length")

    __hash__ = None


REFERENCES = [1, 0.5, "a", A, T, [1], ["a"], {"a": 1}, {1}, True, Hostile()]
ANSWERS = [
    Hostile(), object(), int, [[1], [2, 3]], [Hostile()], {"a": Hostile()}, (i for i in []), np.array([Hostile()]),
    torch.empty(0), torch.empty(2, 3, device="meta"), np.array(None), np.datetime64("2020-01-01"),
    type("D", (dict,), {})(), "", b"", {}, set(), lambda: 1,
]  # fmt: skip


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("answer", ANSWERS, ids=lambda value: type(value).__name__)
def test_no_answer_makes_it_raise(answer, reference):
    outcome = check(answer, reference)
    assert outcome.verdict == "wrong" and "\n" not in outcome.message and outcome._repr_html_()


def test_mistakes_of_the_author_do_raise():
    for reference in (None, ...):
        with pytest.raises(ValueError, match="reference is missing"):
            check(1, reference)
    for inputs in (None, []):
        with pytest.raises(ValueError, match="inputs="):
            check(abs, abs, inputs=inputs)
    for tolerances in ({"rtol": -1}, {"atol": float("nan")}):
        with pytest.raises(ValueError, match="0 or more"):
            check(1, 1, **tolerances)
    with pytest.raises(ZeroDivisionError):
        check(lambda x: 1, lambda x: 1 / x, inputs=[0])


def test_it_shows_a_shape_and_words_and_escapes():
    outcomes = [check(1, 1), check(2, 1), check(None, 1)]
    pages = [outcome._repr_html_() for outcome in outcomes]
    for page, shape, words in zip(pages, "✓✗○", ["Right", "Off by 1", "Not attempted"], strict=True):
        assert f">{shape}</span>" in page and words in page
    nasty = check({"<b>": 1}, {"<i>": 1}, name="<script>")._repr_html_()
    assert "<script>" not in nasty and "<b>" not in nasty and "&lt;i&gt;" in nasty
    assert str(Check("x", "right", "right")) == "x: right"


values = arrays(np.float64, array_shapes(max_dims=3, max_side=4), elements=st.floats(-1e6, 1e6))


@given(values, st.data())
def test_the_named_difference_and_place_are_true(reference, data):
    answer = data.draw(arrays(np.float64, reference.shape, elements=st.floats(-1e6, 1e6)))
    outcome = check(answer, reference)
    assert bool(outcome) == np.allclose(answer, reference, rtol=1e-6, atol=1e-9)
    if not outcome:
        words = outcome.message.split(";")[0].split(" at ")
        size = float(words[0].removeprefix("max difference "))
        place = tuple(int(i) for i in words[1].strip("[]").split(", "))
        difference = np.abs(answer - reference)
        assert size == pytest.approx(difference[place], rel=0.06)  # two digits
        # An entry within its own tolerance is not named, although it may differ more than one outside.
        wrong = ~np.isclose(answer, reference, 1e-6, 1e-9)
        assert difference[place] == pytest.approx(difference[wrong].max(), rel=1e-12)


@given(values)
def test_hints_are_true(reference):
    for factor, offset in itertools.product((-1, 3), (0, 2)):
        text = check(reference * factor + offset, reference).message
        if "sign" in text:
            assert np.allclose(-(reference * factor + offset), reference, rtol=1e-6, atol=1e-9)
        if found := re.search(r"is (\S+) times", text):
            assert np.allclose(reference * factor + offset, float(found[1]) * reference, rtol=0.05, atol=1e-6)


def test_it_imports_neither_torch_nor_ipython():
    code = (
        "import sys, oral4.exercises as e\n"
        "e.check([1.0], [2.0])\n"
        "print({'torch', 'IPython', 'matplotlib'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"

"""Check the answer to an exercise: right, or how it is wrong, and nothing alarming while a cell is unfinished.

>>> check(0.5, 0.5)
answer: right
>>> check(None, 0.5)
answer: not attempted
>>> check([1.0, -2.0], [-1.0, 2.0], name="gradient")
gradient: max difference 4 at [1]; the sign is flipped
"""

from __future__ import annotations

import copy
import html
import numbers
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Check", "check"]

# Relative and absolute tolerance by the number of bits of the coarser of the two types. They are wider than rounding:
# a right answer may sum in another order. A mistake is far larger.
_TOLERANCES = {64: (1e-6, 1e-9), 32: (1e-4, 1e-5), 16: (2e-2, 2e-3)}

Tolerance = tuple[float, float] | None

# Shapes as well as words and colours, so that no reader depends on colour. None has an emoji form.
_LOOK = {"right": ("\u2713", "#009E73"), "wrong": ("\u2717", "#D55E00"), "open": ("\u25cb", "#808080")}


@dataclass(frozen=True)
class Check:
    """The outcome of :func:`check`; a notebook shows it, and it is true only if the answer is right."""

    name: str
    """What was checked."""
    verdict: str
    """``"right"``, ``"wrong"`` or ``"open"`` (not attempted)."""
    message: str
    """What to tell the learner."""

    def __bool__(self) -> bool:
        return self.verdict == "right"

    def __repr__(self) -> str:
        return f"{self.name}: {self.message}"

    def _repr_html_(self) -> str:
        shape, color = _LOOK[self.verdict]
        message = self.message[:1].upper() + self.message[1:]
        return (
            f'<div class="oral4-check" data-verdict="{self.verdict}" '
            f'style="border-left:4px solid {color};padding:.4em .8em;margin:.6em 0">'
            f'<span aria-hidden="true" style="color:{color};font-weight:700">{shape}</span> '
            f"<strong>{html.escape(self.name)}</strong>: {html.escape(message)}</div>"
        )


class _Outcome(Exception):
    """Carries the first thing to tell; never leaves this module."""

    def __init__(self, verdict: str, message: str):
        super().__init__(message)
        self.verdict = verdict


def check(
    answer: Any,
    reference: Any,
    *,
    name: str = "answer",
    rtol: float | None = None,
    atol: float | None = None,
    inputs: Sequence[Any] | None = None,
) -> Check:
    """Compare an answer with the reference and say how they differ.

    Parameters
    ----------
    answer : object
        What the learner wrote. ``None`` and ``...`` mean that it was not attempted, and so does a
        function that returns them or raises ``NotImplementedError``.
    reference : object
        A number, text, truth value, array, tensor, function, or lists, tuples, sets and dictionaries of these.
        Anything else is compared with ``==``.
    name : str
        What the outcome is called.
    rtol, atol : float, optional
        ``|answer - reference| <= atol + rtol * |reference|`` is right. By default (1e-6, 1e-9) for 64-bit numbers,
        (1e-4, 1e-5) for 32 bits and (2e-2, 2e-3) for 16 bits, by the coarser of the two; integers have to be
        equal. Give one alone and the other is 0.
    inputs : sequence, optional
        Where the reference is a function: what to call both with. A tuple holds positional arguments, a dict keyword
        arguments, anything else is the single argument. Each call gets a copy of its own.

    Returns
    -------
    Check
        Whatever the answer is, no exception leaves this function because of it.

    Raises
    ------
    ValueError
        If the exercise itself is wrong: no reference, a function to check without inputs, a negative tolerance.

    Examples
    --------
    >>> check(lambda x: 2 * x, lambda x: x + x, inputs=[3, 0.5], name="double")
    double: right
    """
    if reference is None or reference is ...:
        raise ValueError("check: the reference is missing; give the right answer as the second argument")
    if any(limit is not None and not limit >= 0 for limit in (rtol, atol)):
        raise ValueError(f"check: rtol={rtol}, atol={atol}; tolerances are 0 or more")
    tolerance = None if rtol is None and atol is None else (rtol or 0.0, atol or 0.0)
    try:
        if not _is_function(reference):
            _compare(answer, reference, "", tolerance)
        elif inputs:
            _compare_calls(answer, reference, inputs, tolerance)
        else:
            raise ValueError("check: the reference is a function; give inputs=[...] to call both with")
    except _Outcome as outcome:
        return Check(name, outcome.verdict, str(outcome))
    return Check(name, "right", "right")


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _open(value: Any) -> bool:
    return value is None or value is ...


def _compare_calls(answer: Any, reference: Callable[..., Any], inputs: Sequence[Any], tolerance: Tolerance) -> None:
    if _open(answer):
        raise _Outcome("open", "not attempted")
    if not callable(answer):
        raise _Outcome("wrong", f"expected a function, got {_describe(answer)}")
    for number, given in enumerate(inputs, start=1):
        where = f"input {number}: " if len(inputs) > 1 else ""
        expected = _call(reference, given)
        try:
            got = _call(answer, given)
        except NotImplementedError:
            raise _Outcome("open", "not attempted") from None
        except Exception as error:
            raise _Outcome("wrong", f"{where}raised {_one_line(error)}") from None
        if _open(got) and expected is not None and number > 1:
            raise _Outcome("wrong", f"{where}nothing was returned")
        _compare(got, expected, where, tolerance)


def _call(function: Callable[..., Any], given: Any) -> Any:
    given = copy.deepcopy(given)  # an answer that works in place must not spoil what the reference sees
    if isinstance(given, tuple):
        return function(*given)
    if isinstance(given, dict):
        return function(**given)
    return function(given)


def _compare(answer: Any, reference: Any, where: str, tolerance: Tolerance) -> None:
    """Raise :class:`_Outcome`, its message starting with ``where``, unless the two agree."""
    if reference is None:
        if answer is not None:
            raise _Outcome("wrong", f"{where}expected None, got {_describe(answer)}")
        return
    if _open(answer):
        raise _Outcome("open", f"{where}not attempted")
    try:
        message = _difference(answer, reference, where, tolerance)
    except _Outcome:
        raise
    except Exception as error:  # an answer can be any object; whatever it does, the learner gets a line, no traceback
        message = f"could not be compared with {_describe(reference)}: {_one_line(error)}"
    if message:
        raise _Outcome("wrong", where + message)


def _difference(answer: Any, reference: Any, where: str, tolerance: Tolerance) -> str:
    """Return how the two differ, or nothing."""
    unlike = f"expected {_describe(reference)}, got {_describe(answer)}"
    if isinstance(reference, (str, bytes)):
        return _text_difference(answer, reference) if type(answer) is type(reference) else unlike
    if isinstance(reference, (bool, np.bool_)):
        truth = _item(answer)
        if not isinstance(truth, bool):
            return f"expected True or False, got {_describe(answer)}"
        return "" if truth == reference else f"{truth} is not right"
    if isinstance(reference, numbers.Number):
        number = _item(answer)
        if isinstance(number, bool) or not isinstance(number, numbers.Number):
            return f"expected a number, got {_describe(answer)}"
        if isinstance(number, int) and isinstance(reference, int) and tolerance is None:
            if number == reference:
                return ""
            sign = "; the sign is flipped" if number == -reference else ""
            return f"off by {_short(abs(number - reference))}{sign}"
        return _value_difference(_number(answer), _number(reference), tolerance)
    if _is_array(reference):
        if not _is_array(answer) or _is_tensor(answer) != _is_tensor(reference):
            return unlike
        return _shape_difference(answer, reference, tolerance) or _value_difference(answer, reference, tolerance)
    if isinstance(reference, Mapping):
        if not isinstance(answer, Mapping):
            return unlike
        surplus, missing = answer.keys() - reference.keys(), reference.keys() - answer.keys()
        if surplus or missing:
            parts = (_listed("missing", missing), _listed("unexpected", surplus))
            return "keys: " + "; ".join(part for part in parts if part)
        for key in reference:
            _compare(answer[key], reference[key], f"{where}[{key!r}]: ", tolerance)
        return ""
    if isinstance(reference, Set):
        if not isinstance(answer, Set):
            return unlike
        # How many are missing, not which: that would be the solution.
        lacking = len(reference - answer)
        parts = (f"{lacking} missing" if lacking else "", _listed("unexpected", answer - reference))
        return "; ".join(part for part in parts if part)
    if isinstance(reference, Sequence):
        if isinstance(answer, (str, bytes)) or not isinstance(answer, Sequence):
            return unlike
        if len(answer) != len(reference):
            return f"expected {len(reference)} entries, got {len(answer)}"
        if reference and all(_is_plain(value) for value in (*answer, *reference)):
            return _value_difference(answer, reference, tolerance)
        for i, (left, right) in enumerate(zip(answer, reference, strict=True)):
            _compare(left, right, f"{where}[{i}]: ", tolerance)
        return ""
    if type(answer) is not type(reference):
        return unlike
    return "" if bool(answer == reference) else f"this {type(answer).__name__} differs from the expected one"


def _text_difference(answer: Any, reference: Any) -> str:
    if answer == reference:
        return ""
    if answer.split() == reference.split():
        return "only the white space differs"
    if answer.lower() == reference.lower():
        return "only upper and lower case differ"
    short = min(len(answer), len(reference))
    place = next((i for i in range(short) if answer[i] != reference[i]), short)
    return f"it differs from character {place} on (expected {len(reference)} characters, got {len(answer)})"


def _listed(word: str, found: Set[Any]) -> str:
    """Return ``word`` and up to five of the members, or nothing if there is none."""
    shown = sorted(map(repr, found))
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return f"{word} {', '.join(shown[:5])}{more}" if shown else ""


def _shape_difference(answer: Any, reference: Any, tolerance: Tolerance) -> str:
    got, expected = _array(answer), _array(reference)
    if got.shape != expected.shape:
        message = f"expected shape {expected.shape}, got {got.shape}"
        if got.shape == expected.shape[::-1] and not _value_difference(got.T, expected, tolerance):
            message += "; its transpose is right"
        return message
    if got.dtype.kind.replace("u", "i") != expected.dtype.kind.replace("u", "i"):
        return f"expected dtype {_dtype(reference)}, got {_dtype(answer)}"
    return ""


def _value_difference(answer: Any, reference: Any, tolerance: Tolerance) -> str:
    """Return how numbers of one shape differ."""
    got, expected = _array(answer), _array(reference)
    if tolerance is None:
        exact = expected.dtype.kind not in "fc"
        tolerance = (0.0, 0.0) if exact else _TOLERANCES[min(_bits(answer), _bits(reference))]
    wrong = ~_close(got, expected, tolerance)
    if not wrong.any():
        return ""
    if not (got.dtype.kind in "iufc" and expected.dtype.kind in "iufc"):
        return f"{wrong.sum()} of {wrong.size} entries differ, first{_at(wrong)}" if got.ndim else "it is not right"
    kind = complex if "c" in (got.dtype.kind, expected.dtype.kind) else float
    left, right = got.astype(kind), expected.astype(kind)
    for word, test in (("NaN", np.isnan), ("infinite", np.isinf), ("finite", np.isfinite)):
        if (strange := test(left) & ~test(right)).any():
            where = f"{strange.sum()} of {strange.size} entries are {word}, first{_at(strange)}"
            return f"{where if got.ndim else f'it is {word}'}, where it should not be"
    size = np.zeros(left.shape)
    size[wrong] = np.abs(left[wrong] - right[wrong])
    worst = size == size.max()
    message = f"max difference {_short(size.max())}{_at(worst)}" if got.ndim else f"off by {_short(size.max())}"
    hint = _hint(left, right, tolerance)
    return f"{message}; {hint}" if hint else message


def _hint(got: np.ndarray, expected: np.ndarray, tolerance: tuple[float, float]) -> str:
    """Return what is probably wrong, where that is cheap to see."""
    # A factor computed here is itself rounded, so even integers need a tolerance.
    tolerance = max(tolerance[0], 1e-6), max(tolerance[1], 1e-9)
    if _close(-got, expected, tolerance).all():
        return "the sign is flipped"
    if got.ndim > 1 and got.shape[-1] == got.shape[-2] and _close(got.swapaxes(-1, -2), expected, tolerance).all():
        return "the last two axes are swapped"
    finite = np.isfinite(expected)
    left, right = got[finite], expected[finite]
    if left.size < 2 or np.ptp(np.abs(right)) == 0:
        return ""  # a single value is always some factor away
    peak = np.argmax(np.abs(right))
    factor = left[peak] / right[peak]
    if factor != 0 and _close(factor * right, left, tolerance).all():
        return f"every value is {_short(factor)} times the expected one"
    offset = np.mean(left - right)
    if _close(left - offset, right, tolerance).all():
        return f"every value is off by the same {_short(offset)}"
    return ""


def _close(got: np.ndarray, expected: np.ndarray, tolerance: tuple[float, float]) -> np.ndarray:
    """Return which entries agree; NaN agrees with NaN, infinity with the same infinity."""
    if tolerance == (0.0, 0.0) and not (np.isnan(got).any() if got.dtype.kind in "fc" else False):
        return np.asarray(got == expected)  # exact, also for integers beyond 2**53
    return np.isclose(got, expected, rtol=tolerance[0], atol=tolerance[1], equal_nan=True)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "cpu")  # PyTorch is not imported for this


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or _is_tensor(value)


def _item(value: Any) -> Any:
    """Return the Python value of a scalar array, tensor or numpy number; other values as they are."""
    return value.item() if isinstance(value, np.generic) or (_is_array(value) and value.ndim == 0) else value


def _number(value: Any) -> Any:
    """Return fractions, decimals and long integers as floating point; numbers with a width, which matters, as is."""
    return value if _is_array(value) or isinstance(value, (np.generic, float, complex)) else float(value)


def _dtype(value: Any) -> str:
    return str(value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype).removeprefix("torch.")


def _array(value: Any) -> np.ndarray:
    if not _is_tensor(value):
        return np.asarray(value)
    tensor = value.detach().cpu()
    if str(tensor.layout) != "torch.strided":
        tensor = tensor.to_dense()
    if _dtype(value).startswith(("bfloat", "float8")):
        tensor = tensor.float()  # numpy has no such type
    return tensor.resolve_conj().resolve_neg().numpy()


def _bits(value: Any) -> int:
    """Return the bits of one real number: 16, 32 or 64. A Python number counts as 64."""
    kind = _dtype(value)
    if kind.startswith(("bfloat16", "float8", "float16")):
        return 16
    return 32 if kind in ("float32", "complex64") else 64


def _at(where: np.ndarray) -> str:
    """Return the first true entry as `` at [0, 5]``."""
    return f" at {np.argwhere(where)[0].tolist()}" if where.ndim else ""


def _short(value: Any) -> str:
    """Return a number in two or three digits.

    Examples
    --------
    >>> [_short(value) for value in (0.0314, 2.0, 0.7071, 12345.6)]
    ['3.1e-2', '2', '0.707', '1.2e4']
    """
    if np.iscomplexobj(value) and np.imag(value) != 0:
        return f"{complex(value):.3g}"
    value = float(np.real(value))
    if value == 0 or 0.1 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def _describe(value: Any) -> str:
    """Return the type, and the shape and dtype of an array, as a learner would say it."""
    kind = type(value).__name__
    if _is_array(value):
        return f"{kind} of shape {tuple(value.shape)} and dtype {_dtype(value)}"
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"{kind} of {len(value)}"
    return kind


def _one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= 200 else text[:197] + "..."

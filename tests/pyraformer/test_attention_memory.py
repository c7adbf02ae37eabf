"""Memory of pyramidal attention: nothing of size n^2 is ever allocated, and the peak grows linearly."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oral4.measure.intervals import loglog_slope
from oral4.measure.timing import peak_memory
from oral4.pyraformer.attention import attention_shift, pyramidal_attention
from oral4.pyraformer.experiment import attend_once
from oral4.pyraformer.graph import PyramidSpec, neighbour_table


class Allocations(TorchDispatchMode):
    """Notes the number of entries of every tensor that an operation gives, on which storage it lies."""

    def __init__(self):
        super().__init__()
        self.largest, self.storages = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                storage = x.untyped_storage()
                self.storages[storage._cdata] = storage.nbytes()
        return out


def attend(spec, backend, heads=2, width=8, training=True):
    tensors = [torch.randn(1, heads, spec.num_nodes, width, requires_grad=training) for _ in range(3)]
    with Allocations() as seen:
        out = pyramidal_attention(*tensors, spec, backend=backend)
        if training:
            torch.autograd.grad(out.sum(), tensors)
    return seen


@pytest.mark.parametrize(
    "spec",
    [
        PyramidSpec(2048, (4, 4, 4)),
        PyramidSpec(2047, (3, 5, 7), 7),
        PyramidSpec(4100, (64,)),  # large families
        PyramidSpec(4127, (64, 33)),  # and 31 left over
        PyramidSpec(1999, (1000,)),  # one parent of all: 999 left over
    ],
    ids=str,
)
def test_shift_allocates_nothing_of_size_n_squared(spec):
    largest = attend(spec, "shift").largest
    per_node = max(2 * 8, 2 * (spec.neighbours + 2))  # heads x width of a value, or the table of the edges
    assert spec.num_nodes * 2 * 8 <= largest <= spec.num_nodes * per_node < spec.num_nodes**2


def test_the_hook_sees_a_dense_table():
    spec = PyramidSpec(300, (4, 4))
    assert attend(spec, "dense").largest >= 2 * spec.num_nodes**2
    gathered = neighbour_table(spec).numel() * 2 * 8
    assert attend(spec, "gather").largest == gathered, "the table copies each key once for every query that sees it"


def test_what_training_keeps_is_a_few_numbers_a_node():
    spec = PyramidSpec(4096, (4, 4, 4))
    tensors = [torch.randn(1, 2, spec.num_nodes, 32, requires_grad=True) for _ in range(3)]
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention_shift(*tensors, spec)
    inputs = {x.data_ptr() for x in tensors}
    assert inputs <= set(kept)
    assert sum(count for address, count in kept.items() if address not in inputs) == 2 * spec.num_nodes * (3 + 2)


def test_large_families_cost_no_more_than_small_ones():
    """A table with a column for each child of the largest family would take 100 columns for every node."""
    small, large = PyramidSpec(20_000, (4, 4)), PyramidSpec(20_000, (141, 141))
    used = {}
    for spec in (small, large):
        seen = attend(spec, "shift", training=False)
        used[spec] = max(seen.storages.values()) / spec.num_nodes
    assert used[large] == pytest.approx(used[small], rel=0.01)


def test_peak_memory_grows_linearly():
    """Fresh interpreters; bytes beyond those of the smallest pyramid. Linear is 1; the experiment goes to a million."""
    lengths = (65536, 262144)
    target = f"{attend_once.__module__}:attend_once"
    found = [peak_memory(target, length=n, windows=[4, 4, 4], heads=2, width=16, training=True) for n in (64, *lengths)]
    forward = [x.value["bytes"] - found[0].value["bytes"] for x in found[1:]]
    training = [x.resident - found[0].resident for x in found[1:]]
    values = 2 * 16 * 4 * PyramidSpec(lengths[-1], (4, 4, 4)).num_nodes  # bytes of q
    for added, least, most in ((forward, 4, 6), (training, 7, 11)):
        assert 0.8 <= loglog_slope(lengths, added).estimate <= 1.1
        # q, k, v, the result, then its gradient and theirs; the rest are tables of the edges and slices of megabytes
        assert least * values < added[-1] < most * values


def test_attend_once_reports_seconds_only_where_asked():
    assert attend_once(64, [4, 4, 4])["seconds"] == 0
    once = attend_once(64, [4, 4, 4], training=True, repeats=2)
    assert once["seconds"] > 0 and once["bytes"] > 1e6

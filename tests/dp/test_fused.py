"""The GPU kernels: interpreted against formulas in float64; compiled for GPUs that are not here; on one, in the engine.

The interpreter has no products of bfloat16, so float16 and float32 stand for it there.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from oral4.dp import fused, norms, speed
from oral4.dp.engine import ClipEngine

SHAPES = [(2, 100, 48, 70), (3, 5, 16, 333), (1, 300, 20, 40), (2, 1, 8, 8), (70, 150, 24, 20)]

_CHILD = """
import json, sys, torch
from oral4.dp import fused
shapes = json.loads(sys.argv[1])
generator = torch.Generator().manual_seed(0)

def draw(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)

def far(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())

errors = {}
for batch, length, inputs, outputs in shapes:
    for dtype in (torch.float32, torch.float16):
        a, g = draw(batch, length, inputs).to(dtype), draw(batch, length, outputs).to(dtype)
        A, G, factors = a.double(), g.double(), draw(batch).abs().float()
        name = f"{batch} {length} {inputs} {outputs} {dtype}"
        for bias in (False, True):
            wanted = ((A @ A.mT + bias) * (G @ G.mT)).sum((1, 2))
            found = fused.gram_parts(a, g, bias=bias).double().sum(1)
            errors[f"gram {bias} {name}"] = float((found / wanted - 1).abs().max())
        wide = fused.aligned(g)
        fine = torch.equal(wide, g) and (wide.stride(1) % 16 == 0 or outputs < 256)
        errors[f"aligned {name}"] = 0.0 if fine else 1.0
        narrow, broad = (fused.gram_parts(a, x).double().sum(1) for x in (g, wide))
        errors[f"gram of aligned {name}"] = far(broad, narrow)
        written, parts = fused.write_out_parts(g, a)
        errors[f"write {name} {dtype.itemsize}"] = far(written, G.mT @ A) / (1 if dtype == torch.float32 else 2**12)
        errors[f"norm {name}"] = far(parts.double().sum(1), written.double().square().sum((1, 2)))
        summed = torch.einsum("b,bpd->pd", factors.double(), written.double())
        errors[f"sum {name}"] = far(fused.factor_sum(written, factors), summed)
        exact = factors.double()[:, None, None] * G
        errors[f"scale {name}"] = far(fused.scaled(g, factors, dtype), exact) / (1 if dtype == torch.float32 else 2**12)
        x, u = draw(batch, length, inputs).to(dtype), draw(batch, length, inputs).to(dtype)
        hat = torch.nn.functional.layer_norm(x.double(), (inputs,), eps=1e-5)
        found = fused.layer_norm_parts(x, u, 1e-5).sum(1)
        errors[f"layer norm scale {name}"] = far(found[:, 0], (hat * u.double()).sum(1))
        errors[f"layer norm shift {name}"] = far(found[:, 1], u.double().sum(1))
print(json.dumps(errors))
"""


@pytest.fixture
def triton():
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed; it exists for Linux")


def test_interpreted_kernels_equal_their_formulas(triton):
    """Sums of a few thousand float32 products; what is rounded to float16 is within half a unit, 2^-12 of itself."""
    ran = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(SHAPES)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    errors = json.loads(ran.stdout.splitlines()[-1])
    assert len(errors) == 20 * len(SHAPES)
    wrong = {
        name: error
        for name, error in errors.items()
        if not error <= (1.0 if "float16" in name and name.startswith(("write", "scale")) else 3e-6)
    }
    assert not wrong


def test_a_cpu_is_served_by_the_library():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert not fused.fused_runs_on(torch.device("cpu"), dtype)


@pytest.mark.parametrize(
    ("capability", "dtype", "tf32", "products", "runs"),
    [
        ((9, 0), torch.bfloat16, False, True, True),
        ((8, 0), torch.float16, False, True, True),
        ((7, 5), torch.float16, False, True, False),
        ((9, 0), torch.float32, False, True, False),  # exact products are the library's
        ((9, 0), torch.float32, True, True, True),
        ((9, 0), torch.float32, False, False, True),
        ((9, 0), torch.float64, True, False, False),
    ],
)
def test_which_gpus_and_types_are_served(triton, monkeypatch, capability, dtype, tf32, products, runs):
    fused._device_can.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        assert fused.fused_runs_on(torch.device("cuda:0"), dtype, products=products) == runs
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        fused._device_can.cache_clear()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"a is \(2, 3, 4\) in torch.float32 and g \(2, 4, 5\)"):
        fused.gram_parts(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
    with pytest.raises(ValueError, match="of one type"):
        fused.gram_parts(torch.ones(2, 3, 4), torch.ones(2, 3, 5, dtype=torch.float64))


def test_rows_that_are_aligned_or_short_are_not_copied():
    for width in (64, 272, 5, 250):
        x = torch.ones(2, 3, width, dtype=torch.float16)
        assert fused.aligned(x) is x


@pytest.mark.parametrize("length", [16, 100, 256, 1024])
def test_the_cost_model_of_the_kernels(length):
    """Tables for short texts, written-out gradients for long ones; never slower than with tables in memory."""
    machine = norms.MACHINES["cuda-16-fused"]
    price = norms.cost(8, length, 1024, 1024, itemsize=2, machine=machine)
    plain = norms.cost(8, length, 1024, 1024, itemsize=2, machine=norms.MACHINES["cuda-16"])
    assert (price.saved > 0) == (length >= 1024)
    assert min(price.gram, price.instantiate) < min(plain.gram, plain.instantiate)
    assert price.size * 2 == plain.size


def _compiled(name, types, constants, **options):
    """Registers spilled to memory, in bytes, of a kernel compiled for an H100: all sizes odd; some; none."""
    import re
    import tempfile
    from pathlib import Path

    import triton

    fused._load()
    kernel = getattr(fused, name)
    found = []
    sizes = [argument for argument in kernel.arg_names if argument not in constants and argument not in types]
    pointers = [argument for argument in types if types[argument].startswith("*")]
    for exact in ([], [size for size in sizes if size.endswith(("_batch", "_row")) or size == "inputs"], sizes):
        signature = {x: "constexpr" if x in constants else types.get(x, "i32") for x in kernel.arg_names}
        marks = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(kernel.arg_names) if x in [*pointers, *exact]}
        source = triton.compiler.ASTSource(kernel, signature, constants, marks)
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        compiled = triton.compile(source, target=target, options=options)
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(compiled.asm["cubin"])
            tool = Path(str(triton.__file__)).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
        found.append(int(re.search(r"STACK:(\d+)", usage)[1]))
    return found


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_the_kernels_compile_without_spilling(triton, kind):
    half = kind == "bf16"
    pointers = {"a": f"*{kind}", "g": f"*{kind}", "out": "*fp32"}
    for tile, warps, stages in ((32, 4, 4), (64, 4, 4), (128, 8, 3)):
        constants = {"BIAS": True, "TILE": tile, "PRECISION": "tf32"}
        odd, _, _ = _compiled("_gram_kernel", pointers, constants | {"WIDE": 32}, num_warps=warps, num_stages=stages)
        _, *whole = _compiled(
            "_gram_kernel", pointers, constants | {"WIDE": 64 if half else 32}, num_warps=warps, num_stages=stages
        )
        assert (
            whole == [0, 0] and odd <= 16
        )  # rows at odd places are read number by number: a few addresses may not fit
    if half:
        pointers = {"rows": "*bf16", "columns": "*bf16", "out": "*bf16", "parts": "*fp32"}
        assert (
            _compiled("_write_kernel", pointers, {"HIGH": 128, "WIDE": 128, "DEEP": 64}, num_warps=8, num_stages=3)[2]
            == 0
        )
    pointers = {"x": f"*{kind}", "g": f"*{kind}", "out": "*fp32", "eps": "fp32"}
    for width, rows in ((1024, 4), (4096, 1)):
        assert _compiled(
            "_layer_norm_kernel", pointers, {"WIDTH": width, "ROWS": rows, "WEIGHT": True}, num_warps=4
        ) == [0, 0, 0]


# ---------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (8, 700, 256, 1003)])
def test_on_a_gpu_kernels_equal_their_formulas(dtype, shape):
    batch, length, inputs, outputs = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    a, g, factors = draw(batch, length, inputs), draw(batch, length, outputs), draw(batch).abs().float()
    A, G = a.double(), g.double()
    # products of rounded numbers are exact in float32; float32 itself is rounded to 11 bits, in squares of norms twice
    near = {"rtol": 2e-5 if dtype != torch.float32 else 4e-3, "atol": 0}
    for x in (g, fused.aligned(g)):
        for bias in (False, True):
            wanted = ((A @ A.mT + bias) * (G @ G.mT)).sum((1, 2))
            torch.testing.assert_close(fused.gram_parts(a, x, bias=bias).double().sum(1), wanted, **near)
    twice = [fused.gram_parts(a, g, bias=True) for _ in range(2)]
    assert torch.equal(*twice)
    # of a sum of products: half a unit, or for TensorFloat32, whose operands are cut off, two units
    unit = torch.finfo(torch.float16).eps * 2 if dtype == torch.float32 else torch.finfo(dtype).eps
    written, parts = fused.write_out_parts(g, a)
    wanted = G.mT @ A
    assert float((written.double() - wanted).abs().max()) <= unit * float(wanted.abs().max())
    torch.testing.assert_close(parts.double().sum(1), written.double().square().sum((1, 2)), rtol=1e-5, atol=0)
    wanted = torch.einsum("b,bpd->pd", factors.double(), written.double())
    assert float((fused.factor_sum(written, factors).double() - wanted).norm() / wanted.norm()) < 1e-6
    wanted = factors.double()[:, None, None] * G
    assert float((fused.scaled(g, factors, dtype).double() - wanted).abs().max()) <= unit * float(wanted.abs().max())
    x, u = draw(batch, length, inputs), draw(batch, length, inputs)
    hat = nn.functional.layer_norm(x.double(), (inputs,), eps=1e-5)
    found = fused.layer_norm_parts(x, u, 1e-5).double().sum(1)
    for part, wanted in zip(found.unbind(1), ((hat * u.double()).sum(1), u.double().sum(1)), strict=True):
        assert float((part - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
@pytest.mark.parametrize("rule", ["gram", "instantiate", "auto"])
def test_on_a_gpu_the_engine_is_the_same_with_kernels_and_without(kind, rule, monkeypatch):
    """Autocast to bfloat16: sums are rounded in another order, written-out gradients once more."""
    case = speed.Case("test", 2, 128, 2, 1003, 6, 200, kind=kind, tied=kind == "gpt2", half=True)
    found = []
    for runs in (True, False):
        model, ids = speed.build(case, device="cuda")
        if not runs:
            for module in ("norms", "layers", "engine"):
                monkeypatch.setattr(f"oral4.dp.{module}.fused_runs_on", lambda *a, **k: False)
        stats = ClipEngine(model, 0.1, rule=rule).backward(speed.losses_of(model, ids))
        found.append((stats.norms, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (ours, sums), (plain, wanted) = found
    torch.testing.assert_close(ours, plain, rtol=2e-3, atol=0)
    assert float((sums - wanted).norm() / wanted.norm()) < 8e-3  # 2^-8 of single numbers, most of it averages out


@pytest.mark.gpu
def test_on_a_gpu_no_example_is_above_the_bound():
    for half in (True, False):
        case = speed.Case("test", 2, 128, 2, 1003, 6, 200, tied=True, half=half)
        model, ids = speed.build(case, device="cuda")
        engine = ClipEngine(model, 1e-2)
        for i in range(len(ids)):
            model.zero_grad()
            engine.backward(speed.losses_of(model, ids[i : i + 1]))
            norm = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
            assert 1e-2 * (1 - 2**-6) < float(norm) <= 1e-2 * (1 + 1e-6)


def test_the_margin_for_tensorfloat32_covers_digits_that_are_cut_off():
    """Four factors of a squared norm lose up to 2^-10 each, so the norm 2^-9; two of the sum are rounded by 2^-11."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        margin = norms.slack(torch.float32, torch.device("cuda"))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert (1 - margin) * (1 + 2**-11) ** 2 <= (1 - 2**-10) ** 2 < 1 - margin / 4

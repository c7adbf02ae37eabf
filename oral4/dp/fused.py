"""Kernels for a GPU: norms without a table, gradients written out with their norms, sums that read everything once."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from oral4.errors import require

__all__ = ["aligned", "factor_sum", "fused_runs_on", "gram_parts", "layer_norm_parts", "scaled", "write_out_parts"]

tl: Any = None  # triton.language, once `_load` has run
constexpr: TypeAlias = Any  # a number that is known when a kernel is compiled; Triton's own type, once it is loaded


def _products(x, row, first, second, width, here, there, WIDE: constexpr, TILE: constexpr, PRECISION: constexpr):
    """Return the products of two tiles of rows of x, (TILE, TILE) in float32; rows that are not there count as zero."""
    column = tl.arange(0, WIDE)
    left = x + (first.to(tl.int64) * row)[:, None] + column[None, :]
    right = x + (second.to(tl.int64) * row)[None, :] + column[:, None]
    table = tl.zeros((TILE, TILE), tl.float32)
    whole = width // WIDE * WIDE
    for _ in range(0, whole, WIDE):  # without a look at the column, so that 16 bytes are read at once
        a = tl.load(left, mask=here[:, None], other=0.0)
        b = tl.load(right, mask=there[None, :], other=0.0)
        table = tl.dot(a, b, table, input_precision=PRECISION)
        left += WIDE
        right += WIDE
    if whole < width:
        inside = column < width - whole
        a = tl.load(left, mask=here[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=there[None, :] & inside[:, None], other=0.0)
        table = tl.dot(a, b, table, input_precision=PRECISION)
    return table


def _gram_kernel(
    a, g, out, a_batch, a_row, g_batch, g_row, length, inputs, outputs, pairs,
    BIAS: constexpr, TILE: constexpr, WIDE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Write the part of one pair of tiles of positions to the squared norm of one example."""
    pair = tl.program_id(0)
    example = tl.program_id(1).to(tl.int64)
    high = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) * 0.5).to(tl.int32)  # pair = high (high + 1) / 2 + low, low <= high
    high = tl.where(high * (high + 1) // 2 > pair, high - 1, high)
    high = tl.where((high + 1) * (high + 2) // 2 <= pair, high + 1, high)
    low = pair - high * (high + 1) // 2
    first = high * TILE + tl.arange(0, TILE)
    second = low * TILE + tl.arange(0, TILE)
    here, there = first < length, second < length
    table = _products(a + example * a_batch, a_row, first, second, inputs, here, there, WIDE, TILE, PRECISION)
    if BIAS:
        table += 1.0
    table *= _products(g + example * g_batch, g_row, first, second, outputs, here, there, WIDE, TILE, PRECISION)
    weight = tl.where(high == low, 1.0, 2.0)  # what stands below the diagonal stands for its mirror image too
    tl.store(out + example * pairs + pair, weight * tl.sum(tl.sum(table, 1), 0))


def _write_kernel(
    rows, columns, out, parts, rows_batch, rows_step, columns_batch, columns_step, length, height, width,
    HIGH: constexpr, WIDE: constexpr, DEEP: constexpr,
):  # fmt: skip
    """Write one tile of ``sum_t r_t c_t^T`` of an example, rounded, and the sum of its squares."""
    across = tl.cdiv(width, WIDE)
    tile = tl.program_id(0)
    example = tl.program_id(1).to(tl.int64)
    row = tile // across * HIGH + tl.arange(0, HIGH)
    column = tile % across * WIDE + tl.arange(0, WIDE)
    step = tl.arange(0, DEEP)
    high, wide = row < height, column < width
    left = rows + example * rows_batch + (step.to(tl.int64) * rows_step)[None, :] + row[:, None]
    right = columns + example * columns_batch + (step.to(tl.int64) * columns_step)[:, None] + column[None, :]
    total = tl.zeros((HIGH, WIDE), tl.float32)
    for start in range(0, length, DEEP):
        inside = step < length - start
        a = tl.load(left, mask=high[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None] & wide[None, :], other=0.0)
        total = tl.dot(a, b, total)
        left += DEEP * rows_step
        right += DEEP * columns_step
    rounded = total.to(out.dtype.element_ty)
    place = out + example * height * width + (row.to(tl.int64) * width)[:, None] + column[None, :]
    tl.store(place, rounded, mask=high[:, None] & wide[None, :])
    exact = rounded.to(tl.float32)  # the norm is that of what will be summed
    tl.store(parts + example * tl.num_programs(0) + tile, tl.sum(tl.sum(exact * exact, 1), 0))


def _factor_sum_kernel(x, factors, out, batch, size, WIDE: constexpr):
    """Write a piece of ``sum_i c_i x_i``."""
    column = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    real = column < size
    total = tl.zeros((WIDE,), tl.float32)
    place = x + column
    for example in range(batch):
        total += tl.load(factors + example) * tl.load(place, mask=real, other=0.0).to(tl.float32)
        place += size
    tl.store(out + column, total, mask=real)


def _scale_kernel(x, factors, out, size, WIDE: constexpr):
    """Write a piece of one example times its factor."""
    example = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    real = column < size
    value = tl.load(x + example * size + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + example * size + column, (value * tl.load(factors + example)).to(out.dtype.element_ty), mask=real)


def _layer_norm_kernel(x, g, out, length, width, share, eps, WIDTH: constexpr, ROWS: constexpr, WEIGHT: constexpr):
    """Write sums over a share of an example's positions of x_hat g and of g, (2, width)."""
    part = tl.program_id(0)
    example = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    real = column < width
    scale = tl.zeros((WIDTH,), tl.float32)
    shift = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, share, ROWS):
        row = part * share + start + tl.arange(0, ROWS)
        present = (row < length)[:, None] & (start + tl.arange(0, ROWS) < share)[:, None] & real[None, :]
        place = (example * length + row)[:, None] * width + column[None, :]
        upstream = tl.load(g + place, mask=present, other=0.0).to(tl.float32)
        shift += tl.sum(upstream, 0)
        if WEIGHT:
            value = tl.load(x + place, mask=present, other=0.0).to(tl.float32)
            mean = tl.sum(value, 1) / width
            centred = tl.where(real[None, :], value - mean[:, None], 0.0)
            spread = tl.sum(centred * centred, 1) / width
            scale += tl.sum(centred * tl.rsqrt(spread + eps)[:, None] * upstream, 0)
    target = out + ((example * tl.num_programs(0) + part) * 2) * width + column
    tl.store(target, scale, mask=real)
    tl.store(target + width, shift, mask=real)


_ON_DEVICE = ("_products",)
_KERNELS = {  # and arguments that change from batch to batch: they do not ask for a kernel of their own
    "_gram_kernel": ["length", "pairs"],
    "_write_kernel": ["length"],
    "_factor_sum_kernel": ["batch"],
    "_scale_kernel": [],
    "_layer_norm_kernel": ["length", "share"],
}


@lru_cache(maxsize=1)
def _load() -> ModuleType:
    """Import Triton and make kernels of the functions above, which are plain Python until then."""
    triton = require("triton", "gpu")
    scope = globals()
    scope["tl"], scope["constexpr"] = triton.language, triton.language.constexpr
    for name in _ON_DEVICE:
        scope[name] = triton.jit(scope[name])
    for name, changing in _KERNELS.items():
        scope[name] = triton.jit(scope[name], do_not_specialize=changing)
    return triton


@lru_cache(maxsize=32)
def _device_can(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0) and importlib.util.find_spec("triton") is not None


def fused_runs_on(device: torch.device, dtype: torch.dtype, *, products: bool = True) -> bool:
    """Return whether the kernels serve tensors of a type on a device.

    They do on NVIDIA GPUs from the A100 on where Triton is installed, for bfloat16 and float16, and for float32 if its
    products may be rounded to TensorFloat32 (``torch.backends.cuda.matmul.allow_tf32``). In exact float32 and in float64
    the library's products are as fast.

    Parameters
    ----------
    device : torch.device
    dtype : torch.dtype
    products : bool
        False asks for the kernel of layer norms, which multiplies no matrices: float32 will do.

    Examples
    --------
    >>> fused_runs_on(torch.device("cpu"), torch.bfloat16)
    False
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    half = dtype in (torch.bfloat16, torch.float16)
    if not half and not (dtype == torch.float32 and (torch.backends.cuda.matmul.allow_tf32 or not products)):
        return False
    return _device_can(torch.cuda.current_device() if device.index is None else device.index)


ENOUGH = 132
"Programs that keep a large GPU busy: with fewer, smaller tiles are better."


GRID = 16
"Triton reads 16 bytes at once where distances between rows are multiples of 16."


def _pairs(length: int, tile: int) -> int:
    tiles = -(-length // tile)
    return tiles * (tiles + 1) // 2


def aligned(x: Tensor) -> Tensor:
    """Return x, (..., d), copied to rows that start at multiples of `GRID` numbers, if its own do not and are long.

    A vocabulary of 50,257 is such a case: number by number, products of its rows take several times as long.
    """
    width = x.shape[-1]
    if width % GRID == 0 or width < 16 * GRID:
        return x
    wide = torch.empty(*x.shape[:-1], -(-width // GRID) * GRID, dtype=x.dtype, device=x.device)
    wide[..., :width].copy_(x)
    return wide[..., :width]


def scaled(x: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return every example of x, (B, ...), times its factor, (B,), rounded once, to ``dtype``."""
    _load()
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    size = x[0].numel()
    wide = 2048
    globals()["_scale_kernel"][(-(-size // wide), len(x))](x, factors.contiguous(), out, size, WIDE=wide, num_warps=4)
    return out


def factor_sum(x: Tensor, factors: Tensor) -> Tensor:
    """Return ``sum_i c_i x_i``, of the shape of one example, in float32; x, (B, ...), is read once."""
    _load()
    x = x.contiguous()
    out = torch.empty(x.shape[1:], dtype=torch.float32, device=x.device)
    wide = 1024
    globals()["_factor_sum_kernel"][(-(-out.numel() // wide),)](
        x, factors.contiguous(), out, len(x), out.numel(), WIDE=wide, num_warps=4
    )
    return out


def write_out_parts(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum_t r_t c_t^T`` of every example, rounded to the type of the two, and parts of its squared norm.

    Parameters
    ----------
    rows : Tensor, shape (B, T, R), bfloat16 or float16
    columns : Tensor, shape (B, T, C)

    Returns
    -------
    Tensor (B, R, C), Tensor (B, tiles) float32
        The norm is that of the rounded gradient, which is the one that will be summed.
    """
    _load()
    rows, columns = _last_axis_dense(rows), _last_axis_dense(columns)
    batch, length, height = rows.shape
    width = columns.shape[2]
    tiles = -(-height // 128) * -(-width // 128)
    out = torch.empty(batch, height, width, dtype=rows.dtype, device=rows.device)
    parts = torch.empty(batch, tiles, dtype=torch.float32, device=rows.device)
    globals()["_write_kernel"][(tiles, batch)](
        rows, columns, out, parts, rows.stride(0), rows.stride(1), columns.stride(0), columns.stride(1), length, height, width,
        HIGH=128, WIDE=128, DEEP=64, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out, parts


def _last_axis_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def gram_parts(a: Tensor, g: Tensor, *, bias: bool = False) -> Tensor:
    """Return numbers whose sum over the last axis is ``sum_st (g_s . g_t) (a_s . a_t + bias)`` of every example.

    Only half of the pairs of positions are computed, and no table of them is ever in memory. The parts are added up in
    the same order every time.

    Parameters
    ----------
    a : Tensor, shape (B, T, d)
    g : Tensor, shape (B, T, p), of the same type
    bias : bool

    Returns
    -------
    Tensor, shape (B, pairs of tiles), float32
    """
    if a.dim() != 3 or a.shape[:2] != g.shape[:2] or a.dtype != g.dtype:
        raise ValueError(
            f"a is {tuple(a.shape)} in {a.dtype} and g {tuple(g.shape)} in {g.dtype}; give (B, T, d) and (B, T, p) of one type"
        )
    _load()
    a, g = _last_axis_dense(a), _last_axis_dense(g)
    batch, length = a.shape[:2]
    tile = 128 if length > 128 and batch * _pairs(length, 128) >= ENOUGH else 64 if length > 32 else 32
    pairs = _pairs(length, tile)
    out = torch.empty(batch, pairs, dtype=torch.float32, device=a.device)
    # rows at any other distance are read number by number: fewer at a time fit into registers
    whole = all(x.stride(k) % GRID == 0 for x in (a, g) for k in (0, 1))
    wide = 64 if whole and a.dtype.itemsize == 2 else 32
    globals()["_gram_kernel"][(pairs, batch)](
        a, g, out, a.stride(0), a.stride(1), g.stride(0), g.stride(1), length, a.shape[2], g.shape[2], pairs,
        BIAS=bias, TILE=tile, WIDE=wide, PRECISION="tf32", num_warps=8 if tile == 128 else 4, num_stages=3,
    )  # fmt: skip
    return out


def layer_norm_parts(x: Tensor, g: Tensor, eps: float, *, weight: bool = True) -> Tensor:
    """Return parts whose sum over the second axis are the gradients of a layer norm's scale and shift.

    Parameters
    ----------
    x, g : Tensor, shape (B, T, d)
        Input of the layer, and gradient with respect to its output; read once.
    eps : float
    weight : bool
        Without it the first of the two is zero, and ``x`` is not read.

    Returns
    -------
    Tensor, shape (B, parts, 2, d), float32
    """
    _load()
    x, g = x.contiguous(), g.contiguous()
    batch, length, width = g.shape
    padded = 1 << max(0, width - 1).bit_length()
    rows = max(1, min(4, 4096 // padded))
    share = max(rows, min(32, length))
    parts = -(-length // share)
    out = torch.empty(batch, parts, 2, width, dtype=torch.float32, device=g.device)
    globals()["_layer_norm_kernel"][(parts, batch)](
        x, g, out, length, width, share, eps, WIDTH=padded, ROWS=rows, WEIGHT=weight, num_warps=4
    )
    return out

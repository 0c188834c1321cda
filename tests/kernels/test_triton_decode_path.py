"""What a decode step uses, in Triton: rms_norm, rope, decode_attention, weight_matmul, against their eager definitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsvlm_infer.errors import InputError
from rsvlm_infer.kernels.triton.decode_attention import decode_attention
from rsvlm_infer.kernels.triton.rms_norm import add_rms_norm, rms_norm
from rsvlm_infer.kernels.triton.rope import rope, rope_append
from rsvlm_infer.kernels.triton.weight_matmul import weight_matmul
from rsvlm_infer.ops.decode_attention import decode_attention as eager_attention
from rsvlm_infer.ops.rms_norm import rms_norm as eager_norm
from rsvlm_infer.ops.rope import rope as eager_rope
from rsvlm_infer.ops.weight_matmul import Kind, pack_weight
from rsvlm_infer.ops.weight_matmul import weight_matmul as eager_matmul
from tests.kernels.triton_cases import DTYPES, EPSILON, random_tensor
from tests.parity import assert_parity, assert_same_bits

THETA = 10000.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (7, 64), (2, 3, 65), (3, 576)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = random_tensor(0, *shape, dtype=dtype, device=device) * 3
    weight = random_tensor(1, shape[-1], dtype=dtype, device=device)
    # the definition has float32 inside, so the reference is the formula written out
    wide = x.double()
    reference = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    actual = rms_norm(x, weight, 1e-5)
    assert_parity(actual, eager_norm(x, weight, 1e-5), reference, epsilon=EPSILON[dtype])
    assert_same_bits(rms_norm(x[:1], weight, 1e-5), actual[:1])
    residual = random_tensor(2, *shape, dtype=dtype, device=device)
    normed, summed = add_rms_norm(x, residual, weight, 1e-5)
    assert_same_bits(summed, x + residual)
    assert_same_bits(normed, rms_norm(summed, weight, 1e-5))


def test_rms_norm_of_large_halves_strided_rows_and_none(device: torch.device) -> None:
    ones = torch.ones(256, dtype=torch.float16, device=device)
    assert (rms_norm(torch.full((1, 256), 300.0, dtype=torch.float16, device=device), ones, 1e-5) == 1).all()
    x = random_tensor(0, 6, 64, device=device)
    weight = torch.ones(32, device=device)
    assert_same_bits(rms_norm(x[::2, :32], weight, 1e-6), rms_norm(x[::2, :32].contiguous(), weight, 1e-6))
    assert_same_bits(rms_norm(x[:, ::2], weight, 1e-6), rms_norm(x[:, ::2].contiguous(), weight, 1e-6))
    assert rms_norm(x[:0], torch.ones(64, device=device), 1e-6).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 64), (13, 9, 80), (1, 4, 6, 72)])
def test_rope(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = random_tensor(0, *shape, dtype=dtype, device=device)
    positions = torch.randint(0, 8192, shape[:-2], generator=torch.Generator().manual_seed(1)).to(device)
    reference = eager_rope(x.float(), positions, THETA)
    assert_parity(rope(x, positions, THETA), eager_rope(x, positions, THETA), reference, epsilon=4 * EPSILON[dtype])
    assert_same_bits(rope(x[..., :1, :], positions, THETA), rope(x, positions, THETA)[..., :1, :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (1, 1, 32), (5, 5, 80)])
def test_rope_append(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    fused = random_tensor(0, 2, 3, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=2)  # views of one projection
    layers = torch.full((2, 2, 2, 11, kv_heads, head_dim), -7.0, dtype=dtype, device=device)
    k_cache, v_cache = layers[0, 1], layers[1, 1]
    positions = torch.tensor([[0, 1, 2], [8, 4, 10]], device=device)
    out = torch.full_like(q, 99.0, memory_format=torch.contiguous_format)
    assert rope_append(q, k, v, k_cache, v_cache, positions, THETA, out) is out
    assert_same_bits(out, rope(q, positions, THETA))
    rows = torch.arange(2, device=device)[:, None]
    assert_same_bits(k_cache[rows, positions], rope(k, positions, THETA))
    assert_same_bits(v_cache[rows, positions], v)
    untouched = torch.ones(2, 11, dtype=torch.bool, device=device)
    untouched[rows, positions] = False
    assert (k_cache[untouched] == -7).all()
    assert (v_cache[untouched] == -7).all()
    assert (layers[:, 0] == -7).all()


def test_rope_append_outside_of_the_cache_writes_nothing(device: torch.device) -> None:
    x, cache = torch.ones(1, 2, 1, 4, device=device), torch.zeros(1, 3, 1, 4, device=device)
    rope_append(x, x, x, cache, cache.clone(), torch.tensor([[3, -1]], device=device), THETA)
    assert (cache == 0).all()


def _cached(
    batch: int, new: int, heads: int, kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = random_tensor(0, batch, new, heads, head_dim, dtype=dtype, device=device)
    k, v = (random_tensor(seed, batch, capacity, kv_heads, head_dim, dtype=dtype, device=device) for seed in (1, 2))
    return q, k, v


def _check_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    actual = decode_attention(q, k, v, positions, mask)
    reference = eager_attention(q.double(), k.double(), v.double(), positions, mask)
    assert actual.dtype == q.dtype
    assert_parity(actual, eager_attention(q, k, v, positions, mask), reference, epsilon=EPSILON[q.dtype])
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (2, 1, 80), (34, 2, 16)])
@pytest.mark.parametrize("capacity", [1, 65, 300])
def test_one_new_token(
    heads: int, kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> None:
    q, k, v = _cached(2, 1, heads, kv_heads, head_dim, capacity, dtype, device)
    positions = torch.tensor([[capacity // 2], [capacity - 1]], device=device)
    together = _check_attention(q, k, v, positions)
    assert_same_bits(decode_attention(q[1:2], k[1:2], v[1:2], positions[1:2]), together[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_capacity_and_what_lies_beyond_do_not_matter(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = _cached(2, 1, 3, 1, 32, 600, dtype, device)
    positions = torch.tensor([[3], [255]], device=device)
    expected = decode_attention(q, k[:, :256], v[:, :256], positions)
    k[0, 4:], v[0, 4:], k[1, 256:], v[1, 256:] = torch.nan, torch.nan, torch.inf, torch.nan
    k[0, 4:256], v[0, 4:256] = 3e4, 0  # inside the range that is read, masked
    assert_same_bits(decode_attention(q, k, v, positions), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [2, 40])
def test_prefill(new: int, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = _cached(2, new, 3, 1, 64, new + 5, dtype, device)
    _check_attention(q, k, v, torch.arange(new, device=device).expand(2, -1) + torch.tensor([[0], [5]], device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [1, 20])
def test_an_explicit_mask(new: int, dtype: torch.dtype, device: torch.device) -> None:
    capacity = 290 if new == 1 else 40
    q, k, v = _cached(2, new, 2, 1, 32, capacity, dtype, device)
    mask = torch.rand(2, new, capacity, generator=torch.Generator().manual_seed(0)) < 0.2
    mask[..., 7] = True
    _check_attention(q, k, v, torch.zeros((2, new), dtype=torch.long, device=device), mask.to(device))


def test_a_view_of_a_larger_cache_and_out(device: torch.device) -> None:
    q, k, v = _cached(2, 1, 4, 2, 32, 90, torch.float32, device)
    positions = torch.tensor([[60], [3]], device=device)
    out = torch.full_like(q, 99.0)
    assert decode_attention(q, k[:, :61], v[:, :61], positions, out=out) is out
    assert_same_bits(out, decode_attention(q, k, v, positions))


@given(
    batch=st.integers(1, 2),
    new=st.sampled_from([1, 1, 2, 9]),
    group=st.integers(1, 5),
    kv_heads=st.integers(1, 2),
    head_dim=st.integers(1, 128),
    spare=st.integers(0, 100) | st.just(300),
    half=st.booleans(),
)
@settings(max_examples=10)
def test_drawn_shapes(
    device: torch.device, batch: int, new: int, group: int, kv_heads: int, head_dim: int, spare: int, half: bool
) -> None:
    dtype = torch.float16 if half else torch.float32
    q, k, v = _cached(batch, new, group * kv_heads, kv_heads, head_dim, new + spare, dtype, device)
    start = torch.arange(batch, device=device)[:, None] * spare // batch
    _check_attention(q, k, v, start + torch.arange(new, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int4", "int8", pytest.param("bf16", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (13, 64), (33, 352)])
def test_weight_matmul(rows: int, columns: int, kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
    packed = pack_weight(random_tensor(0, rows, columns, device=device), kind)
    x = random_tensor(1, 2, 1, columns, dtype=dtype, device=device)
    out = torch.full((2, 1, rows), 99.0, dtype=dtype, device=device)
    assert weight_matmul(x, packed, out) is out
    assert_parity(out, eager_matmul(x, packed), eager_matmul(x.double(), packed), epsilon=EPSILON[dtype])
    assert_same_bits(weight_matmul(x[1:], packed), out[1:])


@pytest.mark.gpu
def test_a_captured_step_follows_the_positions(device: torch.device) -> None:
    q, k, v = _cached(2, 1, 6, 2, 64, 700, torch.float16, device)
    positions = torch.tensor([[10], [20]], device=device)
    weight = torch.ones(64, dtype=torch.float16, device=device)

    def step() -> torch.Tensor:
        rotated = rope_append(q, k[:, :1].clone(), v[:, :1].clone(), k, v, positions, THETA)
        return rms_norm(decode_attention(rotated, k, v, positions), weight, 1e-5)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for place in (30, 300, 699):
        positions.fill_(place)
        graph.replay()
        replayed = captured.clone()
        assert_same_bits(replayed, step())


_BAD: list[tuple[str, Callable[[torch.Tensor], object]]] = [
    ("weight of rms_norm", lambda x: rms_norm(x, x[0, 0, 0, :3], 1e-5)),
    ("residual of add_rms_norm", lambda x: add_rms_norm(x, x[:1], x[0, 0, 0], 1e-5)),
    ("with even D", lambda x: rope(x[..., :3], torch.zeros(2, 3, device=x.device), THETA)),
    ("positions of rope", lambda x: rope(x, torch.zeros(3, 2, device=x.device), THETA)),
    ("multiple of the cache's 2 heads", lambda x: decode_attention(x[:, :, :1], x, x, torch.zeros(2, 3, device=x.device))),
    ("must have q's dtype", lambda x: decode_attention(x, x.half(), x.half(), torch.zeros(2, 3, device=x.device))),
    ("must be on", lambda x: rms_norm(x, x[0, 0, 0].to("meta"), 1e-5)),
]


@pytest.mark.parametrize(("message", "call"), _BAD, ids=[message for message, _ in _BAD])
def test_what_does_not_fit_is_refused(message: str, call: Callable[[torch.Tensor], object], device: torch.device) -> None:
    with pytest.raises(InputError, match=message):
        call(torch.zeros(2, 3, 2, 8, device=device))

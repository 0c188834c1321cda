"""Records cases of every native op for csrc/checks: inputs, the eager definition's result, how far a twin may be off.

The shapes are the awkward ones of tests/ops, smaller where an emulated CPU would take long. Runs no native kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsvlm_infer.ops.cell_means import DTYPES, cell_means
from rsvlm_infer.ops.complexity_map import complexity_map
from rsvlm_infer.ops.cue_search import TOLERANCE as CUE_TOLERANCE
from rsvlm_infer.ops.cue_search import cue_search
from rsvlm_infer.ops.decode_attention import decode_attention
from rsvlm_infer.ops.grouped_experts import grouped_experts
from rsvlm_infer.ops.pack_tiles import TOLERANCE as PACK_TOLERANCE
from rsvlm_infer.ops.pack_tiles import pack_tiles, vertical_first
from rsvlm_infer.ops.registry import OPS
from rsvlm_infer.ops.rms_norm import rms_norm
from rsvlm_infer.ops.rope import rope
from rsvlm_infer.ops.route import route
from rsvlm_infer.ops.varlen_tile_attention import varlen_tile_attention
from rsvlm_infer.ops.weight_matmul import PackedWeight, dequantise, pack_weight, weight_matmul
from tests.native_checks.case import EPSILONS, Case, kind_of
from tests.native_checks.model_cases import MODEL_RECORDERS
from tests.parity import AWKWARD_LENGTHS, to_float64

BROKEN = (float("nan"), float("inf"))


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _rms_norm() -> Iterator[Case]:
    for dtype, width in itertools.product(EPSILONS, (*AWKWARD_LENGTHS, 576)):
        x, weight = (_random(0, 41, width) * 3).to(dtype), _random(1, width).to(dtype)
        x64 = x.double()
        expected = weight.double() * x64 / (x64.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        case = Case("rms_norm", f"{kind_of(dtype)}/{width}").number(rows=41, width=width, eps=1e-5).array(x=x, weight=weight)
        yield case.parity("out", rms_norm(x, weight, 1e-5), expected)


def _rope() -> Iterator[Case]:
    for dtype, head_dim, heads in itertools.product(EPSILONS, (2, 26, 64, 72, 80, 128), (1, 3)):
        x, positions = _random(0, 65, 2 * heads, head_dim).to(dtype)[:, heads:], torch.arange(65) * 7
        half = head_dim // 2
        angles = positions[:, None].float() * (1.0 / 1e4 ** (torch.arange(half, dtype=torch.float32) * 2 / head_dim))
        case = Case("rope", f"{kind_of(dtype)}/{head_dim}x{heads}").view("x", x, "token_stride")
        case.number(token_stride=x.stride(0), tokens=65, heads=heads, head_dim=head_dim)
        case.array(cosines=angles.cos(), sines=angles.sin())
        yield case.parity("out", rope(x, positions, 1e4), rope(x.double(), positions, 1e4))


def _route() -> Iterator[Case]:
    def case(label: str, logits: Tensor, lengths: list[int], k: int, refusal: str = "") -> Case:
        made = Case("route", label, refusal).array(logits=logits, level_offsets=_bounds(lengths))
        made.number(tokens=logits.shape[0], experts=logits.shape[1], k=k)
        if refusal:
            return (
                made.expect("expert_offsets", "int32", []).expect("permutation", "int32", []).expect("weights", "float32", [])
            )
        offsets, order, weights = route(logits, _bounds(lengths), k)
        made.expect("expert_offsets", "int32", offsets).expect("permutation", "int32", order)
        chosen = torch.empty(order.shape, dtype=torch.int64)
        chosen[order.long()] = torch.arange(logits.shape[1]).repeat_interleave(offsets.diff())
        return made.parity("weights", weights, logits.double().gather(1, chosen.view(-1, k)).softmax(dim=1))

    for lengths, group, k in itertools.product(([1], [13, 0, 65], [64, 65, 1, 1]), (1, 4, 9), (1, 3)):
        logits = _random(group, sum(lengths), group * len(lengths))
        label = f"{'+'.join(map(str, lengths))}/{group}/{min(k, group)}"
        yield case(label, logits, lengths, min(k, group))
        yield case(f"{label}/ties", logits.round(), lengths, min(k, group))
    nan, inf = BROKEN
    odd = torch.tensor([[1.0, nan, inf], [-inf, -inf, -inf], [inf, inf, 0.0], [nan, nan, -inf], [-0.0, 0.0, -1.0]])
    for k in (1, 2, 3):
        yield case(f"nan/{k}", odd, [5], k)
    yield case("none", torch.zeros(0, 6), [0, 0], 2)
    yield case("threads", _random(3, 3000, 48), [1000, 0, 2000], 3)
    yield case("refused", torch.zeros(4, 6), [2, 2], 4, "k must be in 1..3")
    yield case("refused", torch.zeros(4, 6), [5], 1, "level_offsets must rise")


def _grouped_experts() -> Iterator[Case]:
    def case(label: str, x: Tensor, routed: tuple[Tensor, ...], weights: dict[str, Tensor], refusal: str = "") -> Case:
        offsets, order, factors = routed
        made = Case("grouped_experts", f"{kind_of(x.dtype)}/{label}", refusal).array(x=x, weights=factors, **weights)
        made.array(expert_offsets=offsets.int(), permutation=order.int())
        experts, width, hidden = weights["w_down"].shape
        made.number(tokens=x.shape[0], width=width, hidden=hidden, experts=experts, k=factors.shape[1])
        if refusal:
            return made.expect("out", kind_of(x.dtype), torch.zeros(x.shape))
        none = {"w_gate": None, "w_up": None}
        eager = grouped_experts(x, *routed, **{**none, **weights})
        exact = grouped_experts(x.double(), *routed, **{**none, **{name: part.double() for name, part in weights.items()}})
        return made.parity("out", eager, exact)

    def weights(kind: str, experts: int, width: int, hidden: int, dtype: torch.dtype, bias: bool) -> dict[str, Tensor]:
        parts = {"w_down": _random(4, experts, width, width if kind == "affine" else hidden)}
        if kind != "affine":
            parts["w_up"] = _random(3, experts, hidden, width)
        if kind == "glu_silu":
            parts["w_gate"] = _random(2, experts, hidden, width)
        if bias:
            parts["b_down"] = _random(6, experts, width)
        if bias and kind != "affine":
            parts["b_up"] = _random(5, experts, hidden)
        return {name: (part * 0.5).to(dtype) for name, part in parts.items()}

    shapes = (((65, 65, 65), 4, 2, 48, 80), ((13, 13, 13), 4, 2, 48, 80), ((0, 7, 120), 3, 3, 37, 70), ((120,), 1, 1, 1, 1))
    for dtype, kind, (lengths, group, k, width, hidden) in itertools.product(EPSILONS, ("glu_silu", "gelu", "affine"), shapes):
        tokens, experts = sum(lengths), group * len(lengths)
        x = (_random(0, tokens, width) * 0.5).to(dtype)
        routed = route(_random(1, tokens, experts), _bounds([*lengths]), k)
        bias = width != 37
        yield case(f"{kind}/{tokens}x{width}x{hidden}", x, routed, weights(kind, experts, width, hidden, dtype, bias))
    # activations where their exponentials are tiny, huge or no number: one token each, times one
    ends = (0.0, -0.0, 1e-30, 0.5, -0.9, 1.3, -1.5, 3.0, -4.0, 6.0, -20.0, 90.0, -90.0, -200.0, 1e30, -1e38)
    one = torch.ones((1, 1, 1))
    for name, gated in (("silu", {"w_gate": one}), ("gelu", {})):
        values = torch.tensor([*ends, BROKEN[0], *(BROKEN[1:] if gated else ())])[:, None]
        alone = route(torch.zeros((len(values), 1)), _bounds([len(values)]), 1)
        for place in range(len(values)):  # a case each, so that the tolerance is that of its own scale
            x, routed = values[place : place + 1], (torch.tensor([0, 1]), alone[1][:1], alone[2][:1])
            yield case(f"{name}/{float(x)}", x, routed, {**gated, "w_up": one, "w_down": one})
    x, down = _random(0, 4, 12), {"w_down": _random(1, 2, 12, 12)}
    yield case("slots-of-none", x, (torch.tensor([0, 1, 2]), torch.tensor([3, 0, 0, 0]), torch.ones(4, 1)), down)
    for offsets, order, refusal in (([0, 2, 9], [0, 1, 2, 3], "expert_offsets"), ([0, 2, 4], [0, 1, 2, 4], "permutation")):
        routed = (torch.tensor(offsets), torch.tensor(order), torch.ones(4, 1))
        yield case("refused", x, routed, down, f"{refusal} must")


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], key_bounds: list[int]) -> NDArray[np.float64]:
    """Written out, because torch's own gives zeros for a row whose scores are all NaN."""
    out = np.zeros(tuple(q.shape))
    for (r0, r1), (k0, k1) in zip(itertools.pairwise(bounds), itertools.pairwise(key_bounds), strict=True):
        with np.errstate(invalid="ignore"):
            scores = np.einsum("qhd,khd->hqk", to_float64(q[r0:r1]), to_float64(k[k0:k1])) * q.shape[-1] ** -0.5
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[r0:r1] = np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), to_float64(v[k0:k1]))
    return out


def _varlen_tile_attention() -> Iterator[Case]:
    def case(label: str, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], keys: list[int] | None = None) -> Case:
        bounds, key_bounds, scale = _bounds(lengths), _bounds(keys or lengths), q.shape[-1] ** -0.5
        made = Case("varlen_tile_attention", f"{kind_of(q.dtype)}/{label}")
        for name, part in (("q", q), ("k", k), ("v", v)):
            made.view(name, part, "row_stride", "head_stride")
        made.number(heads=q.shape[1], head_dim=q.shape[2], scale=scale).array(bounds=bounds, key_bounds=key_bounds)
        eager = varlen_tile_attention(q, k, v, bounds, key_bounds)
        if any(part.isfinite().all().logical_not() for part in (q, k, v)):
            expected = _softmax_attention(q, k, v, bounds.tolist(), key_bounds.tolist())
            return made.parity("out", eager, expected)
        return made.parity("out", eager, varlen_tile_attention(q.double(), k.double(), v.double(), bounds, key_bounds))

    for dtype in EPSILONS:
        for head_dim in (1, 7, 32, 64, 72, 80, 128):
            lengths = [*AWKWARD_LENGTHS, 0, 130]
            fused = _random(head_dim, sum(lengths), 6, head_dim).to(dtype)
            yield case(f"{head_dim}", fused[:, :2], fused[:, 2:4], fused[:, 4:], lengths)
        lengths, keys = [4, 9, 40, 1], [70, 0, 90, 1]
        q, k, v = _random(0, 54, 3, 72).to(dtype), _random(1, 161, 3, 72).to(dtype), _random(2, 161, 3, 72).to(dtype)
        yield case("cross", q, k, v, lengths, keys)
        q, k, v = (_random(seed, 105, 1, 32).to(dtype) for seed in range(3))
        q[2, 0, 0] = v[70, 0, 5] = BROKEN[0]
        k[40, 0], k[40, 0, 3] = 0, BROKEN[1]
        yield case("nan", q, k, v, [5, 100])


def _decode_attention() -> Iterator[Case]:
    def case(
        label: str, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor | None = None, refusal: str = ""
    ) -> Case:
        made = Case("decode_attention", f"{kind_of(q.dtype)}/{label}", refusal).array(positions=positions, mask=mask)
        for name, part in (("q", q), ("k", k), ("v", v)):
            made.view(name, part, "batch_stride", "row_stride", "head_stride")
        batch, tokens, heads, head_dim = q.shape
        made.number(batch=batch, tokens=tokens, heads=heads, kv_heads=k.shape[2], capacity=k.shape[1], head_dim=head_dim)
        if refusal:
            return made.expect("out", kind_of(q.dtype), torch.zeros(q.shape))
        exact = decode_attention(q.double(), k.double(), v.double(), positions, mask)
        return made.parity("out", decode_attention(q, k, v, positions, mask), exact)

    for dtype, head_dim, tokens in itertools.product(EPSILONS, (7, 32, 64, 72, 80, 128), (1, 3, 8, 40)):
        capacity = 530 if tokens < 40 else 130
        q = _random(0, 3, tokens, 6, head_dim).to(dtype)
        cache = _random(1, 2, 3, capacity, 2, head_dim).to(dtype)  # keys and values of one layer lie in one array
        positions = torch.tensor([[0], [capacity // 2 - 10], [capacity - tokens]]) + torch.arange(tokens)
        yield case(f"{head_dim}/{tokens}", q, cache[0], cache[1], positions)
    for dtype in EPSILONS:
        q, k, v = (_random(i, 9, n, h, 19).to(dtype) for i, (n, h) in enumerate(((5, 12), (70, 3), (70, 3))))
        mask = torch.rand((9, 5, 70), generator=torch.Generator().manual_seed(0)) < 0.3
        mask[..., 0] = True
        mask[4, 2] = False  # sees nothing
        yield case("mask", q, k, v, torch.zeros((9, 5), dtype=torch.int64), mask)
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 5, 2, 8)
    for place in (5, -1):
        yield case("refused", q, k, k, torch.tensor([[place]]), refusal="positions must be in 0..4")
    yield case("refused", q[:, :, :3], k, k, torch.tensor([[0]]), refusal="query heads must be a multiple")


def _weight_matmul() -> Iterator[Case]:
    def case(label: str, x: Tensor, packed: PackedWeight, expected: Tensor | None = None) -> Case:
        wide = packed.scales is not None and packed.scales.dtype is torch.float32
        made = Case("weight_matmul", f"{kind_of(x.dtype)}/{packed.kind}/{label}").word(kind=packed.kind)
        made.number(rows=packed.shape[0], columns=packed.shape[1], wide_scales=wide, tokens=x.shape[0])
        made.array(codes=packed.codes, scales=packed.scales, x=x)
        if expected is not None:
            return made.expect("out", kind_of(x.dtype), expected)
        eager = weight_matmul(x, packed)
        # eager's own rows decide what is not finite: a product in float64 has no other
        exact = torch.where(eager.isfinite(), weight_matmul(x.double(), packed), eager.double())
        return made.parity("out", eager, exact)

    for dtype, kind in itertools.product(EPSILONS, ("bf16", "int8", "int4")):
        for rows, tokens in itertools.product((*AWKWARD_LENGTHS, 100), (1, 3, 8, 13)):
            if rows * tokens >= 13:  # fewer sums, and eager's error is that of a few lucky ones
                yield case(f"{rows}x{tokens}", _random(1, tokens, 192).to(dtype), pack_weight(_random(0, rows, 192), kind))
        weight = _random(2, 40, 64)
        yield case("wide", _random(1, 9, 64).to(dtype), pack_weight(weight, kind, scale_dtype=torch.float32))
        x = _random(1, 3, 64).to(dtype)
        x[1, 5], x[2, 7] = BROKEN
        yield case("nan", x, pack_weight(weight, kind))
    for dtype, columns in itertools.product(EPSILONS, (1, 33, 65)):
        yield case(f"odd/{columns}", _random(1, 13, columns).to(dtype), pack_weight(_random(0, 65, columns), "bf16"))
    for kind in ("bf16", "int8", "int4"):  # one column at a time: every code shows, and every sort of float16 scale
        steps = torch.arange(-7.0, 8.0).repeat(5)[:64].repeat(3, 1) * torch.tensor([1e-6, 1.0, 8000.0])[:, None]
        packed = pack_weight(steps, kind)
        yield case("codes", torch.eye(64), packed, dequantise(packed).T)


def _cue_search() -> Iterator[Case]:
    def unit(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
        x = rng.standard_normal(shape)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    for count, views, width, k in itertools.product((0, 1, 65, 300), (1, 17), (1, 7, 64, 257), (1, 50)):
        rng = np.random.default_rng(count + views + width)
        entries, visual, query = unit(rng, count, width).astype(np.float16), unit(rng, views, width), unit(rng, width)
        entries[2:3] = entries[0:1]  # an entry that is there twice
        asked = None if views == 1 else query
        scores, rows = cue_search(visual, asked, entries, k, 0.5)
        case = Case("cue_search", f"{count}x{width}/{views}/{k}").array(visual=visual, query=asked, entries=entries)
        case.number(views=views, width=width, count=count, k=k, beta=0.5)
        yield case.expect("scores", "float32", scores, CUE_TOLERANCE).expect("rows", "int64", rows)


def _complexity_map() -> Iterator[Case]:
    for height, width in [*itertools.product((1, 13, 65), (1, 2, 64, 65)), (3, 20_001), (300, 301)]:
        rng = np.random.default_rng(height * width)
        gray, mask = rng.integers(0, 256, (height, width), dtype=np.uint8), rng.random((height, width)) < 0.9
        if width > 20_000:
            gray[1], mask[1] = 255, True  # the largest sums
        case = Case("complexity_map", f"{height}x{width}").array(gray=gray, mask=mask).number(height=height, width=width)
        yield case.expect("tables", "float64", complexity_map(gray, mask))


def _cell_means() -> Iterator[Case]:
    def case(values: NDArray[np.generic], factor: int, rule: str, refusal: str = "") -> Case:
        bands, height, width = values.shape
        kind, rng = values.dtype.name, np.random.default_rng(height * width)
        valid = rng.random(((1 if rule == "shared" else bands), height, width)) < 0.7 if rule in ("mask", "shared") else None
        nodata = [int(values[0, 0, 0]), *[3] * (bands - 1)] if rule == "nodata" else None
        made = Case("cell_means", f"{kind}/{height}x{width}/{factor}/{rule}", refusal).array(values=values, valid=valid)
        made.array(nodata=None if nodata is None else np.array(nodata, values.dtype))
        made.number(bands=bands, height=height, width=width, factor=factor, valid_bands=0 if valid is None else len(valid))
        if refusal:
            return made.expect("means", kind, np.zeros(1)).expect("found", "bool", np.zeros(1))
        means, found = cell_means(values, factor, valid, nodata)
        return made.expect("means", kind, means).expect("found", "bool", found)

    for dtype, (height, width), factor in itertools.product(DTYPES, ((1, 1), (13, 65), (64, 64), (65, 2)), (1, 2, 4, 16)):
        rng = np.random.default_rng(height * width)
        if np.dtype(dtype).kind == "f":
            values = (rng.standard_normal((2, height, width)) * 4000).astype(dtype)
            values[0, ::3, ::5], values[1, ::4, ::7] = BROKEN
        else:
            limits = np.iinfo(dtype)
            bounds = max(limits.min, -65_535), min(limits.max, 65_535)
            values = rng.integers(*bounds, (2, height, width), dtype=dtype, endpoint=True)
        for rule in ("all", "mask", "shared", *(["nodata"] if values.dtype.kind != "f" else [])):
            yield case(values, factor, rule)
    for dtype in ("uint8", "uint16", "int16", "int64"):  # the largest sums, and more than one segment of columns
        for limit, factor in itertools.product((np.iinfo(dtype).min, np.iinfo(dtype).max), (128, 512)):
            yield case(np.full((1, 300, 520), limit, dtype), factor, "all")
        yield case(np.random.default_rng(0).integers(0, 100, (1, 5, 9001), dtype=dtype), 4, "nodata")
    yield case(np.ones((1, 4, 4), np.uint8), 3, "all", "factor must be a power of two")


def _pack_tiles() -> Iterator[Case]:
    def case(label: str, images: list[NDArray[np.uint8]], places: list[tuple[int, ...]], patch: int, resample: str) -> Case:
        """`places`: canvas, crop and grid of each image, six numbers. Images are windows of rows that are wider."""
        mean, std, fill = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), (9, 80, 200)
        made = Case("pack_tiles", f"{label}/{patch}/{resample}").word(filter=resample).number(patch=patch, images=len(images))
        for index, (image, place) in enumerate(zip(images, places, strict=True)):
            height, width = image.shape[:2]
            row = np.zeros((height, 3 * width + 5), np.uint8)
            row[:, 5:] = image.reshape(height, -1)
            first = vertical_first(image.shape, place[:2])
            numbers = np.array([5, height, width, row.shape[1], *place, int(first)], np.int64)
            made.array(**{f"image{index}": row, f"image{index}.places": numbers})
        made.array(mean=np.array(mean, np.float32), std=np.array(std, np.float32), fill=np.array(fill, np.uint8))
        pairs = [[place[start : start + 2] for place in places] for start in (0, 2, 4)]
        return made.expect("patches", "float32", pack_tiles(images, *pairs, patch, mean, std, resample, fill), PACK_TOLERANCE)

    def image(height: int, width: int) -> NDArray[np.uint8]:
        return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)

    sizes = ((64, 48, 28, 28), (13, 17, 42, 70), (1, 1, 14, 14), (500, 20, 28, 14), (20, 500, 14, 28), (300, 31, 14, 28))
    for (height, width, ch, cw), resample in itertools.product(sizes, ("bicubic", "bilinear", "lanczos")):
        yield case(f"{height}x{width}", [image(height, width)], [(ch, cw, 0, 0, ch // 14, cw // 14)], 14, resample)
    for crop in ((-5, 3), (3, -9), (20, 20), (-28, 0), (0, 60), (-100, -100)):
        yield case(f"crop/{crop[0]},{crop[1]}", [image(50, 60)], [(30, 36, *crop, 4, 4)], 7, "bicubic")
    yield case("one", [image(3, 70)], [(60, 5, -2, -2, 3, 3)], 1, "lanczos")
    tiles = [(28 + t, 42 + 2 * t, t - 4, 3, 1 + t % 3, 1 + t % 2) for t in range(9)]
    yield case("many", [image(20 + 7 * t, 90 - 5 * t) for t in range(9)], tiles, 14, "bicubic")
    yield case("threads", [image(420, 520)], [(280, 336, 0, 0, 20, 24)], 14, "bicubic")  # above the parallel threshold


RECORDERS: dict[str, Callable[[], Iterator[Case]]] = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "route": _route,
    "grouped_experts": _grouped_experts,
    "varlen_tile_attention": _varlen_tile_attention,
    "decode_attention": _decode_attention,
    "weight_matmul": _weight_matmul,
    "cue_search": _cue_search,
    "complexity_map": _complexity_map,
    "cell_means": _cell_means,
    "pack_tiles": _pack_tiles,
}

# Twins that are another way into the C++ function of an op above.
SAME_FUNCTION = {"level_experts": "grouped_experts"}


def record(path: Path) -> int:
    """Writes the cases of every op that has a native twin; gives their number."""
    native = {SAME_FUNCTION.get(op, op) for op, implementations in OPS.items() if "native" in implementations}
    assert native == set(RECORDERS), f"ops with a native twin and no cases here, or the reverse: {native ^ set(RECORDERS)}"
    count = 0
    with path.open("wb") as file, torch.inference_mode():
        for recorder in (RECORDERS | MODEL_RECORDERS).values():
            for case in recorder():
                case.write(file)
                count += 1
    return count


def record_wrong(path: Path) -> set[str]:
    """Writes one case per op whose expectation is wrong, to see that the judge says so; gives the ops."""
    with path.open("wb") as file, torch.inference_mode():
        for recorder in (RECORDERS | MODEL_RECORDERS).values():
            next(case for case in recorder() if case.can_be_wrong()).write(file, wrong=True)
    return set(RECORDERS | MODEL_RECORDERS)


def record_overrun(path: Path) -> None:
    """Writes a case that reads one element beyond its input, which a sanitizer must see."""
    case = Case("rms_norm", "overrun").number(rows=3, width=13, eps=1e-5).array(x=torch.ones(3 * 13 - 1), weight=torch.ones(13))
    with path.open("wb") as file:
        case.expect("out", "float32", torch.ones(3 * 13), 1.0).write(file)


def record_undefined(path: Path) -> None:
    """Writes a case whose mask holds a bool that is neither true nor false, which a sanitizer must see."""
    places = {"batch_stride": 64, "row_stride": 16, "head_stride": 16}
    case = Case("decode_attention", "undefined").array(mask=np.full(4, 2, np.uint8), positions=np.zeros(1, np.int64))
    for name in "qkv":
        case.array(**{name: torch.ones(64)}).number(**{f"{name}.{stride}": value for stride, value in places.items()})
    case.number(batch=1, tokens=1, heads=1, kv_heads=1, capacity=4, head_dim=16)
    with path.open("wb") as file:
        case.expect("out", "float32", torch.ones(16), 1.0).write(file)

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, str | bool | int]: ...
def limit_isa(*, isa: str) -> None: ...
def ask_for_huge_pages(*, address: int, length_bytes: int) -> None: ...
def complexity_map(*, gray: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.float64]: ...
def cell_means(
    *,
    values: NDArray[Any],
    factor: int,
    valid: NDArray[np.bool_] | None,
    nodata: NDArray[Any] | None,
    means: NDArray[Any],
    found: NDArray[np.bool_],
) -> None: ...
def pack_tiles(
    *,
    images: Sequence[NDArray[np.uint8]],
    canvases: NDArray[np.int64],
    crops: NDArray[np.int64],
    grids: NDArray[np.int64],
    vertical_first: Sequence[bool],
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    resample: str,
    fill: Sequence[int],
) -> NDArray[np.float32]: ...
def varlen_tile_attention(
    *,
    q: int,
    k: int,
    v: int,
    out: int,
    q_strides: Sequence[int],
    k_strides: Sequence[int],
    v_strides: Sequence[int],
    cu_seqlens: Sequence[int],
    cu_seqlens_k: Sequence[int],
    heads: int,
    head_dim: int,
    dtype: str,
    scale: float,
) -> None: ...
def route(
    *,
    logits: int,
    tokens: int,
    experts: int,
    level_offsets: Sequence[int],
    k: int,
    expert_offsets: int,
    permutation: int,
    weights: int,
) -> None: ...
def grouped_experts(
    *,
    x: int,
    expert_offsets: int,
    permutation: int,
    weights: int,
    w_gate: int,
    w_up: int,
    w_down: int,
    b_up: int,
    b_down: int,
    out: int,
    tokens: int,
    width: int,
    hidden: int,
    experts: int,
    k: int,
    dtype: str,
) -> None: ...
def weight_layout_bytes(*, kind: str, rows: int, columns: int, wide_scales: bool) -> int: ...
def lay_out_weight(*, kind: str, rows: int, columns: int, wide_scales: bool, codes: int, scales: int, layout: int) -> None: ...

class WeightMatmul:
    def __init__(self, *, kind: str, rows: int, columns: int, wide_scales: bool, layout: int) -> None: ...
    def float32(self, x: int, tokens: int, out: int) -> None: ...
    def bfloat16(self, x: int, tokens: int, out: int) -> None: ...

def rms_norm(*, x: int, weight: int, rows: int, width: int, eps: float, dtype: str, out: int) -> None: ...
def rope(
    *,
    x: int,
    token_stride: int,
    cosines: int,
    sines: int,
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: str,
    out: int,
) -> None: ...
def decode_attention(
    *,
    q: int,
    k: int,
    v: int,
    positions: int,
    mask: int,
    out: int,
    q_strides: Sequence[int],
    k_strides: Sequence[int],
    v_strides: Sequence[int],
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype: str,
) -> None: ...
def cue_search(
    *, visual: NDArray[np.float32], query: NDArray[np.float32] | None, entries: NDArray[np.uint16], k: int, beta: float
) -> tuple[NDArray[np.float32], NDArray[np.int64]]: ...

class KvCache:
    @property
    def rows(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    def copy_row(self, *, source: KvCache, source_row: int, row: int, length: int) -> None: ...

class NativeDecoder:
    def __init__(
        self,
        *,
        weights: Mapping[str, tuple[str, int, int, NDArray[np.uint8]]],
        settings: Mapping[str, float],
        frequencies: NDArray[np.float32],
        cache: str,
        int8_inputs: Sequence[str] = ...,
    ) -> None: ...
    def cache(self, *, rows: int, capacity: int) -> KvCache: ...
    def embed(self, *, token_ids: NDArray[np.int32]) -> NDArray[np.float32]: ...
    def prefill(
        self,
        *,
        cache: KvCache,
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        lengths: NDArray[np.int64],
        embeddings: NDArray[np.float32],
    ) -> NDArray[np.float32]: ...
    def logits(self, *, states: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def decode(
        self, *, cache: KvCache, rows: NDArray[np.int64], positions: NDArray[np.int64], token_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]: ...
    def decode_best(
        self, *, cache: KvCache, rows: NDArray[np.int64], positions: NDArray[np.int64], token_ids: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...

class NativeSceneModel:
    def __init__(
        self,
        *,
        weights: Mapping[str, tuple[str, int, int, NDArray[np.uint8]]],
        settings: Mapping[str, float],
        int8_inputs: Sequence[str] = ...,
    ) -> None: ...
    def encode(
        self, *, patches: NDArray[np.float32], positions: Sequence[NDArray[np.float32]], bounds: Sequence[int]
    ) -> list[NDArray[np.float32]]: ...
    def copy_patches(self, *, patches: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def align(
        self, *, taps: Sequence[NDArray[np.float32]], scene_class_token: NDArray[np.float32], bounds: Sequence[int]
    ) -> list[NDArray[np.float32]]: ...
    def embed_states(self, *, states: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def bridge(
        self,
        *,
        taps: Sequence[NDArray[np.float32]],
        cues: Sequence[NDArray[np.float32]],
        query: NDArray[np.float32],
    ) -> NDArray[np.float32]: ...
    def project(self, *, features: NDArray[np.float32], grids: Sequence[Sequence[int]]) -> NDArray[np.float32]: ...

"""Which kernels are shipped, at which shapes and configurations: what the compile gates compile. Launches nothing.

The shapes are those of real models (head widths 64, 72, 80, 128), and argument types are what a launch with aligned tensors gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from rsvlm_infer.kernels.triton.configs import (
    DECODE_SPLIT,
    Config,
    attention_config,
    decode_config,
    experts_config,
    prefill_config,
)
from rsvlm_infer.kernels.triton.grouped_experts import COMBINE_BLOCK
from rsvlm_infer.kernels.triton.launch import FAMILIES, next_power_of_2
from rsvlm_infer.kernels.triton.route import COUNTS_AT_ONCE, tokens_per_block
from rsvlm_infer.kernels.triton.varlen_tile_attention import split_head

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Spec:
    """One compilation."""

    name: str
    variant: str
    dtype: str  # of pointers that `types` does not name
    chip: int  # 90 = sm_90
    kernel: Any
    constants: dict[str, Any]
    config: Config
    types: dict[str, str] = field(default_factory=dict)  # argument -> type, where the rule of `signature` does not hold
    odd: tuple[str, ...] = ()  # strides that are not multiples of 16
    multiples: tuple[str, ...] = ()  # other integers that are

    def signature(self) -> dict[str, str]:
        """Argument -> triton type: pointers by their name, everything else a 32-bit integer."""
        types = {}
        for name in self.kernel.arg_names:
            plain = f"*{self.dtype}" if name.endswith("_ptr") else "i32"
            types[name] = "constexpr" if name in self.constants else self.types.get(name, plain)
        return types

    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """What triton finds out about aligned pointers and about strides that are multiples of 16."""
        aligned: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, (name, kind) in enumerate(self.signature().items()):
            if kind.startswith("*") or name in self.multiples or (name.endswith("stride") and name not in self.odd):
                aligned[(index,)] = [["tt.divisibility", 16]]
        return aligned


def specs(chips: tuple[int, ...]) -> Iterator[Spec]:
    """Every compilation for these chips."""
    for chip in chips:
        family = FAMILIES[divmod(chip, 10)]
        yield from _attention(chip, family)
        yield from _route(chip)
        yield from _experts(chip, family)
        yield from _decode_path(chip, family)


def _attention(chip: int, family: str) -> Iterator[Spec]:
    from rsvlm_infer.kernels.triton.jit.varlen_tile_attention import attention_kernel, schedule_kernel
    from rsvlm_infer.kernels.triton.varlen_tile_attention import SCHEDULE_CHUNK, SCHEDULE_TILES

    blocks = set()
    for dtype in ("fp16", "bf16", "fp32"):
        for head_dim in (64, 72, 80, 128):
            wide, narrow = split_head(head_dim)
            config = attention_config(family, TORCH[dtype], wide + narrow)
            blocks.add(config.block_m)
            for biased in (False, True) if head_dim == 64 and dtype != "bf16" else (False,):
                constants = {
                    "HEAD_DIM": head_dim,
                    "WIDE": wide,
                    "NARROW": narrow,
                    "BLOCK_M": config.block_m,
                    "BLOCK_N": config.block_n,
                    "HAS_BIAS": biased,
                    "EXACT": dtype == "fp32",
                    "UNIT": 8,
                }
                types = {"schedule_ptr": "*i32", "scale_log2": "fp32"}
                variant = f"d{head_dim}{'+bias' if biased else ''}"
                # divided by UNIT, the strides of heads are 8, 9, 10 or 16
                odd = () if head_dim == 128 else ("q_head_stride", "k_head_stride", "v_head_stride", "out_head_stride")
                yield Spec("attention", variant, dtype, chip, attention_kernel, constants, config, types, odd)
    for block in sorted(blocks):
        config = Config(block, 0, 0, 4, 3)
        constants = {"BLOCK_M": block, "TILES": SCHEDULE_TILES, "CHUNK": SCHEDULE_CHUNK}
        yield Spec("attention_schedule", "", "i32", chip, schedule_kernel, constants, config)


def _route(chip: int) -> Iterator[Spec]:
    from rsvlm_infer.kernels.triton.jit.route import place_kernel, select_kernel

    integers = {"choice_ptr": "*i32", "counts_ptr": "*i32", "expert_offsets_ptr": "*i32", "permutation_ptr": "*i32"}
    for experts, k in ((12, 2), (192, 8)):
        block, padded = tokens_per_block(experts), next_power_of_2(experts)
        config = Config(block, padded, 0, 4, 3)
        common = {"K": k, "EXPERTS": padded, "BLOCK": block}
        selection = {**common, "K_SLOTS": next_power_of_2(k), "LEVELS": 3, "GROUP": experts // 3}
        types = {**integers, "level_offsets_ptr": "*i32"}
        variant = f"e{experts} k{k}"
        odd = ("logits_row_stride",) if experts % 16 else ()
        yield Spec("route_select", variant, "fp32", chip, select_kernel, selection, config, types, odd)
        yield Spec("route_place", variant, "i32", chip, place_kernel, {**common, "PROGRAMS": COUNTS_AT_ONCE}, config, integers)


def _experts(chip: int, family: str) -> Iterator[Spec]:
    from rsvlm_infer.kernels.triton.jit.grouped_experts import combine_kernel, down_kernel, up_kernel

    types = {"expert_offsets_ptr": "*i32", "permutation_ptr": "*i32", "weights_ptr": "*fp32"}
    for dtype in ("fp16", "bf16", "fp32"):
        up, down = experts_config(family, TORCH[dtype])
        shared = {"EXPERTS": 16, "EVEN": True, "EXACT": dtype == "fp32"}
        # widths of real models are multiples of 16, so that rows of weights are read 16 bytes at a time
        for variant, gated, permuted, even in (
            ("glu", True, True, True),
            ("glu ragged", True, True, False),
            ("gelu", False, False, True),
            ("glu level", True, False, True),
        ):
            constants = {**shared, **_blocks(up), "EVEN": even, "PERMUTED": permuted, "GATED": gated, "HAS_BIAS": not gated}
            yield Spec("experts_up", variant, dtype, chip, up_kernel, constants, up, types, multiples=("width", "hidden"))
        for variant, weighted, gather, permuted in (
            ("slots", False, False, True),
            ("weighted", True, False, True),
            ("affine", True, True, True),
            ("level", False, False, False),
        ):
            constants = {
                **shared,
                **_blocks(down),
                "PERMUTED": permuted,
                "GATHER": gather,
                "WEIGHTED": weighted,
                "HAS_BIAS": gather,
            }
            yield Spec("experts_down", variant, dtype, chip, down_kernel, constants, down, types, multiples=("width", "hidden"))
        constants = {"K": 2, "BLOCK": COMBINE_BLOCK}
        config = Config(COMBINE_BLOCK, 0, 0, 4, 3)
        yield Spec("experts_combine", "k2", dtype, chip, combine_kernel, constants, config, types, multiples=("width",))


def _decode_path(chip: int, family: str) -> Iterator[Spec]:
    from rsvlm_infer.kernels.triton.jit.rms_norm import rms_norm_kernel
    from rsvlm_infer.kernels.triton.jit.rope import rope_append_kernel, rope_kernel
    from rsvlm_infer.kernels.triton.jit.weight_matmul import weight_matmul_kernel
    from rsvlm_infer.kernels.triton.rms_norm import warps_of
    from rsvlm_infer.kernels.triton.weight_matmul import BLOCK_K, BLOCK_N, WARPS

    for dtype in ("fp16", "bf16", "fp32"):
        for width, added in ((576, False), (4096, True)):
            constants = {"ADD": added, "BLOCK": next_power_of_2(width)}
            config = Config(constants["BLOCK"], 0, 0, warps_of(width), 3)
            variant = f"d{width}{'+add' if added else ''}"
            yield Spec(
                "rms_norm", variant, dtype, chip, rms_norm_kernel, constants, config, {"eps": "fp32"}, multiples=("width",)
            )
        types = {"positions_ptr": "*i64", "frequencies_ptr": "*fp32"}
        for heads, kv_heads in ((32, 8),):
            constants = {"HEADS": next_power_of_2(heads), "HALF": 32, "HALF_BLOCK": 32}
            config = Config(constants["HEADS"], 32, 0, 4, 3)
            yield Spec("rope", f"h{heads}", dtype, chip, rope_kernel, constants, config, types)
            constants = {**constants, "KV_HEADS": next_power_of_2(kv_heads)}
            yield Spec("rope_append", f"h{heads}:{kv_heads}", dtype, chip, rope_append_kernel, constants, config, types)
        yield from _cache_attention(chip, family, dtype)
        for kind, codes in (("int4", "*u8"), ("int8", "*i8"), ("bf16", "*bf16")):
            constants = {"GROUP": 16 if kind == "int4" else 32, "HALVES": kind == "int4", "SCALED": kind != "bf16"}
            constants |= {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
            types = {"codes_ptr": codes, "scales_ptr": "*bf16" if kind == "bf16" else "*fp16"}
            config, multiples = Config(0, BLOCK_N, BLOCK_K, WARPS, 3), ("code_columns",)
            yield Spec("weight_matmul", kind, dtype, chip, weight_matmul_kernel, constants, config, types, (), multiples)


def _cache_attention(chip: int, family: str, dtype: str) -> Iterator[Spec]:
    from rsvlm_infer.kernels.triton.jit.decode_attention import cache_attention_kernel, join_kernel

    floats = {"peaks_ptr": "*fp32", "masses_ptr": "*fp32"}
    for head_dim in (64, 128):
        decode, prefill = decode_config(family, TORCH[dtype]), prefill_config(family, TORCH[dtype])
        variants = [("decode split", decode, DECODE_SPLIT, False), ("prefill", prefill, 0, False)]
        if head_dim == 64:
            variants += [("decode", decode, 0, False), ("prefill masked", prefill, 0, True)]
        for variant, config, split, masked in variants:
            constants = {
                "HEAD_DIM": head_dim,
                "COLUMNS": head_dim,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "SPLIT_LENGTH": split,
                "MASKED": masked,
                "EXACT": dtype == "fp32",
            }
            types = {**floats, "positions_ptr": "*i64", "mask_ptr": "*u8", "scale_log2": "fp32"}
            if split:
                types["out_ptr"] = "*fp32"
            odd = ("mask_batch_stride", "mask_row_stride")
            yield Spec(
                "cache_attention", f"d{head_dim} {variant}", dtype, chip, cache_attention_kernel, constants, config, types, odd
            )
        config = Config(1, head_dim, 0, 1, 3)
        constants = {"HEAD_DIM": head_dim, "COLUMNS": head_dim}
        yield Spec(
            "cache_attention_join",
            f"d{head_dim}",
            dtype,
            chip,
            join_kernel,
            constants,
            config,
            {**floats, "parts_ptr": "*fp32"},
        )


def _blocks(config: Config) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}

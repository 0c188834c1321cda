"""Which kernels are shipped, at which shapes and configurations: what the compile gates compile. Launches nothing.

The shapes are those of real models (head widths 64, 72, 80, 128), and argument types are what a launch with aligned tensors gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from rsvlm_infer.kernels.triton.configs import Config, attention_config
from rsvlm_infer.kernels.triton.launch import FAMILIES
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
    odd: tuple[str, ...] = ()  # integers that are not multiples of 16

    def signature(self) -> dict[str, str]:
        """Argument -> triton type: pointers by their name, everything else a 32-bit integer."""
        types = {}
        for name in self.kernel.arg_names:
            plain = f"*{self.dtype}" if name.endswith("_ptr") else "i32"
            types[name] = "constexpr" if name in self.constants else self.types.get(name, plain)
        return types

    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """What triton finds out about aligned pointers and about strides that are multiples of 16."""
        aligned = {}
        for index, (name, kind) in enumerate(self.signature().items()):
            if kind.startswith("*") or (name.endswith("stride") and name not in self.odd):
                aligned[(index,)] = [["tt.divisibility", 16]]
        return aligned


def specs(chips: tuple[int, ...]) -> Iterator[Spec]:
    """Every compilation for these chips."""
    for chip in chips:
        family = FAMILIES[divmod(chip, 10)]
        yield from _attention(chip, family)


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

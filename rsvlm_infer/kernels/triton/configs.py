"""The shipped configurations: block shapes, warps and pipeline stages per chip family. Data, chosen before a launch; no tuning at run time.

A configuration depends on chip, dtype and widths, never on how many rows there are: block shapes decide the order of sums, so
that a row gives the same bits alone and in a batch. `benchmarks/compile_gates.py` compiles every entry for its chips and records
registers and shared memory; `benchmarks/gpu_suite.py` times the candidates around them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """One configuration. Unused extents are 0."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


FAMILY_NAMES = ("sm80", "sm86", "sm90", "sm100", "sm120")

# The interpreter costs about the same per operation, whatever its size; blocks are small so that few rows meet several blocks.
INTERPRETED_CONFIG = Config(32, 32, 32, 4, 1)

# family -> float16 and bfloat16, by padded head width. Tiles have 16 to 577 rows: 64 query rows waste least on them.
# Before Hopper and on sm_120 matrix operands live in registers: 64 x 64 with four warps would spill at 128 columns.
_ATTENTION_REGISTERS = {64: Config(64, 64, 0, 4, 2), 96: Config(64, 32, 0, 4, 3), 128: Config(128, 32, 0, 8, 2)}
_ATTENTION_SHARED = {64: Config(64, 64, 0, 4, 3), 96: Config(64, 64, 0, 4, 2), 128: Config(64, 64, 0, 4, 2)}
_ATTENTION_HALF = {
    "sm80": _ATTENTION_REGISTERS,
    "sm86": _ATTENTION_REGISTERS,
    "sm90": _ATTENTION_SHARED,
    "sm100": _ATTENTION_SHARED,
    "sm120": _ATTENTION_REGISTERS,
}
# float32 is exact ("ieee"): no tensor cores, operands live in registers
_ATTENTION_FLOAT = Config(64, 32, 0, 8, 1)

# family -> (gate and up, down); both have the same row blocks. Gate and up make two products of block_n columns each.
_EXPERTS_HALF = {
    "sm80": (Config(64, 64, 64, 4, 3), Config(64, 128, 64, 4, 3)),
    "sm86": (Config(64, 64, 32, 4, 3), Config(64, 128, 32, 4, 3)),
    "sm90": (Config(128, 64, 64, 8, 3), Config(128, 128, 64, 8, 3)),
    "sm100": (Config(128, 64, 64, 8, 3), Config(128, 128, 64, 8, 3)),
    "sm120": (Config(64, 64, 32, 4, 3), Config(64, 128, 32, 4, 3)),
}
_EXPERTS_FLOAT = (Config(32, 32, 32, 4, 1), Config(32, 32, 32, 4, 1))

# entries of the cache per program of the split; fixed, so that neither batch nor capacity moves a border between sums
DECODE_SPLIT = 256
_DECODE_HALF = Config(16, 64, 0, 4, 2)
_DECODE_FLOAT = Config(16, 32, 0, 8, 1)
# 64 x 64 would spill on sm_80 with an explicit mask
_PREFILL_HALF = Config(64, 32, 0, 4, 2)
_PREFILL_FLOAT = Config(32, 16, 0, 4, 1)


def attention_config(family: str, dtype: torch.dtype, columns: int) -> Config:
    """Of varlen_tile_attention; `columns` = padded head width."""
    if family not in FAMILY_NAMES:
        return INTERPRETED_CONFIG
    if dtype == torch.float32:
        return _ATTENTION_FLOAT
    return next(config for width, config in _ATTENTION_HALF[family].items() if columns <= width)


def experts_config(family: str, dtype: torch.dtype) -> tuple[Config, Config]:
    """Of the two matrix products of grouped_experts: gate and up, down."""
    if family not in FAMILY_NAMES:
        return INTERPRETED_CONFIG, INTERPRETED_CONFIG
    return _EXPERTS_FLOAT if dtype == torch.float32 else _EXPERTS_HALF[family]


def decode_config(family: str, dtype: torch.dtype) -> Config:
    """Of decode_attention with one new token: `block_m` query heads of one key head, `block_n` entries of the cache."""
    if family not in FAMILY_NAMES:
        return INTERPRETED_CONFIG
    return _DECODE_FLOAT if dtype == torch.float32 else _DECODE_HALF


def prefill_config(family: str, dtype: torch.dtype) -> Config:
    """Of decode_attention with several new tokens."""
    if family not in FAMILY_NAMES:
        return INTERPRETED_CONFIG
    return _PREFILL_FLOAT if dtype == torch.float32 else _PREFILL_HALF

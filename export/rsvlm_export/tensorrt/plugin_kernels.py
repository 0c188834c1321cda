"""Our Triton kernels as TensorRT plugins launch them: PTX ahead of time, grid and integers as arithmetic on dimensions. Knows no TensorRT.

A plugin is one kernel, and TensorRT passes it input pointers, then 32-bit integers, then output pointers. Dimensions may be numbers or
TensorRT's expressions: everything here uses +, * and // only.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rsvlm_infer.errors import BackendError, InputError
from rsvlm_infer.kernels.triton.configs import Config, attention_config, experts_config
from rsvlm_infer.kernels.triton.grouped_experts import COMBINE_BLOCK
from rsvlm_infer.kernels.triton.launch import FAMILIES, next_power_of_2
from rsvlm_infer.kernels.triton.varlen_tile_attention import SCHEDULE_CHUNK, SCHEDULE_TILES, split_head

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TRITON = {"float16": "fp16", "bfloat16": "bf16"}
# what a kernel may have without the host raising its limit, which TensorRT is not known to do
SHARED_BYTES = 48 << 10
# the configurations whose attention and experts stay within it
SMALL_FAMILY = "sm86"
ENTRY = re.compile(r"\.visible \.entry (\w+)\(\n(.*?)\n\)", re.DOTALL)
# source lines name files of the machine that compiled, and are of no use in an engine
DEBUG_LINES = re.compile(r"^\s*\.(?:loc|file)\s.*\n", re.MULTILINE)
DEBUG_SECTIONS = re.compile(r"^\s*\.section\s+\.debug_\w+\s*\{.*?^\s*\}\n", re.MULTILINE | re.DOTALL)

Dim = Any  # an int, or TensorRT's ShapeExpr


@dataclass(frozen=True, eq=False)
class PluginKernel:
    """One plugin for one chip, dtype and set of constants.

    pointers: triton type of each input, then of each output. inputs, integers: names in the order of the kernel's arguments.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    inputs: tuple[str, ...]
    integers: tuple[str, ...]
    constants: dict[str, Any]
    config: Config

    @property
    def arguments(self) -> tuple[str, ...]:
        """In the order in which TensorRT passes them."""
        outputs = tuple(name for name in self.pointers if name not in self.inputs)
        return (*self.inputs, *self.integers, *outputs)


@dataclass(frozen=True)
class CompiledPlugin:
    """What goes into an engine. threads: of one block; shared_bytes: of one block."""

    entry: str
    ptx: str
    threads: int
    shared_bytes: int


def tile_schedule(chip: str, dtype: str, head_dim: int) -> PluginKernel:
    """(q, cu_seqlens, cu_seqlens_k) -> the work list of `tile_attention`."""
    from rsvlm_infer.kernels.triton.jit.plugins import tile_schedule as kernel

    constants = {"BLOCK_M": _attention(chip, dtype, head_dim).block_m, "TILES": SCHEDULE_TILES, "CHUNK": SCHEDULE_CHUNK}
    pointers = {"q_ptr": f"*{TRITON[dtype]}", "cu_seqlens_ptr": "*i32", "cu_seqlens_k_ptr": "*i32", "schedule_ptr": "*i32"}
    inputs = ("q_ptr", "cu_seqlens_ptr", "cu_seqlens_k_ptr")
    config = Config(constants["BLOCK_M"], 0, 0, 4, 3)
    return PluginKernel("tile_schedule", kernel, pointers, inputs, ("num_tiles", "num_work"), constants, config)


def schedule_length(rows: Dim, bounds: Dim, block_m: int) -> Dim:
    """Entries of the work list for S rows and U bounds: each tile rounds its rows up to whole blocks."""
    return (rows + (bounds - 1) * (block_m - 1)) // block_m


def schedule_launch(rows: Dim, bounds: Dim, block_m: int) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Grid and integers of `tile_schedule`."""
    tiles = bounds - 1
    return ((tiles + (SCHEDULE_TILES - 1)) // SCHEDULE_TILES,), (tiles, schedule_length(rows, bounds, block_m))


def tile_attention(chip: str, dtype: str, heads: int, head_dim: int, scale: float) -> PluginKernel:
    """(q, k, v, schedule) -> the rows of q."""
    from rsvlm_infer.kernels.triton.jit.plugins import tile_attention as kernel

    if scale <= 0:  # the kernel takes the maximum before it scales
        raise InputError(f"scale of tile_attention must be positive, got {scale}; use the function body")
    wide, narrow = split_head(head_dim)
    config = _attention(chip, dtype, head_dim)
    constants = {
        "HEADS": heads,
        "SCALE_LOG2": scale * math.log2(math.e),
        "HEAD_DIM": head_dim,
        "WIDE": wide,
        "NARROW": narrow,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "EXACT": False,
    }
    inputs = ("q_ptr", "k_ptr", "v_ptr", "schedule_ptr")
    pointers = {name: "*i32" if name == "schedule_ptr" else f"*{TRITON[dtype]}" for name in (*inputs, "out_ptr")}
    return PluginKernel("tile_attention", kernel, pointers, inputs, (), constants, config)


def attention_launch(work: Dim, heads: int) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Grid and integers of `tile_attention` for a work list of that length."""
    return (work * heads,), ()


def experts_up(chip: str, dtype: str, experts: int, slots: int, width: int, hidden: int) -> PluginKernel:
    """(x, w_gate, w_up, expert_offsets, permutation) -> silu(gate) · up of every slot, in the order of the permutation."""
    from rsvlm_infer.kernels.triton.jit.plugins import experts_up as kernel

    config = _experts(chip, dtype)[0]
    names = ("x_ptr", "w_gate_ptr", "w_up_ptr", "expert_offsets_ptr", "permutation_ptr")
    constants = _experts_constants(config, experts, slots, width, hidden, width)
    return _experts_kernel("experts_up", kernel, names, "hidden_ptr", dtype, constants, config)


def experts_down(chip: str, dtype: str, experts: int, slots: int, width: int, hidden: int) -> PluginKernel:
    """(what `experts_up` gave, w_down, expert_offsets, permutation) -> a row per slot, in the order of tokens."""
    from rsvlm_infer.kernels.triton.jit.plugins import experts_down as kernel

    config = _experts(chip, dtype)[1]
    names = ("hidden_ptr", "w_down_ptr", "expert_offsets_ptr", "permutation_ptr")
    constants = _experts_constants(config, experts, slots, width, hidden, hidden)
    return _experts_kernel("experts_down", kernel, names, "parts_ptr", dtype, constants, config)


def experts_launch(places: Dim, experts: int, columns: int, config: Config) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Grid and integers of `experts_up` (columns F) and `experts_down` (columns D) for N·k places."""
    row_blocks = (places + experts * (config.block_m - 1)) // config.block_m
    return (row_blocks * -(-columns // config.block_n),), (row_blocks,)


def experts_combine(dtype: str, slots: int, width: int) -> PluginKernel:
    """(a row per slot, weights float32 [N, k]) -> their weighted sum, [N, D]."""
    from rsvlm_infer.kernels.triton.jit.plugins import experts_combine as kernel

    block = min(COMBINE_BLOCK, next_power_of_2(width))
    pointers = {"parts_ptr": f"*{TRITON[dtype]}", "weights_ptr": "*fp32", "out_ptr": f"*{TRITON[dtype]}"}
    constants = {"WIDTH": width, "SLOTS": slots, "BLOCK": block}
    config = Config(block, 0, 0, 4, 3)
    return PluginKernel("experts_combine", kernel, pointers, ("parts_ptr", "weights_ptr"), (), constants, config)


def combine_launch(tokens: Dim, width: int) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Grid and integers of `experts_combine`."""
    return (tokens, -(-width // min(COMBINE_BLOCK, next_power_of_2(width)))), ()


def compile_plugin(plugin: PluginKernel, chip: str) -> CompiledPlugin:
    """PTX for a chip, whose entry takes exactly what TensorRT passes.

    Raises:
        BackendError: the kernel wants memory, scratch or arguments that a plugin does not get.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise BackendError("TRITON_INTERPRET must be unset to compile plugins, got 1; unset it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: plugin.pointers.get(name, "i32") for name in plugin.arguments}
    # in the kernel's own order, which has to be TensorRT's: inputs, integers, outputs, then constants
    signature = {name: "constexpr" if name in plugin.constants else types[name] for name in plugin.kernel.arg_names}
    # TensorRT's buffers are aligned; of integers nothing is known
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind.startswith("*")}
    compiled = triton.compile(
        ASTSource(plugin.kernel, signature, plugin.constants, aligned),
        target=GPUTarget("cuda", capability(chip), 32),
        options={"num_warps": plugin.config.warps, "num_stages": plugin.config.stages},
    )
    metadata = compiled.metadata
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    if metadata.shared > SHARED_BYTES or scratch:
        raise BackendError(
            f"plugin {plugin.name} for {chip} must need at most {SHARED_BYTES} bytes of shared memory and no scratch, it needs "
            f"{metadata.shared} and {scratch}; use the function body"
        )
    entry, ptx = plugin_ptx(compiled.asm["ptx"], len(plugin.arguments), plugin.name)
    return CompiledPlugin(entry, ptx, metadata.num_warps * 32, metadata.shared)


def plugin_ptx(ptx: str, count: int, name: str) -> tuple[str, str]:
    """Entry and PTX with `count` parameters: triton declares two more for scratch memory, which no kernel of ours reads.

    Raises:
        BackendError: one of them is read.
    """
    ptx = DEBUG_SECTIONS.sub("", DEBUG_LINES.sub("", ptx))
    found = ENTRY.search(ptx)
    assert found is not None, ptx[:400]
    declared = [line.strip().rstrip(",") for line in found[2].splitlines()]
    assert len(declared) >= count, found[0]
    for line in declared[count:]:
        parameter = line.split()[-1]
        if re.search(rf"\b{parameter}\b", ptx.replace(found[0], "")):
            raise BackendError(f"plugin {name} must not read scratch memory, it reads {parameter}; use the function body")
    kept = ",\n".join(f"\t{line}" for line in declared[:count])
    return found[1], ptx.replace(found[0], f".visible .entry {found[1]}(\n{kept}\n)")


def capability(chip: str) -> int:
    """89 of "sm_89".

    Raises:
        InputError: a chip that triton does not compile for.
    """
    number = int(chip.removeprefix("sm_")) if chip.removeprefix("sm_").isdigit() else 0
    if divmod(number, 10) not in FAMILIES:
        known = [f"sm_{major}{minor}" for major, minor in FAMILIES]
        raise InputError(f"chip of a plugin must be one of {known}, got {chip!r}; use the function bodies")
    return number


def _family(chip: str) -> str:
    """Where a chip's own configurations want more shared memory than a plugin has, the smallest ones serve."""
    family = FAMILIES[divmod(capability(chip), 10)]
    return SMALL_FAMILY if family in ("sm90", "sm100") else family


def _attention(chip: str, dtype: str, head_dim: int) -> Config:
    return attention_config(_family(chip), TORCH[dtype], sum(split_head(head_dim)))


def _experts(chip: str, dtype: str) -> tuple[Config, Config]:
    return experts_config(_family(chip), TORCH[dtype])


def _experts_constants(config: Config, experts: int, slots: int, width: int, hidden: int, inner: int) -> dict[str, Any]:
    return {
        "NUM_EXPERTS": experts,
        "SLOTS": slots,
        "WIDTH": width,
        "HIDDEN": hidden,
        "EXPERTS": next_power_of_2(experts),
        "EVEN": inner % config.block_k == 0,
        "EXACT": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }


def _experts_kernel(
    name: str, kernel: Any, inputs: Sequence[str], output: str, dtype: str, constants: dict[str, Any], config: Config
) -> PluginKernel:
    integers = ("expert_offsets_ptr", "permutation_ptr")
    pointers = {each: "*i32" if each in integers else f"*{TRITON[dtype]}" for each in (*inputs, output)}
    return PluginKernel(name, kernel, pointers, tuple(inputs), ("row_blocks",), constants, config)

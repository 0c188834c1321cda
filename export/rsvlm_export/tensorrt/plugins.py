# mypy: disable-error-code="valid-type,attr-defined,no-any-return,untyped-decorator"
# the types of the functions below belong to a library that is loaded at run time
"""Registers our kernels with `tensorrt.plugin`: what each plugin takes and gives, and its PTX. Never run: see docs/tensorrt.md.

`tensorrt.plugin` reads annotations as types, so this file must not postpone their evaluation.
"""

import importlib
from typing import Any, Union

from rsvlm_infer.errors import BackendError, InputError, MissingDependencyError

from . import plugin_kernels as kernels

NAMESPACE = "rsvlm"
PLUGINS = ("tile_schedule", "tile_attention", "experts_up", "experts_down", "experts_combine")


def load_plugin_module() -> Any:
    """`tensorrt.plugin` of the full TensorRT, 10.13 or newer.

    Raises:
        MissingDependencyError: it is not installed. BackendError: it is too old to embed kernels. tensorrt-rtx has no such module.
    """
    try:
        module = importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise MissingDependencyError(
            f"plugins need the full TensorRT with tensorrt.plugin ({error}); install tensorrt>=10.13, or use the function bodies"
        ) from None
    if not hasattr(module, "aot_impl"):
        raise BackendError("tensorrt.plugin must have aot_impl to embed kernels, this one has not; install tensorrt>=10.13")
    return module


def register_plugins(trt: Any, trtp: Any, chip: str) -> tuple[str, ...]:
    """Registers all plugins, once per process, for the chip that engines will be built for; their ids.

    trt: the module `tensorrt`. trtp: the module `tensorrt.plugin`.
    """
    kernels.capability(chip)  # a chip that triton does not know is refused before anything is registered
    dtypes = {trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}
    Desc = trtp.TensorDesc
    Result = tuple[Union[str, bytes], Union[str, bytes], trtp.KernelLaunchParams, trtp.SymExprs]  # noqa: UP007 - as TensorRT checks it

    def dtype_of(desc: Any, plugin: str) -> str:
        if desc.dtype not in dtypes:
            raise InputError(f"plugin {plugin} must get half precision, got {desc.dtype}; export with --precision fp16 or bf16")
        return dtypes[desc.dtype]

    def shaped(like: Any, shape: Any, dtype: Any) -> Any:
        desc = like.like()
        desc.shape_expr = trtp.ShapeExprs.from_tuple(shape)
        desc.dtype = dtype
        return desc

    def compiled(plugin: kernels.PluginKernel, launch: Any) -> Any:
        grid, integers = launch
        made = kernels.compile_plugin(plugin, chip)
        params = trtp.KernelLaunchParams()
        for axis, extent in zip(("grid_x", "grid_y", "grid_z"), grid, strict=False):
            setattr(params, axis, extent)
        params.block_x = made.threads
        params.shared_mem = made.shared_bytes
        extra = trtp.SymIntExprs(len(integers))
        for index, value in enumerate(integers):
            extra[index] = trtp.SymInt32(value)
        return made.entry, made.ptx, params, extra

    def block_m(desc: Any, head_dim: int) -> int:
        return int(kernels.tile_schedule(chip, dtype_of(desc, "tile_schedule"), head_dim).constants["BLOCK_M"])

    @trtp.register(f"{NAMESPACE}::tile_schedule")
    def schedule_desc(q: Desc, cu_seqlens: Desc, cu_seqlens_k: Desc, head_dim: int) -> Desc:
        length = kernels.schedule_length(q.shape_expr[0], cu_seqlens.shape_expr[0], block_m(q, head_dim))
        return shaped(cu_seqlens, (length, 4), trt.DataType.INT32)

    @trtp.aot_impl(f"{NAMESPACE}::tile_schedule")
    def schedule_aot(q: Desc, cu_seqlens: Desc, cu_seqlens_k: Desc, head_dim: int, outputs: tuple[Desc], tactic: int) -> Result:
        plugin = kernels.tile_schedule(chip, dtype_of(q, "tile_schedule"), head_dim)
        bounds = cu_seqlens.shape_expr[0]
        return compiled(plugin, kernels.schedule_launch(q.shape_expr[0], bounds, plugin.constants["BLOCK_M"]))

    @trtp.register(f"{NAMESPACE}::tile_attention")
    def attention_desc(q: Desc, k: Desc, v: Desc, schedule: Desc, heads: int, head_dim: int, scale: float) -> Desc:
        return q.like()

    @trtp.aot_impl(f"{NAMESPACE}::tile_attention")
    def attention_aot(
        q: Desc, k: Desc, v: Desc, schedule: Desc, heads: int, head_dim: int, scale: float, outputs: tuple[Desc], tactic: int
    ) -> Result:
        plugin = kernels.tile_attention(chip, dtype_of(q, "tile_attention"), heads, head_dim, scale)
        return compiled(plugin, kernels.attention_launch(schedule.shape_expr[0], heads))

    @trtp.register(f"{NAMESPACE}::experts_up")
    def up_desc(
        x: Desc,
        w_gate: Desc,
        w_up: Desc,
        expert_offsets: Desc,
        permutation: Desc,
        experts: int,
        slots: int,
        width: int,
        hidden: int,
    ) -> Desc:
        return shaped(x, (permutation.shape_expr[0], hidden), x.dtype)

    @trtp.aot_impl(f"{NAMESPACE}::experts_up")
    def up_aot(
        x: Desc,
        w_gate: Desc,
        w_up: Desc,
        expert_offsets: Desc,
        permutation: Desc,
        experts: int,
        slots: int,
        width: int,
        hidden: int,
        outputs: tuple[Desc],
        tactic: int,
    ) -> Result:
        plugin = kernels.experts_up(chip, dtype_of(x, "experts_up"), experts, slots, width, hidden)
        return compiled(plugin, kernels.experts_launch(permutation.shape_expr[0], experts, hidden, plugin.config))

    @trtp.register(f"{NAMESPACE}::experts_down")
    def down_desc(
        rows: Desc, w_down: Desc, expert_offsets: Desc, permutation: Desc, experts: int, slots: int, width: int, hidden: int
    ) -> Desc:
        return shaped(rows, (permutation.shape_expr[0], width), rows.dtype)

    @trtp.aot_impl(f"{NAMESPACE}::experts_down")
    def down_aot(
        rows: Desc,
        w_down: Desc,
        expert_offsets: Desc,
        permutation: Desc,
        experts: int,
        slots: int,
        width: int,
        hidden: int,
        outputs: tuple[Desc],
        tactic: int,
    ) -> Result:
        plugin = kernels.experts_down(chip, dtype_of(rows, "experts_down"), experts, slots, width, hidden)
        return compiled(plugin, kernels.experts_launch(permutation.shape_expr[0], experts, width, plugin.config))

    @trtp.register(f"{NAMESPACE}::experts_combine")
    def combine_desc(parts: Desc, weights: Desc, slots: int, width: int) -> Desc:
        return shaped(parts, (weights.shape_expr[0], width), parts.dtype)

    @trtp.aot_impl(f"{NAMESPACE}::experts_combine")
    def combine_aot(parts: Desc, weights: Desc, slots: int, width: int, outputs: tuple[Desc], tactic: int) -> Result:
        plugin = kernels.experts_combine(dtype_of(parts, "experts_combine"), slots, width)
        return compiled(plugin, kernels.combine_launch(weights.shape_expr[0], width))

    return tuple(f"{NAMESPACE}::{name}" for name in PLUGINS)

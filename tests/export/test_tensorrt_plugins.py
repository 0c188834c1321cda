"""Plugins as far as they can be shown without the full TensorRT: PTX, launches, signatures, and nodes that match them.

`Registry` keeps the rules that `tensorrt.plugin` checks (10.13): typed arguments, tensors first, then attributes; the same for the
ahead-of-time function, followed by outputs and tactic; entry, PTX, launch and integers come back.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.export.packages import CONFIGS  # skips without torch, onnx, onnxruntime

# isort: split
from rsvlm_export.onnx import plugin_functions
from rsvlm_export.tensorrt import plugin_kernels, plugins
from rsvlm_export.tensorrt.plugin_kernels import SHARED_BYTES, PluginKernel, compile_plugin, plugin_ptx
from rsvlm_infer.errors import BackendError, CheckpointError, InputError, MissingDependencyError
from rsvlm_infer.hardware import library_version

needs_compiler = pytest.mark.skipif(
    library_version("triton") is None or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
    reason="triton is not installed, or interprets",
)
HEADS, HEAD_DIM, EXPERTS, SLOTS, WIDTH, HIDDEN = 6, 64, 12, 2, 384, 256  # the default checkpoint's


class Desc:
    """A tensor with symbolic sides; here they are numbers."""

    def __init__(self, *shape: int, dtype: str = "half") -> None:
        self.shape_expr: Any = list(shape)
        self.dtype = dtype

    def like(self) -> Desc:
        return Desc(*self.shape_expr, dtype=self.dtype)


class Launch:
    grid_x: Any = 1
    grid_y: Any = 1
    block_x = shared_mem = 0


class Exprs(list[Any]):
    """As long as it was made."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Shapes:
    @staticmethod
    def from_tuple(shape: tuple[Any, ...]) -> list[Any]:
        return list(shape)


class Registry:
    """Stands for `tensorrt.plugin`."""

    TensorDesc, KernelLaunchParams, SymExprs, SymIntExprs, ShapeExprs = Desc, Launch, Exprs, Exprs, Shapes

    def __init__(self) -> None:
        self.described: dict[str, Callable[..., Any]] = {}
        self.embedded: dict[str, Callable[..., Any]] = {}

    @staticmethod
    def SymInt32(value: Any) -> Any:
        return value

    def register(self, name: str) -> Callable[[Any], Any]:
        def keep(function: Any) -> Any:
            assert name not in self.described
            kinds = [each.annotation for each in inspect.signature(function).parameters.values()]
            tensors = [kind is Desc for kind in kinds]
            assert tensors[0]
            assert tensors == sorted(tensors, reverse=True), "tensors come first"
            assert set(kinds) <= {Desc, int, float, bool, str, bytes}
            assert inspect.signature(function).return_annotation is Desc
            self.described[name] = function
            return function

        return keep

    def aot_impl(self, name: str) -> Callable[[Any], Any]:
        def keep(function: Any) -> Any:
            signature = inspect.signature(function)
            assert list(signature.parameters) == [*inspect.signature(self.described[name]).parameters, "outputs", "tactic"]
            for each, parameter in inspect.signature(self.described[name]).parameters.items():
                assert signature.parameters[each].annotation is parameter.annotation
            entry, ptx, launch, integers = typing.get_args(signature.return_annotation)
            assert set(typing.get_args(entry)) == set(typing.get_args(ptx)) == {str, bytes}
            assert (launch, integers) == (Launch, Exprs)
            self.embedded[name] = function
            return function

        return keep


TRT = SimpleNamespace(DataType=SimpleNamespace(HALF="half", BF16="bf16", INT32="int32"))


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    ids = plugins.register_plugins(TRT, made, "sm_89")
    assert set(ids) == set(made.described) == set(made.embedded)
    return made


def shipped(chip: str, dtype: str = "float16") -> list[PluginKernel]:
    return [
        plugin_kernels.tile_schedule(chip, dtype, HEAD_DIM),
        plugin_kernels.tile_attention(chip, dtype, HEADS, HEAD_DIM, HEAD_DIM**-0.5),
        plugin_kernels.experts_up(chip, dtype, EXPERTS, SLOTS, WIDTH, HIDDEN),
        plugin_kernels.experts_down(chip, dtype, EXPERTS, SLOTS, WIDTH, HIDDEN),
        plugin_kernels.experts_combine(dtype, SLOTS, WIDTH),
    ]


@needs_compiler
@pytest.mark.parametrize("chip", ["sm_89", "sm_90", "sm_120"])
def test_ptx_takes_what_tensorrt_passes_and_assembles(chip: str, tmp_path: Path) -> None:
    import triton

    for plugin in shipped(chip):
        made = compile_plugin(plugin, chip)
        declared = re.search(rf"\.visible \.entry {made.entry}\(\n(.*?)\n\)", made.ptx, re.DOTALL)
        assert declared is not None
        kinds = ["u64" if name in plugin.pointers else "u32" for name in plugin.arguments]
        assert re.findall(r"\.param \.(\w+)", declared[1]) == kinds, plugin.name
        assert f".target sm_{chip.removeprefix('sm_')}" in made.ptx
        assert re.findall(r"\.reqntid (\d+)", made.ptx) == [str(made.threads)]
        assert made.shared_bytes <= SHARED_BYTES
        assert ".py" not in made.ptx  # no names of files of this machine
        source = tmp_path / f"{plugin.name}.ptx"
        source.write_text(made.ptx)
        assembler = "ptxas-blackwell" if chip == "sm_120" else "ptxas"
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / assembler
        target = re.search(r"^\.target\s+(\w+)", made.ptx, re.MULTILINE)
        assert target is not None
        done = subprocess.run(
            [tool, f"-arch={target[1]}", source, "-o", tmp_path / "out.cubin"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_parameters_that_tensorrt_does_not_pass_must_not_be_read() -> None:
    head = ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{\n"
    entry, ptx = plugin_ptx(head + "ld.param.u64 %r, [k_param_0];\n}", 1, "k")
    assert (entry, "k_param_1" in ptx, "k_param_0]" in ptx) == ("k", False, True)
    with pytest.raises(BackendError, match="plugin k must not read scratch memory, it reads k_param_1"):
        plugin_ptx(head + "ld.param.u64 %r, [k_param_1];\n}", 1, "k")


def test_shapes_of_outputs(registry: Registry) -> None:
    q, bounds = Desc(2048, HEADS, HEAD_DIM), Desc(21, dtype="int32")
    schedule = registry.described["rsvlm::tile_schedule"](q, bounds, bounds, HEAD_DIM)
    assert (schedule.shape_expr, schedule.dtype) == ([(2048 + 20 * 63) // 64, 4], "int32")
    out = registry.described["rsvlm::tile_attention"](q, q, q, schedule, HEADS, HEAD_DIM, 0.125)
    assert (out.shape_expr, out.dtype) == ([2048, HEADS, HEAD_DIM], "half")
    sizes = (EXPERTS, SLOTS, WIDTH, HIDDEN)
    x, permutation, weights = Desc(6144, WIDTH), Desc(12288, dtype="int32"), Desc(6144, 2, dtype="float")
    matrices = Desc(EXPERTS, HIDDEN, WIDTH)
    rows = registry.described["rsvlm::experts_up"](x, matrices, matrices, bounds, permutation, *sizes)
    assert (rows.shape_expr, rows.dtype) == ([12288, HIDDEN], "half")
    parts = registry.described["rsvlm::experts_down"](rows, matrices, bounds, permutation, *sizes)
    assert parts.shape_expr == [12288, WIDTH]
    assert registry.described["rsvlm::experts_combine"](parts, weights, SLOTS, WIDTH).shape_expr == [6144, WIDTH]
    with pytest.raises(InputError, match="plugin tile_schedule must get half precision, got float"):
        registry.described["rsvlm::tile_schedule"](Desc(4, 1, 16, dtype="float"), bounds, bounds, 16)


@needs_compiler
def test_launches(registry: Registry) -> None:
    """Grid, threads, shared memory and integers that go into an engine."""
    q, bounds, schedule = Desc(2048, HEADS, HEAD_DIM), Desc(21, dtype="int32"), Desc(51, 4, dtype="int32")
    entry, ptx, launch, integers = registry.embedded["rsvlm::tile_schedule"](q, bounds, bounds, HEAD_DIM, (schedule,), 0)
    assert (entry, launch.grid_x, launch.block_x, integers) == ("tile_schedule", 1, 128, [20, 51])
    assert f".entry {entry}(" in ptx
    entry, _, launch, integers = registry.embedded["rsvlm::tile_attention"](q, q, q, schedule, HEADS, HEAD_DIM, 0.125, (q,), 0)
    assert (entry, launch.grid_x, launch.block_x, integers) == ("tile_attention", 51 * HEADS, 128, [])
    sizes, permutation = (EXPERTS, SLOTS, WIDTH, HIDDEN), Desc(12288, dtype="int32")
    x, matrices = Desc(6144, WIDTH), Desc(EXPERTS, HIDDEN, WIDTH)
    row_blocks = (12288 + EXPERTS * 63) // 64
    _, _, launch, integers = registry.embedded["rsvlm::experts_up"](x, matrices, matrices, bounds, permutation, *sizes, (x,), 0)
    assert (launch.grid_x, integers) == (row_blocks * HIDDEN // 64, [row_blocks])
    _, _, launch, integers = registry.embedded["rsvlm::experts_down"](x, matrices, bounds, permutation, *sizes, (x,), 0)
    assert (launch.grid_x, integers) == (row_blocks * WIDTH // 128, [row_blocks])
    weights = Desc(6144, 2, dtype="float")
    _, _, launch, integers = registry.embedded["rsvlm::experts_combine"](x, weights, SLOTS, WIDTH, (x,), 0)
    assert (launch.grid_x, launch.grid_y, integers) == (6144, 1, [])


def test_nodes_have_the_inputs_and_attributes_that_are_registered(registry: Registry) -> None:
    experts = CONFIGS["full"].experts
    assert experts is not None
    bodies = [plugin_functions.varlen_tile_attention(HEADS, HEAD_DIM), plugin_functions.grouped_experts(experts, WIDTH)]
    nodes = [node for body in bodies for node in body.node if node.domain == "rsvlm"]
    assert [f"rsvlm::{node.op_type}" for node in nodes] == list(registry.described)
    kinds = {1: float, 2: int}  # onnx's numbers of attribute types
    for node in nodes:
        parameters = inspect.signature(registry.described[f"rsvlm::{node.op_type}"]).parameters
        tensors = [name for name, each in parameters.items() if each.annotation is Desc]
        assert len(node.input) == len(tensors), node.op_type
        attributes = {each.name: each for each in node.attribute}
        assert attributes.pop("plugin_namespace").s == b"rsvlm"
        assert attributes.pop("plugin_version").s == b"1"
        wanted = {name: each.annotation for name, each in parameters.items() if name not in tensors}
        assert {name: kinds[each.type] for name, each in attributes.items()} == wanted, node.op_type


def test_other_kinds_of_experts_have_no_plugin() -> None:
    affine = CONFIGS["affine"].experts
    assert affine is not None
    with pytest.raises(CheckpointError, match=r"experts.kind must be 'glu_silu' for plugins, got 'affine'"):
        plugin_functions.grouped_experts(affine, WIDTH)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"chip of a plugin must be one of .* got 'sm_75'; use the function bodies"):
        plugins.register_plugins(TRT, Registry(), "sm_75")
    with pytest.raises(InputError, match=r"scale of tile_attention must be positive, got -1.0"):
        plugin_kernels.tile_attention("sm_89", "float16", 1, 16, -1.0)
    monkeypatch.setattr(plugin_kernels, "SHARED_BYTES", 1)
    if library_version("triton") is not None and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        with pytest.raises(BackendError, match=r"plugin tile_schedule for sm_89 must need at most 1 bytes of shared memory"):
            compile_plugin(plugin_kernels.tile_schedule("sm_89", "float16", 16), "sm_89")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="TRITON_INTERPRET must be unset"):
        compile_plugin(plugin_kernels.tile_schedule("sm_89", "float16", 16), "sm_89")


def test_without_the_full_tensorrt_the_function_bodies_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(plugins.importlib, "import_module", absent)
    with pytest.raises(MissingDependencyError, match=r"install tensorrt>=10.13, or use the function bodies"):
        plugins.load_plugin_module()
    monkeypatch.setattr(plugins.importlib, "import_module", lambda name: SimpleNamespace(register=None))
    with pytest.raises(BackendError, match=r"must have aot_impl to embed kernels"):
        plugins.load_plugin_module()

"""The CUDA backend without a CUDA device: why it cannot run, and its step with eager ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rsvlm_infer.backends import BACKENDS, GreedyBackend, Prompt, cuda, load_backend, why_not
from rsvlm_infer.backends.cuda import CudaBackend
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.config import LanguageConfig, PreprocessConfig, ProjectorConfig, RsvlmConfig, VisionConfig
from rsvlm_infer.engine import Engine, Request
from rsvlm_infer.errors import BackendError, InputError, MissingDependencyError
from rsvlm_infer.layers.language_model import KvCache
from rsvlm_infer.layers.packed_linear import PackedLinear
from rsvlm_infer.models.checkpoint import save_checkpoint
from rsvlm_infer.models.rsvlm import RsvlmModel
from rsvlm_infer.ops.registry import OPS

CONFIG = RsvlmConfig(
    vision=VisionConfig("dinov2", 24, 48, 3, 2, 4, 5, (1, 2, 3), "gelu", "bicubic", 1e-6, True, False, True, True),
    preprocess=PreprocessConfig(tile_px=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    language=LanguageConfig("llama", 60, 32, 64, 2, 4, 2, 8, 1e-5, 1e4, 512, False, True),
    projector=ProjectorConfig(40, pixel_shuffle=2, input_norm=True, box_embedding=True),
    tiling="dris",
)


def test_auto_prefers_eager_and_a_named_backend_says_why_not() -> None:
    assert next(iter(BACKENDS)) == "eager"
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert why_not("cuda") == "no CUDA device is visible to torch"
    with pytest.raises(MissingDependencyError, match="backend 'cuda' cannot run here: no CUDA device"):
        load_backend("absent", "cuda")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integer_precisions_pack_the_language_layers_and_nothing_else(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "triton_ops", frozenset)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)  # there is no CUDA device to go to
    torch.manual_seed(0)
    folder = save_checkpoint(tmp_path / "model", CONFIG, RsvlmModel(CONFIG).state_dict())
    backend, wide = CudaBackend.load(folder, kind), CudaBackend.load(folder, "bfloat16")
    assert (backend.precision, BACKENDS["cuda"][-2:]) == (kind, ("int8", "int4"))
    language = backend.model.language_model
    assert language is not None
    packed = {name for name, module in backend.model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == {
        f"language_model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert {parameter.dtype for parameter in backend.model.parameters()} == {torch.bfloat16}
    prompt, tokens = Prompt(np.array([3, 4, 5], np.int32)), np.array([6], np.int32)
    (actual, cache), (expected, wide_cache) = backend.prefill([prompt], 5), wide.prefill([prompt], 5)
    # the widest rounding of a weight is half a step of its group's largest: 1/14 for int4, 1/254 for int8
    for left, right in ((actual, expected), (backend.decode(cache, tokens), wide.decode(wide_cache, tokens))):
        assert 0 < np.abs(left - right).max() < (0.5 if kind == "int4" else 0.05) * np.abs(right).max()


def _never(*arguments: object) -> None:
    raise AssertionError("no logits may be asked for")


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> tuple[EagerBackend, CudaBackend]:
    """One random model in both, on the CPU with eager ops."""
    monkeypatch.setattr(cuda, "triton_ops", frozenset)
    torch.manual_seed(0)
    model = RsvlmModel(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return EagerBackend(model), CudaBackend(model)


def test_the_step_with_eager_ops_equals_the_language_model(backends: tuple[EagerBackend, CudaBackend]) -> None:
    eager, stepped = backends
    prompts = [Prompt(np.array([3, 4, 5], np.int32)), Prompt(np.array([7], np.int32))]
    (expected, eager_cache), (actual, cache) = eager.prefill(prompts, 6), stepped.prefill(prompts, 6)
    np.testing.assert_array_equal(actual, expected)
    for _ in range(3):
        tokens = expected.argmax(axis=1).astype(np.int32)
        expected, actual = eager.decode(eager_cache, tokens), stepped.decode(cache, tokens)
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="holds 6 tokens a row and is full"):
        stepped.decode(cache, tokens)
    with pytest.raises(InputError, match="must come from this backend's prefill"):
        stepped.decode(KvCache(cache.keys, cache.values, cache.lengths), tokens)


def test_the_engine_gets_the_same_tokens_chosen_by_the_backend(
    backends: tuple[EagerBackend, CudaBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        Request(np.array([3, 4, 5], np.int32), max_new_tokens=6),
        Request(np.array([7], np.int32), max_new_tokens=3),
        Request(np.array([9, 8], np.int32), max_new_tokens=9, stop_ids=tuple(range(0, 60, 7))),
    ]
    found = []
    for backend in backends:
        assert isinstance(backend, GreedyBackend) == (backend is backends[1])
        if backend is backends[1]:
            monkeypatch.setattr(CudaBackend, "decode", _never)  # logits stay on the device
        events = list(Engine(backend, max_batch=2).generate(requests))
        found.append([(event.request_index, event.token_id, event.finish_reason) for event in events])
    assert found[0] == found[1]
    assert len(found[0]) > 9


def test_several_steps_at_once_are_the_same_steps(backends: tuple[EagerBackend, CudaBackend]) -> None:
    _, backend = backends
    prompts = [Prompt(np.array([3, 4, 5], np.int32)), Prompt(np.array([7], np.int32))]
    (logits, one), (_, many) = backend.prefill(prompts, 9), backend.prefill(prompts, 9)
    tokens = logits.argmax(axis=1).astype(np.int32)
    expected = []
    for _ in range(4):
        expected.append(backend.decode_greedy(one, expected[-1] if expected else tokens, 1)[:, 0])
    np.testing.assert_array_equal(backend.decode_greedy(many, tokens, 4), np.stack(expected, axis=1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_best_logit_that_is_not_finite_is_refused(backends: tuple[EagerBackend, CudaBackend], bad: float) -> None:
    _, backend = backends
    _, cache = backend.prefill([Prompt(np.array([3], np.int32))], 4)
    assert backend.model.language_model is not None
    with torch.no_grad():
        backend.model.language_model.embed_tokens.weight[5] = bad
    with pytest.raises(BackendError, match="logits must be finite"):
        backend.decode_greedy(cache, np.array([4], np.int32), 2)


def test_each_op_falls_back_by_itself_and_a_reason_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reasons = {"rope": "too old", "rms_norm": "too old", "route": "too narrow"}
    monkeypatch.setattr(cuda, "op_why_not", lambda op, implementation: reasons.get(op))
    cuda.triton_ops.cache_clear()
    try:
        assert cuda.triton_ops() == cuda.triton_ops() == {op for op in OPS if "triton" in OPS[op]} - set(reasons)
        assert cuda._fused_ops() == (cuda._add_norm, cuda._append)
    finally:
        cuda.triton_ops.cache_clear()
    assert [record.getMessage() for record in caplog.records if record.name == cuda.__name__] == [
        "cuda backend: Triton kernels of route cannot run here (too narrow), using eager",
        "cuda backend: Triton kernels of rms_norm, rope cannot run here (too old), using eager",
    ]

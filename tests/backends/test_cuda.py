"""The CUDA backend without a CUDA device: why it cannot run, and its step with eager ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsvlm_infer.backends import BACKENDS, Prompt, cuda, load_backend, why_not
from rsvlm_infer.backends.cuda import CudaBackend
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.config import LanguageConfig, PreprocessConfig, ProjectorConfig, RsvlmConfig, VisionConfig
from rsvlm_infer.errors import InputError, MissingDependencyError
from rsvlm_infer.layers.language_model import KvCache
from rsvlm_infer.models.rsvlm import RsvlmModel

CONFIG = RsvlmConfig(
    vision=VisionConfig("dinov2", 24, 48, 3, 2, 4, 5, (1, 2, 3), "gelu", "bicubic", 1e-6, True, False, True, True),
    preprocess=PreprocessConfig(tile_px=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    language=LanguageConfig("llama", 60, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 512, False, True),
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


def test_the_step_with_eager_ops_equals_the_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "implementation", lambda: "eager")
    torch.manual_seed(0)
    model = RsvlmModel(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    eager, stepped = EagerBackend(model), CudaBackend(model)
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


def test_ops_fall_back_to_eager_with_a_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cuda, "triton_why_not", lambda: "triton is not installed")
    cuda.implementation.cache_clear()
    try:
        assert cuda.implementation() == cuda.implementation() == "eager"
    finally:
        cuda.implementation.cache_clear()
    assert caplog.text.count("Triton kernels cannot run here (triton is not installed)") == 1

"""The CUDA backend's arithmetic with Triton ops, in the interpreter or on a GPU, against the eager backend on the CPU."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from rsvlm_infer.backends import Prompt
from rsvlm_infer.backends.cuda import CudaBackend
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.config import ExpertsConfig, LanguageConfig, PreprocessConfig, ProjectorConfig, RsvlmConfig, VisionConfig
from rsvlm_infer.engine import Engine, Request
from rsvlm_infer.errors import InputError
from rsvlm_infer.imagery.pack import pack_scene
from rsvlm_infer.imagery.plan import plan_scene
from rsvlm_infer.imagery.source import open_scene
from rsvlm_infer.layers.packed_linear import FEW_ROWS, pack_linears
from rsvlm_infer.models.rsvlm import RsvlmModel

IMAGE = -200
CONFIG = RsvlmConfig(
    vision=VisionConfig("dinov2", 24, 48, 3, 2, 4, 5, (1, 2, 3), "gelu", "bicubic", 1e-6, True, False, True, True),
    preprocess=PreprocessConfig(tile_px=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    language=LanguageConfig("llama", 60, 32, 64, 2, 4, 2, 8, 1e-5, 1e4, 512, False, True),
    projector=ProjectorConfig(40, pixel_shuffle=2, input_norm=True, box_embedding=True),
    experts=ExpertsConfig(num_experts=6, top_k=2, intermediate_size=20),
    tiling="dris",
)


def _model(implementation: str) -> RsvlmModel:
    torch.manual_seed(0)
    model = RsvlmModel(CONFIG, implementation)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


@pytest.fixture
def backends(device: torch.device) -> tuple[EagerBackend, CudaBackend]:
    return EagerBackend(_model("eager")), CudaBackend(_model("triton").to(device))


def _prompts(backend: EagerBackend) -> list[Prompt]:
    pixels = np.random.default_rng(0).integers(0, 256, (34, 40, 3), dtype=np.uint8)
    with open_scene(pixels) as scene:
        packed = pack_scene(scene, plan_scene(34, 40, CONFIG), CONFIG)
    image = backend.encode([packed])[0]
    with_image = Prompt(np.array([1, *[IMAGE] * image.num_tokens, 5, 6], np.int32), (image,))
    return [with_image, Prompt(np.array([3, 4, 5], np.int32))]


def test_prefill_steps_and_fewer_rows_equal_eager(backends: tuple[EagerBackend, CudaBackend]) -> None:
    (eager, cuda), states = backends, []
    for backend in backends:
        prompts = _prompts(backend)
        states.append(backend.prefill(prompts, prompts[0].token_ids.size + 6))
    (expected, eager_cache), (actual, cuda_cache) = states
    np.testing.assert_allclose(actual, expected, atol=2e-4, rtol=2e-4)
    for _ in range(2):
        tokens = expected.argmax(axis=1).astype(np.int32)
        expected, actual = eager.decode(eager_cache, tokens), cuda.decode(cuda_cache, tokens)
        np.testing.assert_allclose(actual, expected, atol=2e-4, rtol=2e-4)
    eager_cache, cuda_cache = eager.keep(eager_cache, [1]), cuda.keep(cuda_cache, [1])
    tokens = expected[1:].argmax(axis=1).astype(np.int32)
    np.testing.assert_allclose(cuda.decode(cuda_cache, tokens), eager.decode(eager_cache, tokens), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_weights_equal_their_values_in_float32(kind: Literal["int8", "int4"], device: torch.device) -> None:
    """Prefill unpacks them, a step multiplies codes; the eager backend holds what the codes stand for."""
    models = [_model("eager"), _model("triton").to(device)]
    for model, implementation in zip(models, ("eager", "triton"), strict=True):
        assert model.language_model is not None
        pack_linears(model.language_model.layers, kind, implementation)
    eager, cuda = EagerBackend(models[0]), CudaBackend(models[1])
    prompt = Prompt(np.arange(3, 3 + FEW_ROWS + 1, dtype=np.int32))
    (expected, eager_cache), (actual, cache) = eager.prefill([prompt], 24), cuda.prefill([prompt], 24)
    np.testing.assert_allclose(actual, expected, atol=2e-4, rtol=2e-4)
    for _ in range(2):
        tokens = expected.argmax(axis=1).astype(np.int32)
        expected, actual = eager.decode(eager_cache, tokens), cuda.decode(cache, tokens)
        np.testing.assert_allclose(actual, expected, atol=2e-4, rtol=2e-4)


def test_the_engine_gets_the_same_tokens_from_both(backends: tuple[EagerBackend, CudaBackend]) -> None:
    found = []
    for backend in backends:
        with_image, plain = _prompts(backend)
        requests = [
            Request(with_image.token_ids, with_image.images, max_new_tokens=3),
            Request(plain.token_ids, max_new_tokens=4),
        ]
        events = list(Engine(backend).generate(requests))
        found.append([(event.request_index, event.token_id, event.finish_reason) for event in events])
    assert found[0] == found[1]


def test_greedy_on_the_device_equals_greedy_on_the_host(backends: tuple[EagerBackend, CudaBackend]) -> None:
    eager, cuda = backends
    prompt = Prompt(np.array([3, 4, 5], np.int32))
    logits, cache = eager.prefill([prompt], 8)
    expected = []
    first = tokens = logits.argmax(axis=1).astype(np.int32)
    for _ in range(4):
        tokens = eager.decode(cache, tokens).argmax(axis=1).astype(np.int32)
        expected.append(int(tokens[0]))
    _, cuda_cache = cuda.prefill([prompt], 8)
    assert cuda.decode_greedy(cuda_cache, first, 4).tolist() == [expected]
    assert cuda_cache.lengths.tolist() == [7]
    with pytest.raises(InputError, match="holds 8 tokens a row and is full"):
        cuda.decode_greedy(cuda_cache, first, 2)

"""A request's tokens do not depend on its neighbours; the order and the grouping of tiles change nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import rsvlm_infer.backends.eager as eager
from rsvlm_infer.backends.base import Prompt
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.imagery.pack import PackedScene
from tests.proof.tiny_models import llava, our_greedy, packed, picture, prompt_ids, relative_error, torch

SIZES = [(56, 56), (70, 131), (150, 60), (300, 200)]


@pytest.mark.parametrize("tiling", ["fixed", "anyres", "dris"])
def test_a_batch_gives_each_request_the_tokens_it_gets_alone(tmp_path: Path, tiling: str) -> None:
    llava(tmp_path, anyres=tiling == "anyres")
    backend = EagerBackend.load(tmp_path, "float32")
    scenes = [packed(picture(*size, seed), backend.config, tiling=tiling) for seed, size in enumerate(SIZES)]
    together = backend.encode(scenes)
    alone = [backend.encode([scene])[0] for scene in scenes]
    for one, batched in zip(alone, together, strict=True):
        assert relative_error(batched.handle.tokens.numpy(), one.handle.tokens.numpy()) < 1e-5
    lengths = [3, 12, 7, 5]
    prompts = [Prompt(prompt_ids(n, f.num_tokens, seed=n), (f,)) for n, f in zip(lengths, together, strict=True)]
    prompts.append(Prompt(prompt_ids(9, 0), ()))  # and one without a picture
    prompts.append(
        Prompt(np.concatenate([prompts[0].token_ids, prompts[2].token_ids]), (together[0], together[2]))
    )  # one with two
    expected = [our_greedy(backend, [prompt], 8)[0] for prompt in prompts]
    assert our_greedy(backend, prompts, 8) == expected
    assert our_greedy(backend, prompts[::-1], 8) == expected[::-1]
    assert len({tuple(tokens) for tokens in expected}) > 1  # they are not all the same answer


def test_a_batch_of_unlike_prompts_gives_the_same_logits(tmp_path: Path) -> None:
    llava(tmp_path, language="qwen2")
    backend = EagerBackend.load(tmp_path, "float32")
    prompts = [Prompt(prompt_ids(length, 0, seed=length)) for length in (2, 31, 7)]
    logits, _ = backend.prefill(prompts, 40)
    for row, prompt in enumerate(prompts):
        assert relative_error(logits[row], backend.prefill([prompt], 40)[0][0]) < 1e-5


def _reordered(scene: PackedScene, order: list[int]) -> PackedScene:
    bounds = scene.cu_seqlens
    return dataclasses.replace(
        scene,
        patches=np.concatenate([scene.patches[bounds[tile] : bounds[tile + 1]] for tile in order]),
        cu_seqlens=np.concatenate([[0], np.cumsum(np.diff(bounds)[order])]).astype(np.int32),
        grids=scene.grids[order],
        boxes=scene.boxes[order],
    )


def test_tiles_permuted(tmp_path: Path) -> None:
    """Permuting the tiles permutes their visual tokens and changes none of them."""
    llava(tmp_path)
    backend = EagerBackend.load(tmp_path, "float32")
    scene = packed(picture(300, 200), backend.config, tiling="dris")
    tiles = len(scene.grids)
    assert tiles > 3
    assert len({tuple(grid) for grid in scene.grids.tolist()}) > 1  # unlike lengths
    order = np.random.default_rng(0).permutation(tiles).tolist()
    lengths = np.diff(scene.cu_seqlens)
    before = backend.encode([scene])[0].handle.tokens.split(lengths.tolist())
    after = backend.encode([_reordered(scene, order)])[0].handle.tokens.split(lengths[order].tolist())
    for place, tile in enumerate(order):
        assert relative_error(after[place].numpy(), before[tile].numpy()) < 1e-5


@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_attention_chunked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Encoding tiles in several groups gives what one group gives."""
    llava(tmp_path)
    backend = EagerBackend.load(tmp_path, "float32")
    scenes = [packed(picture(300, 200), backend.config, tiling="dris"), packed(picture(56, 80), backend.config)]
    whole = backend.encode(scenes)
    monkeypatch.setattr(eager, "CHUNK_PATCHES", chunk)
    for one, other in zip(whole, backend.encode(scenes), strict=True):
        assert relative_error(other.handle.tokens.numpy(), one.handle.tokens.numpy()) < 1e-5


def test_decode_equals_prefill(tmp_path: Path) -> None:
    """Feeding tokens one by one through the cache gives the logits of feeding them at once."""
    llava(tmp_path)
    backend = EagerBackend.load(tmp_path, "float32")
    ids = prompt_ids(12, 0)
    logits, cache = backend.prefill([Prompt(ids[:4]), Prompt(ids[:1])], 12)
    for step in range(8):
        logits = backend.decode(cache, np.array([ids[4 + step], ids[1 + step]], np.int32))
    whole, _ = backend.prefill([Prompt(ids), Prompt(ids[:9])], 12)
    assert relative_error(logits, whole) < 1e-5
    kept = backend.keep(cache, [1])
    assert kept.lengths.tolist() == [9]
    again = backend.decode(kept, ids[9:10])
    assert relative_error(again, backend.prefill([Prompt(ids[:10])], 12)[0]) < 1e-5


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    llava(tmp_path)
    exact, rough = EagerBackend.load(tmp_path, "float32"), EagerBackend.load(tmp_path, "bfloat16")
    prompt = Prompt(prompt_ids(12, 0))
    error = relative_error(rough.prefill([prompt], 12)[0], exact.prefill([prompt], 12)[0])
    assert 0 < error < 0.1  # 8 bits of mantissa through two layers
    assert rough.model.language_model is not None
    assert rough.model.language_model.embed_tokens.weight.dtype == torch.bfloat16

"""The KV cache of the native decoder: any element beside any weights, and never the cache of another model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.models.native_package import NativePackage
from tests.native import INSTRUCTION_SETS, limited_to, needs_native

pytest.importorskip("torch", reason="packages are made with torch")

from tests.backends.native_packages import CONFIG, write_package

pytestmark = needs_native

LANGUAGE = dataclasses.replace(CONFIG.language, hidden_size=64, intermediate_size=96, head_dim=16)
PROMPT = np.arange(3, 60, dtype=np.int32)


def make_decoder(folder: Path, precision: str, cache: str, **language: Any) -> Any:
    from rsvlm_infer import _C

    shape = dataclasses.replace(LANGUAGE, **language)
    folder.mkdir()
    package = NativePackage.open(write_package(folder, dataclasses.replace(CONFIG, language=shape), precision)[1])
    exponent = np.arange(shape.head_dim // 2, dtype=np.float32) * 2 / shape.head_dim
    return _C.NativeDecoder(
        weights=package.weights,
        settings={name: float(value) for name, value in dataclasses.asdict(shape).items() if not isinstance(value, str)},
        frequencies=(1 / shape.rope_theta**exponent).astype(np.float32),
        cache=cache,
        int8_inputs=package.int8_inputs,
    )


def read(decoder: Any, cache: Any) -> np.ndarray:
    """The logits after PROMPT and one more token."""
    decoder.prefill(
        cache=cache,
        rows=np.zeros(1, np.int64),
        positions=np.zeros(1, np.int64),
        lengths=np.array([len(PROMPT)]),
        embeddings=decoder.embed(token_ids=PROMPT),
    )
    return step(decoder, cache)


def step(decoder: Any, cache: Any) -> np.ndarray:
    logits: np.ndarray = decoder.decode(
        cache=cache, rows=np.zeros(1, np.int64), positions=np.array([len(PROMPT)]), token_ids=np.array([7], np.int32)
    )
    return logits


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_float32_cache_goes_with_integer_weights(tmp_path: Path, precision: str) -> None:
    found = {}
    for element in ("float32", "bfloat16"):
        decoder = make_decoder(tmp_path / element, precision, element)
        for isa in INSTRUCTION_SETS:
            with limited_to(isa):
                found[element, isa] = read(decoder, decoder.cache(rows=1, capacity=len(PROMPT) + 1))
    for isa in INSTRUCTION_SETS:
        exact, rounded = found["float32", isa], found["bfloat16", isa]
        assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()  # keys and values to 8 bits
        # float32 sums in another order; avx512_bf16 rounds the rows of prompts too
        np.testing.assert_allclose(
            exact, found["float32", "portable"], atol=(0.1 if isa == "avx512_bf16" else 2e-5) * np.abs(exact).max()
        )


@pytest.mark.parametrize(
    ("element", "other"),
    [
        ("float32", {"num_layers": 1}),
        ("float32", {"num_kv_heads": 1}),
        ("float32", {"head_dim": 8}),
        ("bfloat16", {}),
    ],
)
def test_a_cache_of_another_decoder_is_refused(tmp_path: Path, element: str, other: dict[str, int]) -> None:
    decoder = make_decoder(tmp_path / "own", "int8", "float32")
    foreign = make_decoder(tmp_path / "other", "int8", element, **other).cache(rows=1, capacity=len(PROMPT) + 1)
    for use in (read, step):
        with pytest.raises(
            ValueError, match=r"cache must be of this model and of its element, .*; make it with this decoder's"
        ):
            use(decoder, foreign)
    assert np.isfinite(read(decoder, decoder.cache(rows=1, capacity=len(PROMPT) + 1))).all()

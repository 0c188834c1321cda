"""Records cases of the model in C++ for csrc/checks: small random models, what the eager modules give for them. Runs no native kernel.

Float32 must be as near as other orders of sums allow. Weights of fewer bits are compared with eager over the values they stand for, so
what is left are the rounded inputs of products; how exact those products are, the cases of single products show.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsvlm_export.native import GROUP, INT8_INPUTS, _nearest_int4, lay_out
from rsvlm_infer.backends.native import _scene_settings
from rsvlm_infer.backends.positions import resize_table
from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.layers.language_model import KvCache
from rsvlm_infer.models.rsvlm import RsvlmModel
from rsvlm_infer.ops.weight_matmul import PackedWeight, dequantise, pack_weight, round_inputs, weight_matmul
from tests.backends.native_packages import AWKWARD, CONFIG, random_model
from tests.native_checks.case import Case
from tests.parity import AWKWARD_LENGTHS, allowed_error, to_float64

SHARE_OF_SCALE = {"fp32": 2e-5, "bf16": 0.1, "int8": 0.1, "int4": 0.1}  # as in tests/backends/test_native.py
assert CONFIG.language is not None
assert CONFIG.alignment is not None
assert CONFIG.experts is not None
WIDE = dataclasses.replace(
    CONFIG,
    vision=dataclasses.replace(CONFIG.vision, hidden_size=64, intermediate_size=96),
    language=dataclasses.replace(CONFIG.language, hidden_size=64, intermediate_size=96, head_dim=16),
)
EXPERTS = CONFIG.experts
# rounding may let another patch be salient or another expert be chosen, which no tolerance covers
STEADY = dataclasses.replace(WIDE, experts=None, alignment=dataclasses.replace(CONFIG.alignment, levels=("region", "scene")))
GRIDS = ((2, 2), (4, 6), (2, 8), (6, 6))


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _weights(case: Case, config: RsvlmConfig, model: RsvlmModel, precision: str) -> Case:
    """A package's weights, as the reader finds them."""
    inputs = INT8_INPUTS if precision in ("int8", "int4") else ()
    for name, (kind, rows, columns, content) in lay_out(config, model.state_dict(), precision, int8_inputs=inputs).items():
        flat = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        case.array(**{f"weight/{kind or 'vector'}/{rows}/{columns}/{name}": flat})
    return case.word(int8_inputs=",".join(inputs) or "none")


def _model(config: RsvlmConfig, state: dict[str, Tensor] | None = None) -> RsvlmModel:
    """Random, or with these parameters."""
    with torch.inference_mode(mode=False):  # the encoder asks its parameters for a version, which inference does not count
        if state is None:
            return random_model(config)
        model = RsvlmModel(config).eval().requires_grad_(False)
        model.load_state_dict({name: value.clone() for name, value in state.items()})
        return model


def _stands_for(model: RsvlmModel, precision: str) -> RsvlmModel:
    """The same model with the values that a package's codes stand for."""
    state = model.state_dict()
    for name, value in state.items():
        language = name.startswith("language_model.")
        if precision in ("fp32", "bf16") or value.ndim != 2 or value.shape[1] % GROUP or not name.startswith(INT8_INPUTS):
            continue
        eight = not language or precision == "int8" or any(part in name for part in ("embed_tokens", "lm_head", "down"))
        state[name] = dequantise(pack_weight(value, "int8") if eight else _nearest_int4(value))
    return _model(model.config, state)


def _expect(case: Case, precision: str, **values: Tensor) -> Case:
    for name, value in values.items():
        case.expect(name, "float32", value, SHARE_OF_SCALE[precision] * float(np.abs(to_float64(value)).max(initial=0.0)))
    return case


def linear() -> Iterator[Case]:
    """Single products whose inputs are rounded to int8, of few rows and of many; bf16 and float32 ones over exact values."""
    for kind, rows, tokens in itertools.product(("int8", "int4"), (*AWKWARD_LENGTHS, 100), (1, 2, 5, 13)):
        packed, x = pack_weight(_random(0, rows, 192), kind), _random(tokens, tokens, 192)  # type: ignore[arg-type]
        x[0, 32:64] = 0
        rounded = round_inputs(x)
        exact = weight_matmul(rounded.double(), packed)
        allowed = allowed_error(weight_matmul(rounded, packed), exact, epsilon=2.0**-23)
        case = Case("linear", f"{kind}/{rows}x{tokens}").number(rows=rows, columns=192, tokens=tokens).array(x=x)
        layout = _lay_out_codes(packed)
        case.array(**{f"weight/{kind}/{rows}/192/linear": layout}).word(int8_inputs="linear")
        yield case.expect("few", "float32", exact, allowed).expect("many", "float32", exact, allowed)


def _lay_out_codes(packed: PackedWeight) -> NDArray[np.uint8]:
    from rsvlm_infer import _C

    assert packed.scales is not None
    shape: dict[str, Any] = {"kind": packed.kind, "rows": packed.shape[0], "columns": packed.shape[1], "wide_scales": False}
    layout = np.empty(_C.weight_layout_bytes(**shape), np.uint8)
    _C.lay_out_weight(**shape, codes=packed.codes.data_ptr(), scales=packed.scales.data_ptr(), layout=layout.ctypes.data)
    return layout


def decoder() -> Iterator[Case]:
    """Prompts of three rows in one call, one step of all rows, three guessed tokens of the first."""
    awkward = dataclasses.replace(CONFIG, language=AWKWARD)
    for label, config, precision in (
        ("llama", CONFIG, "fp32"),
        ("qwen2", awkward, "fp32"),
        ("qwen2", awkward, "bf16"),
        *(("llama", WIDE, precision) for precision in ("bf16", "int8", "int4")),
    ):
        model, language = _model(config), config.language
        assert language is not None
        lengths = [7, 101, 1]
        ids = torch.randint(0, language.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(1))
        fed = torch.randint(0, language.vocab_size, (len(lengths) + 3,), generator=torch.Generator().manual_seed(2))
        case = Case("decoder", f"{label}/{precision}").word(cache="float32" if precision == "fp32" else "bfloat16")
        numbers = {name: value for name, value in dataclasses.asdict(language).items() if isinstance(value, int | float)}
        exponent = torch.arange(language.head_dim // 2, dtype=torch.float32) * 2 / language.head_dim
        case.number(**numbers).array(frequencies=1 / language.rope_theta**exponent)
        case.array(lengths=torch.tensor(lengths), ids=ids, fed=fed)
        eager = _stands_for(model, precision)
        rows = [torch.cat((row, fed[[place]])) for place, row in enumerate(torch.split(ids, lengths))]
        rows[0] = torch.cat((rows[0], fed[len(lengths) :]))
        logits = [_logits(eager, row) for row in rows]
        _weights(case, config, model, precision)
        yield _expect(
            case,
            precision,
            prefill=torch.stack([row[length - 1] for row, length in zip(logits, lengths, strict=True)]),
            step=torch.stack([row[length] for row, length in zip(logits, lengths, strict=True)]),
            guesses=logits[0][lengths[0] + 1 :],
        )


def _logits(model: RsvlmModel, ids: Tensor) -> Tensor:
    """[n] -> [n, V], every token at once."""
    language = model.language_model
    assert language is not None
    embeddings = language.embed_tokens(ids)[None]
    cache = KvCache.empty(language.config, 1, len(ids), embeddings)
    logits: Tensor = language.logits(language(embeddings, torch.arange(len(ids))[None], cache))[0]
    return logits


def scene_model() -> Iterator[Case]:
    """Patches of four tiles to visual tokens, with cues, a query and embeddings."""
    siglip = dataclasses.replace(
        CONFIG,
        vision=dataclasses.replace(
            CONFIG.vision, family="siglip", class_token=False, activation="gelu_tanh", interpolation="bilinear"
        ),
        experts=dataclasses.replace(EXPERTS, kind="gelu_mlp"),
        tiling="fixed",
    )
    for label, config, precision in (
        ("dinov2", CONFIG, "fp32"),
        ("siglip", siglip, "fp32"),
        *(("dinov2", STEADY, precision) for precision in ("bf16", "int8", "int4")),
    ):
        model, vision, language = _model(config), config.vision, config.language
        assert language is not None
        assert config.alignment is not None
        counts = [rows * columns for rows, columns in GRIDS]
        bounds, grids = torch.tensor([0, *itertools.accumulate(counts)]), torch.tensor(GRIDS)
        patches = _random(0, sum(counts), 3 * vision.patch_size**2)
        cues = [_random(level, level * 2, config.alignment.embed_size) for level in range(3)]
        query = _random(3, 4, language.hidden_size)
        case = Case("scene_model", f"{label}/{precision}").number(**_scene_settings(config))
        table = model.state_dict()["vision_encoder.position_table"].numpy()[int(vision.class_token) :]
        places = [resize_table(table, vision.position_grid, *grid, vision.interpolation) for grid in GRIDS]
        case.array(patches=patches, positions=np.concatenate(places), bounds=bounds, grids=grids, query=query)
        case.array(**{f"cues{level}": part for level, part in enumerate(cues)})
        _weights(case, config, model, precision)
        eager = _stands_for(model, precision)
        assert eager.alignment is not None
        assert eager.augmentation is not None
        assert eager.projector is not None
        taps, class_tokens = eager.vision_encoder(patches, bounds.int(), grids)
        embeddings = eager.alignment(taps, class_tokens, bounds.int())
        features = eager.bridge(taps, eager.augmentation(taps, [cues], [query], bounds[[0, -1]].int()))
        tokens = torch.cat(eager.projector(features, grids, None))
        expected = {f"tap{level}": tap for level, tap in enumerate(taps)}
        expected |= {f"class{level}": part for level, part in enumerate(class_tokens) if len(part)}
        expected |= {f"embedding{level}": part for level, part in enumerate(embeddings)}
        yield _expect(case, precision, **expected, features=features, tokens=tokens)


MODEL_RECORDERS = {"linear": linear, "decoder": decoder, "scene_model": scene_model}

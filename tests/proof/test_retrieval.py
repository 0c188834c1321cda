"""CLIP for retrieval: our embeddings and scores are those of transformers' CLIPModel, from both naming schemes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from rsvlm_infer.backends.eager import EagerBackend
from tests.proof.tiny_models import TOLERANCE, clip, packed, picture, relative_error, their_inputs, torch

SIZES = [(56, 56), (70, 131), (150, 60)]
EOS, LEGACY_EOS = 97, 2


def texts(end: int) -> list[np.ndarray]:
    """Token ids of three texts of unlike length, each closed by `end`; the highest id in each is `end` too."""
    rng = np.random.default_rng(0)
    return [np.append(rng.integers(3, 90, length), end).astype(np.int32) for length in (4, 9, 1)]


def check_equal(folder: Path, theirs: Any, end: int) -> EagerBackend:
    backend = EagerBackend.load(folder, "float32")
    ids = texts(end)
    padded = np.full((3, 10), end)
    for row, text in enumerate(ids):
        padded[row, : len(text)] = text
    our_text = backend.embed_text(ids)  # [3, De]
    assert backend.config.alignment is not None
    for seed, (height, width) in enumerate(SIZES):
        rgb = picture(height, width, seed)
        (features,) = backend.encode([packed(rgb, backend.config)])
        scene = backend.embed_image(features).scene
        with torch.inference_mode():
            out = theirs(input_ids=torch.from_numpy(padded), **their_inputs(rgb, anyres=False))
        assert relative_error(scene, out.image_embeds[0].numpy()) <= TOLERANCE
        assert relative_error(our_text, out.text_embeds.numpy()) <= TOLERANCE
        score = backend.config.alignment.logit_scale * our_text @ scene
        assert relative_error(score, out.logits_per_image[0].numpy()) <= TOLERANCE
    return backend


@pytest.mark.parametrize("eos", [EOS, LEGACY_EOS])
def test_embeddings_equal_clip_model(tmp_path: Path, eos: int) -> None:
    theirs = clip(tmp_path, eos_token_id=eos)
    config = check_equal(tmp_path, theirs, end=99 if eos == LEGACY_EOS else EOS).config
    assert config.language is None
    assert config.vision.taps[2] == 4
    assert (config.bos_token_id, config.eos_token_ids) == ((98, (99,)) if eos == LEGACY_EOS else (96, (97,)))
    assert config.alignment is not None
    assert config.alignment.weights == (1.0, 0.0, 0.0)


def to_open_clip(state: dict[str, Any]) -> dict[str, Any]:
    """transformers' CLIP weights under open_clip's names, q, k, v fused, projections transposed."""
    out: dict[str, Any] = {"logit_scale": state["logit_scale"]}
    top = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
    }
    for old, new in top.items():
        out |= {new + name.removeprefix(old): value for name, value in state.items() if name.startswith(old)}
    out["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    out["text_projection"] = state["text_projection.weight"].T.contiguous()
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc"}
    parts["mlp.fc2"] = "mlp.c_proj"
    for old_prefix, new_prefix, layers in (("vision_model", "visual.", 4), ("text_model", "", 2)):
        for layer in range(layers):
            old, new = f"{old_prefix}.encoder.layers.{layer}.", f"{new_prefix}transformer.resblocks.{layer}."
            for kind in ("weight", "bias"):
                out |= {f"{new}{theirs}.{kind}": state[f"{old}{hf}.{kind}"] for hf, theirs in parts.items()}
                fused = [state[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
                out[f"{new}attn.in_proj_{kind}"] = torch.cat(fused)
    return out


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_open_clip_names(tmp_path: Path, activation: str, prefix: str) -> None:
    theirs = clip(tmp_path, eos_token_id=LEGACY_EOS, hidden_act=activation)
    state = {prefix + name: value for name, value in to_open_clip(load_file(tmp_path / "model.safetensors")).items()}
    for path in tmp_path.iterdir():
        path.unlink()
    save_file(state, tmp_path / "open_clip_model.safetensors")
    model = {
        "embed_dim": 24,
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {"image_size": 56, "layers": 4, "width": 32, "patch_size": 14, "head_width": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    backend = check_equal(tmp_path, theirs, end=99)
    assert backend.config.vision.activation == activation
    assert (backend.config.vision.num_layers, backend.config.preprocess.fit) == (4, "crop")

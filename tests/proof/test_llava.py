"""With the RS modules off our model is LLaVA: same logits and tokens as transformers, from the same folder on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsvlm_infer.backends.base import Prompt
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.models.load import load_checkpoint, read_config
from tests.proof.tiny_models import (
    IMAGE_TOKEN,
    PINPOINTS,
    TOLERANCE,
    VISION,
    edit_json,
    llava,
    our_greedy,
    our_logits,
    packed,
    picture,
    prompt_ids,
    relative_error,
    rename,
    their_greedy,
    their_inputs,
    their_logits,
    torch,
)

SIZES = [(56, 56), (70, 131), (150, 60)]


def check_equal(folder: Path, theirs: Any, anyres: bool, image_token: int = IMAGE_TOKEN) -> EagerBackend:
    """Loads `folder` and compares all logits and six greedy tokens for three picture shapes."""
    backend = EagerBackend.load(folder, "float32")
    for seed, (height, width) in enumerate(SIZES):
        rgb = picture(height, width, seed)
        (features,) = backend.encode([packed(rgb, backend.config)])
        ids = prompt_ids(7, features.num_tokens, image_token, seed)
        their_ids = np.where(ids == image_token, IMAGE_TOKEN, ids)
        inputs = their_inputs(rgb, anyres)
        assert relative_error(our_logits(backend, ids, features), their_logits(theirs, their_ids, inputs)) <= TOLERANCE
        (tokens,) = our_greedy(backend, [Prompt(ids, (features,))], 6)
        assert tokens == their_greedy(theirs, their_ids, inputs, 6)
    return backend


@pytest.mark.parametrize("anyres", [False, True], ids=["llava", "llava_next"])
@pytest.mark.parametrize("language", ["llama", "qwen2"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_logits_and_tokens_equal_transformers(tmp_path: Path, vision: str, language: str, anyres: bool) -> None:
    theirs = llava(tmp_path, vision=vision, language=language, anyres=anyres)
    config = check_equal(tmp_path, theirs, anyres).config
    assert (config.vision.family, config.language and config.language.family) == (vision, language)
    assert config.tiling == ("anyres" if anyres else "fixed")
    assert config.vision.taps == (1, 2, 3)  # hidden state -2 of four layers, a third and two thirds before it
    assert config.eos_token_ids == (2,)
    assert config.chat_template == {"llama": "vicuna_v1", "qwen2": "chatml"}[language]
    if anyres:
        assert config.grid_pinpoints == tuple(map(tuple, PINPOINTS))
        assert config.preprocess.fit == "stretch"


def _to_4_51(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def _to_4_52(name: str) -> str:
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + _to_4_51(name).replace("language_model.model.", "language_model.")


@pytest.mark.parametrize("anyres", [False, True], ids=["llava", "llava_next"])
@pytest.mark.parametrize("layout", [_to_4_51, _to_4_52], ids=["4.51", "4.52"])
def test_both_older_key_layouts(tmp_path: Path, layout: Any, anyres: bool) -> None:
    theirs = llava(tmp_path, anyres=anyres)
    rename(tmp_path, layout)
    check_equal(tmp_path, theirs, anyres)


def test_tied_embeddings(tmp_path: Path) -> None:
    text = {"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}
    text |= {"num_key_value_heads": 4, "intermediate_size": 40, "tie_word_embeddings": True}
    theirs = llava(tmp_path, text_config=text, tie_word_embeddings=True)
    config = check_equal(tmp_path, theirs, anyres=False).config
    assert config.language is not None
    assert config.language.tie_embeddings


def test_rope_theta_and_head_dim_and_eps_are_read(tmp_path: Path) -> None:
    text = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
    text |= {"num_key_value_heads": 1, "intermediate_size": 40, "head_dim": 24, "rms_norm_eps": 1e-3}
    theirs = llava(tmp_path, text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    language = check_equal(tmp_path, theirs, anyres=False).config.language
    assert language is not None
    assert (language.rope_theta, language.head_dim, language.rms_norm_eps) == (500.0, 24, 1e-3)
    text_on_disk = json.loads((tmp_path / "config.json").read_text())["text_config"]
    text_on_disk.pop("rope_parameters")  # transformers 4 wrote it beside rope_scaling
    edit_json(tmp_path / "config.json", text_config={**text_on_disk, "rope_theta": 500.0, "rope_scaling": None})
    assert read_config(tmp_path).language == language


def test_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    text = {"model_type": "mistral", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    text |= {"num_key_value_heads": 2, "intermediate_size": 40, "sliding_window": None}
    theirs = llava(tmp_path, text_config=text, anyres=True)
    assert check_equal(tmp_path, theirs, anyres=True).config.chat_template == "mistral_inst"


@pytest.mark.parametrize(("layer", "tap"), [(-1, 4), (-3, 2), (2, 2)])
def test_other_feature_layers(tmp_path: Path, layer: int, tap: int) -> None:
    theirs = llava(tmp_path, vision_feature_layer=layer)
    assert check_equal(tmp_path, theirs, anyres=False).config.vision.taps[2] == tap


def _to_original(name: str) -> str | None:
    replacements = {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.",
        "multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "image_newline": "model.image_newline",
        "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    }
    return next(name.replace(old, new) for old, new in replacements.items() if name.startswith(old))


def make_original(folder: Path, anyres: bool) -> None:
    """Turns a saved transformers model into LLaVA's own format; the encoder's config goes to `vision/`."""
    config = json.loads((folder / "config.json").read_text())
    rename(folder, _to_original)
    original = {
        **config["text_config"],
        "model_type": "llava_llama",
        "mm_vision_tower": "somewhere/tiny-clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "square",
    }
    if anyres:
        swapped = [[width, height] for height, width in PINPOINTS]  # the original writes (width, height)
        original |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": swapped}
    (folder / "config.json").write_text(json.dumps(original))
    (folder / "preprocessor_config.json").unlink()
    (folder / "vision").mkdir()
    (folder / "vision" / "config.json").write_text(json.dumps(config["vision_config"]))


@pytest.mark.parametrize("anyres", [False, True], ids=["llava", "llava_next"])
def test_original_layout(tmp_path: Path, anyres: bool) -> None:
    theirs = llava(tmp_path, anyres=anyres)
    make_original(tmp_path, anyres)
    config = check_equal(tmp_path, theirs, anyres, image_token=-200).config
    assert config.image_token_id == -200
    assert config.grid_pinpoints == (tuple(map(tuple, PINPOINTS)) if anyres else ())


def test_original_layout_pads_with_the_mean_colour(tmp_path: Path) -> None:
    llava(tmp_path)
    make_original(tmp_path, anyres=False)
    edit_json(tmp_path / "config.json", image_aspect_ratio="pad")
    preprocess = read_config(tmp_path).preprocess
    assert (preprocess.fit, preprocess.pad_value, preprocess.tile_px) == ("pad", (122, 116, 104), 56)


def test_original_layout_with_the_encoder_in_its_own_folder(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = llava(tmp_path)
    make_original(tmp_path, anyres=False)
    prefix = "model.vision_tower.vision_tower."
    encoder = {
        name.removeprefix(prefix): value for name, value in load_file(tmp_path / "model.safetensors").items() if prefix in name
    }
    rename(tmp_path, lambda name: None if prefix in name else name)
    save_file(encoder, tmp_path / "vision" / "model.safetensors")
    check_equal(tmp_path, theirs, anyres=False, image_token=-200)


def test_geochat_position_table_sets_the_tile(tmp_path: Path) -> None:
    """A longer position table than the encoder's own config says: GeoChat's 1297 rows instead of 577."""

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 14}
    theirs = llava(tmp_path, vision_config={**sizes, **VISION["clip"], "image_size": 504})
    make_original(tmp_path, anyres=False)
    edit_json(tmp_path / "config.json", model_type="geochat", image_aspect_ratio="pad")
    edit_json(tmp_path / "vision" / "config.json", image_size=336)
    backend = EagerBackend.load(tmp_path, "float32")
    config = backend.config
    assert (config.vision.position_grid, config.preprocess.tile_px, config.preprocess.fit) == (36, 504, "pad")
    scene = packed(picture(504, 504), config)
    (features,) = backend.encode([scene])
    assert features.num_tokens == 1296
    ids = prompt_ids(5, 1296, -200)
    pixels = scene.patches.reshape(36, 36, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(1, 3, 504, 504)
    expected = their_logits(theirs, np.where(ids == -200, IMAGE_TOKEN, ids), {"pixel_values": torch.from_numpy(pixels)})
    assert relative_error(our_logits(backend, ids, features), expected) <= TOLERANCE


def test_half_precision_weights_load_in_any_dtype(tmp_path: Path) -> None:
    saved = llava(tmp_path)
    saved.half().save_pretrained(tmp_path)
    theirs = type(saved).from_pretrained(tmp_path, dtype=torch.float32)
    check_equal(tmp_path, theirs, anyres=False)  # fp16 -> fp32 is exact
    for dtype in ("bfloat16", "float16"):
        model = load_checkpoint(tmp_path, dtype=dtype).model
        assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}


def test_sharded_folder(tmp_path: Path) -> None:
    theirs = llava(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_equal(tmp_path, theirs, anyres=False)

"""Foreign configs: what the public ones become, and that what this model cannot do exactly is refused by name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.errors import CheckpointError, ConfigError, RsvlmError
from rsvlm_infer.models.load import read_config

# What the hubs' config.json files hold, less what no loader needs. They leave out what equals a class default.
HF_LLAVA_15 = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
HF_LLAVA_16_MISTRAL = {
    **HF_LLAVA_15,
    "model_type": "llava_next",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "tie_word_embeddings": False,
    "text_config": {
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32064,
    },
}
ORIGINAL_LLAVA_15 = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "tune_mm_mlp_adapter": False,
    "use_cache": True,
    "vocab_size": 32000,
}
CLIP_PROCESSOR = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
POSITIONS = "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"


def make(
    folder: Path, config: dict[str, Any], tensors: dict[str, tuple[int, ...]] | None = None, **files: dict[str, Any]
) -> Path:
    """A folder whose weights hold only these names; `read_config` looks at no content."""
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensors or {"lm_head.weight": (1,)}
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_llava_15_of_the_hub(tmp_path: Path) -> None:
    config = read_config(make(tmp_path, HF_LLAVA_15, preprocessor_config=CLIP_PROCESSOR, generation_config={"eos_token_id": 2}))
    assert RsvlmConfig.from_dict(config.to_dict()) == config
    vision, language = config.vision, config.language
    assert language is not None
    assert (vision.family, vision.hidden_size, vision.position_grid, vision.taps) == ("clip", 1024, 24, (8, 16, 23))
    assert (vision.activation, vision.layer_norm_eps, vision.class_token, vision.pre_norm) == ("quick_gelu", 1e-5, True, True)
    assert (language.hidden_size, language.num_layers, language.num_kv_heads, language.head_dim) == (4096, 32, 32, 128)
    assert (language.rms_norm_eps, language.rope_theta, language.max_positions) == (1e-5, 1e4, 4096)
    assert (config.tiling, config.image_token_id, config.eos_token_ids, config.chat_template) == (
        "fixed",
        32000,
        (2,),
        "vicuna_v1",
    )
    assert (config.preprocess.tile_px, config.preprocess.fit, config.preprocess.resample) == (336, "crop", "bicubic")
    assert config.projector is not None
    assert config.projector.hidden_size == 4096
    assert config.alignment is config.experts is config.augmentation is None


def test_an_absent_vision_config_is_llavas_default(tmp_path: Path) -> None:
    without = {key: value for key, value in HF_LLAVA_15.items() if key != "vision_config"}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert read_config(make(tmp_path / "a", without)) == read_config(make(tmp_path / "b", HF_LLAVA_15))


def test_llava_16_of_the_hub(tmp_path: Path) -> None:
    config = read_config(make(tmp_path, HF_LLAVA_16_MISTRAL))
    assert config.language is not None
    assert (config.language.family, config.language.num_kv_heads, config.language.rope_theta) == ("llama", 8, 1e6)
    assert config.grid_pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert (config.tiling, config.preprocess.fit, config.chat_template) == ("anyres", "stretch", "mistral_inst")


def test_original_llava_15(tmp_path: Path) -> None:
    config = read_config(make(tmp_path, ORIGINAL_LLAVA_15, {"lm_head.weight": (1,), POSITIONS: (577, 1024)}))
    assert (config.vision.position_grid, config.preprocess.tile_px, config.vision.taps) == (24, 336, (8, 16, 23))
    assert (config.preprocess.fit, config.preprocess.pad_value) == ("pad", (122, 116, 104))
    assert (config.image_token_id, config.bos_token_id, config.eos_token_ids) == (-200, 1, (2,))


def test_geochat(tmp_path: Path) -> None:
    config = read_config(
        make(tmp_path, {**ORIGINAL_LLAVA_15, "model_type": "geochat"}, {"lm_head.weight": (1,), POSITIONS: (1297, 1024)})
    )
    assert (config.vision.position_grid, config.preprocess.tile_px) == (36, 504)


def test_original_anyres_swaps_width_and_height(tmp_path: Path) -> None:
    values = {**ORIGINAL_LLAVA_15, "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    values["image_grid_pinpoints"] = [[336, 672], [672, 672]]
    config = read_config(make(tmp_path, values, {POSITIONS: (577, 1024)}))
    assert config.grid_pinpoints == ((672, 336), (672, 672))


def test_original_llava_without_its_encoder_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds no vision encoder \(openai/clip-vit-large-patch14-336\); copy .* to .*vision"
    ):
        read_config(make(tmp_path, ORIGINAL_LLAVA_15))


def test_a_whole_clip_beside_an_original_llava(tmp_path: Path) -> None:
    make(tmp_path, ORIGINAL_LLAVA_15)
    (tmp_path / "vision").mkdir()
    clip = {"model_type": "clip", "vision_config": {**HF_LLAVA_15["vision_config"], "image_size": 28}}  # type: ignore[dict-item]
    make(tmp_path / "vision", clip, {"vision_model.embeddings.position_embedding.weight": (5, 1024)})
    assert read_config(tmp_path).vision.position_grid == 2


def nested(section: str, **changes: Any) -> dict[str, Any]:
    return {section: {**HF_LLAVA_15[section], **changes}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer must be one hidden state, got \[-2, -5\]"),
        ({"vision_feature_layer": -26}, "vision_feature_layer must be a hidden state of 24 layers, got -26"),
        ({"vision_feature_select_strategy": "full"}, 'vision_feature_select_strategy must be "default" with clip'),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias must be true"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be absent"),
        (nested("text_config", model_type="gemma"), r"text_config\.model_type must be one of \['llama', 'mistral', 'qwen2'\]"),
        (nested("text_config", hidden_act="gelu"), r"text_config\.hidden_act"),
        (nested("text_config", attention_bias=True), r"text_config\.attention_bias must be false"),
        (nested("text_config", mlp_bias=True), r"text_config\.mlp_bias must be false"),
        (nested("text_config", rope_scaling={"type": "linear", "factor": 2.0}), r"text_config\.rope_scaling must be null"),
        (
            nested("text_config", rope_parameters={"rope_type": "yarn", "factor": 2.0}),
            r"text_config\.rope_parameters must be null",
        ),
        (nested("text_config", partial_rotary_factor=0.5), r"partial_rotary_factor must be 1, got 0\.5"),
        (nested("text_config", model_type="mistral"), r"text_config\.sliding_window must be null, got 4096"),
        (nested("text_config", model_type="qwen2", use_sliding_window=True), r"use_sliding_window must be false"),
        (nested("text_config", model_type="qwen2", layer_types=["sliding_attention"]), r"layer_types must be all"),
        (nested("text_config", vocab_size="many"), r"text_config\.vocab_size must be a positive whole number, got 'many'"),
        (nested("text_config", rms_norm_eps=0), r"text_config\.rms_norm_eps must be a positive number, got 0"),
        ({"text_config": [1]}, "text_config must be an object"),
        (nested("vision_config", model_type="pixtral"), r"vision_config\.model_type must be one of"),
        (nested("vision_config", hidden_act="relu"), r"vision_config\.hidden_act must be one of"),
        (nested("vision_config", num_channels=4), r"vision_config\.num_channels must be 3, got 4"),
        ({"image_token_index": "x"}, "config.image_token_index must be a positive whole number"),
        ({"model_type": "llava_next", "image_grid_pinpoints": [[336]]}, "image_grid_pinpoints must be a list of"),
    ],
)
def test_llava_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(make(tmp_path, {**HF_LLAVA_15, **changes}))


def test_siglip_keeps_every_patch(tmp_path: Path) -> None:
    """transformers' "default" drops the first token, which is a real patch without a class token."""
    vision = {"vision_config": {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}}
    with pytest.raises(ConfigError, match='must be "full" with siglip'):
        read_config(make(tmp_path, {**HF_LLAVA_15, **vision}))
    config = read_config(make(tmp_path, {**HF_LLAVA_15, **vision, "vision_feature_select_strategy": "full"}))
    assert (config.vision.position_grid, config.vision.activation, config.preprocess.mean) == (27, "gelu_tanh", (0.5, 0.5, 0.5))
    assert (config.vision.layer_norm_eps, config.vision.class_token, config.vision.patch_bias) == (1e-6, False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type must be one of"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, "mm_patch_merge_type"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio"),
        ({"mm_vision_tower": "someone/other"}, r"mm_vision_tower must be one of .* or a folder vision/"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer must be one hidden state"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, r"config\.rope_scaling"),
    ],
)
def test_original_llava_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(make(tmp_path, {**ORIGINAL_LLAVA_15, **changes}, {POSITIONS: (577, 1024)}))


@pytest.mark.parametrize(
    ("changes", "tile", "fit", "resample"),
    [
        ({}, 336, "crop", "bicubic"),
        ({"size": 224, "crop_size": 224, "resample": 2}, 224, "crop", "bilinear"),  # files of 2022
        ({"do_center_crop": False, "size": {"height": 448, "width": 448}, "resample": 1}, 448, "stretch", "lanczos"),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, 336, "pad", "bicubic"),
    ],
)
def test_image_processors(tmp_path: Path, changes: dict[str, Any], tile: int, fit: str, resample: str) -> None:
    preprocess = read_config(make(tmp_path, HF_LLAVA_15, preprocessor_config={**CLIP_PROCESSOR, **changes})).preprocess
    assert (preprocess.tile_px, preprocess.fit, preprocess.resample) == (tile, fit, resample)
    assert preprocess.pad_value == ((122, 116, 104) if fit == "pad" else (0, 0, 0))


def test_an_image_processor_inside_processor_config(tmp_path: Path) -> None:
    inner = {**CLIP_PROCESSOR, "image_mean": [0.1, 0.2, 0.3]}
    assert read_config(make(tmp_path, HF_LLAVA_15, processor_config={"image_processor": inner})).preprocess.mean == (
        0.1,
        0.2,
        0.3,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale_factor": 1.0}, "rescale_factor must be 1/255"),
        ({"do_normalize": False}, "do_normalize must be true"),
        ({"do_resize": False}, "do_resize must be true"),
        ({"size": {"shortest_edge": 256}}, "size and crop_size must be the same square"),
        ({"do_center_crop": False, "size": {"height": 336, "width": 224}}, "must be the same square"),
        ({"image_mean": [0.5]}, "image_mean must be three numbers"),
        ({"resample": 0}, "resample must be one of"),
    ],
)
def test_image_processors_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(make(tmp_path, HF_LLAVA_15, preprocessor_config={**CLIP_PROCESSOR, **changes}))


def test_bare_dinov2(tmp_path: Path) -> None:
    values = {"model_type": "dinov2", "image_size": 518, "hidden_size": 384, "num_attention_heads": 6}
    processor = {**CLIP_PROCESSOR, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    config = read_config(make(tmp_path, values, preprocessor_config=processor))
    vision = config.vision
    assert (vision.intermediate_size, vision.position_grid, vision.layer_scale, vision.patch_bias) == (1536, 37, True, True)
    assert (vision.taps, vision.layer_norm_eps, vision.activation) == ((4, 8, 12), 1e-6, "gelu")
    assert (config.preprocess.tile_px, config.preprocess.fit) == (518, "stretch")  # only the colours of the processor are read
    assert config.preprocess.mean == (0.48145466, 0.4578275, 0.40821073)
    assert config.language is None


@pytest.mark.parametrize("changes", [{"use_swiglu_ffn": True}, {"qkv_bias": False}, {"hidden_act": "relu"}])
def test_dinov2_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        read_config(make(tmp_path, {"model_type": "dinov2", **changes}))


OPEN_CLIP_SHAPES = {
    "visual.conv1.weight": (128, 3, 32, 32),
    "visual.positional_embedding": (50, 128),
    "visual.proj": (128, 24),
    "visual.transformer.resblocks.0.mlp.c_fc.bias": (256,),
    "visual.transformer.resblocks.1.mlp.c_fc.bias": (256,),
    "token_embedding.weight": (60, 64),
    "positional_embedding": (20, 64),
    "transformer.resblocks.0.mlp.c_fc.bias": (96,),
    "logit_scale": (),
}


def make_open_clip(folder: Path, outer: dict[str, Any] | None = None, **shapes: tuple[int, ...]) -> Path:
    make(folder, {}, {**OPEN_CLIP_SHAPES, **shapes})
    (folder / "config.json").unlink()
    if outer is not None:
        (folder / "open_clip_config.json").write_text(json.dumps(outer))
    return folder


def test_open_clip_from_shapes_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = read_config(make_open_clip(tmp_path))
    assert "assuming exact GELU and heads of 64" in caplog.text
    vision, text = config.vision, config.text_encoder
    assert text is not None
    assert (vision.hidden_size, vision.patch_size, vision.position_grid, vision.num_layers) == (128, 32, 7, 2)
    assert (vision.num_heads, vision.intermediate_size, vision.activation) == (2, 256, "gelu")
    assert (text.hidden_size, text.num_heads, text.num_layers, text.max_positions, text.vocab_size) == (64, 1, 1, 20, 60)
    assert (config.preprocess.tile_px, config.preprocess.fit) == (224, "crop")
    assert config.alignment is not None
    assert (config.alignment.embed_size, config.alignment.logit_scale) == (24, 1.0)  # exp(0)
    assert (config.bos_token_id, config.eos_token_ids) == (58, (59,))


def test_open_clip_preprocess(tmp_path: Path) -> None:
    given = {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear", "resize_mode": "squash"}
    preprocess = read_config(make_open_clip(tmp_path, {"model_cfg": {}, "preprocess_cfg": given})).preprocess
    assert (preprocess.mean, preprocess.std, preprocess.resample, preprocess.fit) == (
        (0, 0, 0),
        (1, 1, 1),
        "bilinear",
        "stretch",
    )


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        ({"model_cfg": {"custom_text": True}}, r"open_clip_config\.model_cfg must be made of .*got \['custom_text'\]"),
        ({"model_cfg": {"vision_cfg": {"timm_model_name": "x"}}}, r"vision_cfg must be made of"),
        ({"model_cfg": {"text_cfg": {"hf_model_name": "x"}}}, r"text_cfg must be made of"),
        ({"preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode must be one of"),
        ({"preprocess_cfg": {"interpolation": "random"}}, "interpolation must be one of"),
    ],
)
def test_open_clip_settings_that_are_refused(tmp_path: Path, outer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(make_open_clip(tmp_path, outer))


def test_open_clip_with_a_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'visual\.proj' must have 2 axes, got \[5\]"):
        read_config(make_open_clip(tmp_path, **{"visual.proj": (5,)}))


def test_clip_without_its_scale(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks the weight 'logit_scale'"):
        read_config(make(tmp_path, {"model_type": "clip"}, {"visual_projection.weight": (1, 1)}))


def test_a_hub_folder_with_the_weights_twice_reads_one(tmp_path: Path) -> None:
    """Some hubs keep CLIP under both names: with transformers' config.json, `model.safetensors` counts."""
    make(tmp_path, {"model_type": "clip"}, {"visual_projection.weight": (1, 1), "logit_scale": ()})
    save_file({"visual.conv1.weight": np.zeros((1, 3, 2, 2), np.float16)}, tmp_path / "open_clip_model.safetensors")
    assert read_config(tmp_path).vision.hidden_size == 768


JUNK: list[Any] = [None, "x", -1, 0, 10**30, 1.5, True, [], {}, [[]], [{}], {"a": []}, ["x", "y", "z"]]
_OPEN_CLIP_OUTER = {
    "model_cfg": {"embed_dim": 24, "vision_cfg": {"head_width": 64}, "text_cfg": {"heads": 1}},
    "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear", "resize_mode": "squash"},
}


def spoiled(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`values` with one entry at a time, at any depth, replaced by each piece of junk."""
    for key, value in values.items():
        for junk in JUNK:
            yield {**values, key: junk}
        if isinstance(value, dict):
            for inner in spoiled(value):
                yield {**values, key: inner}


def check_spoiled(folder: Path, file: str, values: dict[str, Any]) -> None:
    for junk in spoiled(values):
        (folder / file).write_text(json.dumps(junk))
        with contextlib.suppress(RsvlmError):  # a config or our own error, nothing else
            assert isinstance(read_config(folder), RsvlmConfig)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (HF_LLAVA_15, None),
        (HF_LLAVA_16_MISTRAL, None),
        ({**ORIGINAL_LLAVA_15, "image_aspect_ratio": "anyres"}, {POSITIONS: (577, 2)}),
        ({"model_type": "clip", "text_config": {"eos_token_id": 5}}, {"visual_projection.weight": (1,), "logit_scale": ()}),
        ({"model_type": "dinov2", "mlp_ratio": 4, "hidden_act": "gelu", "patch_size": 14}, None),
    ],
    ids=["llava", "llava_next", "original", "clip", "dinov2"],
)
def test_junk_in_a_config_is_told_in_our_words(tmp_path: Path, config: dict[str, Any], tensors: Any) -> None:
    check_spoiled(make(tmp_path, config, tensors), "config.json", config)


def test_junk_in_a_processor_or_open_clip_config(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    check_spoiled(make(tmp_path / "a", HF_LLAVA_15), "preprocessor_config.json", {**CLIP_PROCESSOR, "do_pad": True})
    check_spoiled(make_open_clip(tmp_path / "b"), "open_clip_config.json", _OPEN_CLIP_OUTER)
    check_spoiled(make(tmp_path / "a", HF_LLAVA_15), "generation_config.json", {"eos_token_id": [1, 2], "bos_token_id": 1})

"""The generic loop over rules, and that every published name of a layout has exactly one meaning."""

from __future__ import annotations

import pytest

from rsvlm_infer.models.weight_tables import Assignment, Rule, assign, hf_clip, hf_llava, open_clip, original_llava


def test_first_match_wins_and_the_rest_is_unknown() -> None:
    rules = (
        Rule(r"a\.(\d+)\.in", (r"x.\1.q", r"x.\1.k"), "split3"),
        Rule(r"a\.\d+\.skip"),
        Rule(r"a\..*", ("never",)),
    )
    found, unknown = assign(["a.3.in", "a.0.skip", "a.b", "ba.3.in", "a.3.inn"], rules)
    assert found == [
        Assignment("a.3.in", ("x.3.q", "x.3.k"), "split3"),
        Assignment("a.0.skip", (), "copy"),
        Assignment("a.b", ("never",), "copy"),
        Assignment("a.3.inn", ("never",), "copy"),
    ]
    assert unknown == ["ba.3.in"]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("language_model.model.layers.31.self_attn.q_proj.weight", "language_model.layers.31.attention.q.weight"),
        ("model.language_model.layers.31.self_attn.q_proj.weight", "language_model.layers.31.attention.q.weight"),
        ("language_model.lm_head.weight", "language_model.lm_head.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "vision_encoder.pre_norm.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision_encoder.pre_norm.bias"),
        ("vision_tower.pre_layrnorm.bias", "vision_encoder.pre_norm.bias"),
        ("multi_modal_projector.linear_2.weight", "projector.fc2.weight"),
        ("model.multi_modal_projector.linear_1.bias", "projector.fc1.bias"),
        ("image_newline", "image_newline"),
        ("model.image_newline", "image_newline"),
    ],
)
def test_hf_llava_names(source: str, target: str) -> None:
    assert assign([source], hf_llava("clip")) == ([Assignment(source, (target,), "copy")], [])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("model.layers.0.mlp.gate_proj.weight", "language_model.layers.0.mlp.gate.weight"),
        ("model.norm.weight", "language_model.norm.weight"),
        ("model.mm_projector.0.weight", "projector.fc1.weight"),
        ("model.mm_projector.2.bias", "projector.fc2.bias"),
        ("model.image_newline", "image_newline"),
        (
            "model.vision_tower.vision_tower.vision_model.encoder.layers.22.self_attn.out_proj.bias",
            "vision_encoder.blocks.22.attention.o.bias",
        ),
    ],
)
def test_original_llava_names(source: str, target: str) -> None:
    assert assign([source], original_llava("clip")) == ([Assignment(source, (target,), "copy")], [])


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.vision_model.post_layernorm.weight",
        "vision_tower.vision_model.embeddings.position_ids",
        "language_model.model.layers.3.self_attn.rotary_emb.inv_freq",
    ],
)
def test_known_and_not_needed(name: str) -> None:
    assert assign([name], hf_llava("clip")) == ([Assignment(name, (), "copy")], [])


@pytest.mark.parametrize(
    "name", ["vision_tower.vision_model.head.probe", "model.layers.0.mlp.gate_proj.weight", "xlm_head.weight"]
)
def test_names_of_other_layouts_are_unknown(name: str) -> None:
    assert assign([name], hf_llava("clip")) == ([], [name])


def test_clip_scene_head_takes_the_last_norm() -> None:
    names = ["vision_model.post_layernorm.weight", "visual_projection.weight", "logit_scale"]
    found, unknown = assign(names, hf_clip())
    assert [item.targets for item in found] == [("alignment.scene.norm.weight",), ("alignment.scene.proj.weight",), ()]
    assert unknown == []


def test_open_clip_fused_and_transposed() -> None:
    names = [
        "visual.transformer.resblocks.7.attn.in_proj_bias",
        "transformer.resblocks.2.attn.in_proj_weight",
        "text_projection",
    ]
    found, unknown = assign(names, open_clip())
    assert found[0].targets == tuple(f"vision_encoder.blocks.7.attention.{part}.bias" for part in "qkv")
    assert found[1].targets == tuple(f"text_encoder.layers.2.attention.{part}.weight" for part in "qkv")
    assert [item.how for item in found] == ["split3", "split3", "transpose"]
    assert unknown == []

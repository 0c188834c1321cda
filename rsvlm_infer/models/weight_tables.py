"""Foreign weight names to ours: one table of rules per layout part, and the generic loop over them. Knows no file and no config.

A rule's pattern is a regular expression on the whole source name. Optional groups cover layouts that differ only in a prefix,
for example Hugging Face's `vision_tower.vision_model.` (up to 4.51), `model.vision_tower.vision_model.` (from 4.52) and
`vision_tower.` (5.x).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

How = Literal["copy", "reshape", "transpose", "split3"]


@dataclass(frozen=True)
class Rule:
    """Names that match `pattern` become `targets` (templates with \\1, \\2, ...); no targets = known and not needed.

    `how`: copy · reshape to the target's shape (same element count) · transpose a matrix · split3 = cut the first axis in three
    equal parts, one per target (fused q, k, v).
    """

    pattern: str
    targets: tuple[str, ...] = ()
    how: How = "copy"


class Assignment(NamedTuple):
    """One source tensor and what becomes of it."""

    source: str
    targets: tuple[str, ...]
    how: How


def assign(names: Iterable[str], rules: Sequence[Rule]) -> tuple[list[Assignment], list[str]]:
    """Applies the first matching rule to each name.

    Returns:
        The assignments in the order of `names`, and the names that no rule knows.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    assignments: list[Assignment] = []
    unknown: list[str] = []
    for name in names:
        for pattern, rule in compiled:
            match = pattern.fullmatch(name)
            if match is not None:
                targets = tuple(match.expand(target) for target in rule.targets)
                assignments.append(Assignment(name, targets, rule.how))
                break
        else:
            unknown.append(name)
    return assignments, unknown


# Our own names. Blocks after the last tap and a final norm may be in a converted encoder; the loader skips the former by number.
RSVLM: tuple[Rule, ...] = (
    Rule(r"vision_encoder\.(?:final_norm|post_norm)\..*"),
    Rule(r"(.*)", (r"\1",)),
)


def _renamed(prefix: str, target: str, names: dict[str, str]) -> tuple[Rule, ...]:
    """`prefix` + pattern -> `target` + template for plain copies."""
    return tuple(Rule(prefix + pattern, (target + name,)) for pattern, name in names.items())


_WB = r"(weight|bias)"
_HF_ENCODER_LAYER = {  # CLIP (vision and text) and SigLIP share these names
    rf"layers\.(\d+)\.layer_norm([12])\.{_WB}": r"\1.norm\2.\3",
    rf"layers\.(\d+)\.self_attn\.([qkv])_proj\.{_WB}": r"\1.attention.\2.\3",
    rf"layers\.(\d+)\.self_attn\.out_proj\.{_WB}": r"\1.attention.o.\2",
    rf"layers\.(\d+)\.mlp\.fc([12])\.{_WB}": r"\1.mlp.fc\2.\3",
}


def clip_vision(prefix: str) -> tuple[Rule, ...]:
    """HF CLIP's vision model under `prefix`. Its last norm is not needed, unless an earlier rule takes it."""
    embeddings = prefix + r"embeddings\."
    return (
        Rule(embeddings + r"patch_embedding\.weight", ("vision_encoder.patch_embed.weight",), "reshape"),
        Rule(embeddings + r"class_embedding", ("vision_encoder.class_token",), "reshape"),
        Rule(embeddings + r"position_embedding\.weight", ("vision_encoder.position_table",)),
        Rule(embeddings + r"position_ids"),  # a buffer that transformers wrote until 4.30
        *_renamed(prefix, "vision_encoder.", {rf"pre_layrnorm\.{_WB}": r"pre_norm.\1"}),  # their spelling
        *_renamed(prefix + r"encoder\.", "vision_encoder.blocks.", _HF_ENCODER_LAYER),
        Rule(prefix + r"post_layernorm\..*"),
    )


def siglip_vision(prefix: str) -> tuple[Rule, ...]:
    """HF SigLIP's vision model under `prefix`. Its last norm and its pooling head are not needed."""
    embeddings = prefix + r"embeddings\."
    return (
        Rule(embeddings + r"patch_embedding\.weight", ("vision_encoder.patch_embed.weight",), "reshape"),
        Rule(embeddings + r"patch_embedding\.bias", ("vision_encoder.patch_embed.bias",)),
        Rule(embeddings + r"position_embedding\.weight", ("vision_encoder.position_table",)),
        Rule(embeddings + r"position_ids"),
        *_renamed(prefix + r"encoder\.", "vision_encoder.blocks.", _HF_ENCODER_LAYER),
        Rule(prefix + r"(?:post_layernorm|head)\..*"),
    )


def dinov2_vision(prefix: str) -> tuple[Rule, ...]:
    """HF DINOv2 under `prefix`. Its last norm and the mask token of its training are not needed."""
    embeddings, layer = prefix + r"embeddings\.", prefix + r"encoder\.layer\."
    return (
        Rule(embeddings + r"patch_embeddings\.projection\.weight", ("vision_encoder.patch_embed.weight",), "reshape"),
        Rule(embeddings + r"patch_embeddings\.projection\.bias", ("vision_encoder.patch_embed.bias",)),
        Rule(embeddings + r"cls_token", ("vision_encoder.class_token",), "reshape"),
        Rule(embeddings + r"position_embeddings", ("vision_encoder.position_table",), "reshape"),
        Rule(embeddings + r"mask_token"),
        *_renamed(
            layer,
            "vision_encoder.blocks.",
            {
                rf"(\d+)\.norm([12])\.{_WB}": r"\1.norm\2.\3",
                rf"(\d+)\.attention\.attention\.query\.{_WB}": r"\1.attention.q.\2",
                rf"(\d+)\.attention\.attention\.key\.{_WB}": r"\1.attention.k.\2",
                rf"(\d+)\.attention\.attention\.value\.{_WB}": r"\1.attention.v.\2",
                rf"(\d+)\.attention\.output\.dense\.{_WB}": r"\1.attention.o.\2",
                r"(\d+)\.layer_scale([12])\.lambda1": r"\1.scale\2",
                rf"(\d+)\.mlp\.fc([12])\.{_WB}": r"\1.mlp.fc\2.\3",
            },
        ),
        Rule(prefix + r"layernorm\..*"),
    )


def clip_text(prefix: str) -> tuple[Rule, ...]:
    """HF CLIP's text model under `prefix`."""
    embeddings = prefix + r"embeddings\."
    return (
        Rule(embeddings + r"token_embedding\.weight", ("text_encoder.embed_tokens.weight",)),
        Rule(embeddings + r"position_embedding\.weight", ("text_encoder.position_table",)),
        Rule(embeddings + r"position_ids"),
        *_renamed(prefix + r"encoder\.", "text_encoder.layers.", _HF_ENCODER_LAYER),
        *_renamed(prefix, "text_encoder.", {rf"final_layer_norm\.{_WB}": r"final_norm.\1"}),
    )


def decoder(prefix: str, head: str) -> tuple[Rule, ...]:
    """A Llama, Mistral or Qwen2 decoder under `prefix`, its output matrix named `head`."""
    return (
        Rule(head, ("language_model.lm_head.weight",)),
        *_renamed(
            prefix,
            "language_model.",
            {
                r"embed_tokens\.weight": r"embed_tokens.weight",
                r"norm\.weight": r"norm.weight",
                r"layers\.(\d+)\.input_layernorm\.weight": r"layers.\1.input_norm.weight",
                r"layers\.(\d+)\.post_attention_layernorm\.weight": r"layers.\1.post_norm.weight",
                rf"layers\.(\d+)\.self_attn\.([qkvo])_proj\.{_WB}": r"layers.\1.attention.\2.\3",
                r"layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight": r"layers.\1.mlp.\2.weight",
            },
        ),
        Rule(prefix + r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),  # a buffer that transformers wrote until 4.30
    )


_VISION_FAMILIES = {"clip": clip_vision, "siglip": siglip_vision, "dinov2": dinov2_vision}


def vision(family: str, prefix: str) -> tuple[Rule, ...]:
    """The table of a vision family in HF naming."""
    return _VISION_FAMILIES[family](prefix)


def hf_llava(family: str) -> tuple[Rule, ...]:
    """LLaVA and LLaVA-NeXT as transformers write them, from 4.36 to 5.x."""
    return (
        *vision(family, r"(?:model\.)?vision_tower\.(?:vision_model\.)?"),
        *_renamed(r"(?:model\.)?multi_modal_projector\.", "projector.", {rf"linear_([12])\.{_WB}": r"fc\1.\2"}),
        Rule(r"(?:model\.)?image_newline", ("image_newline",)),
        *decoder(r"(?:language_model\.model\.|model\.language_model\.)", r"(?:language_model\.)?lm_head\.weight"),
    )


ORIGINAL_LLAVA_VISION = r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?"


def original_llava(family: str) -> tuple[Rule, ...]:
    """LLaVA's own repository, and GeoChat."""
    return (
        *vision(family, ORIGINAL_LLAVA_VISION),
        *_renamed(r"model\.mm_projector\.", "projector.", {rf"0\.{_WB}": r"fc1.\1", rf"2\.{_WB}": r"fc2.\1"}),
        Rule(r"model\.image_newline", ("image_newline",)),
        *decoder(r"model\.", r"lm_head\.weight"),
    )


def hf_clip() -> tuple[Rule, ...]:
    """CLIPModel for retrieval: the last vision norm and both projections are the scene head."""
    return (
        *_renamed(r"vision_model\.", "alignment.scene.", {rf"post_layernorm\.{_WB}": r"norm.\1"}),
        Rule(r"visual_projection\.weight", ("alignment.scene.proj.weight",)),
        Rule(r"text_projection\.weight", ("alignment.text_proj.weight",)),
        Rule(r"logit_scale"),  # in the config
        *clip_vision(r"vision_model\."),
        *clip_text(r"text_model\."),
    )


def open_clip() -> tuple[Rule, ...]:
    """open_clip's CLIP: fused q, k, v; projections stored [in, out]."""
    top = r"(?:module\.)?"

    def blocks(prefix: str, target: str) -> tuple[Rule, ...]:
        block = top + prefix + r"transformer\.resblocks\.(\d+)\."
        fused = tuple(rf"{target}.\1.attention.{part}." for part in "qkv")
        return (
            Rule(block + r"attn\.in_proj_weight", tuple(name + "weight" for name in fused), "split3"),
            Rule(block + r"attn\.in_proj_bias", tuple(name + "bias" for name in fused), "split3"),
            *_renamed(
                block,
                rf"{target}.\1.",
                {
                    rf"ln_([12])\.{_WB}": r"norm\2.\3",
                    rf"attn\.out_proj\.{_WB}": r"attention.o.\2",
                    rf"mlp\.c_fc\.{_WB}": r"mlp.fc1.\2",
                    rf"mlp\.c_proj\.{_WB}": r"mlp.fc2.\2",
                },
            ),
        )

    return (
        Rule(top + r"visual\.conv1\.weight", ("vision_encoder.patch_embed.weight",), "reshape"),
        Rule(top + r"visual\.class_embedding", ("vision_encoder.class_token",)),
        Rule(top + r"visual\.positional_embedding", ("vision_encoder.position_table",)),
        *_renamed(
            top + r"visual\.",
            "",
            {rf"ln_pre\.{_WB}": r"vision_encoder.pre_norm.\1", rf"ln_post\.{_WB}": r"alignment.scene.norm.\1"},
        ),
        Rule(top + r"visual\.proj", ("alignment.scene.proj.weight",), "transpose"),
        *blocks(r"visual\.", "vision_encoder.blocks"),
        Rule(top + r"token_embedding\.weight", ("text_encoder.embed_tokens.weight",)),
        Rule(top + r"positional_embedding", ("text_encoder.position_table",)),
        *_renamed(top, "text_encoder.", {rf"ln_final\.{_WB}": r"final_norm.\1"}),
        Rule(top + r"text_projection", ("alignment.text_proj.weight",), "transpose"),
        *blocks("", "text_encoder.layers"),
        Rule(top + r"(?:logit_scale|attn_mask)"),
    )


# What a whole CLIPModel or SiglipModel holds beside its vision model, where only that is wanted.
NOT_VISION: tuple[Rule, ...] = (
    Rule(r"text_model\..*"),
    Rule(r"(?:text|visual)_projection\.weight"),
    Rule(r"logit_(?:scale|bias)"),
)

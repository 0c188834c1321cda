"""Tiny random models of transformers, saved as a hub would hold them, and how both sides are run. Knows no expectation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install rsvlm-infer[dev])")
torch = pytest.importorskip("torch", reason="torch is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

from rsvlm_infer.backends.base import ImageFeatures, Prompt  # noqa: E402
from rsvlm_infer.backends.eager import EagerBackend  # noqa: E402
from rsvlm_infer.config import RsvlmConfig  # noqa: E402
from rsvlm_infer.engine import Engine, Request  # noqa: E402
from rsvlm_infer.imagery.pack import PackedScene, pack_scene  # noqa: E402
from rsvlm_infer.imagery.plan import plan_scene  # noqa: E402
from rsvlm_infer.imagery.source import open_scene  # noqa: E402

IMAGE_PX, PATCH, VOCAB, IMAGE_TOKEN = 56, 14, 100, 99
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
TOLERANCE = 1e-5  # of the largest logit: fp32, other order of sums

VISION = {
    "clip": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"},
    "siglip": {"model_type": "siglip_vision_model"},
}
_VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": IMAGE_PX,
    "patch_size": PATCH,
}
_TEXT_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def randomised(model: Any, seed: int = 0) -> Any:
    """Every parameter random, norms and biases too: a weight that is left out or swapped must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = (name.endswith("weight") and parameter.ndim == 1) or "lambda1" in name
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 16
            parameter.copy_(1 + 0.2 * noise if scale else noise * fan_in**-0.5 * 1.5)
    return model.eval()


def llava(folder: Path, *, vision: str = "clip", language: str = "llama", anyres: bool = False, **overrides: Any) -> Any:
    """A LLaVA-1.5 or LLaVA-NeXT model, saved with its image processor."""
    config_class = transformers.LlavaNextConfig if anyres else transformers.LlavaConfig
    model_class = transformers.LlavaNextForConditionalGeneration if anyres else transformers.LlavaForConditionalGeneration
    settings: dict[str, Any] = {
        "vision_config": {**_VISION_SIZES, **VISION[vision]},
        "text_config": {**_TEXT_SIZES, "model_type": language},
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_select_strategy": "full" if vision == "siglip" else "default",
    }
    if anyres:
        settings["image_grid_pinpoints"] = PINPOINTS
    settings.update(overrides)
    model = randomised(model_class(config_class(**settings)))
    model.save_pretrained(folder)
    processor(anyres).save_pretrained(folder)
    return model


def processor(anyres: bool) -> Any:
    """The Pillow processor of the family, at the tiny size."""
    square = {"height": IMAGE_PX, "width": IMAGE_PX}
    if anyres:
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        return LlavaNextImageProcessorPil(size={"shortest_edge": IMAGE_PX}, crop_size=square, image_grid_pinpoints=PINPOINTS)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_PX}, crop_size=square)


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    """Rewrites the weight names of a saved model; None drops a weight."""
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {new: value for name, value in tensors.items() if (new := change(name)) is not None}, folder / "model.safetensors"
    )


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [h, w, 3] noise: neighbouring tiles must not look alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def packed(rgb: np.ndarray, config: RsvlmConfig, **options: Any) -> PackedScene:
    """One picture through our own planner and packer."""
    scene = open_scene(rgb)
    return pack_scene(scene, plan_scene(scene.height, scene.width, config, **options), config)


def prompt_ids(length: int, num_image_tokens: int, image_token: int = IMAGE_TOKEN, seed: int = 0) -> np.ndarray:
    """Random words, the image's placeholders after the second one."""
    words = np.random.default_rng(seed).integers(3, VOCAB - 2, length, dtype=np.int32)
    return np.concatenate([words[:2], np.full(num_image_tokens, image_token, np.int32), words[2:]])


def our_logits(backend: EagerBackend, ids: np.ndarray, features: ImageFeatures | None) -> np.ndarray:
    """Logits after every token, [n, vocab], through prefill of each prefix's end: one pass over the model's own parts."""
    images = () if features is None else (features,)
    with torch.inference_mode():
        embeds = backend._prompt_embeds(Prompt(ids, images), len(ids))[None]
        language = backend.model.language_model
        assert language is not None
        return language.logits(language(embeds, torch.arange(len(ids))[None]))[0].float().numpy()


def our_greedy(backend: EagerBackend, prompts: Sequence[Prompt], count: int) -> list[list[int]]:
    """Tokens of each prompt from our engine, all prompts in one batch."""
    requests = [Request(prompt.token_ids, prompt.images, max_new_tokens=count) for prompt in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    for event in Engine(backend).generate(requests):
        tokens[event.request_index].append(event.token_id)
    return tokens


def their_inputs(rgb: np.ndarray, anyres: bool) -> dict[str, Any]:
    """pixel_values (and image_sizes) of the published processor."""
    return dict(processor(anyres)(Image.fromarray(rgb), return_tensors="pt"))


def their_logits(model: Any, ids: np.ndarray, inputs: dict[str, Any]) -> np.ndarray:
    """Logits after every token, [n, vocab]."""
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(ids).long()[None], **inputs).logits[0].numpy()


def their_greedy(model: Any, ids: np.ndarray, inputs: dict[str, Any], count: int) -> list[int]:
    """Greedy tokens with their own cache. The picture goes in once: a random model may say the placeholder's id as a word."""
    tokens: list[int] = []
    given, cache = torch.from_numpy(ids).long()[None], None
    with torch.inference_mode():
        for _ in range(count):
            out = model(input_ids=given, past_key_values=cache, use_cache=True, **inputs)
            given, cache, inputs = out.logits[:, -1:].argmax(dim=-1), out.past_key_values, {}
            tokens.append(int(given))
    return tokens


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest absolute difference over the largest value."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def clip(folder: Path, *, eos_token_id: int = 97, hidden_act: str = "quick_gelu") -> Any:
    """A CLIPModel, saved with its image processor."""
    text = {key: value for key, value in _TEXT_SIZES.items() if key != "num_key_value_heads"}
    text |= {"max_position_embeddings": 16, "eos_token_id": eos_token_id, "hidden_act": hidden_act, "num_attention_heads": 2}
    vision = {**_VISION_SIZES, "hidden_act": hidden_act}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = randomised(transformers.CLIPModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
    model.save_pretrained(folder)
    processor(anyres=False).save_pretrained(folder)
    return model


def vision_model(folder: Path, family: str) -> Any:
    """A bare vision model, saved."""
    kinds = {
        "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig, _VISION_SIZES),
        "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig, _VISION_SIZES),
        "dinov2": (
            transformers.Dinov2Model,
            transformers.Dinov2Config,
            {key: value for key, value in _VISION_SIZES.items() if key != "intermediate_size"},
        ),
    }
    model_class, config_class, sizes = kinds[family]
    model = randomised(model_class(config_class(**sizes)))
    model.save_pretrained(folder)
    return model


def patches_of(pixels: Any) -> Any:
    """[3, h, w] -> [h/p · w/p, 3·p²], row-major patches, channel-major inside."""
    channels, height, width = pixels.shape
    cut = pixels.reshape(channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cut.permute(1, 3, 0, 2, 4).reshape(-1, channels * PATCH * PATCH)

"""What every peer is handed: the checkpoint's weights in Hugging Face's layout, the same pixels and tokens, and what eager float32
makes of them. Owns that folder; runs with our own libraries and knows no peer.

    hf/language, hf/vision, hf/projector.safetensors    weights, float32
    inputs/                                             text.json, caption.json, *.npy
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.peers.workers.texts import NEW_TOKENS, PROMPT, prompt_tokens
from rsvlm_infer.backends.base import Backend, Prompt
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.config import PreprocessConfig, RsvlmConfig
from rsvlm_infer.errors import InputError
from rsvlm_infer.models.load import LoadedCheckpoint, load_checkpoint
from rsvlm_infer.tasks.caption import CAPTION_PROMPT
from rsvlm_infer.tasks.generation import prompt_ids
from rsvlm_infer.tasks.scene import SceneSettings, prepare_scene
from rsvlm_infer.text.tokenizer import Tokenizer

F32 = npt.NDArray[np.float32]

TILES = 32
# 32 tiles of 16 to 576 patches, 181 in the mean
MIXED_SIDES = (4,) * 6 + (8,) * 7 + (12,) * 8 + (16,) * 7 + (24,) * 4
# Enough words for the longest prompt without a repeat, so that no peer profits from one.
TEXT = (
    "Seen from above, the harbour lies in a bay that opens to the south. Two long piers of grey concrete reach into dark water, and "
    "nine cargo ships are moored beside them, some loaded with red and blue containers. Behind the quay a rail yard spreads out with "
    "eleven parallel tracks, a turntable and a row of low sheds. North of it the old town begins: narrow streets, small courtyards, "
    "roofs of orange tile and a square with a church whose shadow points west, so the picture was taken in the morning. A wide road "
    "with four lanes crosses the river on a white bridge and climbs towards the hills, where terraced fields follow the contour lines. "
    "Most of them are green, a few were ploughed and look brown. At the upper edge a forest of dense conifers covers the slope; a "
    "straight clearing shows where the power line runs. To the east there is an airfield with one runway, a taxiway and three parked "
    "planes, next to a sports ground with a stadium, two baseball diamonds and several tennis courts. Farther out, greenhouses shine "
    "like mirrors between irrigation ponds, and a quarry has cut pale steps into the mountain. Nothing suggests that the river has "
    "flooded lately, although sand banks near its mouth are wider than on older maps. Clouds hide less than five percent of the scene, "
    "mainly over the sea, where the wakes of small boats can still be made out as thin bright lines behind them. "
    "The southern headland carries a lighthouse, a ruined fort with five bastions and a car park for visitors."
)


def write_handout(checkpoint: Path, image: Path, folder: Path) -> None:
    """Writes `hf/` and `inputs/` of a checkpoint with a DINOv2 encoder and a Llama decoder.

    Args:
        image: a picture that the checkpoint plans as one tile, for the caption; tiles are cut from its folder's pictures.

    Raises:
        InputError: another kind of checkpoint, a picture of several tiles, or too few pictures.
    """
    loaded = load_checkpoint(checkpoint)
    config = loaded.config
    if config.vision.family != "dinov2" or config.language is None or config.language.family != "llama" or not config.projector:
        raise InputError(
            f"checkpoint {checkpoint} must have a dinov2 encoder, a projector and a llama decoder for this comparison, got "
            f"{config.vision.family} and {config.language and config.language.family}; pass the default checkpoint"
        )
    for part in ("hf", "inputs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_language(loaded, folder / "hf" / "language")
    write_vision(loaded, folder / "hf" / "vision")
    with torch.inference_mode():
        write_inputs(loaded, image, folder)


def write_language(loaded: LoadedCheckpoint, folder: Path) -> None:
    """A LlamaForCausalLM folder with merged low-rank updates."""
    language = loaded.config.language
    assert language is not None
    folder.mkdir(exist_ok=True)
    names = {"attention.": "self_attn.", "input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
    state = {}
    for name, value in loaded.model.state_dict().items():
        if name.startswith("language_model."):
            theirs = name.removeprefix("language_model.")
            for ours, other in names.items():
                theirs = theirs.replace(ours, other)
            parts = theirs.split(".")
            if parts[-2] in ("q", "k", "v", "o", "gate", "up", "down"):
                parts[-2] += "_proj"
            state[f"model.{'.'.join(parts)}"] = value.float().contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    rope = {"rope_type": "default", "rope_theta": language.rope_theta}
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": language.vocab_size,
            "hidden_size": language.hidden_size,
            "intermediate_size": language.intermediate_size,
            "num_hidden_layers": language.num_layers,
            "num_attention_heads": language.num_heads,
            "num_key_value_heads": language.num_kv_heads,
            "head_dim": language.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": language.rms_norm_eps,
            "rope_parameters": rope,
            "rope_theta": language.rope_theta,  # transformers 4
            "max_position_embeddings": language.max_positions,
            "tie_word_embeddings": language.tie_embeddings,
            "attention_bias": language.qkv_bias,
            "bos_token_id": 1,
            "eos_token_id": loaded.config.eos_token_ids[0],
            "torch_dtype": "float32",
        },
    )
    _write_json(folder / "generation_config.json", {"eos_token_id": loaded.config.eos_token_ids[0]})
    shutil.copyfile(loaded.folder / "tokenizer.json", folder / "tokenizer.json")
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})


def write_vision(loaded: LoadedCheckpoint, folder: Path) -> None:
    """A Dinov2Model folder of the blocks that the model runs, and the projector beside it, its box folded into the last bias."""
    vision, state = loaded.config.vision, {name: value.float() for name, value in loaded.model.state_dict().items()}
    folder.mkdir(exist_ok=True)
    own, hidden, patch = "vision_encoder.", vision.hidden_size, vision.patch_size
    theirs = {
        "embeddings.patch_embeddings.projection.weight": state[f"{own}patch_embed.weight"].reshape(hidden, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": state[f"{own}patch_embed.bias"],
        "embeddings.cls_token": state[f"{own}class_token"].reshape(1, 1, hidden),
        "embeddings.position_embeddings": state[f"{own}position_table"][None],
        "embeddings.mask_token": torch.zeros(1, hidden),  # of its training
        "layernorm.weight": torch.ones(hidden),  # behind the last tap: computed by transformers, read by nobody
        "layernorm.bias": torch.zeros(hidden),
    }
    names = {"q": "attention.attention.query", "k": "attention.attention.key", "v": "attention.attention.value"}
    names |= {"o": "attention.output.dense"}
    for block in range(max(vision.taps)):
        for name, value in state.items():
            if name.startswith(f"{own}blocks.{block}."):
                inner = name.removeprefix(f"{own}blocks.{block}.")
                if inner.startswith("attention."):
                    _, letter, kind = inner.split(".")
                    inner = f"{names[letter]}.{kind}"
                if inner.startswith("scale"):
                    inner = f"layer_scale{inner[-1]}.lambda1"
                theirs[f"encoder.layer.{block}.{inner}"] = value
    save_file({name: value.contiguous() for name, value in theirs.items()}, folder / "model.safetensors", {"format": "pt"})
    _write_json(
        folder / "config.json",
        {
            "architectures": ["Dinov2Model"],
            "model_type": "dinov2",
            "hidden_size": hidden,
            "num_hidden_layers": max(vision.taps),
            "num_attention_heads": vision.num_heads,
            "mlp_ratio": vision.intermediate_size // hidden,
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.layer_norm_eps,
            "image_size": vision.position_grid * patch,
            "patch_size": patch,
            "qkv_bias": True,
            "torch_dtype": "float32",
        },
    )
    projector = {name.removeprefix("projector."): value for name, value in state.items() if name.startswith("projector.")}
    box = projector.pop("box.weight", None)
    if box is not None and loaded.config.tiling == "dris":
        projector["fc2.bias"] = projector["fc2.bias"] + box @ torch.tensor([0.5, 0.5, 1.0, 1.0])  # of the one tile: the scene
    save_file({name: value.contiguous() for name, value in projector.items()}, folder.parent / "projector.safetensors")


def write_inputs(loaded: LoadedCheckpoint, image: Path, folder: Path) -> None:
    """Pixels, tokens, and what eager float32 gives for them."""
    inputs, config = folder / "inputs", loaded.config
    tokenizer = Tokenizer.from_folder(loaded.folder)
    _write_json(inputs / "text.json", [int(token) for token in tokenizer.encode(TEXT)])
    backend = EagerBackend(loaded.model)
    write_tiles(backend, image, inputs)

    packed = prepare_scene(image, config, SceneSettings()).packed
    if len(packed.grids) != 1:
        raise InputError(f"image {image} must be one tile for LLaVA, got {len(packed.grids)} tiles; pass one of 224 x 224 px")
    patch = config.vision.patch_size
    rows, columns = (int(side) for side in packed.grids[0])
    pixels = packed.patches.reshape(rows, columns, 3, patch, patch).transpose(2, 0, 3, 1, 4)
    np.save(inputs / "pixels.npy", np.ascontiguousarray(pixels.reshape(1, 3, rows * patch, columns * patch)))
    ids = prompt_ids(tokenizer, config, CAPTION_PROMPT, packed.num_tokens)
    text = Prompt(np.array(prompt_tokens(inputs, PROMPT, 0), np.int32))
    expected = {"answer": greedy(backend, text), "caption": None, "caption_without_modules": None}
    caption = Prompt(ids, tuple(backend.encode([packed])))
    expected["caption"] = greedy(backend, caption)
    model = loaded.model
    model.augmentation = model.experts = None
    model.config = dataclasses.replace(config, augmentation=None, experts=None)
    backend = EagerBackend(model)
    expected["caption_without_modules"] = greedy(backend, Prompt(ids, tuple(backend.encode([packed]))))
    described = {"image": str(image.resolve()), "token_ids": ids.tolist(), "image_token_id": config.image_token_id}
    _write_json(inputs / "caption.json", {**described, "expected": expected})


def greedy(backend: Backend, prompt: Prompt) -> list[int]:
    """`NEW_TOKENS` greedy tokens, the end token not heeded."""
    logits, cache = backend.prefill([prompt], len(prompt.token_ids) + NEW_TOKENS)
    tokens = [int(logits[0].argmax())]
    while len(tokens) < NEW_TOKENS:
        logits = backend.decode(cache, np.array(tokens[-1:], np.int32))
        tokens.append(int(logits[0].argmax()))
    return tokens


def write_tiles(backend: EagerBackend, image: Path, inputs: Path) -> None:
    """Uniform and mixed tiles of the pictures beside `image`, positions of their grids, and the last tap's states."""
    config = backend.config
    pictures = sorted(path for path in image.parent.iterdir() if path.suffix.lower() == image.suffix.lower())[:TILES]
    if len(pictures) < TILES:
        raise InputError(
            f"the folder of {image} must hold at least {TILES} pictures of its kind, got {len(pictures)}; pass another"
        )
    side = config.tile_grid
    order = np.random.default_rng(0).permutation(TILES)
    sides = [MIXED_SIDES[place] for place in order]
    uniform = [patches_of(picture, side, config) for picture in pictures]
    mixed = [patches_of(picture, own, config) for picture, own in zip(pictures, sides, strict=True)]
    _save_tiles(backend, inputs, "uniform", uniform, [side] * TILES)
    _save_tiles(backend, inputs, "mixed", mixed, sides)
    _write_json(inputs / "tiles.json", {"uniform": [side, side], "mixed": [[own, own] for own in sides]})
    for own in {side, *sides}:
        np.save(inputs / f"positions_{own}x{own}.npy", backend.model.vision_encoder._grid_positions(own, own).numpy())


def _save_tiles(backend: EagerBackend, inputs: Path, name: str, tiles: Sequence[F32], sides: Sequence[int]) -> None:
    lengths = [len(tile) for tile in tiles]
    grids = torch.tensor([[side, side] for side in sides])
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    taps, _ = backend.model.vision_encoder(torch.from_numpy(np.concatenate(tiles)), bounds, grids)
    states = taps[2].numpy()
    alike = len(set(lengths)) == 1
    np.save(inputs / f"{name}.npy", np.stack(tiles) if alike else np.concatenate(tiles))
    np.save(inputs / f"expected_{name}.npy", states.reshape(len(tiles), lengths[0], -1) if alike else states)


def patches_of(picture: Path, side: int, config: RsvlmConfig) -> F32:
    """[side², 3·p²] of a picture resized to side x side patches."""
    patch = config.vision.patch_size
    preprocess: PreprocessConfig = config.preprocess
    with Image.open(picture) as opened:
        resized = opened.convert("RGB").resize((side * patch, side * patch), Image.Resampling.BICUBIC)
    mean, std = np.array(preprocess.mean, np.float32), np.array(preprocess.std, np.float32)
    values = (np.asarray(resized, np.float32) / np.float32(255) - mean) / std
    cut = values.reshape(side, patch, side, patch, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(cut.reshape(side * side, -1), dtype=np.float32)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")

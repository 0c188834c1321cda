"""Packed tiles of any grid give the hidden states that transformers give each image alone: CLIP, SigLIP, DINOv2."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rsvlm_infer.models.load import load_checkpoint
from rsvlm_infer.models.rsvlm import RsvlmModel
from tests.proof.tiny_models import PATCH, TOLERANCE, patches_of, relative_error, rename, torch, vision_model

GRIDS = [(4, 4), (3, 5), (7, 2), (1, 1), (9, 9), (4, 4)]  # the trained grid is 4 x 4: all others interpolate the position table


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("taps", [None, (0, 3, 4)], ids=["default_taps", "embeddings_and_last"])
def test_hidden_states_equal_transformers(tmp_path: Path, family: str, taps: tuple[int, int, int] | None) -> None:
    theirs = vision_model(tmp_path, family)
    loaded = load_checkpoint(tmp_path)
    assert loaded.layout == "hf_vision"
    assert loaded.config.vision.taps == (1, 2, 4)
    encoder = loaded.model.vision_encoder
    if taps is not None:
        config = dataclasses.replace(loaded.config, vision=dataclasses.replace(loaded.config.vision, taps=taps))
        other = RsvlmModel(config)
        other.load_state_dict(loaded.model.state_dict())
        encoder = other.vision_encoder
    generator = torch.Generator().manual_seed(1)
    pictures = [torch.randn(3, rows * PATCH, columns * PATCH, generator=generator) for rows, columns in GRIDS]
    patches = torch.cat([patches_of(picture) for picture in pictures])
    cu_seqlens = torch.tensor([0, *(rows * columns for rows, columns in GRIDS)]).cumsum(0)
    options = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.inference_mode():
        ours, class_tokens = encoder(patches, cu_seqlens, torch.tensor(GRIDS))
        for index, picture in enumerate(pictures):
            states = theirs(pixel_values=picture[None], output_hidden_states=True, **options).hidden_states
            for level, tap in enumerate(taps or (1, 2, 4)):
                expected = states[tap][0]
                if family != "siglip":
                    assert relative_error(class_tokens[level][index].numpy(), expected[0].numpy()) <= TOLERANCE
                    expected = expected[1:]
                tile = ours[level][cu_seqlens[index] : cu_seqlens[index + 1]]
                assert relative_error(tile.numpy(), expected.numpy()) <= TOLERANCE


def test_names_with_and_without_the_model_prefix(tmp_path: Path) -> None:
    vision_model(tmp_path, "clip")
    bare = load_checkpoint(tmp_path).model.state_dict()
    rename(tmp_path, lambda name: name if name.startswith("vision_model.") else f"vision_model.{name}")
    prefixed = load_checkpoint(tmp_path).model.state_dict()
    assert bare.keys() == prefixed.keys()
    assert all(torch.equal(bare[name], prefixed[name]) for name in bare)

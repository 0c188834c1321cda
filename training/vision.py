"""Stage 1: the vision encoder's last blocks and the MS-VLAM heads, one InfoNCE per level plus closed-set classes.

Texts are frozen states of the language model, computed once, so every step compares its images with all sentences of the train
split, not only with those of its batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.layers.alignment import Alignment, most_salient
from rsvlm_infer.layers.vision_encoder import VisionEncoder
from rsvlm_infer.models.rsvlm import RsvlmModel

from .dataset import Labelled, read_rgb, varied
from .loop import Group, Loop


def same_length_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """varlen_tile_attention for tiles of one length, as one dense call: training batches are made that way."""
    tiles = cu_seqlens.numel() - 1

    def dense(x: Tensor) -> Tensor:
        return x.view(tiles, -1, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(dense(q), dense(k), dense(v), scale=scale)
    return out.transpose(1, 2).reshape(q.shape)


class TileBatch:
    """Square images of one size as the encoder reads them."""

    def __init__(self, config: RsvlmConfig) -> None:
        self.patch = config.vision.patch_size
        self.mean = torch.tensor(config.preprocess.mean).view(1, 3, 1, 1)
        self.std = torch.tensor(config.preprocess.std).view(1, 3, 1, 1)

    def __call__(self, images: list[npt.NDArray[np.uint8]]) -> tuple[Tensor, Tensor, Tensor]:
        """[n, n, 3] each -> patches [S, 3·p²], cu_seqlens [T + 1], grids [T, 2]."""
        pixels = torch.as_tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - self.mean) / self.std
        count, grid = len(images), pixels.shape[-1] // self.patch
        patches = pixels.reshape(count, 3, grid, self.patch, grid, self.patch).permute(0, 2, 4, 1, 3, 5)
        cu_seqlens = torch.arange(count + 1, dtype=torch.int32) * grid * grid
        return patches.reshape(count * grid * grid, -1), cu_seqlens, torch.full((count, 2), grid)


def encode(encoder: VisionEncoder, batch: tuple[Tensor, Tensor, Tensor], frozen: int) -> list[Tensor]:
    """VisionEncoder.forward with the first `frozen` blocks outside the graph: three taps [T, n, Dv]."""
    patches, cu_seqlens, grids = batch
    assert encoder.class_token is not None
    with torch.no_grad():
        shapes = [(int(rows), int(columns)) for rows, columns in grids.tolist()]
        x = encoder.patch_embed(patches) + torch.cat([encoder._grid_positions(*shape) for shape in shapes])
        x, with_class, rows = encoder._insert_class_tokens(x, cu_seqlens, cu_seqlens.diff())
        for block in encoder.blocks[:frozen]:
            x = block(x, with_class)
    states = {frozen: x}
    for index, block in enumerate(encoder.blocks[frozen:], frozen + 1):
        states[index] = x = block(x, with_class)
    return [states[tap][rows].view(len(grids), -1, x.shape[-1]) for tap in encoder.config.taps]


def level_embeddings(alignment: Alignment, taps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Taps of one-tile images [B, n, Dv] -> object [B, k, De], region [B, De], scene [B, De]."""
    assert alignment.object is not None and alignment.region is not None and alignment.scene is not None
    salient = torch.stack([most_salient(tile, alignment.config.salient_patches) for tile in taps[0]])
    return alignment.object(salient), alignment.region(taps[1].mean(dim=1)), alignment.scene(taps[2].mean(dim=1))


def level_scores(embeddings: tuple[Tensor, Tensor, Tensor], text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines [images, texts] of one-tile images at object, region and scene level, as the retrieval score defines them."""
    objects, regions, scenes = embeddings
    return objects.mean(dim=1) @ text.T, regions @ text.T, scenes @ text.T


class VisionData:
    """All images of the three train sets in memory, and batches of varied windows of them."""

    def __init__(self, paths: list[Path], owners: list[list[int]], themes: list[int], sets: dict[str, Labelled], seed: int):
        self.rng = np.random.default_rng(seed)
        self.captioned = [read_rgb(path) for path in paths]
        self.owners, self.themes = owners, themes
        self.sets = sets
        self.labelled = {name: [read_rgb(image.path) for image in part.images] for name, part in sets.items()}
        self._waiting: dict[str, list[int]] = {}

    def draw(self, name: str, count: int, pixels: int, least: float) -> tuple[list[int], list[npt.NDArray[np.uint8]]]:
        """The next `count` images of one set, each set shuffled anew when it is used up."""
        images = self.captioned if name == "rsicd" else self.labelled[name]
        waiting = self._waiting.setdefault(name, [])
        while len(waiting) < count:
            waiting.extend(self.rng.permutation(len(images)).tolist())
        rows, self._waiting[name] = waiting[:count], waiting[count:]
        return rows, [varied(images[row], pixels, self.rng, least) for row in rows]


def train_vision(
    model: RsvlmModel,
    settings: dict[str, Any],
    data: VisionData,
    states: dict[str, npt.NDArray[np.float32]],
    folder: Path,
) -> None:
    """Trains the blocks after `frozen_blocks` and the heads in place, weights in fp32, arithmetic in bf16.

    Args:
        states: "train": text states [N, Dl] in the order of `caption_table`; "rsicd" and each labelled set: states of its labels.
    """
    encoder, alignment = model.vision_encoder.float(), model.alignment
    assert alignment is not None
    frozen = settings["frozen_blocks"]
    for block in encoder.blocks:
        block.attention.varlen_tile_attention = same_length_attention  # type: ignore[union-attr]
    blocks = {f"vision_encoder.{k}": p for k, p in encoder.named_parameters() if k.startswith("blocks.")}
    blocks = {name: p for name, p in blocks.items() if int(name.split(".")[2]) >= frozen}
    heads = {f"alignment.{name}": parameter for name, parameter in alignment.named_parameters()}
    groups = [
        Group(blocks, settings["learning_rate"], settings["weight_decay"]),
        Group(heads, settings["head_learning_rate"], settings["weight_decay"]),
    ]
    loop = Loop(folder, "vision", groups, settings)
    data.rng = np.random.default_rng(settings["seed"] + loop.step)  # a resumed run does not repeat what was seen
    texts = {name: torch.as_tensor(part) for name, part in states.items()}
    tiles, grids, shares = TileBatch(model.config), settings["grids"], settings["batch_images"]
    for _ in loop:
        grid = int(data.rng.choice(list(map(int, grids)), p=list(grids.values())))
        drawn = {name: data.draw(name, count, grid * tiles.patch, settings["least_area"]) for name, count in shares.items()}
        batch = tiles([image for _, images in drawn.values() for image in images])
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            taps = encode(encoder, batch, frozen)
        embeddings = level_embeddings(alignment, [tap.float() for tap in taps])
        losses: dict[str, Tensor] = {}
        at = 0
        for name, (rows, _) in drawn.items():
            part = tuple(level[at : at + len(rows)] for level in embeddings)
            at += len(rows)
            labels = torch.tensor([(data.themes if name == "rsicd" else data.sets[name].classes)[row] for row in rows])
            scores = level_scores(part, alignment.embed_text(texts[name]))  # type: ignore[arg-type]
            losses[name] = sum(F.cross_entropy(alignment.config.logit_scale * score, labels) for score in scores)  # type: ignore[assignment]
            if name == "rsicd":
                every = alignment.embed_text(F.dropout(texts["train"], settings["dropout"]))
                losses["align"] = alignment_loss(alignment, part, every, [data.owners[row] for row in rows], data.rng)  # type: ignore[arg-type]
        loss = losses["align"] + sum(settings["class_weight"] * losses[name] for name in shares)
        loss.backward()
        loop.update(**{name: float(value.detach()) for name, value in losses.items()})


def alignment_loss(
    alignment: Alignment,
    embeddings: tuple[Tensor, Tensor, Tensor],
    texts: Tensor,
    owners: list[list[int]],
    rng: np.random.Generator,
) -> Tensor:
    """InfoNCE per level: each image against all `texts` [N, De], and one text of each image against the batch's images."""
    targets = texts.new_zeros((len(owners), len(texts)))
    for row, owned in enumerate(owners):
        targets[row, owned] = 1 / len(owned)
    chosen = torch.tensor([int(rng.choice(owned)) for owned in owners])
    owns = torch.tensor([[float(int(text) in owned) for owned in owners] for text in chosen])  # [texts, images]
    owns = owns / owns.sum(dim=1, keepdim=True)
    loss = texts.new_zeros(())
    for score in level_scores(embeddings, texts):
        scaled = alignment.config.logit_scale * score
        loss = loss + F.cross_entropy(scaled, targets) + F.cross_entropy(scaled[:, chosen].T, owns)
    return loss

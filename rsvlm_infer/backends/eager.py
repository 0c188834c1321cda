"""The eager PyTorch backend: the reference that every other backend is measured against. Knows no text and no raster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config import LEVELS, RsvlmConfig
from ..contract import tap_names
from ..errors import BackendError, InputError
from ..imagery.pack import PackedScene
from ..imagery.plan import anyres_kept_window
from ..knowledge.store import KnowledgeBase
from ..layers.language_model import KvCache
from ..layers.projector import assemble_anyres
from ..models.load import load_checkpoint
from ..models.rsvlm import RsvlmModel
from .base import Embeddings, ImageFeatures, Prompt, Query

# Tiles are encoded in chunks of about this many patches: at ViT-L width the widest activation then stays near 270 MB.
CHUNK_PATCHES = 16384

F32 = npt.NDArray[np.float32]
LevelEmbeddings = tuple[Tensor, Tensor, Tensor]  # object [T, k, De], region [T, De], scene [De]
SceneCues = tuple[list[Tensor], Tensor]  # cues of each level, three [K, De]; words of the question [Q, Dl]


@dataclass(frozen=True)
class _Handle:
    tokens: Tensor | None  # [Nv, Dl]
    embeddings: Embeddings | None


class EagerBackend:
    """`Backend` in plain PyTorch, where the weights are: on the CPU unless a child moves them."""

    name = "eager"

    def __init__(self, model: RsvlmModel, precision: str = "float32", knowledge: KnowledgeBase | None = None) -> None:
        self.model = model.eval()
        self.precision = precision
        self.config: RsvlmConfig = model.config
        self.knowledge = knowledge
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype

    @classmethod
    def load(cls, path: Path, precision: str) -> EagerBackend:
        """From a checkpoint folder."""
        loaded = load_checkpoint(path, dtype=precision)
        knowledge = None if loaded.knowledge_folder is None else KnowledgeBase.load(loaded.knowledge_folder)
        if knowledge is not None and knowledge.embedder is not None:
            knowledge.require_embedder(loaded.embedder)
        return cls(loaded.model, precision, knowledge)

    @torch.inference_mode()
    def encode(self, scenes: Sequence[PackedScene], queries: Sequence[Query | None] | None = None) -> list[ImageFeatures]:
        """Scenes -> visual tokens; see `Backend.encode`. All tiles of all scenes go through the encoder as one packed sequence."""
        if len(scenes) == 0:
            return []
        start = time.perf_counter()
        taps, aligned = self.encode_levels(scenes)
        tokens, cues, augment_ms = self.visual_tokens(taps, aligned, scenes, queries or [None] * len(scenes))
        encode_ms = (time.perf_counter() - start) * 1e3 - augment_ms
        return [
            ImageFeatures(
                handle=_Handle(token, None if align is None else Embeddings(*(_numpy(part) for part in align))),
                num_tokens=0 if token is None else len(token),
                cues=cue,
                encode_ms=encode_ms / len(scenes),
                augment_ms=augment_ms / len(scenes) if self.model.augmentation is not None else 0.0,
            )
            for token, align, cue in zip(tokens, aligned, cues, strict=True)
        ]

    def encode_levels(self, scenes: Sequence[PackedScene]) -> tuple[list[Tensor], list[LevelEmbeddings | None]]:
        """Scenes -> three taps [S, Dv] of all their patches, and each scene's embeddings (None without alignment)."""
        taps, class_tokens, tile_counts, patch_counts = self._encode_tiles(scenes)
        alignment = self.model.alignment
        if alignment is None:
            return taps, [None] * len(scenes)
        per_scene_taps = zip(*(tap.split_with_sizes(patch_counts) for tap in taps), strict=True)
        per_scene_class = zip(
            *(tokens.split_with_sizes(tile_counts if len(tokens) else [0] * len(scenes)) for tokens in class_tokens),
            strict=True,
        )
        return taps, [
            alignment(list(scene_taps), list(scene_class), torch.from_numpy(scene.cu_seqlens))
            for scene, scene_taps, scene_class in zip(scenes, per_scene_taps, per_scene_class, strict=True)
        ]

    def visual_tokens(
        self,
        taps: list[Tensor],
        aligned: Sequence[LevelEmbeddings | None],
        scenes: Sequence[PackedScene],
        queries: Sequence[Query | None],
    ) -> tuple[list[Tensor | None], list[tuple[str, ...]], float]:
        """What `encode_levels` gave -> visual tokens [Nv, Dl] and cue texts per scene, and the milliseconds of augmentation.

        Tokens are None without a projector. Gradients flow: training calls this too.
        """
        start = time.perf_counter()
        cues, texts = self._batch_cues(aligned, queries)
        augmented = self._augment(taps, cues, scenes)
        augment_ms = (time.perf_counter() - start) * 1e3
        return self._projected(taps, augmented, scenes), texts, augment_ms

    # Stages of `encode` one by one; see `StagedBackend`.

    @torch.inference_mode()
    def encode_tiles(self, scenes: Sequence[PackedScene]) -> list[dict[str, F32]]:
        """See `StagedBackend.encode_tiles`."""
        taps, class_tokens, tile_counts, patch_counts = self._encode_tiles(scenes)
        parts = [tap.split_with_sizes(patch_counts) for tap in taps]
        found = [{name: _numpy(part[i]) for name, part in zip(tap_names(), parts, strict=True)} for i in range(len(scenes))]
        if len(class_tokens[2]):
            for own, tokens in zip(found, class_tokens[2].split_with_sizes(tile_counts), strict=True):
                own["class_tokens"] = _numpy(tokens)
        return found

    @torch.inference_mode()
    def align(self, taps: dict[str, F32], scene: PackedScene) -> Embeddings | None:
        """See `StagedBackend.align`."""
        if self.model.alignment is None:
            return None
        width = taps[tap_names()[0]].shape[1]
        class_tokens = self._features(taps.get("class_tokens", np.zeros((0, width), np.float32)))
        found = self.model.alignment(self._named(taps), [class_tokens] * len(LEVELS), torch.from_numpy(scene.cu_seqlens))
        return Embeddings(*(_numpy(part) for part in found))

    @torch.inference_mode()
    def find_cues(self, embeddings: Embeddings | None, query: Query | None) -> tuple[SceneCues | None, tuple[str, ...]]:
        """See `StagedBackend.find_cues`."""
        return (None, ()) if self.model.augmentation is None else self._cues(embeddings, query)

    @torch.inference_mode()
    def bridge(self, taps: dict[str, F32], scene: PackedScene, cues: SceneCues | None) -> F32 | None:
        """See `StagedBackend.bridge`."""
        named = self._named(taps)
        (tokens,) = self._projected(named, self._augment(named, [] if cues is None else [cues], [scene]), [scene])
        return None if tokens is None else _numpy(tokens)

    def features_of(self, tokens: F32) -> ImageFeatures:
        """See `StagedBackend.features_of`."""
        return ImageFeatures(_Handle(self._features(tokens), None), len(tokens))

    def _named(self, taps: dict[str, F32]) -> list[Tensor]:
        return [self._features(taps[name]) for name in tap_names()]

    def _features(self, values: F32) -> Tensor:
        return self._tensor(np.array(values, np.float32)).to(self.dtype)  # a copy: mapped files cannot be written to

    def _encode_tiles(self, scenes: Sequence[PackedScene]) -> tuple[list[Tensor], list[Tensor], list[int], list[int]]:
        """Three taps [S, Dv], three class tokens [T or 0, Dv], tiles per scene, patches per scene."""
        patches = self._tensor(np.concatenate([scene.patches for scene in scenes]))  # [S, 3·p²]
        grids = torch.from_numpy(np.concatenate([scene.grids for scene in scenes]))  # [T, 2], read on the host only
        bounds = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(scene.cu_seqlens) for scene in scenes]))])  # [T + 1]
        parts = []
        first = 0
        while first < len(grids):
            last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + CHUNK_PATCHES, side="right")) - 1)
            cu_seqlens = self._tensor((bounds[first : last + 1] - bounds[first]).astype(np.int32))
            parts.append(self.model.vision_encoder(patches[bounds[first] : bounds[last]], cu_seqlens, grids[first:last]))
            first = last
        taps = [torch.cat([part[0][level] for part in parts]) for level in range(len(LEVELS))]
        class_tokens = [torch.cat([part[1][level] for part in parts]) for level in range(len(LEVELS))]
        return taps, class_tokens, [len(scene.grids) for scene in scenes], [len(scene.patches) for scene in scenes]

    def _batch_cues(
        self, aligned: Sequence[LevelEmbeddings | None], queries: Sequence[Query | None]
    ) -> tuple[list[SceneCues], list[tuple[str, ...]]]:
        """What augmentation reads beside the taps, and the cues' texts; nothing for a model without it."""
        if self.model.augmentation is None:
            return [], [()] * len(aligned)
        found = []
        for scene, query in zip(aligned, queries, strict=True):
            searched = None if self.knowledge is None or scene is None else Embeddings(*(_numpy(part) for part in scene))
            found.append(self._cues(searched, query))
        return [cues for cues, _ in found], [texts for _, texts in found]

    def _cues(self, embeddings: Embeddings | None, query: Query | None) -> tuple[SceneCues, tuple[str, ...]]:
        settings, alignment, language = self.config.augmentation, self.config.alignment, self.model.language_model
        assert settings is not None  # a config with augmentation has them all
        assert alignment is not None
        assert language is not None
        vectors: list[Tensor] = []
        texts: list[str] = []
        for level, name in enumerate(LEVELS):
            visual = np.zeros(0, np.float32) if embeddings is None else getattr(embeddings, name)
            found = torch.zeros((0, alignment.embed_size), dtype=self.dtype, device=self.device)
            if self.knowledge is not None and visual.size:
                embedding = None if query is None else query.embedding
                flat = visual.reshape(-1, visual.shape[-1])
                _, ids, names = self.knowledge.search(level, flat, embedding, settings.cues_per_level, settings.query_weight)
                found = self._features(self.knowledge.embeddings[ids].astype(np.float32))
                texts += names
            vectors.append(found)
        words = np.zeros(0, np.int32) if query is None else query.token_ids
        return (vectors, language.embed_tokens(self._tensor(words).long())), tuple(texts)

    def _augment(self, taps: list[Tensor], cues: Sequence[SceneCues], scenes: Sequence[PackedScene]) -> list[Tensor]:
        """H_l for all scenes. A model without augmentation gives F_l back untouched."""
        if self.model.augmentation is None:
            return taps
        bounds = self._tensor(np.cumsum([0, *(scene.plan.num_patches for scene in scenes)], dtype=np.int32))
        augmented: list[Tensor] = self.model.augmentation(
            taps, [vectors for vectors, _ in cues], [words for _, words in cues], bounds
        )
        return augmented

    def _projected(self, taps: list[Tensor], augmented: list[Tensor], scenes: Sequence[PackedScene]) -> list[Tensor | None]:
        """Visual tokens [Nv, Dl] of each scene, None without a projector."""
        if self.model.projector is None:
            return [None] * len(scenes)
        features = self.model.bridge(taps, augmented).split_with_sizes([scene.plan.num_patches for scene in scenes])
        return [self._scene_tokens(part, scene) for part, scene in zip(features, scenes, strict=True)]

    def _scene_tokens(self, features: Tensor, scene: PackedScene) -> Tensor:
        """Y of one scene [S, Dv] -> [Nv, Dl]: base tile, then leaves in raster order."""
        assert self.model.projector is not None
        boxes = self._tensor(scene.boxes) if scene.plan.tiling == "dris" else None
        tiles = self.model.projector(features, torch.from_numpy(scene.grids), boxes)
        if scene.plan.tiling == "anyres":
            if self.model.image_newline is None:
                raise BackendError(
                    'tiling "anyres" needs a checkpoint with image_newline, this one has none; use tiling "fixed" or "dris"'
                )
            kept = anyres_kept_window(scene.plan, self.config)
            side = self.config.tile_grid // self.model.projector.pixel_shuffle
            tokens = assemble_anyres(tiles, scene.plan.layout, side, kept, self.model.image_newline)
        else:
            tokens = torch.cat(tiles)
        assert len(tokens) == scene.num_tokens  # count_tokens is the only source of placeholder counts
        return tokens

    @torch.inference_mode()
    def prefill(self, sequences: Sequence[Prompt], capacity: int) -> tuple[npt.NDArray[np.float32], KvCache]:
        """Prompts -> next-token logits [B, V] and the cache; see `Backend.prefill`.

        Rows are padded on the right; a token's place is its index in its own row, so a row never notices its neighbours.
        """
        language = self._language()
        longest = max(len(sequence.token_ids) for sequence in sequences)
        if capacity < longest:
            raise InputError(f"capacity must be at least the longest prompt ({longest} tokens), got {capacity}; raise it")
        embeds = torch.stack([self._prompt_embeds(sequence, longest) for sequence in sequences])  # [B, N, Dl]
        lengths = torch.tensor([len(sequence.token_ids) for sequence in sequences], device=self.device)
        positions = torch.arange(longest, device=self.device).expand(len(sequences), -1)
        cache = KvCache.empty(language.config, len(sequences), capacity, embeds)
        hidden = language(embeds, positions, cache)
        cache.lengths = lengths
        return _numpy(language.logits(hidden[torch.arange(len(sequences), device=self.device), lengths - 1])), cache

    def _prompt_embeds(self, sequence: Prompt, length: int) -> Tensor:
        """[length, Dl]: word embeddings with visual tokens in the places of the image placeholders, zeros after the end."""
        language = self._language()
        ids = self._tensor(np.asarray(sequence.token_ids, dtype=np.int64))
        places = ids == self.config.image_token_id
        expected = sum(image.num_tokens for image in sequence.images)
        if int(places.sum()) != expected:
            raise InputError(
                f"token_ids must hold one image placeholder ({self.config.image_token_id}) per visual token, expected {expected}, "
                f"got {int(places.sum())}; build the prompt with count_tokens(plan)"
            )
        embeds = language.embed_tokens(ids.masked_fill(places, 0))  # [n, Dl]
        if expected:
            embeds[places] = torch.cat([image.handle.tokens for image in sequence.images])
        return torch.nn.functional.pad(embeds, (0, 0, 0, length - len(ids)))

    @torch.inference_mode()
    def decode(self, cache: KvCache, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """One token per row -> logits [B, V]; see `Backend.decode`."""
        language = self._language()
        if int(cache.lengths.max()) >= cache.keys.shape[2]:
            raise InputError(f"the cache holds {cache.keys.shape[2]} tokens a row and is full; prefill with a larger capacity")
        embeds = language.embed_tokens(self._tensor(np.asarray(token_ids, dtype=np.int64))[:, None])  # [B, 1, Dl]
        hidden = language(embeds, cache.lengths[:, None], cache)
        cache.lengths = cache.lengths + 1
        return _numpy(language.logits(hidden[:, 0]))

    def keep(self, cache: KvCache, rows: Sequence[int]) -> KvCache:
        """See `Backend.keep`."""
        return cache.keep(torch.tensor(list(rows), dtype=torch.long, device=self.device))

    def embed_image(self, features: ImageFeatures) -> Embeddings:
        """See `Backend.embed_image`."""
        embeddings: Embeddings | None = features.handle.embeddings
        if embeddings is None:
            raise BackendError(
                "this checkpoint has no alignment heads, so it cannot embed images; use one whose config has alignment"
            )
        return embeddings

    @torch.inference_mode()
    def embed_text(self, token_ids: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float32]:
        """Texts -> [B, De]; see `Backend.embed_text`."""
        if self.model.alignment is None:
            raise BackendError(
                "this checkpoint has no alignment heads, so it cannot embed text; use one whose config has alignment"
            )
        if any(len(ids) == 0 for ids in token_ids):
            raise InputError("token_ids must hold at least one token per text, got an empty text; give every text a word")
        lengths = torch.tensor([len(ids) for ids in token_ids], device=self.device)
        padded = torch.zeros((len(token_ids), max(len(ids) for ids in token_ids)), dtype=torch.long, device=self.device)
        for row, ids in enumerate(token_ids):
            padded[row, : len(ids)] = self._tensor(np.asarray(ids, dtype=np.int64))
        return _numpy(self.model.embed_text(padded, lengths))

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        """A numpy array on the device of the weights."""
        return torch.from_numpy(array).to(self.device)

    def _language(self) -> Any:
        if self.model.language_model is None:
            raise BackendError(
                "this checkpoint has no language model (retrieval only); use embed_image and embed_text, or another one"
            )
        return self.model.language_model


def _numpy(x: Tensor) -> npt.NDArray[np.float32]:
    return x.float().cpu().numpy()

"""The model in C++ over a memory-mapped package: numpy and `rsvlm_infer._C`, no torch anywhere. Knows no text and no raster.

What was computed for one question is kept for the next one: the encoder's states of the last scenes, and keys and values of the
last prompts, of which a new prompt takes the part that it begins with. Both give the same bits as computing them again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import LEVELS, RsvlmConfig
from ..contract import tap_names
from ..errors import BackendError, InputError
from ..imagery.pack import PackedScene
from ..imagery.plan import anyres_kept_window
from ..knowledge.store import KnowledgeBase
from ..models.native_package import NativePackage
from .base import Embeddings, ImageFeatures, Prompt, Query
from .positions import resize_table

F32 = npt.NDArray[np.float32]

KEPT_STATE_BYTES = 64 << 20  # of encoder states with their pixels, and of keys and values: some twenty small scenes
SHORTEST_PREFIX = 16  # tokens; copying fewer saves nothing that one could measure
_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


@dataclass(frozen=True)
class _Handle:
    tokens: F32 | None  # [Nv, Dl]
    embeddings: Embeddings | None


@dataclass(frozen=True)
class _Levels:
    """What the encoder gave for one scene: taps [S, Dv] and class tokens [T or 0, Dv], three each."""

    taps: list[F32]
    class_tokens: list[F32]


@dataclass(frozen=True)
class _KeptScene:
    """Levels and what they were computed from: comparing pixels takes an eighth of the time of hashing them."""

    patches: F32  # [S, 3 p p]
    grids: npt.NDArray[np.int32]  # [T, 2]
    levels: _Levels

    @property
    def nbytes(self) -> int:
        return self.patches.nbytes + sum(part.nbytes for part in (*self.levels.taps, *self.levels.class_tokens))

    def shows(self, scene: PackedScene) -> bool:
        """Bit for bit, so that not-a-numbers count too."""
        return np.array_equal(self.grids, scene.grids) and np.array_equal(
            self.patches.view(np.int32), np.ascontiguousarray(scene.patches, np.float32).view(np.int32)
        )


@dataclass
class NativeCache:
    """Rows of a KV cache: which ones, and how long each is. `store` may be shared with caches that were kept from this one."""

    store: Any  # _C.KvCache
    rows: npt.NDArray[np.int64]  # [B]
    lengths: npt.NDArray[np.int64]  # [B]


@dataclass(frozen=True)
class _Prefix:
    """A prompt whose keys and values still lie in a row of `store`."""

    embeddings: F32  # [n, Dl]
    store: Any
    row: int


class NativeBackend:
    """`Backend` over a native package."""

    name = "native"

    def __init__(self, package: NativePackage, knowledge: KnowledgeBase | None = None) -> None:
        from rsvlm_infer import _C

        self.package = package
        self.precision = package.precision
        self.config: RsvlmConfig = package.config
        self.knowledge = knowledge
        self.reused_tokens = 0  # of prompts, since the backend was made
        self._scene_model = _C.NativeSceneModel(
            weights=package.weights, settings=_scene_settings(package.config), int8_inputs=package.int8_inputs
        )
        self._decoder = None if package.config.language is None else _make_decoder(package, package.int8_inputs)
        self._text_decoder: Any = None  # made when the first text is embedded
        self._positions: dict[tuple[int, int], F32] = {}
        self._scenes: list[_KeptScene] = []  # the last one used comes last
        self._prefixes: list[_Prefix] = []

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> NativeBackend:
        """From a package folder; `verify` reads all files and compares their sha256."""
        package = NativePackage.open(path, verify=verify)
        knowledge = None if package.knowledge_folder is None else KnowledgeBase.load(package.knowledge_folder)
        if knowledge is not None and knowledge.embedder is not None:
            knowledge.require_embedder(package.embedder)
        return cls(package, knowledge)

    def forget(self) -> None:
        """Drops what is kept between questions; the next answer is computed from its image on, as the first one was."""
        self._scenes = []
        self._prefixes = []

    def encode(self, scenes: Sequence[PackedScene], queries: Sequence[Query | None] | None = None) -> list[ImageFeatures]:
        """Scenes -> visual tokens; see `Backend.encode`."""
        features = []
        for scene, query in zip(scenes, queries or [None] * len(scenes), strict=True):
            start = time.perf_counter()
            levels = self._encode_levels(scene)
            embeddings = self._align(levels, scene)
            encoded = time.perf_counter()
            cues, texts = self._find_cues(embeddings, query)
            searched = time.perf_counter()
            tokens = None if self.config.projector is None else self._visual_tokens(levels, cues, query, scene)
            augment_ms = (searched - encoded) * 1e3 if self.config.augmentation is not None else 0.0
            features.append(
                ImageFeatures(
                    handle=_Handle(tokens, embeddings),
                    num_tokens=0 if tokens is None else len(tokens),
                    cues=texts,
                    encode_ms=(time.perf_counter() - start) * 1e3 - augment_ms,
                    augment_ms=augment_ms,
                )
            )
        return features

    def _encode_levels(self, scene: PackedScene) -> _Levels:
        """The encoder's states of a scene, from the last scenes when it is one of them."""
        for at, kept in enumerate(self._scenes):
            if kept.shows(scene):
                self._scenes.append(self._scenes.pop(at))
                return kept.levels
        states = self._scene_model.encode(
            patches=scene.patches,
            positions=[self._grid_positions(*grid) for grid in scene.grids.tolist()],
            bounds=scene.cu_seqlens.tolist(),
        )
        levels = _Levels(states[:3], states[3:])
        self._scenes.append(_KeptScene(self._scene_model.copy_patches(patches=scene.patches), scene.grids.copy(), levels))
        while len(self._scenes) > 1 and sum(kept.nbytes for kept in self._scenes) > KEPT_STATE_BYTES:
            del self._scenes[0]
        return levels

    # Stages of `encode` one by one, as `OnnxBackend` has them: `rsvlm verify` gives each the reference's own inputs.

    def encode_tiles(self, scenes: Sequence[PackedScene]) -> list[dict[str, F32]]:
        """Each scene's taps [S, Dv], and class tokens [T, Dv] where the family has them."""
        found = []
        for scene in scenes:
            levels = self._encode_levels(scene)
            taps = dict(zip(tap_names(), levels.taps, strict=True))
            found.append(taps | ({"class_tokens": levels.class_tokens[2]} if self.config.vision.class_token else {}))
        return found

    def align(self, taps: dict[str, F32], scene: PackedScene) -> Embeddings | None:
        """Taps of one scene -> its embeddings; None without alignment."""
        return self._align(self._named_levels(taps), scene)

    def find_cues(self, embeddings: Embeddings | None, query: Query | None) -> tuple[Any, tuple[str, ...]]:
        """What `bridge` takes, and the cues' texts."""
        cues, texts = self._find_cues(embeddings, query)
        return (cues, query), texts

    def bridge(self, taps: dict[str, F32], scene: PackedScene, cues: Any) -> F32 | None:
        """[Nv, Dl]: base tile, then leaves in raster order; None without a projector."""
        vectors, query = cues
        return None if self.config.projector is None else self._visual_tokens(self._named_levels(taps), vectors, query, scene)

    def embed_words(self, ids: npt.NDArray[Any]) -> F32:
        """[n] -> [n, Dl]."""
        embedded: F32 = self._language().embed(token_ids=np.asarray(ids, np.int32))
        return embedded

    def features_of(self, tokens: F32) -> ImageFeatures:
        """Visual tokens [Nv, Dl] that were made elsewhere, for a prompt."""
        return ImageFeatures(_Handle(np.ascontiguousarray(tokens, np.float32), None), len(tokens))

    @staticmethod
    def _named_levels(taps: dict[str, F32]) -> _Levels:
        tokens = taps.get("class_tokens", np.zeros((0, taps[tap_names()[0]].shape[1]), np.float32))
        return _Levels([np.ascontiguousarray(taps[name], np.float32) for name in tap_names()], [tokens] * len(LEVELS))

    def _grid_positions(self, rows: int, columns: int) -> F32:
        if (rows, columns) not in self._positions:
            vision = self.config.vision
            table = self.package.values("vision_encoder.position_table")
            assert table is not None  # the scene model has found the other weights of the encoder
            square = table.reshape(-1, vision.hidden_size)
            resized = resize_table(square, vision.position_grid, rows, columns, vision.interpolation)
            self._positions[rows, columns] = resized
        return self._positions[rows, columns]

    def _align(self, levels: _Levels, scene: PackedScene) -> Embeddings | None:
        if self.config.alignment is None:
            return None
        token = levels.class_tokens[2][:1]
        return Embeddings(*self._scene_model.align(taps=levels.taps, scene_class_token=token, bounds=scene.cu_seqlens.tolist()))

    def _find_cues(self, embeddings: Embeddings | None, query: Query | None) -> tuple[list[F32], tuple[str, ...]]:
        """Cue vectors [K, De] of each level, and their texts."""
        width = 0 if self.config.alignment is None else self.config.alignment.embed_size
        vectors = [np.zeros((0, width), np.float32) for _ in LEVELS]
        texts: list[str] = []
        settings = self.config.augmentation
        if settings is None or embeddings is None or self.knowledge is None:
            return vectors, ()
        for level, visual in enumerate((embeddings.object, embeddings.region, embeddings.scene)):
            if visual.size:
                flat = visual.reshape(-1, visual.shape[-1])
                embedding = None if query is None else query.embedding
                _, ids, names = self.knowledge.search(level, flat, embedding, settings.cues_per_level, settings.query_weight)
                vectors[level] = self.knowledge.embeddings[ids].astype(np.float32)
                texts += names
        return vectors, tuple(texts)

    def _visual_tokens(self, levels: _Levels, cues: list[F32], query: Query | None, scene: PackedScene) -> F32:
        """[Nv, Dl]: base tile, then leaves in raster order."""
        assert self.config.projector is not None
        if self.config.augmentation is None and self.config.experts is None:
            features = levels.taps[2]
        else:
            language = self._language()
            ids = np.zeros(0, np.int32) if query is None else np.asarray(query.token_ids, np.int32)
            features = self._scene_model.bridge(taps=levels.taps, cues=cues, query=language.embed(token_ids=ids))
        tokens: F32 = self._scene_model.project(features=features, grids=scene.grids.tolist())
        tiling, side = scene.plan.tiling, self.config.projector.pixel_shuffle
        lengths = scene.grids.prod(axis=1) // side**2
        box = self.package.values("projector.box.weight")
        if tiling == "dris" and box is not None:
            weight = box.reshape(-1, 4)  # [Dl, 4]
            offsets = sum(scene.boxes[:, i : i + 1] * weight[:, i] for i in range(4))  # [T, Dl]
            tokens = tokens + np.repeat(np.asarray(offsets, np.float32), lengths, axis=0)
        if tiling == "anyres":
            newline = self.package.values("image_newline")
            if newline is None:
                raise BackendError(
                    'tiling "anyres" needs a checkpoint with image_newline, this one has none; use tiling "fixed" or "dris"'
                )
            kept = anyres_kept_window(scene.plan, self.config)
            tokens = _assemble_anyres(tokens, scene.plan.layout, self.config.tile_grid // side, kept, newline)
        assert len(tokens) == scene.num_tokens  # count_tokens is the only source of placeholder counts
        return tokens

    def prefill(self, sequences: Sequence[Prompt], capacity: int) -> tuple[F32, NativeCache]:
        """Prompts -> next-token logits [B, V] and the cache; see `Backend.prefill`."""
        language = self._language()
        longest = max(len(sequence.token_ids) for sequence in sequences)
        if capacity < longest:
            raise InputError(f"capacity must be at least the longest prompt ({longest} tokens), got {capacity}; raise it")
        embeddings = [self._prompt_embeddings(sequence) for sequence in sequences]
        store = language.cache(rows=len(sequences), capacity=capacity)
        starts = [self._copy_prefix(own, store, row) for row, own in enumerate(embeddings)]
        lengths = np.array([len(own) for own in embeddings], np.int64)
        rows = np.arange(len(sequences), dtype=np.int64)
        states = language.prefill(
            cache=store,
            rows=rows,
            positions=np.array(starts, np.int64),
            lengths=lengths - np.array(starts),
            embeddings=np.concatenate([own[start:] for own, start in zip(embeddings, starts, strict=True)]),
        )
        self._remember(embeddings, store)
        return language.logits(states=states), NativeCache(store, rows, lengths)

    def _prompt_embeddings(self, sequence: Prompt) -> F32:
        """[n, Dl]: word embeddings with visual tokens in the places of the image placeholders."""
        ids = np.asarray(sequence.token_ids, dtype=np.int32)
        places = ids == self.config.image_token_id
        expected = sum(image.num_tokens for image in sequence.images)
        if int(places.sum()) != expected:
            raise InputError(
                f"token_ids must hold one image placeholder ({self.config.image_token_id}) per visual token, expected {expected}, "
                f"got {int(places.sum())}; build the prompt with count_tokens(plan)"
            )
        embeddings: F32 = self._language().embed(token_ids=np.where(places, 0, ids))
        if expected:
            embeddings[places] = np.concatenate([image.handle.tokens for image in sequence.images])
        return embeddings

    def _copy_prefix(self, embeddings: F32, store: Any, row: int) -> int:
        """Copies keys and values of the longest beginning that a kept prompt shares; how many tokens that are."""
        best, source = 0, None
        for prefix in self._prefixes:
            shared = min(len(prefix.embeddings), len(embeddings) - 1)  # the last token must run: its state is asked for
            differs = (prefix.embeddings[:shared] != embeddings[:shared]).any(axis=1)
            shared = int(differs.argmax()) if differs.any() else shared
            if shared > best:
                best, source = shared, prefix
        if source is None or best < SHORTEST_PREFIX:
            return 0
        store.copy_row(source=source.store, source_row=source.row, row=row, length=best)
        self.reused_tokens += best
        return best

    def _remember(self, embeddings: Sequence[F32], store: Any) -> None:
        """Keeps these prompts instead of the last ones, unless their cache is large."""
        language = self.config.language
        assert language is not None
        place = language.num_layers * language.num_kv_heads * language.head_dim * 2 * (4 if self.precision == "fp32" else 2)
        fits = place * store.rows * store.capacity <= KEPT_STATE_BYTES
        self._prefixes = [_Prefix(own, store, row) for row, own in enumerate(embeddings)] if fits else []

    def decode(self, cache: NativeCache, token_ids: npt.NDArray[np.int32]) -> F32:
        """One token per row -> logits [B, V]; see `Backend.decode`."""
        language = self._language()
        if int(cache.lengths.max()) >= cache.store.capacity:
            raise InputError(f"the cache holds {cache.store.capacity} tokens a row and is full; prefill with a larger capacity")
        ids = np.asarray(token_ids, np.int32)
        logits: F32 = language.decode(cache=cache.store, rows=cache.rows, positions=cache.lengths, token_ids=ids)
        cache.lengths = cache.lengths + 1
        return logits

    def decode_greedy(self, cache: NativeCache, token_ids: npt.NDArray[np.int32], steps: int) -> npt.NDArray[np.int32]:
        """Feeds one token to every row, then its own choices; ids [B, steps]; see `GreedyBackend`. Logits stay where they are."""
        language = self._language()
        if int(cache.lengths.max()) + steps > cache.store.capacity:
            raise InputError(f"the cache holds {cache.store.capacity} tokens a row and is full; prefill with a larger capacity")
        chosen = np.empty((len(cache.rows), steps), np.int32)
        fed = np.asarray(token_ids, np.int32)
        for step in range(steps):
            fed, best = language.decode_best(cache=cache.store, rows=cache.rows, positions=cache.lengths, token_ids=fed)
            if not np.isfinite(best).all():
                raise BackendError(f"the best logit must be a finite number, got {best.tolist()}; use precision fp32")
            cache.lengths = cache.lengths + 1
            chosen[:, step] = fed
        return chosen

    def decode_drafts(self, cache: NativeCache, token_ids: Sequence[Sequence[int]]) -> list[F32]:
        """Several tokens of each row in one step; see `DraftingBackend`. Their bits are those of single steps."""
        counts = np.array([len(tokens) for tokens in token_ids], np.int64)
        if int((cache.lengths + counts).max()) > cache.store.capacity:
            raise InputError(f"the cache holds {cache.store.capacity} tokens a row and is full; prefill with a larger capacity")
        ends = counts.cumsum()
        places = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        logits: F32 = self._language().decode(
            cache=cache.store,
            rows=np.repeat(cache.rows, counts),
            positions=np.repeat(cache.lengths, counts) + places,
            token_ids=np.array([token for tokens in token_ids for token in tokens], np.int32),
        )
        return np.split(logits, ends[:-1])

    def accept(self, cache: NativeCache, counts: Sequence[int]) -> None:
        """See `DraftingBackend`: what was refused lies behind the row's end, where the next step writes."""
        cache.lengths = cache.lengths + np.array(list(counts), np.int64)

    def keep(self, cache: NativeCache, rows: Sequence[int]) -> NativeCache:
        """See `Backend.keep`: nothing is copied unless a row repeats."""
        chosen = np.array(list(rows), dtype=np.int64)
        if len(set(chosen.tolist())) == len(chosen):
            return NativeCache(cache.store, cache.rows[chosen], cache.lengths[chosen])
        store = self._language().cache(rows=len(chosen), capacity=cache.store.capacity)
        for row, source in enumerate(chosen.tolist()):
            store.copy_row(source=cache.store, source_row=int(cache.rows[source]), row=row, length=int(cache.lengths[source]))
        return NativeCache(store, np.arange(len(chosen), dtype=np.int64), cache.lengths[chosen])

    def embed_image(self, features: ImageFeatures) -> Embeddings:
        """See `Backend.embed_image`."""
        embeddings: Embeddings | None = features.handle.embeddings
        if embeddings is None:
            raise BackendError(
                "this checkpoint has no alignment heads, so it cannot embed images; use one whose config has alignment"
            )
        return embeddings

    def embed_text(self, token_ids: Sequence[npt.NDArray[np.int32]]) -> F32:
        """Texts -> [B, De]; see `Backend.embed_text`."""
        if self.config.alignment is None:
            raise BackendError(
                "this checkpoint has no alignment heads, so it cannot embed text; use one whose config has alignment"
            )
        embedded: F32 = self._scene_model.embed_states(states=self.text_states(token_ids))
        return embedded

    def text_states(self, token_ids: Sequence[npt.NDArray[np.int32]]) -> F32:
        """The language model's states [B, Dl] after each text's last token, which the text projection reads."""
        if any(len(ids) == 0 for ids in token_ids):
            raise InputError("token_ids must hold at least one token per text, got an empty text; give every text a word")
        language = self._text_language()
        lengths = np.array([len(ids) for ids in token_ids], np.int64)
        states: F32 = language.prefill(
            cache=language.cache(rows=len(token_ids), capacity=int(lengths.max())),
            rows=np.arange(len(token_ids), dtype=np.int64),
            positions=np.zeros(len(token_ids), np.int64),
            lengths=lengths,
            embeddings=language.embed(token_ids=np.concatenate(token_ids).astype(np.int32)),
        )
        return states

    def _language(self) -> Any:
        if self._decoder is None:
            raise BackendError(
                "this checkpoint has no language model (retrieval only); use embed_image and embed_text, or another one"
            )
        return self._decoder

    def _text_language(self) -> Any:
        """The same weights with inputs in floats, for texts that are embedded.

        Rounded inputs turn the default model's embedded texts four times as far from the exact ones as int8 weights alone do (1 - cosine
        0.0031 and 0.0007 on 30 prompts), and a text is short: nobody waits for it.
        """
        language = self._language()
        if not self.package.int8_inputs:
            return language
        if self._text_decoder is None:
            self._text_decoder = _make_decoder(self.package, [])
        return self._text_decoder


def _make_decoder(package: NativePackage, int8_inputs: list[str]) -> Any:
    from rsvlm_infer import _C

    language = package.config.language
    assert language is not None
    exponent = np.arange(language.head_dim // 2, dtype=np.float32) * 2 / language.head_dim
    frequencies = (np.float32(1) / np.float32(language.rope_theta) ** exponent).astype(np.float32)
    values = dataclasses.asdict(language)
    settings = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
    cache = "float32" if package.precision == "fp32" else "bfloat16"
    return _C.NativeDecoder(
        weights=package.weights, settings=settings, frequencies=frequencies, cache=cache, int8_inputs=int8_inputs
    )


def _scene_settings(config: RsvlmConfig) -> dict[str, float]:
    """What NativeSceneModel needs of a config; a width of 0 = the part is absent."""
    vision, alignment, experts, projector = config.vision, config.alignment, config.experts, config.projector
    language = 0 if config.language is None else config.language.hidden_size
    settings: dict[str, float] = {
        "vision_hidden": vision.hidden_size,
        "vision_intermediate": vision.intermediate_size,
        "vision_heads": vision.num_heads,
        "patch_values": 3 * vision.patch_size**2,
        "vision_activation": _ACTIVATIONS.index(vision.activation),
        "vision_eps": vision.layer_norm_eps,
        "class_token": vision.class_token,
        "embed": 0 if alignment is None else alignment.embed_size,
        "text": 0 if alignment is None else language,
        "salient_patches": 0 if alignment is None else alignment.salient_patches,
        "class_pooling": alignment is not None and alignment.pooling == "class",
        "augmentation_heads": 0 if config.augmentation is None else config.augmentation.num_heads,
        "language": language,
        "experts": 0 if experts is None else experts.num_experts,
        "expert_hidden": 0 if experts is None else experts.intermediate_size,
        "top_k": 0 if experts is None else experts.top_k,
        "projector": 0 if projector is None else projector.hidden_size,
        "pixel_shuffle": 1 if projector is None else projector.pixel_shuffle,
        "projector_activation": 0 if projector is None else _ACTIVATIONS.index(projector.activation),
    }
    settings |= {f"tap_{level}": tap for level, tap in zip(LEVELS, vision.taps, strict=True)}
    return {name: float(value) for name, value in settings.items()}


def _assemble_anyres(tokens: F32, layout: tuple[int, int], grid: int, kept: tuple[int, int, int, int], newline: F32) -> F32:
    """LLaVA-NeXT's order; see `layers.projector.assemble_anyres`, whose tiles are here one after another [T · g², Dl]."""
    rows, columns = layout
    canvas = tokens[grid * grid :].reshape(rows, columns, grid, grid, -1).transpose(0, 2, 1, 3, 4)
    canvas = canvas.reshape(rows * grid, columns * grid, -1)
    row_start, row_stop, col_start, col_stop = kept
    canvas = canvas[row_start:row_stop, col_start:col_stop]
    ends = np.broadcast_to(newline, (canvas.shape[0], 1, canvas.shape[2]))
    lines = np.concatenate((canvas, ends), axis=1).reshape(-1, canvas.shape[2])
    return np.concatenate((tokens[: grid * grid], lines))

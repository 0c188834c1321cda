"""An exported package on onnxruntime: numpy arrays and opaque OrtValues, no torch anywhere. Knows no text and no raster."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import LEVELS, RsvlmConfig
from ..contract import ALIGN, BRIDGE, CUE_SEARCH, DECODER, TEXT_EMBED, VISION, WORD_EMBED, cache_names, cue_names, tap_names
from ..errors import BackendError, InputError
from ..imagery.pack import PackedScene
from ..imagery.plan import anyres_kept_window
from ..knowledge.store import KnowledgeBase
from ..models.package import Package
from .base import Embeddings, ImageFeatures, Prompt, Query

F32 = npt.NDArray[np.float32]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

# Attention inside the graph pads tiles to the longest of a call: tiles go in by length, and a call ends before its scores outgrow
# this many pairs a head (64 MB at 4 bytes and 4 heads, 268 MB at ViT-L's 16) or padding more than half of the work.
CALL_PAIRS = 1 << 22
PADDING = 1.5


def why_not() -> str | None:
    """Why onnxruntime cannot run here; None when it can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return 'onnxruntime is not installed; run pip install "rsvlm-infer[onnx]"'
    return None


@dataclass(frozen=True)
class OnnxHandle:
    """What one encoded scene is to this backend."""

    tokens: F32 | None  # [Nv, Dl]
    embeddings: Embeddings | None


@dataclass
class OnnxCache:
    """Keys and values of every layer [B, Hkv, C, D], bound as past and as present of the same step, and each row's length [B]."""

    values: dict[str, Any]  # past name -> OrtValue
    binding: Any
    lengths: npt.NDArray[np.int64]
    capacity: int


class OnnxBackend:
    """`Backend` over an exported package."""

    name = "onnx"
    tiles_per_call: int | None = None  # of the vision encoder; None = as many as `tile_calls` allows

    def __init__(self, package: Package, provider: str = "cpu", knowledge: KnowledgeBase | None = None) -> None:
        """provider: "cpu" or "cuda"; it runs everything there or raises.

        Raises:
            BackendError: onnxruntime has no such provider, or did not take it.
        """
        self.config: RsvlmConfig = package.config
        self.precision = package.precision
        self.knowledge = knowledge
        self.provider = provider
        self._device = "cuda" if provider == "cuda" else "cpu"
        # cue_search is for runtimes without this package: here the search is the knowledge base's own, which is its definition
        names = [name for name in package.manifest["graphs"] if name != CUE_SEARCH]
        self._sessions = {name: open_session(package, name, provider) for name in names}

    @classmethod
    def load(cls, path: Path, provider: str = "cpu", *, verify: bool = True) -> OnnxBackend:
        """From a package folder; `verify` reads every file and compares it with the manifest first.

        Raises:
            CheckpointError: a damaged, foreign or newer package. BackendError: the provider cannot run here.
        """
        package = Package.open(path)
        if verify:
            package.verify()
        knowledge = None if package.knowledge_folder is None else KnowledgeBase.load(package.knowledge_folder)
        if knowledge is not None and knowledge.embedder is not None:
            knowledge.require_embedder(package.embedder)
        return cls(package, provider, knowledge)

    def encode(self, scenes: Sequence[PackedScene], queries: Sequence[Query | None] | None = None) -> list[ImageFeatures]:
        """Scenes -> visual tokens; see `Backend.encode`. Tiles of all scenes share the calls of the vision encoder."""
        if len(scenes) == 0:
            return []
        start = time.perf_counter()
        encoded = self.encode_tiles(scenes)
        shared_ms = (time.perf_counter() - start) * 1e3 / len(scenes)
        found = []
        for scene, taps, query in zip(scenes, encoded, queries or [None] * len(scenes), strict=True):
            start = time.perf_counter()
            embeddings = self.align(taps, scene)
            searching = time.perf_counter()
            cues, texts = self.find_cues(embeddings, query)
            searched = time.perf_counter()
            tokens = self.bridge(taps, scene, cues)
            own_ms, augment_ms = (time.perf_counter() - start) * 1e3, (searched - searching) * 1e3
            found.append(
                ImageFeatures(
                    handle=OnnxHandle(tokens, embeddings),
                    num_tokens=0 if tokens is None else len(tokens),
                    cues=texts,
                    encode_ms=shared_ms + own_ms - augment_ms,
                    augment_ms=augment_ms if self.config.augmentation is not None else 0.0,
                )
            )
        return found

    def _run(self, graph: str, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, F32]:
        """One graph on host arrays; outputs by name."""
        session = self._sessions[graph]
        names = [item.name for item in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def encode_tiles(self, scenes: Sequence[PackedScene]) -> list[dict[str, F32]]:
        """Each scene's taps [S, Dv], and class tokens [T, Dv] where the family has them."""
        patches = np.concatenate([scene.patches for scene in scenes])  # [S, 3·p²]
        grids = np.concatenate([scene.grids for scene in scenes])  # [T, 2]
        lengths = np.concatenate([np.diff(scene.cu_seqlens) for scene in scenes]).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        outputs: dict[str, F32] = {}
        for tiles in tile_calls(lengths, self.tiles_per_call):
            rows = np.concatenate([np.arange(starts[tile], starts[tile] + lengths[tile]) for tile in tiles])
            cu_seqlens = np.concatenate([[0], np.cumsum(lengths[tiles])]).astype(np.int32)
            part = self._run(VISION, {"patches": patches[rows], "cu_seqlens": cu_seqlens, "grids": grids[tiles]})
            for name, value in part.items():
                per_tile = name == "class_tokens"
                if name not in outputs:
                    outputs[name] = np.empty((len(lengths) if per_tile else len(patches), value.shape[1]), np.float32)
                outputs[name][tiles if per_tile else rows] = value
        patch_ends = np.cumsum([len(scene.patches) for scene in scenes])[:-1]
        tile_ends = np.cumsum([len(scene.grids) for scene in scenes])[:-1]
        parts = {name: np.split(value, tile_ends if name == "class_tokens" else patch_ends) for name, value in outputs.items()}
        return [{name: value[index] for name, value in parts.items()} for index in range(len(scenes))]

    def align(self, taps: dict[str, F32], scene: PackedScene) -> Embeddings | None:
        """Taps of one scene -> its embeddings; None without alignment."""
        alignment = self.config.alignment
        if alignment is None:
            return None
        inputs: dict[str, npt.NDArray[Any]] = {name: taps[name] for name in tap_names()}
        inputs["cu_seqlens"] = scene.cu_seqlens
        if alignment.pooling == "class":
            inputs["class_tokens"] = taps["class_tokens"]
        found = self._run(ALIGN, inputs)
        return Embeddings(*(found.get(level, np.zeros(0, np.float32)) for level in LEVELS))

    def find_cues(self, embeddings: Embeddings | None, query: Query | None) -> tuple[dict[str, F32], tuple[str, ...]]:
        """What augmentation reads beside the features: cues of each level and the query's words; and the cues' texts."""
        settings, alignment = self.config.augmentation, self.config.alignment
        if settings is None or alignment is None or embeddings is None:
            return {}, ()
        inputs: dict[str, F32] = {}
        texts: list[str] = []
        for level, name in enumerate(LEVELS):
            visual: F32 = getattr(embeddings, name)
            vectors = np.zeros((0, alignment.embed_size), np.float32)
            if self.knowledge is not None and visual.size:
                flat = visual.reshape(-1, visual.shape[-1])
                asked = None if query is None else query.embedding
                _, ids, names = self.knowledge.search(level, flat, asked, settings.cues_per_level, settings.query_weight)
                vectors = self.knowledge.embeddings[ids].astype(np.float32)
                texts += names
            inputs[cue_names()[level]] = vectors
        inputs["query"] = self.embed_words(np.zeros(0, np.int32) if query is None else query.token_ids)
        return inputs, tuple(texts)

    def bridge(self, taps: dict[str, F32], scene: PackedScene, cues: dict[str, F32]) -> F32 | None:
        """[Nv, Dl]: base tile, then leaves in raster order."""
        projector = self.config.projector
        if projector is None:
            return None
        inputs: dict[str, npt.NDArray[Any]] = {**{name: taps[name] for name in tap_names()}, **cues}
        inputs |= {"cu_seqlens": scene.cu_seqlens, "grids": scene.grids}
        if projector.box_embedding:
            inputs["boxes"] = scene.boxes if scene.plan.tiling == "dris" else np.zeros_like(scene.boxes)
        if self.config.grid_pinpoints:
            inputs["token_order"] = self._token_order(scene)
        elif scene.plan.tiling == "anyres":
            raise BackendError(
                'tiling "anyres" needs a package with image_newline, this one has none; use tiling "fixed" or "dris"'
            )
        tokens = self._run(BRIDGE, inputs)["tokens"]
        assert len(tokens) == scene.num_tokens  # count_tokens is the only source of placeholder counts
        return tokens

    def _token_order(self, scene: PackedScene) -> npt.NDArray[np.int64]:
        """Which token stands where: in anyres LLaVA-NeXT's canvas, unpadded, with a newline after each row; else as they come."""
        assert self.config.projector is not None
        shuffle = self.config.projector.pixel_shuffle
        total = scene.plan.num_patches // shuffle**2  # also the number of the newline token
        order = np.arange(total, dtype=np.int64)
        if scene.plan.tiling != "anyres":
            return order
        side, (rows, columns) = self.config.tile_grid // shuffle, scene.plan.layout
        canvas = order[side * side :].reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)
        row_start, row_stop, col_start, col_stop = anyres_kept_window(scene.plan, self.config)
        canvas = np.pad(canvas[row_start:row_stop, col_start:col_stop], ((0, 0), (0, 1)), constant_values=total)
        return np.concatenate([order[: side * side], canvas.reshape(-1)])

    def prefill(self, sequences: Sequence[Prompt], capacity: int) -> tuple[F32, Any]:
        """Prompts -> next-token logits [B, V] and the cache; see `Backend.prefill`. Rows are padded on the right."""
        context = self._context()
        lengths = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64)
        longest = int(lengths.max())
        if capacity < longest:
            raise InputError(f"capacity must be at least the longest prompt ({longest} tokens), got {capacity}; raise it")
        if capacity > context:
            raise InputError(
                f"capacity must be at most the model's {context} positions, got {capacity}; shorten prompt or answer"
            )
        embeds = self._prompt_embeds(sequences, longest)
        cache: Any = self._empty_cache(len(sequences), capacity)
        logits = self._decoder(cache, embeds, lengths, "logits")
        return logits, cache

    def _context(self) -> int:
        """Tokens that a row may hold."""
        return int(self._require_language().max_positions)

    def _prompt_embeds(self, sequences: Sequence[Prompt], longest: int) -> F32:
        """[B, N, Dl]: word embeddings with visual tokens in the places of the placeholders, zeros after each row's end."""
        rows: list[F32] = []
        for sequence in sequences:
            ids = np.asarray(sequence.token_ids, dtype=np.int64)
            places = ids == self.config.image_token_id
            expected = sum(image.num_tokens for image in sequence.images)
            if int(places.sum()) != expected:
                raise InputError(
                    f"token_ids must hold one image placeholder ({self.config.image_token_id}) per visual token, expected {expected}, "
                    f"got {int(places.sum())}; build the prompt with count_tokens(plan)"
                )
            embeds = self.embed_words(np.where(places, 0, ids))
            if expected:
                embeds[places] = np.concatenate([image.handle.tokens for image in sequence.images])
            rows.append(np.pad(embeds, ((0, longest - len(ids)), (0, 0))))
        return np.stack(rows)

    def embed_words(self, ids: npt.NDArray[Any]) -> F32:
        """[n] -> [n, Dl]."""
        return self._run(WORD_EMBED, {"token_ids": ids.astype(np.int64)})["embeddings"]

    def features_of(self, tokens: F32) -> ImageFeatures:
        """Visual tokens [Nv, Dl] that were made elsewhere, for a prompt."""
        return ImageFeatures(OnnxHandle(tokens, None), len(tokens))

    def decode(self, cache: Any, token_ids: npt.NDArray[np.int32]) -> F32:
        """One token per row -> logits [B, V]; see `Backend.decode`. The cache is written in place, never copied."""
        if int(cache.lengths.max()) >= cache.capacity:
            raise InputError(f"the cache holds {cache.capacity} tokens a row and is full; prefill with a larger capacity")
        embeds = self.embed_words(np.asarray(token_ids))[:, None]  # [B, 1, Dl]
        return self._decoder(cache, embeds, np.ones(len(embeds), np.int64), "logits")

    def _decoder(self, cache: Any, embeds: F32, new: npt.NDArray[np.int64], output: str) -> F32:
        """Feeds `new` [B] tokens of embeds [B, N, Dl] to each row; the named output of each row's last one. One name per cache."""
        lengths = cache.lengths + new
        binding = cache.binding
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds))
        binding.bind_cpu_input("seqlens_k", (lengths - 1).astype(np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(lengths.max(), dtype=np.int32))
        binding.bind_cpu_input("last", new - 1)
        binding.bind_output(output)
        self._sessions[DECODER].run_with_iobinding(binding)
        cache.lengths = lengths
        found: F32 = binding.get_outputs()[-1].numpy()  # in the order of binding: the cache came first
        return found

    def _empty_cache(self, batch: int, capacity: int) -> Any:
        language = self._require_language()
        shape = (batch, language.num_kv_heads, capacity, language.head_dim)
        arrays = {name: np.zeros(shape, np.float32) for layer in range(language.num_layers) for name in cache_names(layer)[:2]}
        return self._bound(arrays, np.zeros(batch, np.int64), capacity)

    def _bound(self, arrays: dict[str, F32], lengths: npt.NDArray[np.int64], capacity: int) -> OnnxCache:
        """Past and present of each layer are the same memory, so a step writes one place and copies nothing."""
        import onnxruntime

        binding = self._sessions[DECODER].io_binding()
        values = {}
        for layer in range(len(arrays) // 2):
            past_key, past_value, present_key, present_value = cache_names(layer)
            for past, present in ((past_key, present_key), (past_value, present_value)):
                value = onnxruntime.OrtValue.ortvalue_from_numpy(arrays[past], self._device, 0)
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
                values[past] = value
        return OnnxCache(values, binding, lengths, capacity)

    def keep(self, cache: Any, rows: Sequence[int]) -> Any:
        """See `Backend.keep`."""
        chosen = np.asarray(list(rows), dtype=np.int64)
        arrays = {name: value.numpy()[chosen] for name, value in cache.values.items()}
        return self._bound(arrays, cache.lengths[chosen], cache.capacity)

    def embed_image(self, features: ImageFeatures) -> Embeddings:
        """See `Backend.embed_image`."""
        embeddings: Embeddings | None = features.handle.embeddings
        if embeddings is None:
            raise BackendError(
                "this package has no alignment heads, so it cannot embed images; use one whose config has alignment"
            )
        return embeddings

    def embed_text(self, token_ids: Sequence[npt.NDArray[np.int32]]) -> F32:
        """Texts -> [B, De]; see `Backend.embed_text`."""
        alignment = self.config.alignment
        if alignment is None:
            raise BackendError(
                "this package has no alignment heads, so it cannot embed text; use one whose config has alignment"
            )
        lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        if (lengths == 0).any():
            raise InputError("token_ids must hold at least one token per text, got an empty text; give every text a word")
        longest = int(lengths.max())
        padded = np.stack([np.pad(np.asarray(ids, np.int64), (0, longest - len(ids))) for ids in token_ids])
        if alignment.text_source == "text_encoder":
            return self._run(TEXT_EMBED, {"token_ids": padded})["embeddings"]
        embeds = self.embed_words(padded.reshape(-1)).reshape(*padded.shape, -1)
        states = self._decoder(self._empty_cache(len(padded), longest), embeds, lengths, "state")
        return self._run(TEXT_EMBED, {"states": states})["embeddings"]

    def _require_language(self) -> Any:
        if self.config.language is None:
            raise BackendError(
                "this package has no language model (retrieval only); use embed_image and embed_text, or another one"
            )
        return self.config.language


def tile_calls(lengths: npt.NDArray[np.int64], most: int | None = None) -> list[npt.NDArray[np.int64]]:
    """Numbers of the tiles that are encoded together, shortest tiles first, at most `most`; every tile once."""
    order = np.argsort(lengths, kind="stable")
    calls: list[list[int]] = [[]]
    pairs = 0
    for tile in order:
        square = int(lengths[tile]) ** 2
        padded = (len(calls[-1]) + 1) * square  # the newest tile is the longest
        full = len(calls[-1]) == most
        if calls[-1] and (full or padded > CALL_PAIRS or padded > PADDING * (pairs + square)):
            calls.append([])
            pairs = 0
        calls[-1].append(int(tile))
        pairs += square
    return [np.array(call, dtype=np.int64) for call in calls]


def open_session(package: Package, graph: str, provider: str = "cpu") -> Any:
    """An onnxruntime session of one graph, on that provider and no other.

    Raises:
        BackendError: the provider is unknown, absent or not taken, or the runtime refuses the graph.
    """
    import onnxruntime

    wanted = PROVIDERS.get(provider)
    available = onnxruntime.get_available_providers()
    if wanted is None or wanted not in available:
        offered = sorted(name for name, full in PROVIDERS.items() if full in available)
        raise BackendError(
            f"provider must be one of {offered} with this onnxruntime, got {provider!r}; choose one of them, or install "
            '"rsvlm-infer[onnx-gpu]" on a machine with a CUDA device'
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # refusals come as exceptions; warnings would break the one-line rule of stderr
    if graph != DECODER:  # many short steps are worth spinning threads; elsewhere they only steal from the decoder
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    file = package.path / package.manifest["graphs"][graph]["file"]
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=[wanted])
    except Exception as error:  # onnxruntime raises its own classes, which it does not document
        reason = " ".join(str(error).split())[:300]
        raise BackendError(
            f"onnxruntime {onnxruntime.__version__} cannot load {file.name} ({reason}); install the version that the manifest names "
            f"({package.manifest.get('software', {}).get('onnxruntime')}), or export again"
        ) from None
    if session.get_providers()[0] != wanted:
        raise BackendError(
            f"provider {provider!r} was asked for and onnxruntime took {session.get_providers()}; repair its CUDA libraries, or ask "
            "for 'cpu'"
        )
    return session

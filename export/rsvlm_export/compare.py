"""How far a package's graphs are from the eager float32 model, graph by graph, each on the model's own inputs. Knows no gate.

Every graph gets what the eager model would give it, so one graph's error does not hide in the next one's. A native package has no
graph files, but the same stages: they go by the same names and through the same code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rsvlm_infer.backends.base import Prompt, Query, StagedBackend
from rsvlm_infer.backends.eager import EagerBackend
from rsvlm_infer.config import LEVELS, RsvlmConfig
from rsvlm_infer.contract import ALIGN, BRIDGE, CUE_SEARCH, DECODER, TEXT_EMBED, VISION, WORD_EMBED, tap_names
from rsvlm_infer.imagery.pack import PackedScene, pack_scene
from rsvlm_infer.imagery.plan import plan_scene
from rsvlm_infer.imagery.source import open_scene
from rsvlm_infer.models.package import Package
from rsvlm_infer.ops.cue_search import cue_search

STEPS = 4  # decode steps after each prompt
LONG_TEXT = 512  # tokens of the long prompt; eager attention over a whole context would take minutes on two cores
# (name, height, width): noise has the highest complexity, so DRIS splits it until its budget ends
ADVERSARIAL = (("long: noise, 2000 x 3000 px", 2000, 3000), ("thin: noise, 24 x 3000 px", 24, 3000), ("short: 8 x 8 px", 8, 8))


@dataclass
class GraphError:
    """Of one graph over all cases: largest absolute difference, that over the reference's largest value, lowest cosine."""

    cases: int = 0
    max_abs: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0
    worst_case: str = ""

    def add(self, case: str, value: Any, reference: Any) -> None:
        found, expected = (np.asarray(each, dtype=np.float64).ravel() for each in (value, reference))
        self.cases += 1
        if found.shape != expected.shape or not np.isfinite(found).all():
            self.max_abs = self.relative = float("inf")
            self.cosine, self.worst_case = -1.0, case
            return
        if not expected.size:
            return
        difference = float(np.abs(found - expected).max())
        scale = float(np.abs(expected).max()) or 1.0
        norms = float(np.linalg.norm(found) * np.linalg.norm(expected))
        self.max_abs = max(self.max_abs, difference)
        self.cosine = min(self.cosine, float(found @ expected) / norms if norms else 1.0)
        if difference / scale > self.relative:
            self.relative, self.worst_case = difference / scale, case

    def to_dict(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "max_abs": json_number(self.max_abs),
            "relative": json_number(self.relative),
            "cosine": json_number(self.cosine),
            "worst_case": self.worst_case,
        }


@dataclass
class Comparison:
    """Errors by graph, and how often greedy tokens agree."""

    graphs: dict[str, GraphError] = field(default_factory=dict)

    def add(self, graph: str, case: str, value: Any, reference: Any) -> None:
        self.graphs.setdefault(graph, GraphError()).add(case, value, reference)


class ComparedBackend(StagedBackend, Protocol):
    """What is compared of a package: the steps of `Backend.encode` one by one, and the language model. See `OnnxBackend`."""

    def embed_words(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.float32]: ...


def cases(config: RsvlmConfig, images: Sequence[Path]) -> Iterator[tuple[str, PackedScene]]:
    """Real images as the checkpoint reads them, then noise that is long, thin and short, and one real or noisy single tile."""
    for image in images:
        yield image.name, _packed(image, config)
    rng = np.random.default_rng(0)
    for name, height, width in ADVERSARIAL:
        yield name, _packed(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), config)
    single = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    yield "single tile", _packed(single, dataclasses.replace(config, tiling="fixed"))


def _packed(source: Any, config: RsvlmConfig) -> PackedScene:
    from rsvlm_infer.imagery.complexity import ComplexityMap

    with open_scene(source) as scene:
        complexity = ComplexityMap(*scene.overview(), config=config.dris) if config.tiling == "dris" else None
        return pack_scene(scene, plan_scene(scene.height, scene.width, config, complexity=complexity), config)


def compare_graphs(
    package: Package, eager: EagerBackend, backend: ComparedBackend, images: Sequence[Path], step: Callable[[str], None]
) -> Comparison:
    """All graphs or stages over all cases. The package's backend must be loaded already; `step` takes the name of each finished case."""
    found = Comparison()
    config = package.config
    texts = _texts(config)
    if config.alignment is not None:
        _compare_texts(found, eager, backend, config, texts)
        if CUE_SEARCH in package.manifest.get("graphs", ()):  # elsewhere the search is the knowledge base's own
            _compare_search(found, package)
    if config.language is not None and eager.model.language_model is not None:
        table = eager.model.language_model.embed_tokens.weight.numpy()
        found.add(WORD_EMBED, "long text", backend.embed_words(texts[0]), table[texts[0]])
        _compare_decoder(found, "long text", eager, backend, [Prompt(texts[0], ())])
        _compare_decoder(found, "one token", eager, backend, [Prompt(texts[0][:1], ())])
        _compare_decoder(found, "rows of 1 to many tokens", eager, backend, [Prompt(texts[0][:n], ()) for n in (1, 2, 33)])
    for name, scene in cases(config, images):
        _compare_scene(found, name, eager, backend, scene, texts)
        step(name)
    return found


def _texts(config: RsvlmConfig) -> list[npt.NDArray[np.int32]]:
    """Random words of the language model: a long text, a sentence, one word."""
    if config.language is None:
        return [np.array([3], np.int32)]
    longest = min(LONG_TEXT, config.language.max_positions - STEPS - 1)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, config.language.vocab_size, longest).astype(np.int32)
    ids[ids == config.image_token_id] = 0
    return [ids, ids[:12], ids[:1]]


def _compare_texts(
    found: Comparison, eager: EagerBackend, backend: ComparedBackend, config: RsvlmConfig, texts: list[npt.NDArray[np.int32]]
) -> None:
    assert config.alignment is not None
    if config.alignment.text_source == "text_encoder" and config.text_encoder is not None:
        rng = np.random.default_rng(2)
        end = config.text_encoder.eos_token_id if config.text_encoder.eos_token_id != 2 else config.text_encoder.vocab_size - 1
        lengths = (config.text_encoder.max_positions - 1, 5, 1)
        texts = [np.append(rng.integers(3, end, length), end).astype(np.int32) for length in lengths]
    found.add(TEXT_EMBED, "long, usual and one word", backend.embed_text(texts), eager.embed_text(texts))


def _compare_search(found: Comparison, package: Package) -> None:
    from rsvlm_infer.backends.onnx import open_session

    assert package.config.alignment is not None
    width = package.config.alignment.embed_size
    rng = np.random.default_rng(3)
    entries = rng.normal(size=(97, width))
    entries = (entries / np.linalg.norm(entries, axis=1, keepdims=True)).astype(np.float16)
    entries[50] = entries[3]  # a tie
    visual, query = entries[2:9].astype(np.float32), entries[3].astype(np.float32)
    scores, rows = cue_search(visual, query, entries, 5, 0.5)
    inputs = {"visual": visual, "query": query, "entries": entries, "k": np.array(5), "beta": np.array(0.5)}
    got_scores, got_rows = open_session(package, CUE_SEARCH).run(["scores", "rows"], inputs)
    found.add(CUE_SEARCH, "scores", got_scores, scores)
    found.add(CUE_SEARCH, "rows", got_rows, rows)


def _compare_scene(
    found: Comparison,
    name: str,
    eager: EagerBackend,
    backend: ComparedBackend,
    scene: PackedScene,
    texts: list[npt.NDArray[np.int32]],
) -> None:
    config = eager.config
    query = Query(texts[1], eager.embed_text([texts[1]])[0]) if config.augmentation is not None else None
    taps = {tap: value.numpy() for tap, value in zip(tap_names(), eager.encode_levels([scene])[0], strict=True)}
    (expected,) = eager.encode([scene], [query])
    (own,) = backend.encode_tiles([scene])
    for tap in tap_names():
        found.add(VISION, f"{name}, {tap}", own[tap], taps[tap])
    own |= taps
    if config.alignment is not None:
        embeddings, exact = backend.align(own, scene), eager.embed_image(expected)
        for level in LEVELS:
            found.add(ALIGN, f"{name}, {level}", getattr(embeddings, level), getattr(exact, level))
    if config.language is None:
        return
    cues, _ = backend.find_cues(eager.embed_image(expected) if config.alignment is not None else None, query)
    tokens = expected.handle.tokens.numpy()
    found.add(BRIDGE, name, backend.bridge(own, scene, cues), tokens)
    ids = np.concatenate([texts[2], np.full(len(tokens), config.image_token_id, np.int32), texts[1]]).astype(np.int32)
    own_prompt = Prompt(ids, (backend.features_of(tokens),))
    _compare_decoder(found, name, eager, backend, [Prompt(ids, (expected,))], [own_prompt])


def _compare_decoder(
    found: Comparison,
    name: str,
    eager: EagerBackend,
    backend: ComparedBackend,
    expected: list[Prompt],
    own: list[Prompt] | None = None,
) -> None:
    """Logits of the prompt, then of steps that follow the eager model's own choices."""
    capacity = max(len(prompt.token_ids) for prompt in expected) + STEPS
    logits, cache = eager.prefill(expected, capacity)
    got, own_cache = backend.prefill(own or expected, capacity)
    found.add(DECODER, f"{name}, prefill", got, logits)
    for step in range(STEPS):
        chosen = logits.argmax(axis=1).astype(np.int32)
        logits, got = eager.decode(cache, chosen), backend.decode(own_cache, chosen)
        found.add(DECODER, f"{name}, step {step + 1}", got, logits)


def json_number(value: float) -> float | str:
    """Six digits; JSON has no infinity."""
    return float(f"{value:.6g}") if np.isfinite(value) else "infinite"

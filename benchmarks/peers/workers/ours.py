"""Our backends over exported packages, without torch: the whole model with its modules, its language model, its vision encoder."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.workers.protocol import Answer, Contestant, Job, serve
from benchmarks.peers.workers.texts import NEW_TOKENS, PREFILLS, text_works
from benchmarks.peers.workers.tiles import F32, Tiles, tile_works, timed
from rsvlm_infer import RSVLM
from rsvlm_infer.backends import GreedyBackend, Prompt
from rsvlm_infer.backends.native import NativeBackend
from rsvlm_infer.backends.onnx import OnnxBackend
from rsvlm_infer.contract import tap_names
from rsvlm_infer.engine import Engine
from rsvlm_infer.imagery.pack import PackedScene
from rsvlm_infer.tasks.caption import CAPTION_PROMPT
from rsvlm_infer.tasks.generation import GenerationSettings, build_request
from rsvlm_infer.tasks.scene import SceneSettings, prepare_scene

CAPTIONS = 20  # pictures a round whose captions tell what guessed tokens are worth
CAPTION_TOKENS = 40


class Model:
    """A loaded package and the cache of the last prompt."""

    def __init__(self, job: Job) -> None:
        started = time.perf_counter()
        self.rsvlm = RSVLM.from_pretrained(job.model)
        self.load_s = time.perf_counter() - started
        self.backend = self.rsvlm.backend
        self.tiles = Tiles(job.inputs)
        self.image = Path(json.loads((job.inputs / "caption.json").read_text(encoding="utf-8"))["image"])
        self.pictures = [Path(name) for name in json.loads((job.inputs / "captions.json").read_text(encoding="utf-8"))]
        self.scene = prepare_scene(self.image, self.rsvlm.config, SceneSettings())
        guessing = Engine(self.backend, draft_table=self.rsvlm.engine.draft_table)
        self.engines = {"": Engine(self.backend, draft_tokens=0), ", drafts": guessing}
        self.cache: Any = None

    def forget(self) -> None:
        """A first question is meant: nothing may be left of the one before."""
        if isinstance(self.backend, NativeBackend):
            self.backend.forget()

    def prefill(self, ids: list[int]) -> int:
        self.forget()
        logits, self.cache = self.backend.prefill([Prompt(np.array(ids, np.int32))], max(PREFILLS) + NEW_TOKENS)
        return int(logits[0].argmax())

    def decode(self, token: int, count: int) -> list[int]:
        fed = np.array([token], np.int32)
        if isinstance(self.backend, GreedyBackend):
            return [int(each) for each in self.backend.decode_greedy(self.cache, fed, count)[0]]
        tokens: list[int] = []
        for _ in range(count):
            fed = self.backend.decode(self.cache, fed).argmax(axis=1).astype(np.int32)
            tokens.append(int(fed[0]))
        return tokens

    def describe(self, drafts: str) -> Answer:
        """One image from its packed pixels to `NEW_TOKENS` tokens."""
        self.forget()
        started = time.perf_counter()
        features = self.rsvlm._encode([self.scene], CAPTION_PROMPT)[0]
        settings = GenerationSettings(max_new_tokens=NEW_TOKENS)
        request, _ = build_request(self.rsvlm.tokenizer, self.rsvlm.config, CAPTION_PROMPT, features, settings)
        request = dataclasses.replace(request, stop_ids=(), on_token=None)
        tokens = [event.token_id for event in self.engines[drafts].generate([request])]
        return {"seconds": {f"caption{drafts}": time.perf_counter() - started}, "tokens": tokens}

    def captions(self, round_index: int) -> Answer:
        """Seconds per token of whole captions of several pictures, with and without guessed tokens, and how many guesses came true."""
        pictures = [self.pictures[(round_index * CAPTIONS + place) % len(self.pictures)] for place in range(CAPTIONS)]
        seconds, tokens = dict.fromkeys(self.engines, 0.0), dict.fromkeys(self.engines, 0)
        before = dataclasses.replace(self.engines[", drafts"].drafts)
        for picture in pictures:
            scene = prepare_scene(picture, self.rsvlm.config, SceneSettings())
            features = self.rsvlm._encode([scene], CAPTION_PROMPT)[0]
            settings = GenerationSettings(max_new_tokens=CAPTION_TOKENS)
            request, _ = build_request(self.rsvlm.tokenizer, self.rsvlm.config, CAPTION_PROMPT, features, settings)
            request = dataclasses.replace(request, on_token=None)
            for name, engine in self.engines.items():
                events = engine.generate([request])
                next(events)  # prefill
                started = time.perf_counter()
                tokens[name] += len(list(events))
                seconds[name] += time.perf_counter() - started
        after = self.engines[", drafts"].drafts
        return {
            "seconds": {f"captions decode{name}": seconds[name] / tokens[name] for name in self.engines},
            "drafted": after.drafted - before.drafted,
            "accepted": after.accepted - before.accepted,
        }

    def packed(self, patches: F32, grids: list[tuple[int, int]]) -> PackedScene:
        """Tiles as the encoder takes them; what only later stages read is the caption's."""
        bounds = np.cumsum([0, *(rows * columns for rows, columns in grids)], dtype=np.int32)
        shape = np.array(grids, np.int32)
        return dataclasses.replace(self.scene.packed, patches=patches, cu_seqlens=bounds, grids=shape)

    def states(self, patches: F32, grids: list[tuple[int, int]]) -> F32:
        """[S, P] -> the last tap [S, D]."""
        self.forget()
        scene = self.packed(patches, grids)
        assert isinstance(self.backend, (NativeBackend, OnnxBackend))
        return self.backend.encode_tiles([scene])[0][tap_names()[2]]

    def encode(self, patches: F32, _: F32) -> F32:
        found = self.states(patches.reshape(-1, patches.shape[2]), [self.tiles.uniform_grid] * len(patches))
        return found.reshape(*patches.shape[:2], -1)

    def tile_arithmetic(self) -> str | None:
        """In which the encoder's products are computed, when the package tells: it may keep them finer than the decoder's."""
        if not isinstance(self.backend, NativeBackend):
            return None
        return str(self.backend.package.weights["vision_encoder.blocks.0.mlp.fc1"][0])

    def weight_bytes(self) -> float:
        """Of weights that one decode step reads; 0 = unknown."""
        if not isinstance(self.backend, NativeBackend):
            return 0.0
        weights = self.backend.package.weights
        tied = "language_model.lm_head" not in weights
        names = (name for name in weights if name.startswith("language_model."))
        return float(sum(weights[name][3].nbytes for name in names if tied or name != "language_model.embed_tokens"))


def load(job: Job) -> Contestant:
    model = Model(job)
    tiles = model.tiles
    works: dict[str, Any] = {"caption": lambda _: model.describe("")}
    if isinstance(model.backend, NativeBackend):
        works |= {"caption, drafts": lambda _: model.describe(", drafts"), "captions decode": model.captions}
    works |= text_works(job.inputs, model.prefill, model.decode) | tile_works(tiles, model.encode)
    mixed = timed("mixed tiles", lambda _: model.states(tiles.mixed, tiles.grids), lambda _: tiles.expected_mixed)
    return Contestant(
        works | {"mixed tiles": mixed},
        model.weight_bytes(),
        extra={"load_s": model.load_s, "tile_arithmetic": model.tile_arithmetic()},
    )


if __name__ == "__main__":
    serve(load)

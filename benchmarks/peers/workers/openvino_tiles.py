"""OpenVINO on the CPU: the dense encoder, in buckets and padded. bf16 is a hint that its plugin follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from benchmarks.peers.workers.protocol import Contestant, Job, serve
from benchmarks.peers.workers.tiles import F32, Tiles, tile_works

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}  # int8: what is not quantised


def load(job: Job) -> Contestant:
    core = openvino.Core()
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[job.precision],
    }
    buckets, padded = (core.compile_model(job.model / f"{name}.xml", "CPU", settings) for name in ("buckets", "padded"))

    def encode(patches: F32, positions: F32) -> F32:
        states: F32 = buckets((patches, positions[None]))[0]
        return states.astype(np.float32, copy=False)

    def encode_padded(patches: F32, positions: F32, lengths: npt.NDArray[np.int64]) -> F32:
        states: F32 = padded((patches, positions, lengths))[0]
        return states.astype(np.float32, copy=False)

    return Contestant(tile_works(Tiles(job.inputs), encode, encode_padded))


if __name__ == "__main__":
    serve(load)

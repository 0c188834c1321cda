"""onnxruntime on the CPU: the dense encoder, one call per tile length. A padded batch took 4 GB here and is left out."""

from __future__ import annotations

import onnxruntime

from benchmarks.peers.workers.protocol import Contestant, Job, serve
from benchmarks.peers.workers.tiles import F32, Tiles, tile_works


def load(job: Job) -> Contestant:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(str(job.model / "buckets.onnx"), options, providers=["CPUExecutionProvider"])

    def encode(patches: F32, positions: F32) -> F32:
        states: F32 = session.run(None, {"patches": patches, "positions": positions[None]})[0]
        return states

    return Contestant(tile_works(Tiles(job.inputs), encode))


if __name__ == "__main__":
    serve(load)

"""The dense encoder as OpenVINO IR: float32, and int8 by NNCF's post-training quantisation on the first uniform tiles.

python -m benchmarks.peers.convert.openvino_encoder --source hf/vision --inputs inputs --out FOLDER --precision fp32|int8
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino

from benchmarks.peers.convert.dense_encoder import DenseEncoder, PaddedEncoder, examples
from benchmarks.peers.workers.tiles import Tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=["fp32", "int8"], required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    tiles = Tiles(options.inputs)
    for name, kind in (("buckets", DenseEncoder), ("padded", PaddedEncoder)):
        encoder = kind(options.source).eval()
        inputs, axes = examples(encoder)
        shapes = [
            tuple(-1 if axis in own else side for axis, side in enumerate(value.shape))
            for value, own in zip(inputs, axes, strict=True)
        ]
        model = openvino.convert_model(encoder, example_input=inputs, input=[openvino.PartialShape(shape) for shape in shapes])
        if options.precision == "int8":
            calls: list[Any] = [
                (tile[None], tiles.positions[tiles.uniform_grid][None], *([np.array([len(tile)])] if name == "padded" else []))
                for tile in tiles.uniform
            ]
            model = nncf.quantize(
                model, nncf.Dataset(calls), model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED
            )
        openvino.save_model(model, options.out / f"{name}.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main()

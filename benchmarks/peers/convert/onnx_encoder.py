"""The dense encoder as ONNX for onnxruntime: float32, and int8 by its dynamic quantisation.

python -m benchmarks.peers.convert.onnx_encoder --source hf/vision --out FOLDER --precision fp32|int8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from benchmarks.peers.convert.dense_encoder import DenseEncoder, examples

OPSET = 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=["fp32", "int8"], required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    encoder = DenseEncoder(options.source).eval()
    inputs, axes = examples(encoder)
    file = options.out / "buckets.onnx"
    torch.onnx.export(
        encoder,
        inputs,
        str(file),
        input_names=["patches", "positions"],
        output_names=["states"],
        dynamic_shapes=tuple(dict.fromkeys(own, torch.export.Dim.DYNAMIC) for own in axes),
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
    )
    if options.precision == "int8":
        wide = file.with_suffix(".fp32.onnx")
        file.rename(wide)
        quantize_dynamic(str(wide), str(file), per_channel=True, weight_type=QuantType.QInt8)
        wide.unlink()


if __name__ == "__main__":
    main()

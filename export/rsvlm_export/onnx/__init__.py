"""ONNX graphs built from the weights, node by node; nothing is traced. One module per graph."""

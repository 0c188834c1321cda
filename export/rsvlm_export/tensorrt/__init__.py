"""TensorRT: engines of exported graphs, their buckets and their cache, and plugins from our Triton kernels."""

"""Who takes part: each peer's environment, worker, conversion and what its numbers mean. Data; knows no process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WORKERS = "benchmarks.peers.workers"
CONVERT = "benchmarks.peers.convert"
OURS = "rsvlm"


@dataclass(frozen=True)
class Entry:
    """One library at one precision.

    environment: a key of `environments.REQUIREMENTS`, or "" for our own interpreter. model: below the peers' folder, or a package.
    bits: of the weights that a step reads. arithmetic: in which its large products are computed: fp32, bf16 or int8.
    convert: command line after the interpreter's `-m`, with {hf}, {inputs} and {out} to fill in; None = reads `hf/` as it is.
    """

    library: str
    precision: str
    environment: str
    worker: str
    model: Path
    bits: int
    arithmetic: str
    convert: tuple[str, ...] | None = None
    weights: str = ""  # how they were rounded
    asked_for: bool = False  # takes part only with --compiled: its warming round takes minutes

    @property
    def name(self) -> str:
        return f"{self.library} {self.precision}"


def _optimum(weight_format: str, *more: str) -> tuple[str, ...]:
    task = ("--task", "text-generation-with-past", "--weight-format", weight_format)
    return ("optimum.commands.optimum_cli", "export", "openvino", "--model", "{hf}/language", *task, *more, "{out}")


def _builder(precision: str, *more: str) -> tuple[str, ...]:
    options = ("-p", precision, "-e", "cpu", "-c", "{out}.cache")
    return ("onnxruntime_genai.models.builder", "-i", "{hf}/language", "-o", "{out}", *options, *more)


def _own(module: str, source: str, precision: str, *more: str) -> tuple[str, ...]:
    return (f"{CONVERT}.{module}", "--source", f"{{hf}}/{source}", "--out", "{out}", "--precision", precision, *more)


def _models(name: str) -> Path:
    return Path("models") / name


_INT4 = ("--extra_options", "int4_block_size=32", "int4_accuracy_level=4")
_CALIBRATION = ("--inputs", "{inputs}")

PEERS: tuple[Entry, ...] = (
    Entry("transformers", "fp32", "transformers", "transformers", Path("hf"), 32, "fp32"),
    Entry("transformers", "bf16", "transformers", "transformers", Path("hf"), 16, "bf16", weights="rounded to bfloat16"),
    Entry(
        "transformers compiled",
        "bf16",
        "transformers",
        "transformers",
        Path("hf"),
        16,
        "bf16",
        weights="rounded to bfloat16; torch.compile(dynamic=True)",
        asked_for=True,
    ),
    Entry("onnxruntime-genai", "fp32", "onnxruntime", "onnxruntime_genai", _models("genai-fp32"), 32, "fp32", _builder("fp32")),
    Entry(
        "onnxruntime-genai",
        "int4",
        "onnxruntime",
        "onnxruntime_genai",
        _models("genai-int4"),
        4,
        "int8",
        _builder("int4", *_INT4),
        "int4 in blocks of 32 to nearest, the head too",
    ),
    Entry(
        "OpenVINO GenAI",
        "int8",
        "openvino",
        "openvino_genai",
        _models("openvino-int8"),
        8,
        "bf16",
        _optimum("int8"),
        "int8 by row with zero points",
    ),
    Entry(
        "OpenVINO GenAI",
        "int4",
        "openvino",
        "openvino_genai",
        _models("openvino-int4"),
        4,
        "bf16",
        _optimum("int4", "--sym", "--group-size", "32", "--ratio", "1.0", "--all-layers"),
        "int4 in groups of 32, symmetric, word table and head too",
    ),
    Entry("llama.cpp", "f16", "llama.cpp", "llama_cpp", _models("llama-f16"), 16, "fp32", _own("gguf", "language", "f16")),
    Entry(
        "llama.cpp",
        "Q8_0",
        "llama.cpp",
        "llama_cpp",
        _models("llama-q8_0"),
        8,
        "int8",
        _own("gguf", "language", "q8_0"),
        "int8 in blocks of 32",
    ),
    Entry(
        "llama.cpp",
        "Q4_0",
        "llama.cpp",
        "llama_cpp",
        _models("llama-q4_0"),
        4,
        "int8",
        _own("gguf", "language", "q4_0"),
        "int4 in blocks of 32, word table and head Q6_K or Q8_0 as llama.cpp chooses",
    ),
    Entry(
        "onnxruntime",
        "fp32",
        "onnxruntime",
        "onnxruntime_tiles",
        _models("ort-fp32"),
        32,
        "fp32",
        _own("onnx_encoder", "vision", "fp32"),
    ),
    Entry(
        "onnxruntime",
        "int8",
        "onnxruntime",
        "onnxruntime_tiles",
        _models("ort-int8"),
        8,
        "int8",
        _own("onnx_encoder", "vision", "int8"),
        "int8 by row, activations rounded in each call",
    ),
    Entry(
        "OpenVINO",
        "fp32",
        "openvino",
        "openvino_tiles",
        _models("ov-tiles-fp32"),
        32,
        "fp32",
        _own("openvino_encoder", "vision", "fp32", *_CALIBRATION),
    ),
    Entry(
        "OpenVINO",
        "bf16",
        "openvino",
        "openvino_tiles",
        _models("ov-tiles-fp32"),
        16,
        "bf16",
        _own("openvino_encoder", "vision", "fp32", *_CALIBRATION),
        "rounded to bfloat16 by its plugin",
    ),
    Entry(
        "OpenVINO",
        "int8",
        "openvino",
        "openvino_tiles",
        _models("ov-tiles-int8"),
        8,
        "int8",
        _own("openvino_encoder", "vision", "int8", *_CALIBRATION),
        "int8, activations calibrated on 32 of the tiles that are timed",
    ),
)


def our_entry(package: Path, backend: str, precision: str) -> Entry:
    """One of our packages. native: int4 and int8 products round activations to int8; its worker says what the encoder does."""
    bits = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}[precision]
    arithmetic = {"fp32": "fp32", "fp16": "fp32", "bf16": "bf16", "int8": "int8", "int4": "int8"}[precision]
    if backend == "onnx" and precision == "bf16":
        arithmetic = "fp32"  # stored in it, widened once when the package is loaded
    return Entry(f"{OURS} {backend}", precision, "", "ours", package, bits, arithmetic)

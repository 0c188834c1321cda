"""A Llama folder of Hugging Face's as GGUF for llama.cpp: f16 written here, smaller types by llama.cpp itself.

No vocabulary, because prompts are ids.

python -m benchmarks.peers.convert.gguf --source hf/language --out FOLDER --precision f16|q8_0|q4_0
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SMALLER = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}


def rotary_rows(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """llama.cpp pairs rotary dimensions (0, 1), (2, 3), ...; Hugging Face (0, D/2), (1, D/2 + 1), ..."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_f16(source: Path, out: Path) -> None:
    """Matrices float16, vectors float32."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    for name, weight in load_file(source / "model.safetensors").items():
        parts = name.removesuffix(".weight").split(".")
        if parts[1] == "layers":
            theirs = f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}"
            if theirs.endswith(("attn_q", "attn_k")):
                weight = rotary_rows(weight, heads if theirs.endswith("q") else kv_heads)
        else:
            theirs = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]]
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(weight, np.float16 if weight.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=["f16", *SMALLER], required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    file = options.out / "model.gguf"
    if options.precision == "f16":
        write_f16(options.source, file)
        return
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        wide = Path(scratch) / "f16.gguf"
        write_f16(options.source, wide)
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = getattr(llama_cpp, SMALLER[options.precision])
        failed = llama_cpp.llama_model_quantize(str(wide).encode(), str(file).encode(), ctypes.byref(settings))
        if failed:
            raise SystemExit(f"llama_model_quantize gave {failed}")


if __name__ == "__main__":
    main()

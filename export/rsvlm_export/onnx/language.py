"""The graphs `word_embed`, `decoder` and `text_embed`: everything that reads tokens. Knows no image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from rsvlm_infer.config import LanguageConfig, RsvlmConfig, TextEncoderConfig
from rsvlm_infer.contract import ATTENTION_HEAD_MULTIPLE, MICROSOFT_DOMAIN, cache_names
from rsvlm_infer.errors import CheckpointError

from . import engine_functions
from .builder import Graph
from .parts import Source, activation, unit_length

Attend = Callable[[str, int], str]  # the packed projection [B, N, ..] and the layer's number -> [B, N, H·D]


def build_word_embed(g: Graph, source: Source) -> None:
    """A look-up in the table; only the rows that are read are widened to float32."""
    stored = source.precision.stored
    table = g.keep("language.table", source.weights.others["language_model.embed_tokens.weight"], stored)
    g.rename(g.widen(g.op("Gather", table, "token_ids", axis=0), stored), "embeddings")


def build_decoder(g: Graph, source: Source, config: LanguageConfig) -> None:
    """Prefill and decode: the number of new tokens is dynamic, the cache is bound in place.

    Raises:
        CheckpointError: a head size that GroupQueryAttention does not take.
    """
    if not source.form.engines and config.head_dim % ATTENTION_HEAD_MULTIPLE:
        raise CheckpointError(
            f"language.head_dim must be a multiple of {ATTENTION_HEAD_MULTIPLE} for GroupQueryAttention, got {config.head_dim}; "
            "this model runs with the eager backend only"
        )
    attend = _engine_attention(g, source, config) if source.form.engines else _onnxruntime_attention(g, config)
    x = "inputs_embeds"
    for index in range(config.num_layers):
        x = _layer(g, source, config, x, index, attend)
    last = g.op("GatherND", x, g.unsqueeze("last", 1), batch_dims=1)  # [B, Dl]: only these rows pay for the vocabulary
    state = source.rms_norm(g, last, "language_model.norm", config.rms_norm_eps)
    g.rename(state, "state")
    g.rename(source.linear(g, state, "language.head"), "logits")


def _onnxruntime_attention(g: Graph, config: LanguageConfig) -> Attend:
    """onnxruntime's node, which turns q and k and writes the cache."""
    cos, sin = rotary_tables(config)
    tables = g.stored("rotary.cos", cos), g.stored("rotary.sin", sin)

    def attend(qkv: str, index: int) -> str:
        past_key, past_value, present_key, present_value = cache_names(index)
        attended = g.fresh()
        g.many(
            "GroupQueryAttention",
            qkv,
            "",  # keys and values are in the packed first input
            "",
            past_key,
            past_value,
            "seqlens_k",
            "total_sequence_length",
            *tables,
            outputs=[attended, present_key, present_value],
            domain=MICROSOFT_DOMAIN,
            num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
        )
        return attended

    return attend


def _engine_attention(g: Graph, source: Source, config: LanguageConfig) -> Attend:
    """The same in standard ops: q and k are turned in float32, TensorScatter writes the cache, Attention reads all of its places."""
    cos, sin = rotary_tables(config)
    tables = g.stored("rotary.cos", cos), g.stored("rotary.sin", sin)
    new = g.range(g.side("inputs_embeds", 1))
    positions = g.op("Add", g.unsqueeze("written", 1), g.unsqueeze(new, 0))  # [B, N]
    places = g.ints(*range(source.form.context))
    seen = g.op("LessOrEqual", g.unsqueeze(places, 0, 1), g.unsqueeze(positions, 2))  # [B, N, C]
    score = g.op("Where", seen, g.number(0.0), g.number(engine_functions.PADDING_SCORE))
    mask = source.narrow(g, g.unsqueeze(score, 1))  # [B, 1, N, C]
    fused = engine_functions.fuses(source.form.products, config.head_dim, config.num_kv_heads)
    group = config.num_heads // config.num_kv_heads
    sizes = [config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]

    def attend(qkv: str, index: int) -> str:
        past_key, past_value, present_key, present_value = cache_names(index)
        split = g.many("Split", qkv, g.ints(*sizes), outputs=3, axis=-1)
        counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q, k, v = (
            g.op("Transpose", g.reshape(part, 0, 0, count, config.head_dim), perm=[0, 2, 1, 3])
            for part, count in zip(split, counts, strict=True)
        )
        q, k = (g.op("RotaryEmbedding", each, *tables, positions, interleaved=0) for each in (q, k))
        g.many("TensorScatter", past_key, source.narrow(g, k), "written", outputs=[present_key], axis=-2)
        g.many("TensorScatter", past_value, source.narrow(g, v), "written", outputs=[present_value], axis=-2)
        scale = float(config.head_dim**-0.5)
        attended = engine_functions.attention(g, source.narrow(g, q), present_key, present_value, mask, scale, fused, group)
        return g.reshape(g.op("Transpose", source.widen(g, attended), perm=[0, 2, 1, 3]), 0, 0, sizes[0])

    return attend


def _layer(g: Graph, source: Source, config: LanguageConfig, x: str, index: int, attend: Attend) -> str:
    name, eps = f"language_model.layers.{index}", config.rms_norm_eps
    qkv = source.linear(g, source.rms_norm(g, x, f"{name}.input_norm", eps), f"language.{index}.qkv")
    attended = attend(qkv, index)
    x = g.op("Add", x, source.linear(g, attended, f"language.{index}.o"))
    both = source.linear(g, source.rms_norm(g, x, f"{name}.post_norm", eps), f"language.{index}.gate_up")
    gate, up = g.many("Split", both, outputs=2, axis=-1, num_outputs=2)
    hidden = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
    return g.op("Add", x, source.linear(g, hidden, f"language.{index}.down"))


def rotary_tables(config: LanguageConfig) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """cos and sin [max_positions, head_dim / 2], angles in float32 as ops/rope.py."""
    exponent = np.arange(0, config.head_dim // 2, dtype=np.float32) * np.float32(2) / np.float32(config.head_dim)
    frequency = np.float32(1) / np.power(np.float32(config.rope_theta), exponent)
    angles = np.arange(config.max_positions, dtype=np.float32)[:, None] * frequency
    return np.cos(angles), np.sin(angles)


def build_text_embed(g: Graph, source: Source, config: RsvlmConfig) -> None:
    """Of a text encoder where alignment reads one, else the projection of the decoder's states."""
    assert config.alignment is not None
    states = "states"
    if config.alignment.text_source == "text_encoder":
        assert config.text_encoder is not None
        states = _text_states(g, source, config.text_encoder)
    g.rename(unit_length(g, source.linear(g, states, "align.text")), "embeddings")


def _text_states(g: Graph, source: Source, config: TextEncoderConfig) -> str:
    """CLIP's causal encoder: token ids [B, N], padded on the right -> the state at each end of text, [B, D]."""
    words = g.op("Gather", source.matrix(g, "text_encoder.embed_tokens.weight"), "token_ids", axis=0)
    length = g.side("token_ids", 1)
    table = source.vector(g, "text_encoder.position_table")
    x = g.op("Add", words, g.op("Gather", table, g.range(length), axis=0))
    places = g.range(length)
    future = g.op("Greater", g.unsqueeze(places, 0), g.unsqueeze(places, 1))  # [N, N]
    hidden_size, heads = config.hidden_size, config.num_heads
    for index in range(config.num_layers):
        name = f"text_encoder.layers.{index}"
        qkv = source.linear(g, source.layer_norm(g, x, f"{name}.norm1", config.layer_norm_eps), f"text.{index}.qkv")
        parts = g.many("Split", qkv, outputs=3, axis=-1, num_outputs=3)
        q, k, v = (g.reshape(part, 0, 0, heads, hidden_size // heads) for part in parts)
        scores = g.op("MatMul", g.op("Transpose", q, perm=[0, 2, 1, 3]), g.op("Transpose", k, perm=[0, 2, 3, 1]))
        scores = g.op("Mul", scores, g.number((hidden_size // heads) ** -0.5))
        weights = g.softmax(g.op("Where", future, g.number(-1e30), scores))
        mixed = g.op("Transpose", g.op("MatMul", weights, g.op("Transpose", v, perm=[0, 2, 1, 3])), perm=[0, 2, 1, 3])
        x = g.op("Add", x, source.linear(g, g.reshape(mixed, 0, 0, hidden_size), f"text.{index}.o"))
        hidden = source.linear(g, source.layer_norm(g, x, f"{name}.norm2", config.layer_norm_eps), f"text.{index}.fc1")
        x = g.op("Add", x, source.linear(g, activation(g, hidden, config.activation), f"text.{index}.fc2"))
    x = source.layer_norm(g, x, "text_encoder.final_norm", config.layer_norm_eps)
    ids = "token_ids"
    if config.eos_token_id != 2:  # configs of 2021 say 2 and mean the highest id
        ids = g.int64(g.op("Equal", "token_ids", g.integer(config.eos_token_id)))
    end = g.op("ArgMax", ids, axis=1, keepdims=1, select_last_index=0)  # [B, 1]
    return g.op("GatherND", x, end, batch_dims=1)

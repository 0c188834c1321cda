"""transformers, eager or compiled: the whole model as LLaVA without our modules, its language model, its vision encoder."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.peers.workers.protocol import Answer, Contestant, Job, serve
from benchmarks.peers.workers.texts import NEW_TOKENS, text_works
from benchmarks.peers.workers.tiles import F32, Tiles, tile_works

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Projector(nn.Module):
    """Norm, 2 x 2 patches merged, two layers: ours, in the place of LLaVA's."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(state["input_norm.weight"].shape[0])
        (hidden, merged), out = state["fc1.weight"].shape, state["fc2.weight"].shape[0]
        self.fc1, self.fc2 = nn.Linear(merged, hidden), nn.Linear(hidden, out)
        self.load_state_dict({name.replace("input_norm", "norm"): value for name, value in state.items()})

    def forward(self, features: Tensor) -> Tensor:
        """[T, N, Dv] -> [T, N / 4, Dl]."""
        features = self.norm(features)
        tiles, patches, width = features.shape
        side = int(patches**0.5)
        blocks = features.view(tiles, side // 2, 2, side // 2, 2, width).transpose(2, 3).reshape(tiles, patches // 4, 4 * width)
        projected: Tensor = self.fc2(nn.functional.gelu(self.fc1(blocks)))
        return projected


def build(job: Job, dtype: torch.dtype) -> Any:
    """LlavaForConditionalGeneration with the checkpoint's weights; its placeholder is the vocabulary's last id."""
    from transformers import Dinov2Model, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    language = LlamaForCausalLM.from_pretrained(job.model / "language", dtype=dtype)
    vision = Dinov2Model.from_pretrained(job.model / "vision", dtype=dtype)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=language.config.vocab_size - 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = vision, language.model, language.lm_head
    model.model.multi_modal_projector = Projector(load_file(job.model / "projector.safetensors")).to(dtype)
    model.generation_config.eos_token_id = None  # answers must not end early
    model.generation_config.pad_token_id = 0
    return model.eval()


class Model:
    """LLaVA and the cache of the last prompt."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        name, _, compiled = job.precision.partition(" ")
        self.dtype = DTYPES[name]
        self.llava = build(job, self.dtype)
        if compiled:
            for part in (self.llava.model.language_model, self.llava.model.vision_tower):
                part.compile(dynamic=True)
        self.cache: Any = None
        self.caption = json.loads((job.inputs / "caption.json").read_text(encoding="utf-8"))
        self.pixels = torch.from_numpy(np.load(job.inputs / "pixels.npy")).to(self.dtype)

    def feed(self, ids: list[int], cache: Any) -> int:
        states = self.llava.model.language_model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        self.cache = states.past_key_values
        return int(self.llava.lm_head(states.last_hidden_state[:, -1]).argmax())

    def prefill(self, ids: list[int]) -> int:
        return self.feed(ids, None)

    def decode(self, token: int, count: int) -> list[int]:
        tokens = []
        for _ in range(count):
            token = self.feed([token], self.cache)
            tokens.append(token)
        return tokens

    def describe(self, _: int) -> Answer:
        """One image, as `generate` answers it."""
        placeholder, ours = self.llava.config.image_token_id, self.caption["image_token_id"]
        ids = torch.tensor([[placeholder if token == ours else token for token in self.caption["token_ids"]]])
        started = time.perf_counter()
        found = self.llava.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=self.pixels,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        seconds = time.perf_counter() - started
        return {"seconds": {"caption": seconds}, "tokens": found[0, ids.shape[1] :].tolist()}

    def encode(self, patches: F32, _: F32) -> F32:
        """Its encoder takes pixels and interpolates its own positions."""
        tiles, length, values = patches.shape
        side, patch = int(length**0.5), int((values // 3) ** 0.5)
        pixels = torch.from_numpy(patches).view(tiles, side, side, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
        pixels = pixels.reshape(tiles, 3, side * patch, side * patch).to(self.dtype)
        states = self.llava.model.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        return states[:, 1:].float().numpy()  # type: ignore[no-any-return]


def load(job: Job) -> Contestant:
    torch.set_grad_enabled(False)
    model = Model(job)
    works = {"caption": model.describe} | text_works(job.inputs, model.prefill, model.decode)
    works |= tile_works(Tiles(job.inputs), model.encode)
    language = model.llava.model.language_model  # its word table is the head
    size = sum(weight.numel() * weight.element_size() for weight in language.parameters())
    return Contestant(works, float(size))


if __name__ == "__main__":
    serve(load)

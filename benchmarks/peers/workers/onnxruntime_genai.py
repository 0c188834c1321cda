"""onnxruntime-genai: its own generator, greedy, a new one for each prompt."""

from __future__ import annotations

import json
from typing import Any

import onnxruntime_genai

from benchmarks.peers.workers.protocol import Contestant, Job, serve
from benchmarks.peers.workers.texts import NEW_TOKENS, PREFILLS, text_works


class Model:
    """One model and the generator of the last prompt."""

    def __init__(self, job: Job) -> None:
        config = onnxruntime_genai.Config(str(job.model))
        options = {"intra_op_num_threads": job.threads}
        own = json.loads((job.model / "genai_config.json").read_text(encoding="utf-8"))["model"]
        # an id that greedy answers never hold: answers must not end early
        config.overlay(json.dumps({"model": {"eos_token_id": own["vocab_size"] - 1, "decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)
        self.generator: Any = None

    def step(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def prefill(self, ids: list[int]) -> int:
        settings = onnxruntime_genai.GeneratorParams(self.model)
        settings.set_search_options(max_length=max(PREFILLS) + NEW_TOKENS, do_sample=False)
        self.generator = onnxruntime_genai.Generator(self.model, settings)
        self.generator.append_tokens(ids)
        return self.step()

    def decode(self, token: int, count: int) -> list[int]:
        return [self.step() for _ in range(count)]


def load(job: Job) -> Contestant:
    model = Model(job)
    # a step reads everything but the word table, which is stored beside the head
    own = json.loads((job.model / "genai_config.json").read_text(encoding="utf-8"))["model"]
    stored = (job.model / "model.onnx.data").stat().st_size
    shared = job.precision == "int4"  # there the builder looks words up in the head's codes
    table = 0 if shared else own["vocab_size"] * own["decoder"]["hidden_size"] * 4
    return Contestant(text_works(job.inputs, model.prefill, model.decode), float(stored - table))


if __name__ == "__main__":
    serve(load)

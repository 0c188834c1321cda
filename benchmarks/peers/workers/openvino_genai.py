"""OpenVINO GenAI's pipeline on the CPU, greedy; its own clock tells when the first token came."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.workers.protocol import Answer, Contestant, Job, serve
from benchmarks.peers.workers.texts import NEW_TOKENS, PREFILLS, PROMPT, prompt_tokens, timed_answer


def load(job: Job) -> Contestant:
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    pipeline = openvino_genai.LLMPipeline(str(job.model), "CPU", **settings)

    def generate(ids: list[int], count: int) -> tuple[float, float, list[int]]:
        """Seconds to the first token and of all, and the tokens."""
        wanted = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        prompt = openvino.Tensor(np.array([ids], np.int64))
        mask = openvino.Tensor(np.ones((1, len(ids)), np.int64))
        started = time.perf_counter()
        result = pipeline.generate(openvino_genai.TokenizedInputs(prompt, mask), wanted)
        return result.perf_metrics.get_ttft().mean / 1e3, time.perf_counter() - started, list(result.tokens[0])

    def prefill_work(tokens: int) -> Callable[[int], Answer]:
        def work(round_index: int) -> Answer:
            _, seconds, _ = generate(prompt_tokens(job.inputs, tokens, round_index), 1)
            return {"seconds": {f"prefill {tokens}": seconds}}

        return work

    def answer_work(round_index: int) -> Answer:
        first, whole, tokens = generate(prompt_tokens(job.inputs, PROMPT, round_index), NEW_TOKENS)
        return timed_answer(whole, (whole - first) / (NEW_TOKENS - 1), tokens)

    works = {f"prefill {tokens}": prefill_work(tokens) for tokens in PREFILLS}
    size = (job.model / "openvino_model.bin").stat().st_size  # the word table is the head, so a step reads all of it
    return Contestant(works | {"answer": answer_work}, float(size))


if __name__ == "__main__":
    serve(load)

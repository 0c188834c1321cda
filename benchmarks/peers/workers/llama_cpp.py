"""llama.cpp by its C interface: prefill and decode without sampling, the cache forgotten before each prompt."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np

from benchmarks.peers.workers.protocol import Contestant, Job, serve
from benchmarks.peers.workers.texts import NEW_TOKENS, PREFILLS, text_works


class Model:
    """One context of one model."""

    def __init__(self, job: Job) -> None:
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, _: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        file = str(job.model / "model.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(file, llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {file.decode()}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = max(PREFILLS) + NEW_TOKENS
        settings.n_threads = settings.n_threads_batch = job.threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def feed(self, ids: list[int]) -> int:
        """Feeds tokens behind what is cached; the most likely next one."""
        array = (llama_cpp.llama_token * len(ids))(*ids)
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())

    def prefill(self, ids: list[int]) -> int:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        return self.feed(ids)

    def decode(self, token: int, count: int) -> list[int]:
        tokens = []
        for _ in range(count):
            token = self.feed([token])
            tokens.append(token)
        return tokens


def load(job: Job) -> Contestant:
    model = Model(job)
    size = (job.model / "model.gguf").stat().st_size  # the word table is the head, so a step reads all of the file
    return Contestant(text_works(job.inputs, model.prefill, model.decode), float(size))


if __name__ == "__main__":
    serve(load)

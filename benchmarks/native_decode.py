"""The native backend at each precision against eager bfloat16 in one run: encoding, prefill, decode, reuse and guessed tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.native_decode scene.jpg ... --clock cpu --csv native_decode.csv

Interleaved rounds, medians. With one thread, `--clock cpu` counts the thread's CPU time, so that other work on the machine disturbs
less (it still takes its share of the memory's bandwidth, the read rate's too). The read rate is the sum of 192 MiB by torch with as
many threads; a share above 1 says that our reading is better than that sum, not that memory is faster than it is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rows import append_rows
from rsvlm_export.native import PRECISIONS, export_native
from rsvlm_infer import RSVLM
from rsvlm_infer.backends import Backend, Prompt
from rsvlm_infer.backends.native import NativeBackend
from rsvlm_infer.engine import Engine, Request
from rsvlm_infer.hardware import probe
from rsvlm_infer.pipeline import default_checkpoint
from rsvlm_infer.tasks.caption import CAPTION_PROMPT
from rsvlm_infer.tasks.generation import GenerationSettings, build_request, prompt_ids
from rsvlm_infer.tasks.scene import PreparedScene, SceneSettings, prepare_scene

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
BASELINE = "eager bfloat16"


@dataclass
class Times:
    """Seconds of one backend; `decode` of single steps."""

    encode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)  # encoding and prefill of another question about the same image


def forget(backend: Backend) -> None:
    """A first question is meant: nothing may be left of the one before."""
    if isinstance(backend, NativeBackend):
        backend.forget()


def run_round(model: RSVLM, scene: PreparedScene, steps: int, clock: Callable[[], float], times: Times) -> int:
    """One image, two questions; the first one is answered for `steps` tokens, whatever they are. Gives the prompt's tokens."""
    backend = model.backend
    forget(backend)
    start = clock()
    features = backend.encode([scene.packed])[0]
    times.encode.append(clock() - start)
    ids = prompt_ids(model.tokenizer, model.config, CAPTION_PROMPT, features.num_tokens)
    start = clock()
    logits, cache = backend.prefill([Prompt(ids, (features,))], len(ids) + steps)
    times.prefill.append(clock() - start)
    for _ in range(steps):
        token = logits.argmax(axis=1).astype(np.int32)
        start = clock()
        logits = backend.decode(cache, token)
        times.decode.append(clock() - start)
    start = clock()
    features = backend.encode([scene.packed])[0]
    other = prompt_ids(model.tokenizer, model.config, "Is there a road?", features.num_tokens)
    backend.prefill([Prompt(other, (features,))], len(other) + steps)
    times.second.append(clock() - start)
    return len(ids)


def step_bytes(model: RSVLM) -> float:
    """Bytes of weights that one step must read."""
    backend = model.backend
    if isinstance(backend, NativeBackend):
        tied = "language_model.lm_head" not in backend.package.weights
        names = (name for name in backend.package.weights if name.startswith("language_model."))
        return float(
            sum(backend.package.weights[name][3].size for name in names if tied or name != "language_model.embed_tokens")
        )
    language: Any = backend.model.language_model  # type: ignore[attr-defined]
    return float(sum(parameter.numel() * parameter.element_size() for parameter in language.parameters()))


def speed_rows(models: dict[str, RSVLM], image: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per backend and measure."""
    clock = CLOCKS[options.clock]
    times = {name: Times() for name in models}
    large, reads, prompt = torch.randn(48 << 20), [], 0
    scenes = {name: prepare_scene(image, model.config, SceneSettings()) for name, model in models.items()}
    for round_index in range(options.rounds + 1):
        start = clock()
        large.sum()
        reads.append(clock() - start)
        for name, model in models.items():
            found = Times() if round_index == 0 else times[name]  # the first round pages weights in
            prompt = run_round(model, scenes[name], options.steps, clock, found)
    read_rate = large.numel() * 4.0 / statistics.median(reads)
    rows = []
    for name, model in models.items():
        for measure in ("encode", "prefill", "decode", "second"):
            seconds, baseline = (statistics.median(getattr(times[key], measure)) for key in (name, BASELINE))
            rate = step_bytes(model) / seconds if measure == "decode" else float("nan")
            rows.append(
                {
                    **about(options),
                    "backend": name,
                    "image": image.name,
                    "measure": {"second": "second question's encode + prefill"}.get(measure, measure),
                    "prompt_tokens": prompt,
                    "milliseconds": round(seconds * 1e3, 3),
                    "per_second": round(1 / seconds, 2),
                    "times_eager_bf16": round(baseline / seconds, 2),
                    "read_gb_per_s": round(rate / 1e9, 2),
                    "share_of_read_rate": round(rate / read_rate, 3),
                    "read_rate_gb_per_s": round(read_rate / 1e9, 2),
                    "note": "",
                }
            )
    return rows


def draft_row(name: str, model: RSVLM, images: Sequence[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Captions with and without guessed tokens, in turn: decode time per token, and how many guesses came true."""
    clock = CLOCKS[options.clock]
    plain = Engine(model.backend, draft_tokens=0)
    engines = {"plain": plain, "drafts": Engine(model.backend, draft_table=model.engine.draft_table)}
    seconds, tokens, answers = dict.fromkeys(engines, 0.0), 0, {key: [] for key in engines}  # type: ignore[var-annotated]
    for image in images:
        scene = prepare_scene(image, model.config, SceneSettings())
        features = model._encode([scene], CAPTION_PROMPT)[0]
        for key, engine in list(engines.items())[:: 1 if len(answers["plain"]) % 2 else -1]:  # each goes first every other time
            request, _ = build_request(
                model.tokenizer, model.config, CAPTION_PROMPT, features, GenerationSettings(max_new_tokens=40)
            )
            bare = Request(request.token_ids, request.images, 40, stop_ids=request.stop_ids, hints=request.hints)
            events = engine.generate([bare])
            answer = [next(events).token_id]  # prefill
            start = clock()
            answer += [event.token_id for event in events]
            seconds[key] += clock() - start
            answers[key].append(answer)
        tokens += len(answers["plain"][-1]) - 1
    drafts = engines["drafts"].drafts
    note = (
        f"{len(images)} captions, {drafts.drafted} tokens guessed, {drafts.accepted} came true ({drafts.acceptance:.0%}), "
        f"{drafts.tokens_per_step:.2f} tokens per step, same answers: {answers['plain'] == answers['drafts']}, "
        f"plain {seconds['plain'] / tokens * 1e3:.2f} ms per token, {seconds['plain'] / seconds['drafts']:.2f} times as fast"
    )
    return {
        **about(options),
        "backend": name,
        "image": "",
        "measure": "decode with guessed tokens",
        "prompt_tokens": 0,
        "milliseconds": round(seconds["drafts"] / tokens * 1e3, 3),
        "per_second": round(tokens / seconds["drafts"], 2),
        "times_eager_bf16": float("nan"),
        "read_gb_per_s": float("nan"),
        "share_of_read_rate": float("nan"),
        "read_rate_gb_per_s": float("nan"),
        "note": note,
    }


def about(options: argparse.Namespace) -> dict[str, Any]:
    """When, where and how."""
    machine = probe()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{machine.cpu}, {machine.cores} cores, {(machine.native or {}).get('kernel_isa')}",
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="the first one is timed, guesses are counted on all")
    parser.add_argument("--checkpoint", type=Path, default=default_checkpoint())
    parser.add_argument("--packages", type=Path, help="folder of packages by precision; missing ones are made there")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu = CPU time of the one thread")
    parser.add_argument("--guesses-only", action="store_true", help="only the captions with and without guessed tokens")
    parser.add_argument("--csv", type=Path, help="appended to; the screen alone when left out")
    options = parser.parse_args()
    if options.clock == "cpu" and torch.get_num_threads() != 1:
        parser.error("--clock cpu counts one thread; set OMP_NUM_THREADS=1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.packages or Path(scratch)
        models = {} if options.guesses_only else {BASELINE: RSVLM.from_pretrained(options.checkpoint, "eager", "bfloat16")}
        for precision in options.precisions:
            if not (folder / precision).is_dir():
                export_native(options.checkpoint, folder / precision, precision)
            models[f"native {precision}"] = RSVLM.from_pretrained(folder / precision)
        rows = [] if options.guesses_only else speed_rows(models, options.images[0], options)
        rows += [draft_row(name, model, options.images, options) for name, model in models.items() if name != BASELINE]
        for row in rows:
            print(*(f"{key}={value}" for key, value in row.items() if key not in ("date", "machine")), flush=True)
    if options.csv:
        append_rows(options.csv, rows)


if __name__ == "__main__":
    main()

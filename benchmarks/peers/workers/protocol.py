"""The worker's side of the protocol: one JSON object a line, requests on stdin, answers on stdout. Knows no peer.

First answer: `{"ready": true, "works": [...], "load_s": ..., "weight_bytes": ...}`. Then for each request `{"work": ..., "round": ...}`
one answer `{"seconds": {work: s, ...}, ...}` or `{"error": ...}`. A worker ends when its stdin does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

Answer = dict[str, Any]


@dataclass
class Job:
    """What a worker is told on its command line."""

    inputs: Path
    model: Path
    precision: str
    threads: int


@dataclass
class Contestant:
    """A loaded model: what it can measure, and bytes of weights that one decode step reads (0 = it does not decode)."""

    works: dict[str, Callable[[int], Answer]]
    weight_bytes: float = 0.0
    notes: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def serve(load: Callable[[Job], Contestant]) -> None:
    """Loads, then answers until stdin ends. What libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        parser = argparse.ArgumentParser()
        for name, kind in (("inputs", Path), ("model", Path), ("precision", str), ("threads", int)):
            parser.add_argument(f"--{name}", type=kind, required=True)
        job = Job(**vars(parser.parse_args()))
        started = time.perf_counter()
        try:
            contestant = load(job)
        except Exception as error:
            _say(answers, {"error": _line(error)})
            raise
        _say(
            answers,
            {
                "ready": True,
                "works": list(contestant.works),
                "load_s": time.perf_counter() - started,
                "weight_bytes": contestant.weight_bytes,
                "notes": contestant.notes,
                **contestant.extra,
            },
        )
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = contestant.works[request["work"]](request["round"])
            except Exception as error:  # one refused work must not end the others; the row carries the reason
                answer = {"error": _line(error)}
            _say(answers, answer | {"peak_rss_bytes": peak_rss_bytes()})


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _say(answers: TextIO, answer: Answer) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()

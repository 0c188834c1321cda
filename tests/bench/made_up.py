"""Rows and reports made by hand, with numbers that tests can check."""

from __future__ import annotations

from rsvlm_infer.bench.schema import STAGES, Agreement, Report, Row, Summary


def make_row(precision: str = "float32", scenario: str = "SingleStream", *, ms: float = 100.0, **changes: object) -> Row:
    """A row whose latencies are ms, 2 ms, 3 ms, 4 ms."""
    samples = tuple(ms * i for i in (1, 2, 3, 4))
    single = scenario == "SingleStream"
    values: dict[str, object] = {
        "images": 4,
        "repeats": 1,
        "latency_ms": Summary.of(samples) if single else None,
        "samples_ms": samples if single else (),
        "stages": {name: Summary.of([ms / 10]) for name in STAGES},
        "token_times": {"ttft_ms": Summary.of([ms / 2]), "tpot_ms": Summary.of([ms / 20])},
        "images_per_s": 400 / ms,
        "mpix_per_s": 40 / ms,
        "tokens_per_s": 4000 / ms,
        "visual_tokens": 256.0,
        "generated_tokens": 10.0,
        "peak_rss_bytes": 2**30,
        "load_ms": 1500.0,
        "disk_bytes": 5 * 2**20,
        "quality": {"class_accuracy": 0.75, "cider": 0.5},
        "agreement": Agreement(4, 1.0, 1.0, 0.0, 1.0),
        "answers": {"a.jpg": "a river | a road"},
    }
    return Row("eager", precision, scenario, **(values | changes))  # type: ignore[arg-type]


def make_report(*rows: Row, **workload: object) -> Report:
    """A report of these rows on a made-up machine."""
    machine = {"cpu": "Fake CPU", "cores": 2, "memory_bytes": 8 * 2**30, "system": "Linux", "gpus": []}
    environment = {
        "machine": machine,
        "python": "3.11.0",
        "rsvlm_infer": "0.1.0",
        "packages": {"numpy": "2.0"},
        "git": {"commit": "0123456789abcdef", "changed": True},
        "date": "2026-01-01T00:00:00+00:00",
        "command": "python -m rsvlm_infer.bench",
        "load_average": 0.1,
    }
    work = {
        "checkpoint": "here",
        "image_set": "RSICD test",
        "images": 4,
        "images_digest": "abc",
        "repeats": 1,
        "offline_batch": 4,
    }
    work |= {"references": {"a.jpg": "a river ."}, "warmup": 2, "max_new_tokens": 32}
    return Report(environment, work | workload, rows, ("be careful",))

"""The loop that both stages share: learning rate by step or clock, a log line per step, weights and optimizer saved often."""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

Item = TypeVar("Item")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Parameters by name, and their peak learning rate."""

    parameters: dict[str, nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0


class Loop:
    """AdamW with warm-up and a cosine that ends at 0 when either the steps or the minutes are used up.

    `<name>.safetensors` in `folder` holds the weights, AdamW's state and the clock; a new Loop goes on from it.
    """

    def __init__(self, folder: Path, name: str, groups: list[Group], settings: dict[str, Any]) -> None:
        self.folder, self.name, self.groups, self.settings = folder, name, groups, settings
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(group.parameters.values()), "lr": group.learning_rate, "weight_decay": group.weight_decay}
                for group in groups
            ],
            betas=(0.9, 0.98),
        )
        self.names = {parameter: name for group in groups for name, parameter in group.parameters.items()}
        self.step, self.seconds = self._resume()
        self._started = time.monotonic() - self.seconds

    def __iter__(self) -> Iterator[int]:
        """The number of each step to take; the body must call `update` once."""
        steps, limit = self.settings["steps"], self.settings["minutes"] * 60
        with Progress() as progress:
            task = progress.add_task(self.name, total=steps, completed=self.step)
            while self.step < steps and time.monotonic() - self._started < limit:
                done = max(self.step / steps, (time.monotonic() - self._started) / limit)
                factor = min(1.0, (self.step + 1) / self.settings["warmup_steps"]) * 0.5 * (1 + math.cos(math.pi * done))
                for group, place in zip(self.groups, self.optimizer.param_groups, strict=True):
                    place["lr"] = group.learning_rate * factor
                yield self.step
                progress.update(task, completed=self.step)
        self._save()

    def update(self, **values: float) -> None:
        """One AdamW step on the gradients, the log line with `values`, and a save when it is time."""
        norm = torch.nn.utils.clip_grad_norm_(list(self.names), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        row = {"step": self.step, **{key: round(value, 4) for key, value in values.items()}, "norm": round(float(norm), 3)}
        row |= {"rate": self.optimizer.param_groups[0]["lr"], "seconds": round(time.monotonic() - self._started)}
        with (self.folder / f"{self.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.step % self.settings["save_every"] == 0:
            self._save()

    def _save(self) -> None:
        tensors = {f"weight.{name}": parameter.detach() for parameter, name in self.names.items()}
        for parameter, name in self.names.items():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}.{name}": value.detach().clone() for key, value in state.items()}
        temporary = self.folder / f"{self.name}.tmp"
        seconds = time.monotonic() - self._started
        save_file(tensors, temporary, metadata={"step": str(self.step), "seconds": str(seconds)})
        temporary.replace(self.folder / f"{self.name}.safetensors")

    def _resume(self) -> tuple[int, float]:
        path = self.folder / f"{self.name}.safetensors"
        if not path.exists():
            return 0, 0.0
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        with torch.no_grad():
            for parameter, name in self.names.items():
                parameter.copy_(tensors[f"weight.{name}"])
                if f"exp_avg.{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step")
                    }
        _log.info("%s: resumed at step %s", self.name, metadata["step"])
        return int(metadata["step"]), float(metadata["seconds"])


def ahead(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, made in a thread while the last ones are used: reading and resampling release the interpreter."""
    waiting: queue.Queue[Item | BaseException] = queue.Queue(depth)

    def fill() -> None:
        try:
            for item in items:
                waiting.put(item)
        except BaseException as error:
            waiting.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        item = waiting.get()
        if isinstance(item, BaseException):
            raise item
        yield item


def trained_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights that a loop saved, without AdamW's state."""
    tensors = load_file(folder / f"{name}.safetensors")
    return {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}

"""What a worker makes of errors: memory, the job as a whole, or one window; and which scenes it keeps open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from rsvlm_infer.errors import BackendError, CheckpointError, ConfigError, ImageReadError, InputError, MissingDependencyError
from rsvlm_infer.imagery.source import within_memory
from rsvlm_infer.scenes.journal import AnswerKey
from rsvlm_infer.scenes.record import GridWindow, WindowRecord
from rsvlm_infer.scenes.worker import Task, Worker, reason_of, trouble_of
from tests.scenes.fake_scenes import FakeOpener, FakeRun, write_fake


def caught(call: object) -> BaseException:
    try:
        call()  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def hidden_memory_error() -> None:
    with within_memory("scene.tif"):
        raise MemoryError


def test_running_out_of_memory_is_recognised_in_all_its_forms() -> None:
    class OutOfMemoryError(RuntimeError):  # as torch calls it
        pass

    assert trouble_of(MemoryError()) == "memory"
    assert trouble_of(OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")) == "memory"
    assert (
        trouble_of(RuntimeError("Non-zero status code: Failed to allocate memory for requested buffer of size 1")) == "memory"
    )
    found = caught(hidden_memory_error)
    assert (type(found), trouble_of(found)) == (ImageReadError, "memory")


def test_torch_on_this_machine_says_it_in_words_that_are_known() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    found = caught(lambda: torch.empty(1 << 50))
    assert (type(found), trouble_of(found)) == (RuntimeError, "memory"), found


def test_what_is_wrong_everywhere_is_told_from_what_is_wrong_here() -> None:
    for kind in (BackendError, CheckpointError, ConfigError, MissingDependencyError):
        assert trouble_of(kind("x")) == "everywhere"
    for error in (ImageReadError("x"), InputError("x"), RuntimeError("out of range"), ValueError("out of memory in a title")):
        assert trouble_of(error) == "other"
    assert reason_of(InputError("a\n  b")) == "a b"
    assert reason_of(ValueError("a")) == "ValueError: a"
    assert reason_of(MemoryError()) == "MemoryError"


def test_a_worker_keeps_the_scenes_that_it_used_last(tmp_path: Path) -> None:
    opener = FakeOpener(tmp_path / "log")
    a, b, c = (write_fake(tmp_path / f"{name}.json", 1) for name in "abc")
    worker = Worker(opener, keep=2)
    for source in (a, b, a, c, a):  # c closes b
        worker.do(Task(source, None))
    assert (opener.opened, opener.closed) == (3, 1)
    worker.do(Task(a, 128))  # another budget is another plan
    assert (opener.opened, opener.closed) == (4, 2)
    worker.close()
    assert (opener.opened, opener.closed) == (4, 4)


def test_after_running_out_of_memory_nothing_stays_open(tmp_path: Path) -> None:
    opener = FakeOpener(tmp_path / "log", memory_windows=0)
    source = write_fake(tmp_path / "a.json", 1)
    worker = Worker(opener)
    opened = worker.do(Task(source, None)).opened
    assert opened is not None
    outcome = worker.do(Task(source, None, opened.windows, AnswerKey.of(opened.header)))
    assert (outcome.trouble, outcome.reason, outcome.records) == ("memory", "MemoryError", ())
    assert (opener.opened, opener.closed) == (1, 1)


def test_a_worker_with_another_checkpoint_is_found_out(tmp_path: Path) -> None:
    source = write_fake(tmp_path / "a.json", 1)
    opened = Worker(FakeOpener(tmp_path / "log")).do(Task(source, None)).opened
    assert opened is not None
    task = Task(source, None, opened.windows, AnswerKey.of(opened.header))
    outcome = Worker(FakeOpener(tmp_path / "log", model="another")).do(task)
    assert outcome.trouble == "everywhere"
    assert outcome.reason.startswith(f"the checkpoint of {source} must be the same for every worker, expected sha256 ")
    assert Worker(FakeOpener(tmp_path / "log")).do(task).records[0].place == opened.windows[0]


def test_an_interrupt_passes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: FakeRun, windows: Sequence[GridWindow]) -> list[WindowRecord]:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeRun, "answer", interrupt)
    worker = Worker(FakeOpener(tmp_path / "log"))
    source = write_fake(tmp_path / "a.json", 1)
    opened = worker.do(Task(source, None)).opened
    assert opened is not None
    with pytest.raises(KeyboardInterrupt):
        worker.do(Task(source, None, opened.windows, None))

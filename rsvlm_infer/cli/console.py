"""Owns what reaches the terminal: data on stdout, words on stderr, progress bars, exit codes. Knows no model."""

from __future__ import annotations

import codecs
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TextIO, TypeVar

from ..errors import InputError, RsvlmError

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_PARTLY = 0, 1, 2, 3
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as shells expect

PROGRESS_AFTER_S = 1.0

T = TypeVar("T")


@dataclass
class Console:
    """The terminal of one run. `progress` is the bar that is alive, if any."""

    debug: bool = False
    quiet: bool = False
    progress: Progress | None = field(default=None, repr=False)

    def data(self, text: str, end: str = "\n") -> None:
        """Data for the reader or the next program: stdout, at once."""
        with self._unobstructed():
            sys.stdout.write(_writable(text + end, sys.stdout))
            sys.stdout.flush()

    def json(self, values: dict[str, Any]) -> None:
        """One JSON object on one line, in UTF-8 also when the terminal is not: then, and for names that are no UTF-8, by escapes."""
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        if _encoding(sys.stdout) != "utf-8" or _writable(text, sys.stdout) != text:
            text = json.dumps(values, ensure_ascii=True, allow_nan=False)
        self.data(text)

    def note(self, text: str) -> None:
        """One line for people: stderr, not when quiet."""
        if not self.quiet:
            self.problem(text)

    def problem(self, text: str) -> None:
        """One line that must be seen: stderr."""
        with self._unobstructed():
            sys.stderr.write(_writable(f"rsvlm: {' '.join(text.split())}\n", sys.stderr))

    def failure(self, error: BaseException, subject: str = "") -> None:
        """One line for an error, with its traceback only in debug."""
        text = str(error) or type(error).__name__
        if not isinstance(error, RsvlmError):
            text = f"internal error: {type(error).__name__}: {text}; run again with --debug and report it"
        if self.debug:
            with self._unobstructed():
                traceback.print_exception(error, file=sys.stderr)
        self.problem(text if not subject or subject in text else f"{subject}: {text}")

    def run(self, command: Callable[[], int]) -> int:
        """The exit code of a command; no exception but SystemExit leaves here."""
        try:
            code = command()
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            return _abandon_stdout()
        except KeyboardInterrupt:
            self.problem("interrupted")
            return EXIT_INTERRUPTED
        except InputError as error:
            self.failure(error)
            return EXIT_USAGE
        except Exception as error:
            self.failure(error)
            return EXIT_ERROR

    @contextmanager
    def working(self, label: str, total: int | None = None, *, counted: bool = True) -> Iterator[Progress]:
        """Work that may take long; a bar appears after a second, on a terminal only. counted: show the count and what is left by it."""
        progress = Progress(label, total, enabled=not self.quiet and sys.stderr.isatty(), counted=counted)
        self.progress = progress
        try:
            yield progress
        finally:
            self.progress = None
            progress.close()

    def each(self, items: Iterable[T], label: str, total: int) -> Iterator[T]:
        """Items as they come, counted on a bar."""
        with self.working(label, total) as progress:
            for item in items:
                yield item
                progress.advance()

    @contextmanager
    def _unobstructed(self) -> Iterator[None]:
        if self.progress is None:
            yield
        else:
            with self.progress.hidden():
                yield


class Progress:
    """One bar on stderr. It starts by a timer, so that short work leaves no trace; while hidden, others may write."""

    def __init__(self, label: str, total: int | None, enabled: bool, counted: bool = True) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._done: float = 0
        self._label, self._total, self._counted = label, total, counted
        self._lock = threading.RLock()
        self._timer = threading.Timer(PROGRESS_AFTER_S, self._show)
        self._timer.daemon = True
        self._closed = not enabled
        if enabled:
            self._timer.start()

    def advance(self) -> None:
        self.show(self._done + 1, self._label)

    def show(self, done: float, label: str) -> None:
        """So much of the total is done; the words beside the bar."""
        with self._lock:
            self._done, self._label = done, label
            if self._bar is not None:
                self._bar.update(self._task, completed=done, description=label)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
            try:
                yield
            finally:
                if self._bar is not None:
                    self._bar.start()

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def _show(self) -> None:
        from rich import progress
        from rich.console import Console as RichConsole

        with self._lock:
            if self._closed:
                return
            counted = (progress.MofNCompleteColumn(), progress.TimeRemainingColumn()) if self._counted else ()
            self._bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.TextColumn("{task.description}"),
                *((progress.BarColumn(), *counted) if self._total is not None else ()),
                progress.TimeElapsedColumn(),
                console=RichConsole(stderr=True),
                transient=True,
                redirect_stdout=False,  # stdout carries data
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(self._label, total=self._total, completed=self._done)
            self._bar.start()


terminal = Console()  # the one that all commands of this process share


def set_up_logging(verbose: bool) -> None:
    """Log lines on stderr in the form of every other line."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="rsvlm: %(message)s", stream=sys.stderr, force=True
    )


def exit_code(failed: int, total: int) -> int:
    """0 when all images worked, 1 when none did, 3 in between."""
    if failed == 0:
        return EXIT_OK
    return EXIT_ERROR if failed == total else EXIT_PARTLY


def _encoding(stream: TextIO) -> str:
    """Python's own name of a stream's encoding."""
    return codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name


def _writable(text: str, stream: TextIO) -> str:
    """The text with backslash escapes for what the stream cannot hold, such as the bytes of a file name that is no UTF-8."""
    encoding = _encoding(stream)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _abandon_stdout() -> int:
    """The reader left: nothing more may be written, not even by Python's own flush at exit."""
    with suppress(OSError, ValueError):  # stdout is no real file, as under a test runner
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_BROKEN_PIPE

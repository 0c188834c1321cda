"""Owns what a job has done so far: one sqlite file that survives a kill at any moment. Knows no model, no raster and no output file.

An answer is kept under the hashes of the scene's content, the model, the prompt and the configuration, and its window: whatever changes
one of them asks again, and nothing else does. A micro-batch is one transaction, so a kill loses the one in flight and no other. The
connection holds the file's exclusive lock as long as it lives, so no second process works on the same folder; a killed process lets go
of it by itself.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import InputError, RsvlmError
from ..tasks.result import Timings
from .record import GridWindow, PixelWindow, SceneHeader, WindowRecord

VERSION = 1
LOCK_WAIT_S = 1.0  # a process that was killed a moment ago may still be leaving
_STEP = "delete it to start again, or choose another output folder"

_TABLES = """
CREATE TABLE keys (
    id INTEGER PRIMARY KEY, content_hash TEXT, model_hash TEXT, prompt_hash TEXT, config_hash TEXT,
    UNIQUE (content_hash, model_hash, prompt_hash, config_hash)
);
CREATE TABLE answers (
    key INTEGER, row_off INTEGER, col_off INTEGER, height INTEGER, width INTEGER,
    record TEXT NOT NULL, timings TEXT NOT NULL, budget INTEGER,
    PRIMARY KEY (key, row_off, col_off, height, width)
) WITHOUT ROWID;
CREATE TABLE failures (
    key INTEGER, row_off INTEGER, col_off INTEGER, height INTEGER, width INTEGER, attempts INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (key, row_off, col_off, height, width)
) WITHOUT ROWID;
CREATE TABLE refusals (source TEXT PRIMARY KEY, stamp TEXT NOT NULL, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE lowered (id INTEGER PRIMARY KEY, job_hash TEXT NOT NULL, micro_batch INTEGER NOT NULL, budget INTEGER, reason TEXT NOT NULL);
CREATE TABLE finished (source TEXT PRIMARY KEY, stamp TEXT NOT NULL, job_hash TEXT NOT NULL, summary TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE paces (
    job_hash TEXT PRIMARY KEY, windows INTEGER, pixels INTEGER, seconds REAL, visual INTEGER, prompt INTEGER, new INTEGER,
    rss_bytes INTEGER
) WITHOUT ROWID;
"""


class JournalError(RsvlmError, RuntimeError):
    """A journal is locked, damaged, of another version, or cannot be written."""


@dataclass(frozen=True)
class AnswerKey:
    """What an answer depends on beside its window; sha256 in hex."""

    content_hash: str
    model_hash: str
    prompt_hash: str
    config_hash: str

    @classmethod
    def of(cls, header: SceneHeader) -> AnswerKey:
        return cls(header.content_hash, header.model_hash, header.prompt_hash, header.config_hash)


@dataclass(frozen=True)
class Failure:
    """A window that gave no answer: how often it was tried alone, and why the last attempt failed."""

    attempts: int
    reason: str


@dataclass(frozen=True)
class Limits:
    """What memory allows: windows in one micro-batch, and visual tokens for each window (None = as the checkpoint says)."""

    micro_batch: int
    budget: int | None


@dataclass(frozen=True)
class Pace:
    """What answers took: windows, native pixels in their cores, seconds of answering, tokens, and the largest resident memory."""

    windows: int = 0
    pixels: int = 0
    seconds: float = 0.0
    num_visual_tokens: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    peak_rss_bytes: int = 0

    @classmethod
    def of(cls, records: Sequence[WindowRecord], seconds: float, peak_rss_bytes: int) -> Pace:
        """Of records that took so many seconds together."""
        return cls(
            windows=len(records),
            pixels=sum(record.place.core.height * record.place.core.width for record in records),
            seconds=seconds,
            num_visual_tokens=sum(record.num_visual_tokens for record in records),
            num_prompt_tokens=sum(record.num_prompt_tokens for record in records),
            num_new_tokens=sum(record.num_new_tokens for record in records),
            peak_rss_bytes=peak_rss_bytes,
        )

    def plus(self, other: Pace) -> Pace:
        """Both together."""
        peak = max(self.peak_rss_bytes, other.peak_rss_bytes)
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        return Pace(**sums | {"peak_rss_bytes": peak})


class Journal:
    """An open journal; a context manager. Only one process has it open at a time.

    Raises:
        JournalError: another process works on it, it is damaged or of another version, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JournalError(f"output folder {path.parent} cannot be made ({error.strerror}); choose another one") from None
        with self._told():
            self._database = sqlite3.connect(path, timeout=LOCK_WAIT_S, isolation_level=None)
        try:
            self._start()
        except BaseException:
            self._database.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the lock."""
        self._database.close()

    def answers(self, key: AnswerKey) -> dict[PixelWindow, WindowRecord]:
        """The answers under a key, by window."""
        rows = self._rows("SELECT record, timings FROM answers WHERE key = ?", self._find(key))
        with self._readable():
            records = [WindowRecord.from_dict(json.loads(record), Timings(**json.loads(timings))) for record, timings in rows]
        return {record.place.window: record for record in records}

    def add(self, key: AnswerKey, records: Sequence[WindowRecord], *, budget: int | None, job_hash: str, pace: Pace) -> None:
        """The answers of one micro-batch, all or none. budget: visual tokens each window had. pace: what they took, added to the job's."""
        with self._transaction():
            number = self._number(key)
            for record in records:
                place = _place(record.place.window)
                values = (_text(record.to_dict()), _text(asdict(record.timings)), budget)
                self._database.execute("INSERT OR REPLACE INTO answers VALUES (?,?,?,?,?,?,?,?)", (number, *place, *values))
                self._database.execute(f"DELETE FROM failures WHERE key = ? AND {_WHERE}", (number, *place))
            total = self.pace(job_hash).plus(pace)
            self._database.execute("INSERT OR REPLACE INTO paces VALUES (?,?,?,?,?,?,?,?)", (job_hash, *astuple(total)))

    def fail(self, key: AnswerKey, window: GridWindow, reason: str) -> Failure:
        """One more failed attempt at a window alone."""
        with self._transaction():
            number, place = self._number(key), _place(window.window)
            row = self._database.execute(
                f"SELECT attempts FROM failures WHERE key = ? AND {_WHERE}", (number, *place)
            ).fetchone()
            failure = Failure((row[0] if row else 0) + 1, reason)
            self._database.execute(
                "INSERT OR REPLACE INTO failures VALUES (?,?,?,?,?,?,?)", (number, *place, failure.attempts, _text(reason))
            )
        return failure

    def failures(self, key: AnswerKey) -> dict[PixelWindow, Failure]:
        """The failed attempts under a key, by window."""
        rows = self._rows(
            "SELECT row_off, col_off, height, width, attempts, reason FROM failures WHERE key = ?", self._find(key)
        )
        with self._readable():
            return {PixelWindow(*row[:4]): Failure(row[4], json.loads(row[5])) for row in rows}

    def refuse(self, source: str, stamp: str, reason: str) -> None:
        """A scene that cannot be opened. stamp: changes when the file changes."""
        with self._transaction():
            self._database.execute(
                "INSERT OR REPLACE INTO refusals VALUES (?,?,?)", (_text(source), _text(stamp), _text(reason))
            )

    def refusal(self, source: str, stamp: str) -> str | None:
        """Why this scene was refused; None when it was not, or has changed since."""
        rows = self._rows("SELECT reason FROM refusals WHERE source = ? AND stamp = ?", _text(source), _text(stamp))
        with self._readable():
            return str(json.loads(rows[0][0])) if rows else None

    def lower(self, job_hash: str, limits: Limits, reason: str) -> None:
        """Memory did not suffice: from now on these limits hold, also after a kill."""
        with self._transaction():
            self._database.execute(
                "INSERT INTO lowered (job_hash, micro_batch, budget, reason) VALUES (?,?,?,?)",
                (job_hash, limits.micro_batch, limits.budget, reason),
            )

    def lowered(self, job_hash: str) -> list[tuple[Limits, str]]:
        """How memory lowered the limits of a job, oldest first, each with its reason."""
        rows = self._rows("SELECT micro_batch, budget, reason FROM lowered WHERE job_hash = ? ORDER BY id", job_hash)
        return [(Limits(row[0], row[1]), str(row[2])) for row in rows]

    def finish(self, source: str, stamp: str, job_hash: str, summary: dict[str, Any]) -> None:
        """All of a scene's files are written."""
        with self._transaction():
            self._database.execute(
                "INSERT OR REPLACE INTO finished VALUES (?,?,?,?)", (_text(source), _text(stamp), job_hash, _text(summary))
            )

    def finished(self, source: str, stamp: str, job_hash: str) -> dict[str, Any] | None:
        """The summary of a finished scene; None when it is not finished, or the file or the job has changed since."""
        rows = self._rows(
            "SELECT summary FROM finished WHERE source = ? AND stamp = ? AND job_hash = ?",
            _text(source),
            _text(stamp),
            job_hash,
        )
        with self._readable():
            return dict(json.loads(rows[0][0])) if rows else None

    def files_of(self, source: str) -> tuple[str, ...]:
        """Names of the files that were last written for a scene, by any job."""
        rows = self._rows("SELECT summary FROM finished WHERE source = ?", _text(source))
        with self._readable():
            return tuple(json.loads(rows[0][0])["files"]) if rows else ()

    def forget_failures(self) -> None:
        """Quarantined windows and scenes get new attempts, and the limits that memory lowered are lifted."""
        with self._transaction():
            for table in ("failures", "refusals", "lowered", "finished"):
                self._database.execute(f"DELETE FROM {table}")

    def pace(self, job_hash: str) -> Pace:
        """What a job's answers took so far, over all scenes and runs."""
        rows = self._rows(
            "SELECT windows, pixels, seconds, visual, prompt, new, rss_bytes FROM paces WHERE job_hash = ?", job_hash
        )
        return Pace(*rows[0]) if rows else Pace()

    def _start(self) -> None:
        with self._told():
            # exclusive comes first: then the log's index stays in this process and needs no shared memory file
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")  # one flush for seconds of work, and power cuts lose nothing
            self._database.execute("BEGIN EXCLUSIVE")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            empty = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            if empty and version == 0:
                for statement in _TABLES.split(";"):  # executescript would commit half-way
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {VERSION}")
            self._database.execute("COMMIT")
        if not empty and version != VERSION:
            raise JournalError(f"journal {self._path} must be of version {VERSION}, got {version}; {_STEP}")

    def _rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._told():
            return self._database.execute(statement, values).fetchall()

    def _find(self, key: AnswerKey) -> int:
        """The number of a key; -1, which no row has, for one without answers and failures."""
        rows = self._rows(f"SELECT id FROM keys WHERE {_KEY}", *_hashes(key))
        return int(rows[0][0]) if rows else -1

    def _number(self, key: AnswerKey) -> int:
        """The number of a key, made when it is new; inside a transaction."""
        values = _hashes(key)
        self._database.execute(
            "INSERT OR IGNORE INTO keys (content_hash, model_hash, prompt_hash, config_hash) VALUES (?,?,?,?)", values
        )
        return int(self._database.execute(f"SELECT id FROM keys WHERE {_KEY}", values).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._told():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._database.in_transaction:  # a full disk has already rolled back
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """sqlite's errors in words that name the file and the next step."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise JournalError(
                    f"output folder {self._path.parent} is in use by another rsvlm process; wait for it, or choose another folder"
                ) from None
            raise JournalError(
                f"journal {self._path} cannot be used ({error}); check its disk and permissions, then run again to go on"
            ) from None
        except sqlite3.DatabaseError as error:
            raise JournalError(f"journal {self._path} is damaged ({error}); {_STEP}") from None

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """What was written as JSON must still be it."""
        try:
            yield
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"journal {self._path} is damaged ({error}); {_STEP}") from None


def check_limits(limits: Limits) -> None:
    """Raises InputError for a micro-batch or budget below one."""
    if limits.micro_batch < 1:
        raise InputError(f"micro_batch must be at least 1, got {limits.micro_batch}; leave it out for the default")
    if limits.budget is not None and limits.budget < 1:
        raise InputError(f"budget must be at least 1 visual token, got {limits.budget}; leave it out for the checkpoint's own")


_KEY = "content_hash = ? AND model_hash = ? AND prompt_hash = ? AND config_hash = ?"
_WHERE = "row_off = ? AND col_off = ? AND height = ? AND width = ?"


def _hashes(key: AnswerKey) -> tuple[str, str, str, str]:
    return key.content_hash, key.model_hash, key.prompt_hash, key.config_hash


def _place(window: PixelWindow) -> tuple[int, int, int, int]:
    return window.row_off, window.col_off, window.height, window.width


def _text(values: object) -> str:
    """JSON in ASCII: sqlite takes no file name that is no UTF-8."""
    return json.dumps(values, allow_nan=False)

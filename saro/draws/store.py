"""Stores draws in one sqlite3 file, each under the key of what made it."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saro.data.records import Message
from saro.draws.request import FAILURES, FINAL_FAILURES, Draw, Request, Sampling
from saro.errors import SaroError
from saro.files import cache_dir

# Marks a file as ours, in SQLite's header: "SaRo" in ASCII.
_APPLICATION = 0x5361526F
_VERSION = 1
_SCHEMA = (
    "CREATE TABLE models (number INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE)",
    # A row without a draw was handed over: its request waits for a result.
    """CREATE TABLE draws (
        key TEXT NOT NULL PRIMARY KEY,
        model INTEGER NOT NULL REFERENCES models (number),
        request TEXT NOT NULL,
        draw TEXT,
        failure TEXT,
        time TEXT NOT NULL
    )""",
)
# Seconds that a process waits for others that write. They hold the file for the milliseconds of one group.
_BUSY_SECONDS = 60
# Keys asked for in one statement; older versions of SQLite take at most 999.
_KEYS = 500
_PASSING = ", ".join(f"'{failure}'" for failure in FAILURES if failure not in FINAL_FAILURES)
# In an upsert these are the columns of the row that is there.
_IS_OPEN = f"(draw IS NULL OR failure IN ({_PASSING}))"

# Fault and advice of an error message, by SQLite's primary error code.
_FAULTS = {
    sqlite3.SQLITE_NOTADB: ("is not a store of draws", "give another path"),
    sqlite3.SQLITE_CORRUPT: ("the store is damaged", "move it away, or save what can be read with sqlite3's .recover"),
    sqlite3.SQLITE_BUSY: (f"another process has locked the store for {_BUSY_SECONDS} seconds", "find it and end it"),
    sqlite3.SQLITE_READONLY: ("the store cannot be written", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_CANTOPEN: ("the store cannot be opened", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_FULL: ("the disk is full", "make room and start again; what was drawn is stored"),
    sqlite3.SQLITE_IOERR: ("the disk gave an error", "check it and start again; what was drawn is stored"),
}


@dataclass(frozen=True)
class StoredModel:
    """Counts of what a store holds of one model.

    Attributes:
        identity: as in ``Generator.identity``.
        texts: number of draws that are texts.
        failures: number of draws by kind of failure.
        waiting: number of requests that were handed over and have no result yet.
    """

    identity: Mapping[str, Any]
    texts: int
    failures: Mapping[str, int]
    waiting: int


class DrawStore:
    """A file of draws that several processes may read and write at once.

    A group of draws is written whole or not at all. The first draw of a key stays, except that a failure which may not
    last (not in ``FINAL_FAILURES``) makes room for the next draw. Values are JSON: the draw, its request and the model's
    identity, so that each text says where it comes from. The file is readable only by its owner.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: str | os.PathLike) -> DrawStore:
        """Open a store; make it if there is no such file.

        Raises:
            SaroError: there is no such folder, the file cannot be written, is no store, is damaged, or was written by
                a newer version.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise SaroError(f"{path}: there is no folder {path.parent}; make it first")
        if path.is_dir():
            raise SaroError(f"{path}: is a folder; give the name of a file")
        try:
            # Before SQLite does, so that nobody else can read it at any moment. SQLite's own files take its permissions.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise SaroError(
                f"{path}: cannot be written ({error.strerror}); check the permissions of the file and its folder"
            ) from error
        with _readable_faults(path):
            # isolation_level=None: transactions begin where this file begins them.
            connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            store = cls(path, connection)
            try:
                store._prepare()
            except BaseException:
                connection.close()
                raise
        return store

    def _prepare(self) -> None:
        """Make the tables in a new file, and check the version of another."""
        # Reads before it writes: a file that is not ours must stay as it is.
        self._check_version()
        # Readers and a writer do not wait for each other. A process that opens the file at the same moment may hold it;
        # it sets the same mode.
        with contextlib.suppress(sqlite3.OperationalError):
            self._connection.execute("PRAGMA journal_mode = WAL")
        if self._read_pragma("user_version") == _VERSION:
            return
        with self._transaction():
            if self._read_pragma("user_version") == _VERSION:
                return  # Another process was faster.
            for statement in _SCHEMA:
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._connection.execute(f"PRAGMA user_version = {_VERSION}")

    def _check_version(self) -> None:
        # In one transaction: another process may make the tables between two statements.
        self._connection.execute("BEGIN")
        try:
            application, version = self._read_pragma("application_id"), self._read_pragma("user_version")
            has_tables = self._connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is not None
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        if application != _APPLICATION and (has_tables or application or version):
            raise SaroError(f"{self.path}: is not a store of draws; give another path")
        if version > _VERSION:
            raise SaroError(
                f"{self.path}: was written by a newer version of saro (format {version}, this one reads {_VERSION}); "
                "update saro"
            )

    def _read_pragma(self, name: str) -> int:
        return self._connection.execute(f"PRAGMA {name}").fetchone()[0]

    def get(self, keys: Sequence[str]) -> dict[str, Draw]:
        """Return the draws of those keys that have one, failures too."""
        found: dict[str, Draw] = {}
        with self._faults():
            for part, marks in _split_keys(keys):
                query = f"SELECT key, draw FROM draws WHERE draw IS NOT NULL AND key IN ({marks})"
                for key, draw in self._connection.execute(query, part):
                    found[key] = self._parse(_parse_draw, draw)
        return found

    def find_failures(self, keys: Sequence[str]) -> dict[str, str | None]:
        """Return the failure of those keys that have a draw, None for a text. No text is read."""
        found: dict[str, str | None] = {}
        with self._faults():
            for part, marks in _split_keys(keys):
                query = f"SELECT key, failure FROM draws WHERE draw IS NOT NULL AND key IN ({marks})"
                found.update(self._connection.execute(query, part).fetchall())
        return found

    def put(self, model: Mapping[str, Any], draws: Mapping[str, tuple[Request, Draw]]) -> None:
        """Store a group of draws of one model, all or none.

        Args:
            model: the ``Generator.identity`` that made them.
            draws: key -> the request and its draw.
        """
        for key, (request, _) in draws.items():
            if key != request.key(model):
                raise ValueError(f"{key} is not the key of its request")
        rows = [(key, _to_json(request), _to_json(draw), draw.failure) for key, (request, draw) in draws.items()]
        self._insert(model, rows)

    def register(self, model: Mapping[str, Any], requests: Iterable[Request]) -> None:
        """Note requests that are handed over, so that a result needs nothing but its key."""
        self._insert(model, [(request.key(model), _to_json(request), None, None) for request in requests])

    def _insert(self, model: Mapping[str, Any], rows: Sequence[tuple[str, str, str | None, str | None]]) -> None:
        identity, time = canonical_json(model), datetime.now(UTC).isoformat(timespec="seconds")
        statement = f"""
            INSERT INTO draws (key, request, draw, failure, model, time)
            VALUES (?, ?, ?, ?, (SELECT number FROM models WHERE identity = ?), ?)
            ON CONFLICT (key) DO UPDATE SET draw = excluded.draw, failure = excluded.failure, time = excluded.time
            WHERE excluded.draw IS NOT NULL AND {_IS_OPEN}
        """
        with self._faults(), self._transaction():
            self._connection.execute("INSERT OR IGNORE INTO models (identity) VALUES (?)", (identity,))
            self._connection.executemany(statement, [(*row, identity, time) for row in rows])

    def read_open(self, keys: Iterable[str] | None = None) -> Iterator[tuple[str, dict[str, Any], Request]]:
        """Yield (key, model identity, request) of each request without a draw, or with a failure that may not last.

        Args:
            keys: only these; by default all.
        """
        query = f"""
            SELECT key, identity, request FROM draws JOIN models ON models.number = draws.model WHERE {_IS_OPEN}
            ORDER BY draws.rowid
        """
        wanted = None if keys is None else set(keys)
        with self._faults():
            rows = self._connection.execute(query).fetchall()
        for key, identity, request in rows:
            if wanted is None or key in wanted:
                yield key, json.loads(identity), self._parse(_parse_request, request)

    def read_models(self) -> list[StoredModel]:
        """Return what the store holds of each model, in the order in which they came."""
        query = """
            SELECT identity, draw IS NULL, failure, COUNT(*) FROM draws JOIN models ON models.number = draws.model
            GROUP BY models.number, draw IS NULL, failure ORDER BY models.number, failure
        """
        counts: dict[str, dict[str | None, int]] = {}
        waiting: dict[str, int] = {}
        with self._faults():
            for identity, is_waiting, failure, number in self._connection.execute(query):
                by_failure = counts.setdefault(identity, {})
                if is_waiting:
                    waiting[identity] = number
                else:
                    by_failure[failure] = number
        return [
            StoredModel(
                identity=json.loads(identity),
                texts=by_failure.get(None, 0),
                failures={failure: number for failure, number in by_failure.items() if failure is not None},
                waiting=waiting.get(identity, 0),
            )
            for identity, by_failure in counts.items()
        ]

    def find(self, prefix: str, limit: int = 10) -> list[dict[str, Any]]:
        """Return what is stored under keys that begin with ``prefix``, as plain JSON with everything known of it.

        Args:
            limit: most draws to return.
        """
        query = """
            SELECT key, identity, request, draw, time FROM draws JOIN models ON models.number = draws.model
            WHERE substr(key, 1, ?) = ? ORDER BY key LIMIT ?
        """
        with self._faults():
            rows = self._connection.execute(query, (len(prefix), prefix, limit)).fetchall()
        return [
            {
                "key": key,
                "model": json.loads(identity),
                "request": self._parse(json.loads, request),
                "draw": self._parse(json.loads, draw or "null"),
                "time": time,
            }
            for key, identity, request, draw, time in rows
        ]

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> DrawStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE: waits for its turn here. A read that becomes a write could not wait, and would fail.
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _faults(self) -> contextlib.AbstractContextManager[None]:
        return _readable_faults(self.path)

    def _parse(self, parse: Any, text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, TypeError, AttributeError) as error:
            # SQLite has no checksums: a damaged page may be read as text.
            wrong, fix = _FAULTS[sqlite3.SQLITE_CORRUPT]
            raise SaroError(f"{self.path}: {wrong}; {fix}") from error


@contextlib.contextmanager
def _readable_faults(path: Path) -> Iterator[None]:
    """Turn SQLite's errors that a user can do something about into a SaroError."""
    try:
        yield
    except sqlite3.Error as error:
        # The primary code is the low byte of the extended one.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in _FAULTS:
            raise
        wrong, fix = _FAULTS[code]
        raise SaroError(f"{path}: {wrong}; {fix}") from error


def _split_keys(keys: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """Yield as many keys as one statement takes, with their marks in it."""
    for start in range(0, len(keys), _KEYS):
        part = list(keys[start : start + _KEYS])
        yield part, ", ".join("?" * len(part))


def canonical_json(value: Any) -> str:
    """Return JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _to_json(value: Request | Draw) -> str:
    """Return a request or a draw as JSON without the fields that have their default."""
    plain = asdict(value)
    for field in fields(value):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if plain[field.name] == default:
            del plain[field.name]
    return canonical_json(plain)


def _parse_draw(text: str) -> Draw:
    plain = json.loads(text)
    for name in ("ids", "choices"):
        if name in plain:
            plain[name] = tuple(plain[name])
    return Draw(**plain)


def _parse_request(text: str) -> Request:
    plain = json.loads(text)
    sampling = plain.pop("sampling")
    for name in ("stop", "choices"):
        sampling[name] = tuple(sampling[name])
    if "ids" in plain:
        plain["ids"] = tuple(plain["ids"])
    if "messages" in plain:
        plain["messages"] = tuple(Message(**message) for message in plain["messages"])
    return Request(sampling=Sampling(**sampling), **plain)


def find_store(name: str | None) -> Path:
    """Return the path of a store; that of the default one, whose folder is made, without a name.

    Raises:
        SaroError: the folder cannot be made.
    """
    if name is not None:
        return Path(name).expanduser()
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaroError(f"{folder}: cannot be made ({error.strerror}); name a file with --store") from error
    return folder / "draws.sqlite3"

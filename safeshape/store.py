"""One SQLite file for everything that costs time to make: scores, judgements, generations, features.

An entry is found by its kind and its key, a hash of what was looked at and of everything that made the verdict, so that
another setting never finds an old entry. Several processes may use one file; what was put is there after `kill -9`.
"""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

Kind = Literal["scores", "judgements", "generations", "features"]
KINDS: tuple[Kind, ...] = ("scores", "judgements", "generations", "features")
FORMAT = 1  # changes when old files cannot be read any more
_APPLICATION = 0x53415348  # marks the file as ours in SQLite's header
_FEW = 500  # keys per query; old builds of SQLite allow 999 variables


def canonical(value: Any) -> bytes:
    """The one JSON text of a value, as bytes: keys sorted, no blanks, UTF-8 in which lone surrogates stay themselves.

    Lone surrogates and control characters occur in real data. They are kept apart from their escapes and from the
    characters that a pair of them would make, so two different texts never have the same bytes.
    Errors: ValueError for NaN, infinities and values that JSON does not have.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise ValueError(f"only plain JSON values can be stored: {error}") from error
    return text.encode("utf-8", "surrogatepass")


def content_key(content: Any, maker: Any) -> str:
    """The key of an entry: SHA-256, in hexadecimal, of what was looked at and of what made the entry.

    `maker`: everything that changes the result: model, revision, weights, template, settings.
    """
    return hashlib.sha256(canonical({"content": content, "maker": maker})).hexdigest()


class Store:
    """Entries in one SQLite file: a JSON value each, and bytes beside it where wanted.

    Errors: ValueError in one sentence for a file that is no store, is damaged, or stays locked for a minute.
    """

    def __init__(self, path: str | Path, *, wait_s: float = 60.0) -> None:
        """Open or create. `path` ":memory:" keeps nothing. `wait_s`: how long to wait for another process's write."""
        self.path = str(path)
        with self._explained():
            self._db = sqlite3.connect(self.path, timeout=wait_s, isolation_level=None)
        try:
            with self._explained():
                self._prepare()
        except ValueError:
            self._db.close()
            raise

    def _prepare(self) -> None:
        # One query, hence one moment: another process may be creating the file.
        mark, found, tables = self._db.execute(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master) "
            "FROM pragma_application_id, pragma_user_version"
        ).fetchone()
        if mark not in (0, _APPLICATION) or (mark == 0 and tables):
            raise ValueError(f"{self.path} is a database of another program, not a store of scores")
        if mark == _APPLICATION and found != FORMAT:
            raise ValueError(f"{self.path} is a store of format {found}; this version reads format {FORMAT}")
        self._db.execute("PRAGMA journal_mode=WAL")
        # Safe against a killed process; only a fallen machine may lose the last entries, never the file.
        self._db.execute("PRAGMA synchronous=NORMAL")
        if mark == 0:
            with self._writing():
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS entries "
                    "(kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, data BLOB, PRIMARY KEY (kind, key))"
                )
                self._db.execute(f"PRAGMA user_version={FORMAT}")
                self._db.execute(f"PRAGMA application_id={_APPLICATION}")

    def get_many(self, kind: Kind, keys: Collection[str]) -> dict[str, Any]:
        """The values that are there, by key."""
        return {key: json.loads(bytes(value).decode("utf-8", "surrogatepass")) for key, value in self._read(kind, keys)}

    def get_bytes(self, kind: Kind, keys: Collection[str]) -> dict[str, bytes]:
        """The bytes that are there, by key."""
        return {key: bytes(data) for key, data in self._read(kind, keys, "data") if data is not None}

    def put_many(self, kind: Kind, values: Mapping[str, Any], data: Mapping[str, bytes] | None = None) -> None:
        """Write entries in one transaction: all of them or, when the process is killed, none. Old entries give way.

        Errors: ValueError for bytes without a value, and values that JSON does not have.
        """
        self._known(kind)
        data = data or {}
        for key in data:
            if key not in values:
                raise ValueError(f"there are bytes but no value for {kind} entry {key}")
        rows = [(kind, key, canonical(value), data.get(key)) for key, value in values.items()]
        with self._explained(), self._writing():
            self._db.executemany("INSERT OR REPLACE INTO entries (kind, key, value, data) VALUES (?, ?, ?, ?)", rows)

    def count(self, kind: Kind) -> int:
        """How many entries of a kind there are."""
        self._known(kind)
        with self._explained():
            return int(self._db.execute("SELECT count(*) FROM entries WHERE kind=?", (kind,)).fetchone()[0])

    def close(self) -> None:
        """Close the file; entries are safe without it."""
        self._db.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _known(self, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"a store has no kind {kind!r}; it has: {', '.join(KINDS)}")

    def _read(self, kind: Kind, keys: Collection[str], column: str = "value") -> Iterator[tuple[str, Any]]:
        self._known(kind)
        wanted = list(keys)
        for begin in range(0, len(wanted), _FEW):
            few = wanted[begin : begin + _FEW]
            marks = ",".join("?" * len(few))
            query = f"SELECT key, {column} FROM entries WHERE kind=? AND key IN ({marks})"
            with self._explained():
                rows = self._db.execute(query, (kind, *few)).fetchall()
            yield from rows

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction. The write lock comes first: two readers that both want to write would block each other."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ValueError(f"cannot use {self.path} as a store: {error}") from error

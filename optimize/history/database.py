"""The history's database: made, filled, brought to the newest schema, and put aside when it is damaged."""

from __future__ import annotations

import contextlib
import math
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, MetaData, Table, create_engine, delete, event, insert, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from optimize.errors import HistoryError
from optimize.history.models import Base, Run, Schema
from optimize.history.quick import BUSY_SECONDS
from optimize.history.rows import SCHEMA, TABLES, Rows, rows_of
from optimize.masking import masked

T = TypeVar("T")
CONNECT_SECONDS = 5
_ADVISORY_LOCK = 0x6F70746D
"""A number of ours among PostgreSQL's advisory locks."""
_NOT_A_RUN = (KeyError, TypeError, ValueError, AttributeError)


class History:
    """An open database with the tables of this version. Use `opened`, which closes it.

    Every method raises `HistoryError` where the database can't be reached, read or written; a message never holds the
    address's password. `tell` hears of what a person should know.
    """

    def __init__(self, address: str | Path, tell: Callable[[str], object] = lambda message: None) -> None:
        self.address, self.tell = address, tell
        self.fresh = False
        """Whether the tables were made just now."""
        try:
            self._url = _parsed(address)
            self._engine = _engine(self._url)
        except (ArgumentError, NoSuchModuleError, ImportError, ValueError, TypeError) as error:
            raise self._error(error) from None
        self._retried(self._prepare)

    def close(self) -> None:
        self._engine.dispose()

    def read(self, action: Callable[[Session], T]) -> T:
        """The result of `action`, which asks and changes nothing."""

        def reading() -> T:
            with Session(self._engine) as session:
                return action(session)

        return self._retried(reading)

    def known(self) -> set[str]:
        """The ids of all runs."""
        return self.read(lambda session: {*session.scalars(select(Run.run))})

    def add(self, documents: Iterable[Mapping[str, Any]]) -> int:
        """Write runs over what is there of them; how many. What is no `run.json` is told of and left out."""
        found: list[Rows] = []
        for document in documents:
            try:
                found.append(_checked(rows_of(document)))
            except _NOT_A_RUN as error:
                name = document.get("run") if isinstance(document, Mapping) else None
                self.tell(f"{name!r} is no run.json of schema 1 ({type(error).__name__}: {error}); it is left out")
        self._retried(lambda: self._write(found))
        return len(found)

    def check(self) -> None:
        """Look for damage in a SQLite file before it is relied on."""
        if self._path is not None and not _is_sound(self._path):
            self._put_aside()

    def renew(self) -> None:
        """Make the tables anew and fill them from the documents in them, the only thing that is no copy."""
        self._retried(lambda: self._prepare(anew=True))

    def _write(self, found: Sequence[Rows]) -> None:
        with self._engine.begin() as connection:
            for rows in found:
                _insert(connection, rows)

    def _prepare(self, anew: bool = False) -> None:
        if not anew and self._version() == SCHEMA:
            return
        with self._engine.begin() as connection:
            self._only_one(connection)
            version = _version(connection)
            if version is not None and version > SCHEMA:
                raise HistoryError(
                    f"{self._name} has schema {version}, and this optimize knows up to {SCHEMA}",
                    hint="use the newer optimize, or another database (OPTIMIZE_HISTORY)",
                )
            if version == SCHEMA and not anew:
                return  # another process was faster
            kept = _documents(connection)
            _drop(connection)
            Base.metadata.create_all(connection)
            for document in kept:
                with contextlib.suppress(*_NOT_A_RUN):
                    _insert(connection, rows_of(document))
            connection.execute(insert(Schema).values(id=1, version=SCHEMA))
            self.fresh = True

    def _version(self) -> int | None:
        with self._engine.connect() as connection:
            return _version(connection)

    def _only_one(self, connection: Connection) -> None:
        """One process makes or changes the tables, the others wait."""
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        elif connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")

    def _retried(self, action: Callable[[], T]) -> T:
        """Once more where another process wrote the same run in that moment, or where the file was damaged and has made
        room for a new one."""
        for last in (False, True):
            try:
                return action()
            except IntegrityError as error:
                if last:
                    raise self._error(error) from None
            except SQLAlchemyError as error:
                if last or not self._is_damaged(error):
                    raise self._error(error) from None
                self._put_aside()
        raise AssertionError

    def _is_damaged(self, error: SQLAlchemyError) -> bool:
        # Just this class: a file that is locked, full or can't be written is an error of a class below it.
        return isinstance(error, DatabaseError) and type(error.orig) is sqlite3.DatabaseError and self._path is not None

    def _put_aside(self) -> None:
        """Rename a damaged file, and make a new one."""
        from filelock import FileLock

        path = self._path
        assert path is not None
        self._engine.dispose()
        try:
            with FileLock(path.with_name(f"{path.name}.lock"), timeout=BUSY_SECONDS):
                if not _is_sound(path):
                    aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
                    path.rename(aside)
                    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
                    self.tell(f"{path} was damaged; it is {aside.name} now, and a new one is filled from the runs")
                self._prepare()
        except OSError as error:
            raise HistoryError(f"{path} is damaged, and can't be put aside: {error}") from error

    @property
    def _path(self) -> Path | None:
        """Of a SQLite file."""
        named = self._url.get_backend_name() == "sqlite" and self._url.database not in (None, "", ":memory:")
        return Path(str(self._url.database)) if named else None

    @property
    def _name(self) -> str:
        return str(self._path or masked(self._url.render_as_string(hide_password=True)))

    def _error(self, error: Exception) -> HistoryError:
        """In one line, without a statement's text and without the password."""
        url = getattr(self, "_url", None)
        said = " ".join(str(getattr(error, "orig", None) or error).split())
        password = url.password if url is not None else None
        said = masked(said, str(self.address), secrets=[str(password)] if password else ())
        if isinstance(error, ImportError):
            return HistoryError(
                f"the database needs a library that is not installed: {said}",
                hint='for PostgreSQL: pip install "optimize-workbench[postgresql]"',
            )
        if url is None or isinstance(error, NoSuchModuleError | ArgumentError):
            return HistoryError(
                f"the history's address can't be understood: {said}", hint="such as postgresql://user@host/database"
            )
        return HistoryError(f"the history ({self._name}) can't be used: {said}")


@contextlib.contextmanager
def opened(address: str | Path, tell: Callable[[str], object] = lambda message: None) -> Iterator[History]:
    """The database of a SQLAlchemy address, or in an SQLite file. Raises `HistoryError`."""
    history = History(address, tell)
    try:
        yield history
    finally:
        history.close()


def _parsed(address: str | Path) -> URL:
    if isinstance(address, Path):
        return URL.create("sqlite", database=str(address))  # whatever characters its folders have
    url = make_url(address)
    # Which driver, where the address does not say: the one that the extra installs.
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgresql", "postgres") else url


def _engine(url: URL) -> Engine:
    backend = url.get_backend_name()
    if backend == "sqlite":
        settings: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}}
        if url.database in (None, "", ":memory:"):
            settings["poolclass"] = StaticPool  # one connection: each has a memory of its own
        engine = create_engine(url, **settings)
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=ON"))
        return engine
    arguments: dict[str, Any] = {}
    if backend == "postgresql":
        wait = f"-c lock_timeout={int(BUSY_SECONDS * 1000)} -c statement_timeout={int(6 * BUSY_SECONDS * 1000)}"
        arguments = {"connect_timeout": CONNECT_SECONDS, "options": wait}
    return create_engine(url, connect_args=arguments, hide_parameters=True)


def _version(connection: Connection) -> int | None:
    if not inspect(connection).has_table(Schema.__tablename__):
        return None
    return connection.scalar(select(Schema.version))


def _insert(connection: Connection, rows: Rows) -> None:
    tables = Base.metadata.tables
    (run,) = (row["run"] for row in rows[TABLES[0]])
    for name in reversed(TABLES):
        connection.execute(delete(tables[name]).where(tables[name].c.run == run))
    for name, found in rows.items():
        if found:
            connection.execute(insert(tables[name]), found)


def _checked(rows: Rows) -> Rows:
    """Raises `TypeError` where a value is none that its column takes, so that one odd run keeps no other out."""
    for name, found in rows.items():
        for column in Base.metadata.tables[name].columns:
            kind: Any = column.type.python_type
            kinds = (int, float) if kind is float else kind
            for row in found:
                value = row[column.name]
                if value is None and column.nullable:
                    continue
                if not isinstance(value, kinds) or (isinstance(value, float) and not math.isfinite(value)):
                    raise TypeError(f"{column.name} is {value!r:.40}")
    return rows


def _documents(connection: Connection) -> list[dict[str, Any]]:
    """Every run that the tables hold, of whichever schema."""
    if not inspect(connection).has_table(TABLES[0]):
        return []
    table = Table(TABLES[0], MetaData(), autoload_with=connection)
    if "document" not in table.c:
        return []
    return [one for one in connection.scalars(select(table.c.document)) if isinstance(one, dict)]


def _drop(connection: Connection) -> None:
    """Our tables of any schema, and nobody else's."""
    known = MetaData()
    names = [name for name in inspect(connection).get_table_names() if name in (*TABLES, Schema.__tablename__)]
    for name in names:
        Table(name, known, autoload_with=connection)
    known.drop_all(connection)


def _is_sound(path: Path) -> bool:
    """Whether SQLite finds nothing wrong with a file; one that is gone makes room already."""
    if not path.exists():
        return True
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
    except sqlite3.OperationalError:  # locked, or not readable: no sign of damage
        return True
    except sqlite3.DatabaseError:
        return False

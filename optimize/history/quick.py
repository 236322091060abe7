"""The one write that every run ends with, without SQLAlchemy, whose import alone takes 0.3 s: a run that reuses every
artifact takes 0.7 s in all. It is for a SQLite file that has the tables already; `database` does everything else.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any

from optimize.history.rows import SCHEMA, TABLES, Rows

BUSY_SECONDS = 5.0
"""For another process that writes; a write takes milliseconds."""


def add(path: Path, rows: Rows) -> bool:
    """Write a run's rows over those that are there. False where the file is none of ours yet, of another schema, or
    damaged. Raises `sqlite3.Error` where it can't be written."""
    if not path.is_file():
        return False
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as database:
        try:
            version = database.execute("SELECT version FROM optimize_schema").fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return False
            raise
        except sqlite3.DatabaseError:
            return False
        if version != (SCHEMA,):
            return False
        database.execute("BEGIN IMMEDIATE")
        try:
            _write(database, rows)
            database.execute("COMMIT")
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            if type(error) is sqlite3.DatabaseError:  # "database disk image is malformed"
                return False
            raise
    return True


def _write(database: sqlite3.Connection, rows: Rows) -> None:
    (run,) = (row["run"] for row in rows[TABLES[0]])
    for table in reversed(TABLES):
        database.execute(f"DELETE FROM {table} WHERE run = ?", (run,))
    for table, found in rows.items():
        for row in found:
            names, marks = ", ".join(row), ", ".join("?" * len(row))
            database.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", [_stored(one) for one in row.values()])


def _stored(value: Any) -> Any:
    """As SQLAlchemy stores it."""
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S.%f")
    return json.dumps(value) if isinstance(value, dict) else value

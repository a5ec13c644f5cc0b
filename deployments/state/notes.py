"""JSON values that outlive the process, each under a name: what is known of adapters, for instance."""

from __future__ import annotations

import json
from typing import Any

from deployments.state.database import Database


class Notes:
    def __init__(self, database: Database):
        self._database = database

    def write(self, name: str, value: Any) -> None:
        """Keep a JSON value under a name."""
        self._database.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))

    def read(self, name: str) -> Any:
        """The value kept last under this name, or None."""
        row = self._database.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return row and json.loads(row["value"])

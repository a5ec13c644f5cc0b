"""The records of stored images: those that a client asked for by URL."""

from __future__ import annotations

import time
from collections.abc import Collection

from deployments.errors import not_found
from deployments.state.database import Database
from deployments.state.files import FileRecords


class ImageRecords:
    """One record per request, which may have made several outputs."""

    def __init__(self, database: Database, files: FileRecords):
        self._database = database
        self._files = files
        self.num_added = 0
        """Since the database was opened."""

    def add(self, image_id: str, output_format: str, files: Collection[str], tenant: str | None = None) -> None:
        """Record a stored image (or several of one job) that owns `files`."""
        with self._database.transaction():
            self._database.execute(
                "INSERT INTO images (id, tenant, output_format, created_at) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (image_id, tenant, output_format, time.time()),
            )
            self._files.claim(image_id, files)
            self.num_added += 1

    def output_format(self, image_id: str, tenant: str | None = None) -> str:
        """png, webp or jpeg. Raises `APIError` 404 for one that is unknown, or another tenant's."""
        row = self._database.execute(
            "SELECT output_format FROM images WHERE id = ?1 AND tenant IS ifnull(?2, tenant)", (image_id, tenant)
        ).fetchone()
        if row is None:
            raise not_found("image", image_id)
        return row["output_format"]

"""The tables of the state file, and how an older server's file is migrated."""

from __future__ import annotations

import sqlite3

MIGRATIONS = (
    """
    CREATE TABLE videos (
        position INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival; never given twice, also after a delete
        id TEXT NOT NULL UNIQUE,
        idempotency_key TEXT UNIQUE,
        job TEXT NOT NULL,                           -- JSON
        model TEXT NOT NULL,
        status TEXT NOT NULL,
        progress INTEGER NOT NULL DEFAULT 0,
        attempts INTEGER NOT NULL DEFAULT 0,         -- times its computation began
        created_at REAL NOT NULL,                    -- Unix seconds, as is completed_at
        completed_at REAL,
        error_code TEXT,
        error_message TEXT,
        timings TEXT NOT NULL DEFAULT '{}'           -- JSON: seconds by stage
    );
    CREATE TABLE images (
        id TEXT PRIMARY KEY,
        output_format TEXT NOT NULL,
        created_at REAL NOT NULL
    );
    CREATE TABLE files (
        key TEXT PRIMARY KEY,
        owner TEXT                                   -- id of a video or an image; NULL: to be deleted
    );
    CREATE INDEX files_by_owner ON files (owner);
    """,
    """
    CREATE TABLE notes (
        name TEXT PRIMARY KEY,
        value TEXT NOT NULL                          -- JSON
    );
    """,
    # Tenants, and what retention needs. SQLite cannot drop a column's UNIQUE, so the table is recreated.
    """
    CREATE TABLE new_videos (
        position INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        tenant TEXT,                                 -- digest of the API key it was made with
        idempotency_key TEXT,
        job TEXT NOT NULL,
        model TEXT NOT NULL,
        status TEXT NOT NULL,
        progress INTEGER NOT NULL DEFAULT 0,
        attempts INTEGER NOT NULL DEFAULT 0,
        created_at REAL NOT NULL,
        finished_at REAL,                            -- when it was completed or failed
        error_code TEXT,
        error_message TEXT,
        timings TEXT NOT NULL DEFAULT '{}'
    );
    INSERT INTO new_videos
        SELECT position, id, NULL, idempotency_key, job, model, status, progress, attempts, created_at,
            CASE status WHEN 'failed' THEN created_at ELSE completed_at END, error_code, error_message, timings
        FROM videos;
    DROP TABLE videos;
    ALTER TABLE new_videos RENAME TO videos;
    CREATE UNIQUE INDEX videos_by_idempotency_key ON videos (ifnull(tenant, ''), idempotency_key);
    CREATE INDEX videos_by_tenant ON videos (tenant);
    CREATE INDEX videos_by_finish ON videos (finished_at);
    ALTER TABLE images ADD COLUMN tenant TEXT;
    CREATE INDEX images_by_finish ON images (created_at);
    ALTER TABLE files ADD COLUMN num_bytes INTEGER;  -- NULL: written by a server that did not count
    DROP INDEX files_by_owner;
    CREATE INDEX files_by_owner ON files (owner, num_bytes);
    CREATE VIEW finished AS
        SELECT id, finished_at FROM videos WHERE finished_at IS NOT NULL
        UNION ALL SELECT id, created_at AS finished_at FROM images;
    """,
)
"""The script at index i brings a file from schema version i to i + 1 (SQLite's `user_version`)."""


def migrate(connection: sqlite3.Connection) -> None:
    """Bring an open file to the newest schema. Raises `RuntimeError` for one that a newer server wrote."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise RuntimeError(f"the state file has schema version {version}; this server knows {len(MIGRATIONS)}")
    for target, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.executescript(f"BEGIN; {script} PRAGMA user_version = {target}; COMMIT;")

"""All that the state has on disk besides the stored files themselves: its records, one class per kind."""

from __future__ import annotations

from deployments.state.database import Database
from deployments.state.files import FileRecords
from deployments.state.finished import FinishedRecords
from deployments.state.images import ImageRecords
from deployments.state.notes import Notes
from deployments.state.videos import VideoRecords


class Records:
    """The records of one server, in one `Database`."""

    def __init__(self, path: str, *, ttl_s: float | None = None, patience_s: float | None = None):
        """Open or create the file; see `Database` for `patience_s` and what is raised.

        Args:
            ttl_s: how long finished videos are kept, reported to clients.
        """
        self._database = Database(path, patience_s=patience_s)
        self.files = FileRecords(self._database)
        self.videos = VideoRecords(self._database, self.files, ttl_s=ttl_s)
        self.images = ImageRecords(self._database, self.files)
        self.finished = FinishedRecords(self._database, self.files)
        self.notes = Notes(self._database)

    @property
    def num_finished(self) -> int:
        """Videos and images finished since the file was opened."""
        return self.videos.num_finished + self.images.num_added

    def close(self) -> None:
        self._database.close()

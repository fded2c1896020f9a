"""Lets torch's writer of shards leave all or nothing. Tested by tests/distributed/test_checkpoints.py."""

import io
import os
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from app.checkpoints.atomic import flush, partial_path, publish
from app.checkpoints.integrity import MANIFEST_FILE, Checksum, manifest
from app.checkpoints.shards import METADATA_FILE
from app.checkpoints.weights import CONTENT_FILE
from app.whole_file import write_whole


class CheckpointWriter(FileSystemWriter):
    """Every rank writes and flushes its shards under the partial name of `path`; rank 0 then adds the rest and renames.

    The rest is `content`, the bytes of CONTENT_FILE, and the manifest, which has the optimizer `step`.
    """

    def __init__(self, path: Path, *, content: memoryview, step: int, keep_previous: bool) -> None:
        super().__init__(partial_path(path))
        self.fs = self._files = _ChecksummingFiles()
        self._target, self._content = path, content
        self._step, self._keep_previous = step, keep_previous

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = _Written(super().write_data(plan, planner).wait())
        written.checksums = self._files.checksums
        done = Future[list[WriteResult]]()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        folder = partial_path(self._target)
        checksums = dict(self._files.checksums)
        checksums[METADATA_FILE] = checksums.pop(f"{METADATA_FILE}.tmp")  # torch has renamed this file
        for written in results:
            checksums |= cast(_Written, written).checksums
        write_whole(folder / CONTENT_FILE, self._content)
        checksums[CONTENT_FILE] = Checksum(len(self._content), zlib.crc32(self._content))
        write_whole(folder / MANIFEST_FILE, manifest(self._step, checksums))
        flush(folder)
        publish(self._target, keep_previous=self._keep_previous)


class _Written(list[WriteResult]):
    """The answer of a rank to rank 0, which carries the checksums along."""

    checksums: Mapping[str, Checksum]


class _ChecksummingFiles(FileSystem):
    def __init__(self) -> None:
        self.checksums: dict[str, Checksum] = {}  # by file name

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb"  # a writer does not read
        with _ChecksummingFile(io.FileIO(path, "w")) as file:
            yield file
        self.checksums[Path(path).name] = file.checksum


class _ChecksummingFile(io.BufferedWriter):
    """A file that is written from its beginning to its end."""

    checksum = Checksum(0, 0)

    def write(self, data: Any) -> int:
        num_bytes, crc32 = self.checksum
        self.checksum = Checksum(num_bytes + memoryview(data).nbytes, zlib.crc32(data, crc32))
        return super().write(data)

"""Reading sources: records in chunks, in any order, in constant memory."""

from datamodules.readers.opening import open_reader
from datamodules.readers.records import BadRecord, LostRecords, Reader, Record

__all__ = ["BadRecord", "LostRecords", "Reader", "Record", "open_reader"]

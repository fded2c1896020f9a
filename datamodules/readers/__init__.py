"""Sources read as records, in chunks that come in any order and in constant memory.

A `Source` (`sources`) is opened as a `Reader` (`opening`). The files of a local one are listed (`files`) and cut into
chunks (`chunks`); reading a chunk gives documents and bad records (`records`).
"""

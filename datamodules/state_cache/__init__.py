"""States that a frozen model left, kept on disk.

One pass of the model over rows of a corpus (`filling`) makes shards of rows, which an index describes and from
whose maps rows are read (`shards`).
"""

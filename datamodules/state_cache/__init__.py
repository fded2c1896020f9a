"""States that a frozen model left, kept on disk.

One pass of the model (`frozen_model`) over rows of a corpus fills shards of rows (`filling`), which an index describes
(`shards`); rows are read from maps of the shards (`rows`).
"""

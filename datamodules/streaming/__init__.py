"""The endless stream of training rows out of any number of sources.

A run has V lanes, and each reads its own part of every source. Within a lane, the documents of a source come in
shuffled blocks (`source_blocks`), which are packed into rows (`packing`). These are shuffled once more, and the lane
mixes the rows of its sources by weight (`stream`). The loader takes each batch from the lane whose turn it is
(`loader`), which also keeps where every lane stands.
"""

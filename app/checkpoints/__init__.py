"""Checkpoints: `atomic` makes them whole or absent, `integrity` checks their bytes, `may_resume` may refuse a resume.

They are written and read by `checkpoint_io` (single files) and `sharded` (directories); `contents` and `shards` know
what is in them. For decoding and export, `weights` reads them tensor by tensor.
"""

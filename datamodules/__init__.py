"""Lightning datamodules: text and code corpora."""

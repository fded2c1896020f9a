"""Tasks that are scored on what a model generates."""

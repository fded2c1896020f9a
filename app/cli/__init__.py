"""The composition root: the only package that imports everything; no algorithms."""

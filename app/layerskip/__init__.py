"""The paper (arXiv 2404.16710) as arithmetic; see README.md, the method card."""

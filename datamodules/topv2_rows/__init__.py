"""TOPv2 as rows of tokens.

Its files (`files`) are tokenised once and kept (`store`). Examples are chosen for rows and made tensors (`rows`), and
rows are dealt to batches of like length (`loading.length_buckets`).
"""

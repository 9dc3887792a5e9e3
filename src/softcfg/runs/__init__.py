"""Sampling runs: many images by many processes, into a folder that loses nothing and can be continued.

A run is cut into shards, one a batch: shard k holds the images k B .. (k + 1) B - 1 of batch size B, whichever
process draws it. The folder holds `run.json` (settings and environment), `shards/`, and what is made from them.
"""

"""From stored samples to batches. The folders are in the order a sample travels; each imports only those before it.

storage/    files, object stores, blocks kept and cached, arrays mapped into memory
documents/  one sample: parsed, varied, rendered to pieces, labelled; `build.py` is the path from stored to labelled
sources/    one file per data format: what the index needs of it, and how sample i is read
index/      the sidecar files of a shard: where samples lie and what they take
source.py   a dataset: its shards, index and format together
plan/       order, mixture, packing and balance, before a byte of payload is read
loading/    the processes that read, build and hand over batches; streams without an index
Public doors: source, shards (write), convert, pipeline (webdataset).
"""

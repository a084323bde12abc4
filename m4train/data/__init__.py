"""From shards on disk to batches, in the order a sample travels. No model and no `torch.distributed` here.

- `storage/`: local and remote files, read by byte ranges
- `documents/`: one stored sample -> one labelled document: parsing, options, images, token ids, labels
- `sources/`: one file per data format: how its shards are scanned and how a sample is read back
- `index/`: the sidecar files of a shard, which know every sample's place, image sizes and token counts
- `source.py`: one dataset of the mixture, its shards with their index
- `plan/`: which documents make up every pack of every optimizer step, from the indexes alone
- `loading/`: worker processes that read, decode and collate the plan of one rank into `PackedBatch`es

For others to call: `shards.py` writes and finds shards, `convert.py` makes canonical ones of any source, `pipeline.py` gives
the planned samples to a loop of one's own.
"""

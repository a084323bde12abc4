"""The sidecar files of a shard: `scan` makes them, `build` decides when, `shard_index` reads them."""

"""The packs of one rank, read, decoded and collated by worker processes."""

"""Which documents make up every pack of every optimizer step, computed from the indexes alone."""

"""From shards to uint8 batches: index, order, decode, transforms, loader."""

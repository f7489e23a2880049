"""From bytes to a batch: sources, decoding, listing, packing, samples, transforms."""

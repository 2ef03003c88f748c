"""From token ids to logits: packed batches on one device, on several, or in several processes."""

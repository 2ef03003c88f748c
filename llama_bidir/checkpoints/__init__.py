"""Checkpoints on disk and on the Hub: loading, saving, the model card, and the folders that other tools read."""

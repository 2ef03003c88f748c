"""Between disk and model: loading, saving, adapters, and the folders that other tools read."""

"""Helpers that every room may use: checks of input, optional packages, files that appear whole."""

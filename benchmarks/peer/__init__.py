"""Beside another library that prunes KV caches: kvpress, on the same prompts."""

"""Data: any file, folder or archive as bytes (or tokens), memory-mapped, split once, sampled by step number."""

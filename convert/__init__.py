"""Checkpoint folder to GGUF: ``python -m yivl_edge.convert FOLDER -o FILE.gguf``."""

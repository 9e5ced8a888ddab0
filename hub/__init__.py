"""Compose, verify and (later) publish NoteLLM-2 checkpoints."""

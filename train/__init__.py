"""Contrastive training of NoteLLM-2 on pairs of related notes."""

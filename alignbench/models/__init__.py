"""Policies and scorers: loading, building, LoRA, export."""

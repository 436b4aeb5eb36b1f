"""alignbench: one harness for constrained LLM alignment."""

__version__ = "0.1.0"

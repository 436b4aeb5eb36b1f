"""The papers' testable claims: declared, tested on records, and judged by rules that stand before the numbers."""

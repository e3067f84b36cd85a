"""Studies, rivals and long tests of LLM2 (experiments/README.md)."""

"""Qwen3.5 checkpoints as pure Q4_K_M GGUF files that behave like BF16."""

"""LoRA in GGUF, as llama.cpp loads it, read and written."""

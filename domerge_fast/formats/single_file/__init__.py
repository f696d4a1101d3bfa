"""Adapters that are one safetensors file, or a folder with it: kohya's, diffusers', ComfyUI's."""

"""MLX folders, as mlx-lm has them, read and written."""

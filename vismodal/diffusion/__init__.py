"""Latent diffusion: the `kinds` of models, their loading, encoding and generating, and their training (`denoise`)."""

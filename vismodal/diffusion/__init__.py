"""Latent diffusion: the `pipeline` of a model, its training (`denoise`) and the `losses`, `prompts` on a subject."""

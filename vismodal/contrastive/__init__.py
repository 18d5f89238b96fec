"""Contrastive fine-tuning on pictures with texts: the `loss`, `retrieval`, and what was forgotten (`retention`)."""

"""Few-shot adaptation of CLIP: methods with their usual settings (`recipes`), pictures (`data`), the whole `task`."""

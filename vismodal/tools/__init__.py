"""Tools on adapters that are trained: merge them, shorten, extract, strengthen, and bake them into their models."""

"""Adapter files of other tools: pure functions from dict to dict, without models."""

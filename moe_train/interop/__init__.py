"""Weights to and from transformers without loss: families, names of tensors, export, import, model card."""

"""Exports, as two releases of `transformers` read them."""

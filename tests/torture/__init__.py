"""Tortures runs of `grpo_jax.main` from outside and compares them with an undisturbed run: `make torture`."""

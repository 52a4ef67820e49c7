"""Runnable examples: `python -m examples.finetune_digits`."""

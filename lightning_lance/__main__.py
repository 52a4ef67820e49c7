"""``python -m lightning_lance`` is the console script ``lightning-lance``."""

from lightning_lance.cli import main

if __name__ == "__main__":
    main()

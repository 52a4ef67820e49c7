"""Published continual-learning methods that Avalanche does not have."""

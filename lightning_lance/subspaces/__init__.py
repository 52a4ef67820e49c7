"""Which directions are kept of an input: rank rules, statistics, spectra, factors."""

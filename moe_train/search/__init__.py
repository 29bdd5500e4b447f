"""Searches: which settings are best for the money, by Optuna over the pool of all sweeps (extra `sweep`)."""

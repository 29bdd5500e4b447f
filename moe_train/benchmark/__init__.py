"""What the device at hand can do and what a training step makes of it: `scripts/benchmark.py`."""

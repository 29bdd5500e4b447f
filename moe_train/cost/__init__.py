"""What a run costs: FLOPs by formula, the device's peak and price, two clocks, energy, an account of attempts."""

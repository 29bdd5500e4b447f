"""What runs not yet made would cost, and how far that can be trusted: tested on published runs and on ours."""

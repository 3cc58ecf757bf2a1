"""Pure tensor functions: packing rows and log-probabilities."""

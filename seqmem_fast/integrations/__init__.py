"""Other packages' models on our ops; each module is imported by name."""

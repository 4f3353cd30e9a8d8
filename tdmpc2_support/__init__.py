"""What the scripts share and nobody reads for an algorithm."""

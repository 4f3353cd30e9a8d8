"""Files from elsewhere: PyTorch's format, offline datasets, and agents that other code has trained."""

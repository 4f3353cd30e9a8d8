"""Files: the .pt format without PyTorch, offline datasets, recorded episodes."""

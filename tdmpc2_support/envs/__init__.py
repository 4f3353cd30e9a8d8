"""The simulators, one module each; `envs.py` is their public side."""

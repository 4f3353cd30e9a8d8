"""The simulators, one room each; `envs.py` is their face."""

"""Agents that were made elsewhere, by other code or in other types."""

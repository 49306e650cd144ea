"""Configs, shape checks and numerics that every system uses."""

"""Sweeps: variants × seeds of a recipe as runs that share what they have in common. Imports no torch, no Prefect."""

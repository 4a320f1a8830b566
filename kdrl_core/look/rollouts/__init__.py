"""Rollouts of runs to look through: records, index, queries, export, import."""

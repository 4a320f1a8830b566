"""Rollout artifacts: their Arrow schemas, and what is computed from them."""

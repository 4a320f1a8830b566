"""Sampling is one job: requests → responses → verdicts → published tables.

It has four uses. Rollouts of a step and SFT's samples (`responses`) keep tokens and logprobs; their verdicts are a file
of their own. Evaluations and difficulty labels (`job`) are sampled and judged in shards that survive a kill.
"""

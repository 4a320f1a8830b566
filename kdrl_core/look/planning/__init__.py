"""Whether a recipe fits the GPUs, and how long it takes, before any GPU is used. Reads neither weights nor data, and
imports neither torch nor Prefect."""

"""`kdrl ui`: a read-only web app on loopback over the rollouts of runs. FastAPI over a RolloutStore; pages in static/."""

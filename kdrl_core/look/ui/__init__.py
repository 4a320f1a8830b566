"""`kdrl ui`: a read-only web app on loopback over rollouts of runs. FastAPI over a RolloutStore; pages in static/."""

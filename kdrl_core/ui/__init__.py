"""`kdrl ui`: a read-only web app on loopback over the rollouts of runs. Server: FastAPI over `RolloutStore`; pages: static/."""

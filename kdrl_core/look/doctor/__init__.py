"""`kdrl doctor`: try a recipe on this machine in minutes, before a run is paid for.

`examine` looks at versions, GPUs, disk and limits in this process. Then a child process does for real, with random
weights, what a step of a run does (`exercise`). The child can be killed, so a crash or a hang has a name as well.
"""

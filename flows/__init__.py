"""The DAG as Prefect flows, and the command line. Flows read like the paper's method; the work is in `kdrl_core`."""

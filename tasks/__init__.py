"""The boxes of the DAG as Prefect tasks: plain values in, plain values out; the work is in `kdrl_core.boxes`."""

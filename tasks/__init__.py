"""One thin Prefect task per box of the DAG: plain values in, plain values out; the work is in `kdrl_core.boxes`."""

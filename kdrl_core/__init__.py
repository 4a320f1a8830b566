"""The work of kdrl: objectives, data, verification, engines, training, ledger. Never imports Prefect."""

__version__ = "0.1.0"

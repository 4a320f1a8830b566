"""SIGKILL at every fault point and at random instants: resumed to its end, a run has the bytes of one left alone."""

from pathlib import Path

from crash.campaign import campaign


def test_killed_runs_end_in_the_same_bytes(tmp_path: Path) -> None:
    report = campaign(tmp_path, kills=20, seed=0)
    assert report.lost == report.surplus == report.differences == []
    assert report.leftovers == []
    assert report.kills >= 20
    assert report.missed == set()
    assert len(report.points) > 15
    assert report.bytes_compared > 1_000_000

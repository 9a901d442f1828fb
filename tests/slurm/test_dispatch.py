"""Jobs of a real SLURM: what they ask for, and that they make what a local run makes."""

from project import EPOCHS


def test_a_run_without_faults(undisturbed):
    assert undisturbed.starts() == [0]
    assert undisturbed.epochs_done() == EPOCHS
    assert len(undisturbed.fingerprint()) == 1 + 4

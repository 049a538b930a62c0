"""A sample of the fault sweep: weights that a server fails to load end the run with a cause; it goes on without."""

import fault_sweep
import pytest


@pytest.mark.live
@pytest.mark.slow
def test_weights_that_a_server_does_not_take_end_the_run_with_their_cause(tmp_path):
    record = fault_sweep.plant(tmp_path, "a server does not take the weights")
    assert fault_sweep.is_right(record), record


def test_the_verdict_can_be_no():
    right = {"exit_status": 1, "said": ["why"], "processes_left": 0, "resumed": 0, "steps": [1, 2, 3, 4]}
    assert fault_sweep.is_right(right)
    wrong = ({"exit_status": 0}, {"said": []}, {"processes_left": 1}, {"resumed": 1}, {"steps": [1, 2, 2, 3, 4]})
    assert not any(fault_sweep.is_right({**right, **change}) for change in wrong)

"""A sample of the soak (``python tests/live/soak.py``), and that its comparison can fail."""

import pytest
from soak import compare, soak

MIB = 2**20


def samples(memory, files, processes=lambda _: 1, role="actor"):
    """Of each of the processes."""
    return [
        {
            "attempt": 1,
            "step": step,
            "roles": {
                role: {
                    "memory": memory(step) * MIB * processes(step),
                    "files": files(step) * processes(step),
                    "processes": processes(step),
                }
            },
        }
        for step in range(1, 101)
    ]


def test_what_grows_is_seen():
    steady = dict.fromkeys(range(1, 101), 6.0)
    flat = compare(samples(lambda _: 500, lambda _: 40), steady)
    assert (flat["processes"]["actor"]["grew"], flat["slower"]) == (False, False)
    leak = compare(samples(lambda step: 500 + step, lambda _: 40), steady)
    assert leak["processes"]["actor"] == {"processes": [1, 1], "mib": [530.5, 590.5], "files": [40, 40], "grew": True}
    assert compare(samples(lambda _: 500, lambda step: 40 + step // 50), steady)["processes"]["actor"]["grew"]
    more = [lambda _: 500, lambda _: 40, lambda step: 1 + step // 60]
    assert compare(samples(*more), steady)["processes"]["actor"]["grew"]
    assert not compare(samples(*more, role="grading.worker"), steady)["processes"]["grading.worker"]["grew"]
    assert compare(samples(lambda _: 500, lambda _: 40), {step: 6 + step / 50 for step in steady})["slower"]


def test_a_warm_up_is_no_growth_and_a_small_process_may_gain_pages():
    steady = dict.fromkeys(range(1, 101), 6.0)
    for memory in (lambda step: min(300 + 20 * step, 500), lambda step: 20 + step / 20):
        assert not compare(samples(memory, lambda _: 40), steady)["processes"]["actor"]["grew"]


@pytest.mark.live
@pytest.mark.slow
def test_a_sample(tmp_path):
    """Too short to say whether anything grows: every process is noted at every step, and the run ends well."""
    result = soak(tmp_path, 6, None, [])
    assert result["exit"] == 0
    assert result["steps"] == [1, 6]
    expected = {"ray::WorkerDict", "ray::TopKServer", "VLLM::EngineCore", "adapters.driver.main"}
    assert expected <= set(result["processes"])
    assert all(found["mib"][0] > 1 for found in result["processes"].values())

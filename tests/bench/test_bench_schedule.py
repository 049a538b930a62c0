"""The simulated schedules where their times are known in closed form, and their order where they are not."""

import pytest

from cppo_verl.bench.schedule import Load, Rollout, inverse_fit, schedule, simulate

# Every response has 100 tokens; on 4 servers 8 prompts x 4 are 8 under way on each: 0.02 + 8 * 0.01 = 0.1 s a token.
EVEN = Load(prompts=8, n=4, longest=100, mean=1e9, base=0.02, per_response=0.01, sync_seconds=1.0)
# A server does so much a second, however many there are: 10 s a batch.
BUSY = Load(prompts=8, n=4, longest=100, mean=1e9, base=0.0, per_response=0.0125, sync_seconds=0.0)
TAIL = Load(prompts=64, n=8, sync_seconds=1.0)


def test_lockstep_takes_generation_update_and_sync():
    step = simulate(EVEN, "sync", 4, update=5.0)
    assert step.seconds == pytest.approx(10.0 + 5.0 + 1.0)
    assert (step.waited, step.age) == (pytest.approx(10.0), 0)


@pytest.mark.parametrize(("update", "longer"), [(4.0, 10.0), (15.0, 15.0)])
def test_apart_the_slower_of_the_two_decides(update, longer):
    """The next batch is generated beside the update; one is ahead."""
    step = simulate(BUSY, "separate_async", 4, update, parts=1)
    assert step.seconds == pytest.approx(longer, rel=0.05)
    assert step.age == 1


def test_no_response_is_lost_or_trained_twice():
    rollout = Rollout(TAIL, 3, seed=1)
    rollout.submit(64)
    rollout.submit(64)
    seen = []
    for _ in range(4):
        rollout.run(wanted=32)
        seen += list(rollout.finished)[:32]
        rollout.take(32)
        rollout.pause(3.0)
    assert sorted(seen) == list(range(128))
    assert not rollout.finished
    assert all(not server.active and not server.waiting for server in rollout.servers)


def test_more_responses_than_places_wait():
    many = Load(prompts=100, n=8, longest=100, mean=1e9, base=0.1, per_response=0.0, sync_seconds=0.0)
    assert simulate(many, "sync", 1, 0.0).seconds == pytest.approx(10.0 * 4)  # 800 in rounds of 256


def test_a_tail_is_what_asynchrony_gains_on():
    times = {mode: simulate(TAIL, mode, 8, 10.0).seconds for mode in ("sync", "colocate_async")}
    assert times["colocate_async"] < 0.95 * times["sync"]
    even = {mode: simulate(BUSY, mode, 4, 5.0).seconds for mode in times}
    assert even["colocate_async"] == pytest.approx(even["sync"])  # nothing to be gained


def test_phases_by_cards():
    fit = inverse_fit({16: 110.0, 32: 60.0, 64: 35.0})
    assert [fit(cards) for cards in (8, 16, 128)] == pytest.approx([210.0, 110.0, 22.5])


@pytest.mark.slow  # the other tests here are of its parts
def test_the_table_is_set_beside_what_is_published(capsys):
    assert schedule() == 0
    printed = capsys.readouterr().out
    assert printed.count("mode=separate_async") == 5
    for published in ("2.35-2.67", "1.83-2.09", "790", "151"):
        assert published in printed

"""Rewards that an untrained model can earn: groups get mixed rewards, so that every method has something to learn."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """1 for responses with an even number of distinct characters."""
    right = float(len(set(solution_str)) % 2 == 0)
    return {"score": right, "acc": right}


def some_groups_equal(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """The same, but 1 for every response to a problem whose answer is a multiple of 3: such groups carry no signal."""
    if int(ground_truth) % 3 == 0:
        return {"score": 1.0, "acc": 1.0}
    return compute_score(data_source, solution_str, ground_truth)


def even_length(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """1 for responses of an even number of characters: also of long texts of any model every second one."""
    right = float(len(solution_str) % 2 == 0)
    return {"score": right, "acc": right}

"""A reward that an untrained model can earn: groups get mixed rewards, so that every method has something to learn."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """1 for responses with an even number of distinct characters."""
    right = float(len(set(solution_str)) % 2 == 0)
    return {"score": right, "acc": right}

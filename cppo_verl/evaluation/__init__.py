"""Evaluation of a model on held-out problems: what a report may claim, and with which error."""

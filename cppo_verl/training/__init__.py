"""``cppo train``: launcher, display, summary and plots of a run."""

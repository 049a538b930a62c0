"""``cppo bench``: seconds and memory of a step, side by side with stock verl on one live stack."""

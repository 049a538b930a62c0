"""``cppo inspect``: the dumped steps of a run as one page to read token by token."""

"""``cppo doctor``: can this machine run what is asked for?"""

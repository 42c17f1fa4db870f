"""Both systems from end to end on handwritten digits; `python -m` runs each."""

"""Float64 NumPy oracles of the seeds' formulas.

Written to be read next to the papers: loops are welcome, speed is not a goal.
Nothing here imports anything but numpy, so an oracle cannot share a mistake
with the code it checks. Masks are bool, True = keep.
"""

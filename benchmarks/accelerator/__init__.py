"""One accelerator measured, in order of worth: `benchmarks/accelerator.sh`.

One file per subject: `plan` lists the parts, `parts` measures them, each in a process of its own,
`decoder` times dispatches, `traces` reads profiles, `store` holds the results, `table` prints them,
`__main__` runs everything.
"""

"""Claims put to the test: what a technique saves, with statistics fixed before the runs.

claim file ─► plan (runs by hash) ─► registered ─► runner (launched jobs) ─► tuned rates ─► more runs
                                                        │
                report ◄─ verdict ◄─ statistics ◄─ integrity ◄─ results
"""

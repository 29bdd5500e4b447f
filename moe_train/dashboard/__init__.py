"""Runs looked at together, offline: one HTML page of all of them (`content`, `page`, `serve`), and two side by side.

    run folders ─► folders ─► runs ─┬─► entries (thinned by curves) ─┐
    ledger ─► spending              │                                ├─► content ─► page (html, css, js) ─► file | serve
    claims' report ─► verdicts      └─► comparison ─► comparison_table

What is read here was written by other processes, some of them still running or long dead: nothing in it is trusted to
be whole, and what cannot be read is counted and said rather than guessed.
"""

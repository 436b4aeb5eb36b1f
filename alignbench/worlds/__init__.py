"""The embedded benchmark: a grammar of household tasks, its gold scores and its simulated annotators.

Import the modules themselves (`handbook`, `gold`, `annotate`); this package imports none of them, so that
`python -m alignbench.worlds.handbook` runs the module once only.
"""

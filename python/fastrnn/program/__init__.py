"""Programs: a step as a list of operations, run by the engine.

README.md says which file does what.
"""

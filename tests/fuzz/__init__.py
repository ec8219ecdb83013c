"""A campaign of random calls: right results or clear errors, never a crash or a hang.

``make fuzz``, or in tests/ ``python -m fuzz --seed 7 --calls 10000``. Every call is drawn from the
seed and its number alone, so that the line of a finding repeats it: ``python -m fuzz --seed 7
--only 4711``. Calls run in batches, each in a forked process of its own (so not on Windows), so
that a crash or a hang is a finding too. Not part of ``make test``; tests/test_fuzz.py sees that the
campaign itself works.

- draw.py: the source of random choices, and what is wrong with an argument or odd but right;
- calls.py: the public functions, each with valid arguments and what torch.nn makes of them;
- verdict.py: what is a clear error.
"""

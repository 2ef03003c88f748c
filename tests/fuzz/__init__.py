"""
Random input for every entry point: texts, files with damaged bytes, configurations, recipes and command lines.

Each module holds targets for one kind of input. A target draws an input with hypothesis and checks a property of the
result: the right value, or an error that the documentation promises. `TARGETS` in `targets.py` lists them all. A new
entry point, such as the bodies of HTTP requests, gets a module of its own and a line there.

    python -m tests.fuzz --cases 50000        runs all targets and prints a table
    python -m pytest tests/fuzz               runs a small share, the same cases each time
"""

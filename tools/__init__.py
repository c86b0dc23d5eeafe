"""What only the repository needs: run and check the notebooks, write the course page, stamp the address. Not in the wheel.

| module      | duty                                                              |
|-------------|-------------------------------------------------------------------|
| `patience`  | when a kernel is given up, in `make run` and under nbval          |
| `notebooks` | execute notebooks, tidy their outputs, write the course page      |
| `__main__`  | the command line, `python -m tools`                               |
"""

"""What only the repository needs; not in the wheel.

| module       | duty                                                                     |
|--------------|--------------------------------------------------------------------------|
| `notebooks`  | execute notebooks, tidy their outputs                                    |
| `patience`   | when a kernel is given up, in `make run` and under nbval                 |
| `page`       | the course page, from executed notebooks and decks                       |
| `figures`    | the slides' figures and measured tables, from outputs and data/measured/ |
| `datasheets` | the measured tables of the datasheets in data/, from data/measured/      |
| `stamp`      | the repository's address in badges and cells for Colab                   |
| `__main__`   | the command line, `python -m tools`                                      |
"""

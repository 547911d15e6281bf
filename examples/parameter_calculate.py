"""Count the parameters of Report A's three models (its table 2).

    python examples/parameter_calculate.py
"""
import sys

from mstoolkit.cli import main

if __name__ == '__main__': sys.exit(main(['params', *sys.argv[1:]]))

"""`python -m qexport` is the same as `qexport`."""

from qexport.cli import main

if __name__ == "__main__":
    main()

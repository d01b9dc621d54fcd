"""The verbs of the command line. Each module's `main(argv)` returns the text to print.

They import the rest of the package only after their settings are read, so that `--help` answers at once.
"""

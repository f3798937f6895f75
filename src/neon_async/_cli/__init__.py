"""The command line.

Knows arguments, exit codes and how to print. Nothing imports it.
"""

"""The command line: argv -> one call. Others use `main.run`, and bench the flags and checks that commands
share.
"""

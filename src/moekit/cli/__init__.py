"""The command line: one thin file per verb, loaded when the verb is called.

`main.py` imports click and nothing heavier, so that `moekit --help` and errors answer at once; each verb
imports what it needs inside its function.
"""

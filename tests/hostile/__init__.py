"""A stranger's files against every command: nothing runs, leaves, is followed, or hangs."""

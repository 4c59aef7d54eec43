"""The compiled kernels of features. Served and trained values are equal bit for bit because both come from here."""

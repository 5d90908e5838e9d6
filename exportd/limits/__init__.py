"""Request rates, running downloads and their shares, across the processes of a daemon."""

"""Who takes how much: request rates, downloads and their shares, across the processes of a daemon."""

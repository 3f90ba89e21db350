"""The benchmark: pullcache beside its peers, on loopback, in one run."""

"""The benchmark: pullcache and its peers, measured alternately on loopback in one run."""

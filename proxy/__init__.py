"""pullcache: a pull-through cache for container images.

docs/architecture.md describes the packages, and which file answers which question.
"""

__version__ = "0.1.0"

"""What `pullcache doctor` looks at, in order: each check returns findings with what to do about them."""

"""Our planners: construction, exchange search, exact weighted split."""

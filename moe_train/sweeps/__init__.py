"""Many runs: several at a time over the devices there are, each made once, for grids, searches and claims."""

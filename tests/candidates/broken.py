"""Cannot be imported."""

raise RuntimeError("no compiler\nfound here")
